"""guided-diffusion's npz: read as its evaluator reads it."""

import errno
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgbook.paper_scale.generate.export import export_npz
from dgbook.paper_scale.generate.run import run
from dgbook.paper_scale.generate.store import Shard, Store
from dgkit.errors import DataError, DgkitError
from tests.fake_images import Fake, expected, job


def read_as_the_evaluator(path: Path, name: str) -> np.ndarray:
    """As `NpzArrayReader` of openai/guided-diffusion's evaluations/evaluator.py: header, then bytes as they come."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as entry:
        assert np.lib.format.read_magic(entry) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(entry)
        assert not fortran and not dtype.hasobject
        count = int(np.prod(shape)) * dtype.itemsize
        data = entry.read(count)
        assert len(data) == count and entry.read() == b""
    return np.frombuffer(data, dtype).reshape(shape)


@pytest.mark.parametrize(("conditions", "labels"), [([5, 0, 1], [5, 0, 1, 5, 0, 1, 5, 0, 1, 5]), (["a", "b"], None)])
def test_what_the_evaluator_reads(tmp_path: Path, conditions: list[Any], labels: list[int] | None) -> None:
    of = job(conditions=conditions)
    run(of, tmp_path / "run", sampler=Fake)
    path = export_npz(tmp_path / "run", tmp_path / "out.npz")
    assert path == tmp_path / "out.npz" and not list(tmp_path.glob(".*"))
    whole = expected(of)
    made = read_as_the_evaluator(path, "arr_0")
    assert made.dtype == np.uint8 and made.shape == (10, 8, 8, 3) and np.array_equal(made, whole)
    with np.load(path) as loaded:
        assert set(loaded.files) == ({"arr_0"} if labels is None else {"arr_0", "arr_1"})
        assert np.array_equal(loaded["arr_0"], whole)
    # the same as np.savez makes, entry by entry
    reference = tmp_path / "reference.npz"
    np.savez(reference, whole, *([] if labels is None else [np.array(labels)]))
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(reference) as theirs:
        assert ours.namelist() == theirs.namelist()
        for name in theirs.namelist():
            assert ours.read(name) == theirs.read(name)
            assert ours.getinfo(name).compress_type == theirs.getinfo(name).compress_type


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(job(), tmp_path / name, sampler=Fake)
        export_npz(tmp_path / name, tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_not_all_images_are_in_memory(tmp_path: Path) -> None:
    of = job(64, 4)
    store = Store.create(tmp_path / "run", of)
    for block in range(of.blocks):
        store.write(block, Shard({i: np.full((128, 128, 3), i, np.uint8) for i in of.block(block)}, {}))
    tracemalloc.start()
    export_npz(tmp_path / "run", tmp_path / "out.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 128 * 128 * 3 / 4
    assert [image[0, 0, 0] for image in np.load(tmp_path / "out.npz")["arr_0"]] == list(range(64))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run(job(), tmp_path / "run", sampler=Fake)
    (tmp_path / "run" / "shards" / "000002.safetensors").unlink()
    (tmp_path / "out.npz").write_text("from before")
    with pytest.raises(DataError, match="lacks 2 of 10 images"):
        export_npz(tmp_path / "run", tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_text() == "from before" and not list(tmp_path.glob(".*"))


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", job(2, 1))
    for block, size in enumerate((8, 16)):
        store.write(block, Shard({block: np.zeros((size, size, 3), np.uint8)}, {}))
    with pytest.raises(DgkitError, match=r"image 1 is \(16, 16, 3\)"):
        export_npz(tmp_path / "run", tmp_path / "out.npz")
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("path", ["out.npy", "nowhere/out.npz"])
def test_a_path_that_cannot_be(tmp_path: Path, path: str) -> None:
    run(job(), tmp_path / "run", sampler=Fake)
    with pytest.raises(DgkitError, match="give a file .npz in a folder that exists"):
        export_npz(tmp_path / "run", tmp_path / path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job(), tmp_path / "run", sampler=Fake)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DgkitError, match="No space left on device"):
        export_npz(tmp_path / "run", tmp_path / "out.npz")
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))
