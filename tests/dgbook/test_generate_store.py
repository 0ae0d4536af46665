"""The folder of a run: whole files only, damage noticed, one job and one model per folder."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgbook.paper_scale.generate.store import Shard, Store, images, load_images
from dgkit.errors import DataError, DgkitError
from tests.fake_images import expected, job


def filled(folder: Path, blocks: range | None = None) -> Store:
    """A store with the blocks of `job()` that are asked for."""
    store, whole = Store.create(folder, job()), expected(job())
    for block in blocks if blocks is not None else range(store.job.blocks):
        store.write(block, Shard({i: whole[i] for i in store.job.block(block)}, {"device": "fake"}))
    return store


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, whole = filled(tmp_path), expected(job())
    assert files(tmp_path) == ["manifest.json", *(f"shards/00000{i}.safetensors" for i in range(3))]
    assert Store(tmp_path).job == job()
    for block in range(3):
        shard = store.read(block)
        assert shard and shard.provenance == {"device": "fake"}
        assert all(np.array_equal(image, whole[i]) for i, image in shard.images.items())
        assert store.missing(block) == []
    assert store.count() == 10
    assert np.array_equal(load_images(tmp_path), whole)
    indices, each = zip(*images(tmp_path), strict=True)
    assert indices == tuple(range(10)) and np.array_equal(np.stack(each), whole)


def test_images_may_lie_in_memory_in_any_order(tmp_path: Path) -> None:
    """As pipelines give them: views of (C, H, W)."""
    store, whole = Store.create(tmp_path, job(4)), expected(job(4))
    turned = np.ascontiguousarray(whole.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert not turned.flags.c_contiguous
    store.write(0, Shard(dict(enumerate(turned)), {}))
    assert np.array_equal(load_images(tmp_path), whole)


def test_a_shard_may_lack_images(tmp_path: Path) -> None:
    store = filled(tmp_path, range(2))
    store.write(2, Shard({9: expected(job())[9]}, {}))
    assert store.missing(2) == [8] and store.count() == 9
    for read in (load_images, lambda folder: list(images(folder))):
        with pytest.raises(DataError, match="lacks 1 of 10 images"):
            read(tmp_path)
    store.fail(2, {8: "ValueError: poison"})
    assert store.failures() == {8: "ValueError: poison"}
    with pytest.raises(DataError, match=r"lacks 1 of 10 images \(1 failed"):
        load_images(tmp_path)
    store.fail(2, {})
    assert store.failures() == {} and files(tmp_path / "failures") == []


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(tmp_path_factory.mktemp("run"), range(1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_damage_goes_unnoticed(one_shard: Store, data: st.DataObject) -> None:
    """One byte altered anywhere, or the end missing: an error, or the right images."""
    path = one_shard.folder / "shards" / "000000.safetensors"
    content = path.read_bytes()
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(content) - 1))]
    else:
        # half of the draws in the header, which is short
        end = data.draw(st.sampled_from([int.from_bytes(content[:8], "little") + 8, len(content)]))
        damaged[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    whole = expected(job())
    path.write_bytes(damaged)
    try:
        shard = one_shard.read(0)
        assert shard and sorted(shard.images) == [0, 1, 2, 3]
        assert all(np.array_equal(image, whole[i]) for i, image in shard.images.items())
        assert shard.provenance == {"device": "fake"}
    except DataError:
        assert one_shard.missing(0) == [0, 1, 2, 3]
    finally:
        path.write_bytes(content)


def test_a_shard_of_another_block_is_damage(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shutil.copyfile(tmp_path / "shards" / "000000.safetensors", tmp_path / "shards" / "000001.safetensors")
    with pytest.raises(DataError, match="000001.safetensors is damaged"):
        store.read(1)
    with pytest.raises(DataError, match="000001.safetensors is damaged"):
        load_images(tmp_path)


def test_damage_counts_as_missing_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, path = filled(tmp_path), tmp_path / "shards" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.missing(1) == [4, 5, 6, 7]
    assert "000001.safetensors is damaged" in caplog.text and "made again" in caplog.text


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, whole = filled(tmp_path, range(1)), expected(job())
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        for block in (0, 1):  # there already, and new
            with pytest.raises(
                DgkitError, match=f"00000{block}.safetensors cannot be written: No space left on device"
            ):
                store.write(block, Shard({4 * block: whole[4 * block]}, {}))
    assert files(tmp_path) == before and store.missing(0) == []


def test_a_folder_is_for_one_job(tmp_path: Path) -> None:
    filled(tmp_path)
    assert Store.create(tmp_path, job()).count() == 10
    with pytest.raises(DgkitError, match="belongs to another job: count: 12 here, 10 there; seed: 5 here, 0 there"):
        Store.create(tmp_path, job(12, seed=5))


def test_a_folder_is_for_one_model(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.pin({"weights_sha256": {"transformer": "ab"}, "call": {"height": 8}})
    store.pin({"call": {"height": 8.0}, "weights_sha256": {"transformer": "ab"}})
    with pytest.raises(DgkitError, match="holds images of another model: weights_sha256 differ"):
        store.pin({"call": {"height": 8}, "weights_sha256": {"transformer": "cd"}})
    with pytest.raises(DgkitError, match="another model: call, methods differ"):
        store.pin({"weights_sha256": {"transformer": "ab"}, "methods": {}})


def test_no_folder_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the folder of a run"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not the folder of a run"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="is not a JSON object"):
        load_images(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DgkitError, match="cannot be written"):
        Store.create(tmp_path / "file", job())


def test_tidy_removes_what_killed_workers_left(tmp_path: Path) -> None:
    store = filled(tmp_path)
    left = tmp_path / "shards" / ".000001.safetensors.host.123.partial"
    left.write_bytes(b"half")
    assert store.count() == 10 and len(load_images(tmp_path)) == 10
    store.tidy()
    assert not left.exists() and store.count() == 10
