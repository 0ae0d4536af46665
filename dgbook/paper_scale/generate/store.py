"""The folder of a run. All that is in it under a final name is whole (`dgbook.files.replacing`).

manifest.json            the job
model.json               hashes of the weights and what the methods resolved to, by the first worker that knew
shards/000123.safetensors   images and indices of one block, provenance, checksum
failures/000123.json     what of a block could not be made, and why
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dgbook.files import replacing, write_whole
from dgbook.paper_scale.generate.job import Job, canonical
from dgkit.errors import DataError, DgkitError
from dgkit.files import read_json

logger = logging.getLogger(__name__)

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Shard:
    """The images of one block that are there, by index, and how they were made."""

    images: dict[int, Image]
    provenance: dict[str, Any]


class Store:
    """The folder of one job.

    Args:
        folder: it needs a manifest; see `create`.

    Raises:
        DataError: it has none, or one that is no job's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.job = Job.from_dict(read_json(self.folder / "manifest.json", finite=False))
        except DgkitError as error:
            raise DataError(f"{folder} is not the folder of a run: {error}") from error

    @classmethod
    def create(cls, folder: Path, job: Job) -> "Store":
        """The folder of `job`, new or as it was left.

        Raises:
            DgkitError: the folder is another job's, or cannot be written.
        """
        manifest = Path(folder) / "manifest.json"
        if not manifest.exists():
            write_whole(manifest, json.dumps(job.to_dict(), indent=1, ensure_ascii=False))
        store = cls(folder)
        if found := job.differences(store.job):
            raise DgkitError(f"{folder} belongs to another job: {'; '.join(found)}. Give another folder")
        return store

    def pin(self, identity: Mapping[str, Any]) -> None:
        """Keep what the model is (weights, methods), or check that it is what made the images that are there.

        Raises:
            DgkitError: it is another, with the parts that differ, or what was kept is damaged.
        """
        mine = json.loads(json.dumps(dict(identity)))
        path = self.folder / "model.json"
        if not path.exists():
            write_whole(path, json.dumps(mine, indent=1))
        there = read_json(path, finite=False)  # some methods take infinity
        parts = [name for name in sorted({*mine, *there}) if canonical(mine.get(name)) != canonical(there.get(name))]
        if parts:
            raise DgkitError(
                f"{self.folder} holds images of another model: {', '.join(parts)} differ. Give another folder"
            )

    # ---- one block

    def write(self, block: int, shard: Shard) -> None:
        """Keep the images of a block in place of those that are there.

        Raises:
            DgkitError: it cannot be written; the shard is as it was.
        """
        indices = sorted(shard.images)
        arrays: dict[str, NDArray[Any]] = {
            # safetensors writes the memory as it lies, and pipelines give views of (C, H, W)
            "images": np.ascontiguousarray(np.stack([shard.images[i] for i in indices])),
            "indices": np.array(indices, np.int64),
        }
        provenance = json.dumps(shard.provenance)
        with replacing(self._shard(block)) as partial:
            save_file(arrays, partial, {"provenance": provenance, "sha256": _checksum(arrays, provenance)})

    def read(self, block: int) -> Shard | None:
        """The images of a block; None if there are none.

        Raises:
            DataError: the file is damaged: cut short, altered, or of other indices.
        """
        path = self._shard(block)
        try:
            with safe_open(path, framework="numpy") as file:
                arrays, metadata = {name: file.get_tensor(name) for name in ("images", "indices")}, file.metadata()
            images, indices = arrays["images"], arrays["indices"].tolist()
            whole = metadata["sha256"] == _checksum(arrays, metadata["provenance"])
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not whole or not set(indices) <= set(self.job.block(block)):
            raise DataError(f"{path} is damaged: its checksum does not fit")
        return Shard(dict(zip(indices, images, strict=True)), json.loads(metadata["provenance"]))

    def intact(self, block: int) -> Shard | None:
        """As `read`, but a damaged shard counts as none, with a warning."""
        try:
            return self.read(block)
        except DataError as error:
            logger.warning("%s: its images are made again", error)
            return None

    def missing(self, block: int) -> list[int]:
        """The indices of a block that have no intact image."""
        shard = self.intact(block)
        return [i for i in self.job.block(block) if shard is None or i not in shard.images]

    def fail(self, block: int, reasons: Mapping[int, str]) -> None:
        """Keep why images of a block could not be made, in place of what was kept before; nothing if none failed."""
        path = self.folder / "failures" / f"{block:06d}.json"
        if reasons:
            write_whole(path, json.dumps({str(i): reason for i, reason in sorted(reasons.items())}, indent=1))
        else:
            path.unlink(missing_ok=True)

    # ---- the whole

    def failures(self) -> dict[int, str]:
        """Why images could not be made, by index.

        Raises:
            DataError: what was kept of that is damaged.
        """
        found: dict[int, str] = {}
        for path in sorted((self.folder / "failures").glob("[0-9]*.json")):
            try:
                found |= {int(index): str(reason) for index, reason in read_json(path).items()}
            except ValueError as error:
                if path.exists():  # else another worker has just made them
                    raise DataError(f"{path} is damaged, remove it: {error}") from error
        return found

    def count(self) -> int:
        """How many images there are, by the headers of the shards alone: damage within them is not noticed."""
        total = 0
        for path in (self.folder / "shards").glob("[0-9]*.safetensors"):
            try:
                with safe_open(path, framework="numpy") as shard:
                    total += shard.get_slice("indices").get_shape()[0]
            except (SafetensorError, OSError):
                continue
        return total

    def provenance(self) -> Iterator[dict[str, Any]]:
        """How each shard that is there was made, by the headers alone.

        Raises:
            DataError: one is damaged.
        """
        for path in sorted((self.folder / "shards").glob("[0-9]*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as shard:
                    found = json.loads(shard.metadata()["provenance"])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged: {error}") from error
            yield found

    def shards(self) -> Iterator[Shard]:
        """All blocks in their order.

        Raises:
            DataError: images are missing, with how many; or a shard is damaged.
        """
        there = self.count()
        if there != self.job.count:
            failed = len(self.failures())
            why = f" ({failed} failed, see its folder failures)" if failed else ""
            raise DataError(
                f"{self.folder} lacks {self.job.count - there} of {self.job.count} images{why}: generate them first"
            )
        for block in range(self.job.blocks):
            shard = self.read(block)
            if shard is None or len(shard.images) != len(self.job.block(block)):
                raise DataError(f"{self.folder} lacks images of block {block}: generate them first")
            yield shard

    def tidy(self) -> None:
        """Remove what killed workers were writing; only when nothing is left to make."""
        for path in self.folder.rglob(".*.partial"):
            path.unlink(missing_ok=True)

    def _shard(self, block: int) -> Path:
        return self.folder / "shards" / f"{block:06d}.safetensors"


def images(folder: Path) -> Iterator[tuple[int, Image]]:
    """(index, image (H, W, 3)) of a finished run in the order of the indices, with one block at a time in memory.

    Raises:
        DataError: images are missing, with how many; or a shard is damaged.
    """
    for shard in Store(folder).shards():
        yield from sorted(shard.images.items())


def load_images(folder: Path) -> Image:
    """All images (N, H, W, 3) of a finished run in the order of the indices.

    Raises:
        DataError: images are missing, with how many; or a shard is damaged.
    """
    count = Store(folder).job.count
    whole: Image | None = None
    for index, image in images(folder):
        if whole is None:
            whole = np.empty((count, *image.shape), np.uint8)
        whole[index] = image
    assert whole is not None, "a job has at least one image"
    return whole


def _checksum(arrays: Mapping[str, NDArray[Any]], provenance: str) -> str:
    digest = hashlib.sha256(provenance.encode())
    for name in ("indices", "images"):
        array = arrays[name]
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
