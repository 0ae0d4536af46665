"""The public data that the embedded models are trained on."""

import gzip
import hashlib
import os
import shutil
import urllib.request
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgbook.readers import read_npz
from dgkit.errors import DataError, first_line

FASHION_MNIST = "Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), MIT licence"

DUNGEON_TILES = "tiles of Dungeon Crawl Stone Soup (github.com/crawl/tiles at a6ea165), CC0"

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# SHA-256 of the pixels and labels themselves (the packed files differ between distributors)
FASHION_MNIST_SHA256 = {
    "train-images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train-labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "t10k-images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "t10k-labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}

DUNGEON_TILES_ARCHIVE = "https://github.com/crawl/tiles/archive/a6ea165.zip"
DUNGEON_TILES_FILE = "dcss_tiles_32.npz"
DUNGEON_TILES_SHA256 = "46a9401bcf8ea8abc36184612eb03d3b57ef1e4dff20b24164b90d7cd0cc2959"
"""SHA-256 of the decoded pixels, then of the paths joined by newlines."""


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in uint8 and labels (N,) in int64 of Fashion-MNIST (Xiao et al. 2017, MIT licence).

    Looked for in `$DGKIT_DATA_DIR/fashion-mnist`, then where the Debian package `dataset-fashion-mnist` puts it;
    otherwise downloaded by torchvision into `~/.cache/dgkit`.

    Raises:
        DataError: `split` is not "train" or "test", or the pixels or labels are not the published ones.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise DataError(f'split={split!r} is not allowed: use "train" or "test"')
    folders = [DEBIAN_FASHION_MNIST]
    if "DGKIT_DATA_DIR" in os.environ:
        folders.insert(0, Path(os.environ["DGKIT_DATA_DIR"]) / "fashion-mnist")
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is not None:
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16, (-1, 1, 28, 28))
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8, (-1,))
    else:
        from torchvision.datasets import FashionMNIST

        dataset = FashionMNIST(str(Path.home() / ".cache" / "dgkit"), train=split == "train", download=True)
        images, labels = dataset.data[:, None].numpy(), dataset.targets.numpy().astype(np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        expected = FASHION_MNIST_SHA256[f"{prefix}-{name}"]
        found = hashlib.sha256(array.tobytes()).hexdigest()
        if found != expected:
            raise DataError(f"Fashion-MNIST {split} {name} have SHA-256 {found}, the published ones {expected}")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def dungeon_tiles() -> tuple[Tensor, list[str]]:
    """Images (4007, 4, 32, 32), RGBA in uint8, and paths of the dungeon tiles, e.g. "Nov-2015/mon/unique/sonja.png".

    Looked for in `$DGKIT_DATA_DIR` and `~/.cache/dgkit`, as `dcss_tiles_32.npz`; otherwise made from the public archive
    (see `tiles_in_archive`) and kept in the latter.

    Raises:
        DataError: the tiles are neither there nor to be downloaded, or not those that the models were trained on.
    """
    cache = Path.home() / ".cache" / "dgkit" / DUNGEON_TILES_FILE
    files = [cache]
    if "DGKIT_DATA_DIR" in os.environ:
        files.insert(0, Path(os.environ["DGKIT_DATA_DIR"]) / DUNGEON_TILES_FILE)
    file = next((f for f in files if f.is_file()), None)
    if file is not None:
        content = read_npz(file, ("images", "paths"))
        if len(content) < 2:
            raise DataError(f"{file} is not a file of images and paths")
        images, paths = content["images"], [str(path) for path in content["paths"].ravel()]
        _check_dungeon_tiles(images, paths, str(file))
    else:
        with TemporaryFile() as archive:
            try:
                with urllib.request.urlopen(DUNGEON_TILES_ARCHIVE) as response:
                    shutil.copyfileobj(response, archive)
                images, paths = tiles_in_archive(archive)
            except (OSError, EOFError, zipfile.BadZipFile) as error:  # no network, a broken download
                raise DataError(
                    f"{DUNGEON_TILES_FILE} is in none of {', '.join(str(f.parent) for f in files)}, and "
                    f"{DUNGEON_TILES_ARCHIVE} could not be read ({error}): connect to the network, or set "
                    "DGKIT_DATA_DIR to the folder that holds the file"
                ) from error
        _check_dungeon_tiles(images, paths, DUNGEON_TILES_ARCHIVE)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez_compressed(partial, images=images, paths=np.array(paths))
        os.replace(partial, cache)
    return torch.from_numpy(images).movedim(-1, 1), paths


def tiles_in_archive(archive: IO[bytes]) -> tuple[np.ndarray, list[str]]:
    """RGBA images (N, 32, 32, 4) in uint8 and paths of the tiles in a zip file of the repository crawl/tiles.

    Kept are the PNG files of the releases Nov-2015 and Ancient, in this order and then by path, that measure 32 x 32,
    are not transparent in at least 15 % of their pixels and are of another kind than UNUSED, gui and misc/numbers; of
    tiles with equal pixels the first.
    """
    seen: dict[bytes, str] = {}
    with zipfile.ZipFile(archive) as content:
        members = {name.partition("/releases/")[2]: name for name in content.namelist() if name.endswith(".png")}
        for release in ("Nov-2015/", "Ancient/"):
            for path in sorted(path for path in members if path.startswith(release)):
                if any(kind in f"/{path}" for kind in ("/UNUSED/", "/gui/", "/misc/numbers/")):
                    continue
                with content.open(members[path]) as file, Image.open(file) as image:
                    tile = np.asarray(image.convert("RGBA"))
                if tile.shape == (32, 32, 4) and (tile[..., 3] > 0).mean() >= 0.15:
                    seen.setdefault(tile.tobytes(), path)
    return np.frombuffer(b"".join(seen), np.uint8).reshape(-1, 32, 32, 4).copy(), list(seen.values())


def _check_dungeon_tiles(images: np.ndarray, paths: list[str], source: str) -> None:
    found = hashlib.sha256(images.tobytes() + "\n".join(paths).encode()).hexdigest()
    if found != DUNGEON_TILES_SHA256:
        raise DataError(
            f"the dungeon tiles of {source} have SHA-256 {found}, the published ones {DUNGEON_TILES_SHA256}"
        )


def as_samples(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) in the layout of generated samples, (N, H, W, 3)."""
    return images.movedim(1, -1).expand(-1, -1, -1, 3)


def _read_idx(path: Path, header: int, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a gzipped IDX file after its `header` bytes."""
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder has to hold the four files of Fashion-MNIST")
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).reshape(shape).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is not a whole file of Fashion-MNIST: {first_line(error)}") from error
