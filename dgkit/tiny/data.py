"""The public data that the embedded models are trained on."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgkit.errors import DataError

FASHION_MNIST = "Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), MIT licence"

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
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", header=8)
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


def as_samples(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) in the layout of generated samples, (N, H, W, 3)."""
    return images.movedim(1, -1).expand(-1, -1, -1, 3)


def _read_idx(path: Path, header: int) -> np.ndarray:
    """The values of a gzipped IDX file after its `header` bytes."""
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder has to hold the four files of Fashion-MNIST")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()
