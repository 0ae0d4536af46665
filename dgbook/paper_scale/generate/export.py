"""A finished run in the format of guided-diffusion's evaluator."""

import zipfile
from pathlib import Path

import numpy as np

from dgbook.files import replacing
from dgbook.paper_scale.generate.store import Store
from dgkit import checks
from dgkit.errors import DgkitError


def export_npz(folder: Path, path: Path) -> Path:
    """Write the images of a finished run as guided-diffusion's evaluator reads them, and return `path`.

    `arr_0` are the images, uint8 (N, H, W, 3), in the order of the indices; `arr_1` the class ids, int64 (N,), if the
    conditions are classes. One block at a time is in memory; the bytes depend on the images and classes alone.

    Args:
        folder: of the run.
        path: `.npz`; replaced if it is there.

    Raises:
        DataError: images are missing, or a shard is damaged.
        DgkitError: `path` is not an `.npz`, its folder is not there, it cannot be written, or the images differ in
            size.
    """
    path, store = Path(path), Store(folder)
    job = store.job
    if path.suffix != ".npz" or not path.parent.is_dir():
        checks.refuse("path", str(path), "give a file .npz in a folder that exists")
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _write_images(store, archive)
        if isinstance(job.conditions[0], int):
            labels = np.array([job.condition(i) for i in range(job.count)], np.int64)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
                np.lib.format.write_array(entry, labels)
    return path


def _write_images(store: Store, archive: zipfile.ZipFile) -> None:
    size: tuple[int, ...] = ()
    # a ZipInfo of its own has no time of day in it
    with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
        for shard in store.shards():
            for index in sorted(shard.images):
                image = shard.images[index]
                if not size:
                    size = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (store.job.count, *size)}
                    np.lib.format.write_array_header_1_0(entry, header)
                if image.shape != size:
                    raise DgkitError(f"image {index} is {image.shape}, the first {size}: an npz holds one size")
                entry.write(image.tobytes())
