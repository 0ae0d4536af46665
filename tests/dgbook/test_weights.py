"""Weights: found, downloaded, hashed before they are opened, read only as tensors; and the table of metrics."""

import hashlib
import importlib
import importlib.util
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dgbook.downloads import NotHere, Published, fetch, local
from dgbook.files import replacing
from dgbook.measures.base import MetricId
from dgbook.paper_scale.scores import METRICS, available, scorer
from dgbook.paper_scale.scores.weights import WEIGHTS, MetricUnavailable, label, package, tensors, weights
from dgkit.errors import DataError, DgkitError
from tests.hub_layout import isolate, pickled, put
from tests.local_server import Server, serving

HUB = Published(("model.safetensors", "pytorch_model.bin"), "MIT", 0.1, None, hub="owner/net", revision="a" * 40,
                companions=("config.json", "vocab.txt"))  # fmt: skip
NOWHERE = "http://127.0.0.1:9/net.pth"  # nobody answers there
FILE = Published(("net.pth",), "MIT", 0.1, None, url=NOWHERE)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    isolate(monkeypatch, tmp_path)
    return tmp_path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_hashed_every_time(home: Path, server: Server) -> None:
    item = replace(FILE, url=server.put("net.pth", b"weights"), sha256=sha256(b"weights"))
    assert local(item) is None
    found = fetch(item)
    assert found.path == home / ".cache" / "dgkit" / "net.pth" == local(item)
    assert found.sha256 == item.sha256 and found.published
    assert fetch(item) == found and server.asked == ["/net.pth"]
    found.path.write_bytes(b"Weights")
    with pytest.raises(DataError, match=f"{sha256(b'Weights')}, not {item.sha256}"):
        fetch(item)


def test_a_download_that_is_not_the_published_file_is_not_kept(home: Path, server: Server) -> None:
    with pytest.raises(DataError, match="SHA-256"):
        fetch(replace(FILE, url=server.put("net.pth", b"other"), sha256=sha256(b"weights")))
    assert list((home / ".cache" / "dgkit").iterdir()) == []


def test_the_data_folder_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGKIT_DATA_DIR", str(home / "data"))
    (home / "data").mkdir()
    (home / "data" / "net.pth").write_bytes(b"weights")
    assert fetch(FILE).path == home / "data" / "net.pth"


def test_without_a_published_hash_the_first_one_counts(home: Path, server: Server) -> None:
    item = replace(FILE, url=server.put("net.pth", b"weights"))
    found = fetch(item)
    assert not found.published and label("net", found) == f"net@{sha256(b'weights')[:12]}(first-use)"
    assert label("net", replace(found, published=True)) == f"net@{sha256(b'weights')[:12]}"
    found.path.write_bytes(b"Weights")
    with pytest.raises(DataError, match="first use"):
        fetch(item)


@pytest.mark.parametrize("item", [replace(FILE, url=NOWHERE), HUB])
def test_a_missing_file_says_how_to_get_it(home: Path, item: Published) -> None:
    with pytest.raises(NotHere, match="net.pth|model.safetensors") as raised:
        fetch(item)
    assert item.command in str(raised.value) and "0.1 GB, MIT" in str(raised.value)


def test_commands_name_everything_that_is_needed() -> None:
    assert HUB.command == f"hf download owner/net model.safetensors config.json vocab.txt --revision {'a' * 40}"
    assert "--repo-type dataset" in replace(HUB, dataset=True).command
    assert FILE.url in FILE.command and "~/.cache/dgkit/net.pth" in FILE.command


def test_a_hub_file_is_found_in_the_hubs_own_cache(home: Path) -> None:
    put(HUB, {"model.safetensors": b"weights", "config.json": b"{}", "vocab.txt": b""}, home)
    found = fetch(replace(HUB, sha256=sha256(b"weights")))
    assert found.path.read_bytes() == b"weights" and (found.path.parent / "config.json").is_file()
    with pytest.raises(NotHere):  # of another commit
        fetch(replace(HUB, revision="b" * 40))


def test_the_second_name_is_taken_where_the_first_does_not_exist(home: Path) -> None:
    put(HUB, {"pytorch_model.bin": b"pickle", "config.json": b"{}", "vocab.txt": b""}, home)
    assert fetch(HUB).path.name == "pytorch_model.bin"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# Tensors --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    half = torch.randn(3, 4).half()
    return {"a": half, "shared": half, "transposed": torch.randn(2, 5).T, "count": torch.tensor(7)}


def installed(monkeypatch: pytest.MonkeyPatch, home: Path, content: bytes) -> None:
    folder = home / ".cache" / "dgkit"
    folder.mkdir(parents=True)
    (folder / "net.pth").write_bytes(content)
    monkeypatch.setitem(WEIGHTS, "net", replace(FILE, sha256=sha256(content)))


@pytest.mark.parametrize("key", ["", "state_dict"])
def test_a_pickle_is_converted_once(
    key: str, home: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]
) -> None:
    installed(monkeypatch, home, pickled({key: state, "epoch": 3} if key else state))
    found = weights("net")
    for _ in range(2):
        read = tensors(found, key)
        assert set(read) == set(state) and all(torch.equal(read[name], state[name]) for name in state)
        assert read["a"].dtype == torch.float16
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened again"))
    assert (home / ".cache" / "dgkit" / "weights" / f"{found.sha256}.safetensors").is_file()


def test_safetensors_are_read_as_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]
) -> None:
    content = save({"a": state["a"]})
    put(HUB, {"model.safetensors": content, "config.json": b"{}", "vocab.txt": b""}, home)
    assert torch.equal(tensors(fetch(HUB))["a"], state["a"])
    put(HUB, {"model.safetensors": content[:-1]}, home)
    with pytest.raises(DataError, match="first use"):
        fetch(HUB)
    with pytest.raises(DataError, match="not a whole safetensors"):
        tensors(replace(fetch(replace(HUB, sha256=sha256(content[:-1])))))


def test_a_pickle_with_another_hash_is_never_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, home, pickled({}))
    monkeypatch.setitem(WEIGHTS, "net", replace(WEIGHTS["net"], sha256="0" * 64))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DataError, match="SHA-256"):
        tensors(weights("net"))


class Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Attack(), protocol=2),
        pickled({"a": Attack()}),
        pickled({"a": [1, 2]}),
        pickled([torch.ones(2)]),
        b"no pickle",
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    content: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    installed(monkeypatch, home, content)
    with pytest.raises(DataError):
        tensors(weights("net"))
    assert not (home / "attacked").exists() and not list(home.rglob("*.safetensors"))


# The tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_pinned(name: str) -> None:
    item = WEIGHTS[name]
    assert item.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", item.sha256)
    assert bool(item.hub) != bool(item.url) and item.licence and item.gigabytes > 0
    if item.hub:
        assert re.fullmatch(r"[0-9a-f]{40}", item.revision)
    elif item.sha256:  # a release or a commit, never a branch
        assert re.search(r"/releases/download/v|/[0-9a-f]{40}/", item.url)


@pytest.mark.parametrize("name", METRICS)
def test_rows_of_metrics_are_complete(name: str) -> None:
    row = METRICS[name]
    module, _, attribute = row.builder.partition(":")
    assert callable(getattr(importlib.import_module(module, "dgbook.paper_scale.scores"), attribute))
    assert set(row.weights) <= set(WEIGHTS)
    if not row.weights:
        assert available(name) is None and scorer(name).id.name == name


@pytest.mark.parametrize("name", [name for name, row in METRICS.items() if row.weights])
def test_a_metric_without_weights_says_what_to_do(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for item in METRICS[name].weights:
        if WEIGHTS[item].url:
            monkeypatch.setitem(WEIGHTS, item, replace(WEIGHTS[item], url=NOWHERE))
    command = [WEIGHTS[item].command for item in METRICS[name].weights]
    reason = available(name)
    assert reason is not None and any(line in reason for line in command)
    with pytest.raises(MetricUnavailable) as raised:
        scorer(name)
    assert any(line in str(raised.value) for line in command)


def test_available_weights(home: Path) -> None:
    item = WEIGHTS["hpsv2.1"]
    put(item, {item.files[0]: b"weights"}, home)
    assert available("hpsv2.1") is None
    with pytest.raises(DataError, match="SHA-256"):  # what lies there is not HPSv2.1
        scorer("hpsv2.1")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name))
    reason = available("hpsv2.1")
    assert reason is not None and "open_clip_torch is not installed" in reason and "dgkit[scores]" in reason
    with pytest.raises(MetricUnavailable, match="no-such is not installed"):
        package("no_such_package", "no-such")


@pytest.mark.parametrize("call", [available, scorer])
def test_an_unknown_metric_is_refused(call) -> None:
    with pytest.raises(DgkitError, match="clipscore"):
        call("clip-score")


def test_the_id_tells_any_two_computations_apart() -> None:
    base = MetricId("m", "w@1", "p", True, "float32", "100*cos")
    others = [
        replace(base, **change)
        for change in (
            {"name": "n"},
            {"weights": "w@2"},
            {"preprocessing": "q"},
            {"antialias": False},
            {"antialias": None},
            {"dtype": "float64"},
            {"scale": "cos"},
        )  # fmt: skip
    ]
    assert str(base) == "m|w@1|p|antialias|float32|100*cos"
    assert len({str(identity) for identity in (base, *others)}) == 8
