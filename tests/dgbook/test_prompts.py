"""Prompt sets, with stand-ins for the files that are not shipped."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgbook.paper_scale import prompts
from dgbook.paper_scale.prompts import Prompt, fingerprint, load
from dgkit.errors import DataError, DgkitError
from dgkit.paths import DATA
from tests.hub_layout import folder_of, isolate, put


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    isolate(monkeypatch, tmp_path)
    return tmp_path


def test_imagenet_is_balanced() -> None:
    images = load("imagenet")
    assert [prompt.index for prompt in images] == list(range(50_000))
    assert Counter(prompt.condition for prompt in images) == {label: 50 for label in range(1000)}
    assert Counter(prompt.condition for prompt in images[:3000]) == {label: 3 for label in range(1000)}
    assert images[1207] == Prompt(1207, "class 207", "", 207)


@pytest.mark.parametrize(("name", "count"), [("offline", 24), ("dungeon-tiles", 1000)])
def test_shipped_sets(name: str, count: int) -> None:
    lines = (DATA / "prompts" / f"{name}.txt").read_text().split("\n")[:-1]
    assert [(p.index, p.text, p.condition) for p in load(name)] == [(i, x, x) for i, x in enumerate(lines)]
    assert len(lines) == count and all(lines)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(DgkitError, match="pickapic, hpsv2.1, imagenet, offline, dungeon-tiles"):
        load("coco")


def test_the_fingerprint_is_of_texts_and_categories_in_order() -> None:
    a, b = Prompt(0, "a cat", "photo"), Prompt(1, "a dög", "anime")
    expected = '[["a cat", "photo"], ["a dög", "anime"]]'
    assert fingerprint([a, b]) == hashlib.sha256(expected.encode()).hexdigest()
    assert len({fingerprint(x) for x in ([a, b], [b, a], [a], [a, replace(b, category="photo")])}) == 4


# HPSv2 ----------------------------------------------------------------------------------------------------------------


def hps(home: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any]) -> None:
    for style, texts in content.items():
        raw = texts if isinstance(texts, bytes) else json.dumps(texts).encode()
        item = replace(prompts.HPS_FILES[style], sha256=hashlib.sha256(raw).hexdigest())
        monkeypatch.setitem(prompts.HPS_FILES, style, item)
        put(item, {item.files[0]: raw}, home)


def standing_in() -> dict[str, Any]:
    return {style: [f"{style} {i % 790}" for i in range(800)] for style in prompts.HPS_STYLES}  # some come twice


def test_hps_prompts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hps(home, monkeypatch, standing_in())
    loaded = load("hpsv2.1")
    assert [p.index for p in loaded] == list(range(3200))
    assert Counter(p.category for p in loaded) == dict.fromkeys(["anime", "concept-art", "paintings", "photo"], 800)
    assert loaded[805] == Prompt(805, "concept-art 5", "concept-art") and loaded[3199].text == "photo 9"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"] * 799, "has 799 prompts, 800"),
        (["a"] * 799 + [""], "prompt 2399 is empty"),
        (["a"] * 799 + [1], "not a list of prompts"),
        ({"a": "b"}, "is not a JSON list"),
        ([], "not a list of prompts"),
        (b"[", "not JSON"),
    ],
)
def test_other_hps_files_are_refused(texts: Any, message: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hps(home, monkeypatch, standing_in() | {"paintings": texts})
    with pytest.raises(DataError, match=message):
        load("hpsv2.1")


def test_altered_hps_prompts_are_refused(home: Path) -> None:
    item = prompts.HPS_FILES["anime"]
    put(item, {item.files[0]: json.dumps(["a"] * 800).encode()}, home)
    with pytest.raises(DataError, match="6b38a479"):  # the published hash
        load("hpsv2.1")


@pytest.mark.parametrize("name", ["hpsv2.1", "pickapic"])
def test_a_missing_set_says_how_to_get_it(name: str, home: Path) -> None:
    with pytest.raises(DataError, match="hf download (zhwang/HPDv2|yuvalkirstain/pickapic_v1_no_images)"):
        load(name)


# Pick-a-Pic -----------------------------------------------------------------------------------------------------------


def captions(home: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """A snapshot whose two files hold the texts; the reading of parquet has a test of its own."""
    item = replace(prompts.HPS_FILES["anime"], hub=prompts.PICKAPIC, revision="c" * 40)
    names = [f"data/test_unique-0000{i}-of-00002-ab.parquet" for i in (0, 1)]
    put(item, {name: b"" for name in names}, home)
    halves = {Path(names[0]).name: texts[:200], Path(names[1]).name: texts[200:]}
    monkeypatch.setattr(prompts, "_captions", lambda path: halves[path.name])


def test_pickapic(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions(home, monkeypatch, [f"caption {i}" for i in range(500)])
    loaded = load("pickapic")
    assert loaded == [Prompt(i, f"caption {i}") for i in range(500)]
    assert load("pickapic") == loaded
    captions(home, monkeypatch, [f"Caption {i}" for i in range(500)])
    with pytest.raises(DataError, match=f"{fingerprint(loaded)} as at its first use"):
        load("pickapic")


def test_a_pickapic_of_another_size_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions(home, monkeypatch, ["caption"] * 501)
    with pytest.raises(DataError, match="has 501 prompts, 500"):
        load("pickapic")


def test_a_snapshot_without_the_split_is_refused(home: Path) -> None:
    folder_of(replace(prompts.HPS_FILES["anime"], hub=prompts.PICKAPIC, revision="c" * 40), home)
    with pytest.raises(DataError, match="no file .*test_unique|hf download"):
        load("pickapic")


def test_parquet_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    path = tmp_path / "test_unique.parquet"
    pd.DataFrame({"caption": ["a cat", "ein Hünd"], "label": [1, 2]}).to_parquet(path)
    assert prompts._captions(path) == ["a cat", "ein Hünd"]
    pd.DataFrame({"text": ["a cat"]}).to_parquet(path)
    with pytest.raises(DataError, match="no column caption"):
        prompts._captions(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="caption"):
        prompts._captions(path)


def test_missing_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(DataError, match="pyarrow"):
        prompts._captions(tmp_path / "x.parquet")
