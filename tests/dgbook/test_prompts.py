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
    with pytest.raises(DgkitError, match="pickapic, hpsv2.1, parti, imagenet, offline, dungeon-tiles"):
        load("coco")


def test_the_fingerprint_is_of_texts_and_categories_in_order() -> None:
    a, b = Prompt(0, "a cat", "photo"), Prompt(1, "a dög", "anime")
    expected = '[["a cat", "photo"], ["a dög", "anime"]]'
    assert fingerprint([a, b]) == hashlib.sha256(expected.encode()).hexdigest()
    assert len({fingerprint(x) for x in ([a, b], [b, a], [a], [a, replace(b, category="photo")])}) == 4


# PartiPrompts ---------------------------------------------------------------------------------------------------------


def parti(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (home / "PartiPrompts.tsv").write_text(text, encoding="utf-8")
    monkeypatch.setenv("DGKIT_DATA_DIR", str(home))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(prompts, "PARTI_FILE", replace(prompts.PARTI_FILE, sha256=sha256))


ROWS = ['"OOPS" in\tArts\tBasic\t', "half a \" quote'\tArts\tBasic\ta note", " a café \tFood & Beverage\tBasic\t"]
HEADER = "Prompt\tCategory\tChallenge\tNote\n"


def test_parti_prompts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"prompt {i}\tAnimals\tBasic\t" for i in range(1629)] + ROWS
    parti(home, monkeypatch, HEADER + "\n".join(rows) + "\n")
    loaded = load("parti")
    assert len(loaded) == 1632 and loaded[7] == Prompt(7, "prompt 7", "Animals")
    assert [p.text for p in loaded[1629:]] == ['"OOPS" in', "half a \" quote'", " a café "]
    assert [p.category for p in loaded[1629:]] == ["Arts", "Arts", "Food & Beverage"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "\n".join(ROWS), "has 3 prompts, 1632"),
        ("Text\tCategory\n" + "\n".join(ROWS), "columns Prompt and Category"),
        (HEADER + "\n".join(["no category"] * 1632), "columns Prompt and Category"),
        (HEADER + "\n".join([*ROWS, *[" \tArts\tBasic\t"] * 1629]), "prompt 3 is empty"),
    ],
)
def test_other_tables_are_refused(text: str, message: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parti(home, monkeypatch, text)
    with pytest.raises(DataError, match=message):
        load("parti")


def test_altered_parti_prompts_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGKIT_DATA_DIR", str(home))
    (home / "PartiPrompts.tsv").write_text(HEADER + "\n".join(ROWS))
    with pytest.raises(DataError, match="fab29e41"):  # the published hash
        load("parti")


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
        ({"a": "b"}, "not a list of prompts"),
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
