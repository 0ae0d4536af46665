"""The words for each part of the claims: what the tests decide, what they leave open, and how a chapter ends."""

import re
from typing import Any

import numpy as np
import pytest

from dgbook.claims import derived, paper, results, verdicts
from dgbook.claims.names import LABELS
from dgbook.claims.results import Record, Result
from dgbook.claims.verdicts import compare
from dgbook.measures.stats import Interval
from dgbook.notebooks import NOTEBOOKS
from dgkit.errors import DgkitError


def tables(values: dict[str, Any]) -> dict[str, Any]:
    """Nested tables from values by their paths."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *keys, last = path.split(".")
        table = found
        for key in keys:
            table = table.setdefault(key, {})
        table[last] = value
    return found


HOLDS: dict[str, dict[str, Any]] = {
    "01_layer_properties": {
        "blocks": 8,
        "blocks_with_massive": 8,
        "fixed": {"share": 0.8, "channels": [7, 8]},
        "largest.token_share": 0.95,
        "largest.ratio": 12.1,
    },
    "02_timestep_vs_text": {
        "share.timestep": Interval(0.8, 0.7, 0.9),
        "share.condition": Interval(0.05, 0.02, 0.08),
    },
    "05_ablations": {
        "blocks": 3,
        "sweeps.block.last_ratio": 1.02,
        "sweeps.block.sharpness_ratio": np.array([[0, 1.2, 1, 2], [1, 1.5, 1.1, 2], [2, 1.0234567891, 1, 2]]),
        "sweeps.w.agreement_change": np.array([[0, 0, 0, 0], [0.5, 0.1, -0.04, 0.2], [1, -0.02, -0.04, 0.01]]),
        "methods.cfg.frechet": 3.5,
        "methods.cfg.frechet_change": Interval(0, 0, 0),
        "methods.none.frechet_change": Interval(-9, -9, -9),
        "methods.apg.frechet_change": Interval(-0.5, -0.55, -0.2),
        "methods.cfg+dg.frechet_change": Interval(-1, -1.4, -0.6),
    },
    "06_imagenet": {
        "contrast.uncond+dg - uncond.frechet": Interval(-2, -3, -1),
        "contrast.cond+dg - cond.frechet": Interval(-2, -3, -1),
        "settings.uncond.is": Interval(4, 3, 5),
        "settings.uncond+dg.is": Interval(6, 5.1, 7),
        "settings.cond.is": Interval(6, 5, 7),
        "settings.cond+dg.is": Interval(8, 7.1, 9),
        "settings.uncond.precision": Interval(0.5, 0.4, 0.6),
        "settings.uncond+dg.precision": Interval(0.7, 0.61, 0.8),
        "settings.cond.precision": Interval(0.6, 0.5, 0.7),
        "settings.cond+dg.precision": Interval(0.8, 0.71, 0.9),
    },
}
BLOCKS, OVER_W = "sweeps.block.sharpness_ratio", "sweeps.w.agreement_change"
ONE_PART_OFF: list[tuple[str, str, Any, str]] = [
    ("01_layer_properties", "blocks_with_massive", 7, "does not hold"),
    ("01_layer_properties", "fixed", {"share": 0.7, "channels": [7, 8]}, "does not hold"),
    ("01_layer_properties", "largest.token_share", 0.8, "does not hold"),
    ("02_timestep_vs_text", "share.timestep", Interval(0.3, 0.07, 0.9), "undecided"),
    ("02_timestep_vs_text", "share.condition", Interval(0.05, 0.02, 0.11), "undecided"),
    # sharpest at the first block, or nothing beyond chance; the last changes as much as another, or the other way
    ("05_ablations", BLOCKS, np.array([[0, 1.2, 1, 2], [1, 1.1, 1, 2], [2, 1.01, 1, 2]]), "does not hold"),
    ("05_ablations", BLOCKS, np.array([[0, 1.2, 1, 2], [1, 1.5, 0.9, 2], [2, 1.01, 1, 2]]), "does not hold"),
    ("05_ablations", BLOCKS, np.array([[0, 1.05, 1, 2], [1, 1.5, 1.1, 2], [2, 1.1, 1, 2]]), "does not hold"),
    ("05_ablations", BLOCKS, np.array([[0, 1.05, 1, 2], [1, 1.5, 1.1, 2], [2, 0.6, 0, 2]]), "does not hold"),
    ("05_ablations", OVER_W, np.array([[0, 0, 0, 0], [0.5, 0.1, -0.06, 0.2], [1, 0, 0, 0]]), "undecided"),
    ("05_ablations", OVER_W, np.array([[0, 0, 0, 0], [0.5, -0.1, -0.2, -0.06], [1, 0, 0, 0]]), "does not hold"),
    ("05_ablations", "methods.apg.frechet_change", Interval(-0.5, -0.8, -0.2), "undecided"),
    ("05_ablations", "methods.apg.frechet_change", Interval(-2.5, -2.8, -2.2), "does not hold"),
    ("06_imagenet", "contrast.cond+dg - cond.frechet", Interval(-2, -3, 0.5), "undecided"),
    ("06_imagenet", "settings.uncond+dg.is", Interval(6, 4.9, 7), "undecided"),
    ("06_imagenet", "settings.cond+dg.is", Interval(4, 3.9, 4.8), "does not hold"),
    ("06_imagenet", "settings.uncond+dg.precision", Interval(0.7, 0.59, 0.8), "undecided"),
    ("06_imagenet", "settings.cond+dg.precision", Interval(0.7, 0.69, 0.8), "undecided"),
]


# one comparison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "relation", "bound", "word"),
    [
        (Interval(0.2, 0.1, 0.3), ">", 0, "holds"),
        (Interval(0.1, -0.1, 0.3), ">", 0, "undecided"),
        (Interval(-0.1, -0.3, 0.1), ">", 0, "undecided"),
        (Interval(-0.2, -0.3, -0.1), ">", 0, "does not hold"),
        (Interval(0.2, 0.1, 0.3), "<", 0, "does not hold"),
        (Interval(-0.2, -0.3, -0.1), "<", 0, "holds"),
        (Interval(0.2, 0.0, 0.3), ">", 0, "undecided"),  # the end itself is not above
        (Interval(-0.2, -0.3, 0.0), ">", 0, "does not hold"),
        (Interval(0.5, 0.4, 0.6), ">", Interval(0.1, 0.05, 0.2), "holds"),
        (Interval(0.5, 0.4, 0.6), ">", Interval(0.3, 0.2, 0.45), "undecided"),  # they overlap
        (Interval(0.3, 0.2, 0.45), ">", Interval(0.5, 0.4, 0.6), "undecided"),
        (Interval(0.1, 0.05, 0.2), ">", Interval(0.5, 0.4, 0.6), "does not hold"),
        (Interval(0.1, 0.05, 0.2), "<", Interval(0.5, 0.4, 0.6), "holds"),
        (8, ">=", 8, "holds"),
        (8, ">", 8, "does not hold"),
        (7, ">=", 8, "does not hold"),
    ],
)
def test_comparison_of_intervals(value: Any, relation: str, bound: Any, word: str) -> None:
    assert compare(value, relation, bound) == word


PARTS = paper.parts()


# tests of arrays ------------------------------------------------------------------------------------------------------


def arrays(**changes: Any) -> Record:
    """A run of chapter 3 on 60 images in which zeroing takes detail and nothing else."""
    rng = np.random.default_rng(0)
    right = rng.random(60) < 0.8
    measured = {
        "original.agreement": right,
        "massive.agreement": right,
        "massive.low_error": rng.uniform(0, 0.02, 60),
        "massive.high_error": rng.uniform(0.3, 0.5, 60),
        "massive.sharpness_ratio": rng.uniform(0.5, 0.7, 60),
        "massive.detail_distance": rng.normal(6, 1, 60),
        "massive.frechet": rng.normal(9, 1, 60),
        "original.detail_distance": rng.normal(3, 1, 60),
        "original.frechet": rng.normal(5, 1, 60),
        "next.high_error": rng.uniform(0, 0.1, 60),
        "random.high_error": rng.uniform(0, 0.05, (40, 12)),
    }
    return Record(
        "03_intervention", {}, {}, {}, {k: np.asarray(v, np.float32) for k, v in (measured | changes).items()}
    )


def words(record: Record) -> dict[str, str]:
    return {answer.part.id: answer.word for answer in verdicts.judge({record.name: record})[record.name].answers}


def test_the_words_of_a_run_that_loses_detail_alone() -> None:
    assert words(arrays()) == dict.fromkeys(["3a", "3b", "3c", "3d", "3e", "3f", "3h"], "holds") | {
        "3g": "not measured"
    }


@pytest.mark.parametrize(
    ("changes", "part", "word"),
    [
        ({"massive.low_error": np.linspace(0.03, 0.075, 60)}, "3a", "undecided"),
        ({"massive.low_error": np.linspace(0.2, 0.3, 60)}, "3a", "does not hold"),
        ({"random.high_error": np.linspace(0.05, 1, 40)[:, None].repeat(12, 1)}, "3b", "does not hold"),
        ({"random.high_error": np.linspace(0.05, 0.6, 40)[:, None].repeat(12, 1)}, "3b", "undecided"),
        ({"random.high_error": np.linspace(0.2, 0.6, 12)[None].repeat(40, 0)}, "3c", "does not hold"),
        ({"massive.detail_distance": np.linspace(0, 1, 60)}, "3d", "does not hold"),
        ({"massive.agreement": np.zeros(60)}, "3e", "does not hold"),
        ({"original.agreement": np.ones(60), "massive.agreement": np.arange(60) > 2}, "3e", "undecided"),
        ({"next.high_error": np.full(60, 0.6)}, "3f", "does not hold"),
        ({"matched.high_error": np.zeros(60)}, "3g", "holds"),
        ({"massive.frechet": np.linspace(3, 7, 60)}, "3h", "undecided"),
    ],
)
def test_each_part_of_an_intervention_can_come_out_otherwise(changes: dict[str, Any], part: str, word: str) -> None:
    assert words(arrays(**changes))[part] == word


def test_an_edit_that_changes_nothing_does_nothing() -> None:
    record = arrays()
    same = {key: record.arrays[key.replace("massive", "original")] for key in record.arrays if "distance" in key}
    nothing = {key: np.zeros_like(a) for key, a in record.arrays.items() if key.endswith("_error")}
    found = words(arrays(**nothing, **same, **{"massive.frechet": record.arrays["original.frechet"]}))
    assert [found[part] for part in ("3b", "3d", "3f", "3h")] == ["does not hold"] * 4


def test_many_tests_ask_more_of_each() -> None:
    """A part that holds as the only test, and not among the family of its chapter."""
    rng = np.random.default_rng(1)
    close = 3 + rng.normal(0.28, 1, 60)
    record = arrays(**{"massive.frechet": np.full(60, 5.0) + close, "original.frechet": np.full(60, 8.0)})
    alone = next(part for part in verdicts.parts()["03_intervention"] if part.id == "3h").answer(record)
    assert alone.word == "holds" and 0.05 / 6 < alone.p < 0.05
    among = words(arrays(**{**record.arrays, "next.high_error": np.full(60, 0.4), "massive.low_error": close / 60}))
    assert among["3h"] == "undecided"


def test_expressions_by_hand() -> None:
    found = {"a.m": np.array([1, 2, 3], np.float32), "b.m": np.array([[0, 2], [2, 4]], np.float32)}
    assert verdicts.per_image(found, "a.m").tolist() == [1, 2, 3]
    assert verdicts.per_image(found, "b.m").tolist() == [1, 3]  # the mean of the draws
    assert verdicts.per_image(found, "a.m - b.m").tolist() == [0, -1]  # of the images that both have
    right = {"a.agreement": np.array([1, 1, 0, 0]), "b.agreement": np.array([1, 0, 1, 0])}
    assert verdicts.per_image(right, "lost b of a").tolist() == [0, 1, 0, 0]
    assert verdicts.per_image(right, "lost a of b").tolist() == [0, 0, 1, 0]
    with pytest.raises(KeyError):
        verdicts.per_image(found, "a.n")


def test_the_stored_verdicts_can_be_found_again_from_the_arrays_alone() -> None:
    """The plan's rules written out with scipy, on every test of a mean of every stored run."""
    for name in results.references("03_intervention"):
        found = verdicts.of_training(name)
        family = [a for verdict in found.values() for a in verdict.answers if a.part.kind == "mean" and a.p is not None]
        for answer in family:
            stored = results.reference_of(answer.part.chapter, name)
            assert stored is not None and stored.arrays
            values = verdicts.per_image(stored.arrays, answer.part.value)
            bound, n = float(answer.part.bound), len(values)
            if answer.word == "holds":  # by a normal approximation, at the level that Bonferroni asks of all of them
                z = (values.mean() - bound) / (values.std(ddof=1) / np.sqrt(n) + 1e-12)
                claimed = -z if answer.part.relation == "<" else z
                assert claimed > 1.5, (name, answer.part.id)


# the table of parts ---------------------------------------------------------------------------------------------------


def test_an_unknown_relation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would otherwise be read as one of those that are known."""
    monkeypatch.setattr(paper, "parts", lambda: PARTS.assign(relation="<="))
    verdicts.parts.cache_clear()
    with pytest.raises(DgkitError, match="relation='<=' is not allowed: use one of <, >, >="):
        verdicts.parts()
    monkeypatch.setattr(paper, "parts", lambda: PARTS.assign(kind="median"))
    with pytest.raises(DgkitError, match="kind='median' is not allowed: use one of mean, rank, number, interval"):
        verdicts.parts()


def test_the_table_is_about_claims_and_chapters_that_exist() -> None:
    table = paper.parts()
    assert table["id"].is_unique and set(table["relation"]) <= set(verdicts.RELATIONS)
    assert {f"{chapter}.ipynb" for chapter in table["chapter"]} <= set(NOTEBOOKS.values())
    known = set(paper.claims()["id"])
    assert all(set(part.claims) <= known for parts in verdicts.parts().values() for part in parts)


@pytest.mark.parametrize("chapter", HOLDS)
def test_every_number_that_a_part_needs_is_measured_on_some_model(chapter: str) -> None:
    """A path with a slip would read as not measured."""
    stored = [record.decoded() for record in results.references(chapter).values()]
    for part in verdicts.parts()[chapter]:
        if part.kind in ("mean", "rank"):
            continue  # of arrays
        paths = [part.value, *[part.bound] * isinstance(part.bound, str), *re.findall(r"\{([^:}]+)", part.shown)]
        for path in paths:
            assert any(_measured(values, path) for values in stored), path


def _measured(values: dict[str, Any], path: str) -> bool:
    try:
        derived.value_at(values, path)
    except KeyError:
        return False
    return True


def test_every_method_of_a_result_has_a_name() -> None:
    for record in results.references("05_ablations").values():
        assert record.values["methods"].keys() <= LABELS.keys() | {"none"}


# verdicts -------------------------------------------------------------------------------------------------------------


def stored(chapter: str, values: dict[str, Any]) -> Record:
    return Record(chapter, {}, {}, {key: results._kept(key, value, "") for key, value in tables(values).items()})


def verdict(chapter: str, values: dict[str, Any]) -> verdicts.Verdict:
    return verdicts.judge({chapter: stored(chapter, values)})[chapter]


def test_every_chapter_that_claims_something_is_tried_here_or_by_its_controls() -> None:
    assert [*verdicts.parts()] == sorted([*HOLDS, "03_intervention", "04_detail_guidance"])


@pytest.mark.parametrize("chapter", HOLDS)
def test_all_parts_hold_for_what_is_read_back_from_a_result_file(chapter: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path))
    result = Result(chapter, model="m")
    result.update(tables(HOLDS[chapter]))
    found = verdicts.judge({chapter: results.read(result.save())})[chapter]
    answers = [answer for answer in found.answers if answer.part.kind in ("number", "interval")]
    assert str(found) == "reproduced" and {answer.word for answer in answers} == {"holds"}
    assert all(answer.numbers for answer in answers)


@pytest.mark.parametrize(("chapter", "path", "value", "word"), ONE_PART_OFF)
def test_one_part_that_does_not_hold_is_told(chapter: str, path: str, value: Any, word: str) -> None:
    found = verdict(chapter, HOLDS[chapter] | {path: value})
    words = [answer.word for answer in found.answers if answer.word != "not measured"]
    assert str(found) == f"{len(words) - 1} of {len(words)} parts reproduced"
    assert [other for other in words if other != "holds"] == [word]


def test_nothing_measured_is_no_verdict() -> None:
    found = verdict("03_intervention", {})
    assert str(found) == "not measured" and {str(answer) for answer in found.answers} == {"not measured"}


def test_nothing_that_holds_is_not_reproduced() -> None:
    values = {
        "contrast.uncond+dg - uncond.frechet": Interval(2, 1, 3),
        "contrast.cond+dg - cond.frechet": Interval(1, -1, 3),
    }
    assert str(verdict("06_imagenet", values)) == "not reproduced"


def test_what_was_not_measured_does_not_count() -> None:
    measured = {path: value for path, value in HOLDS["06_imagenet"].items() if "frechet" in path}
    found = verdict("06_imagenet", measured)
    assert str(found) == "reproduced"
    assert [answer.word for answer in found.answers].count("not measured") == 4


def test_numbers_come_with_their_intervals() -> None:
    shown = [*map(str, verdict("02_timestep_vs_text", HOLDS["02_timestep_vs_text"]).answers)]
    assert shown[0] == "holds: 0.80 [0.70, 0.90] against 0.05 [0.02, 0.08]"
    shown = [*map(str, verdict("05_ablations", HOLDS["05_ablations"]).answers)]
    assert shown[0] == "holds: block 1 of 0 to 2, sharpness times 1.50"
    assert shown[2] == "holds: agreement +0.00 (w = 0), +0.10 (w = 0.5), -0.02 (w = 1)"
    assert shown[4] == "holds: -1.00 [-1.40, -0.60]; APG -0.50 [-0.55, -0.20]"


@pytest.mark.parametrize(("dims", "listed"), [([7], "7"), ([7, 83], "7 and 83"), ([1, 2, 3], "1, 2 and 3")])
def test_fixed_channels_are_listed(dims: list[int], listed: str) -> None:
    assert derived.fixed_channels_listed({"fixed": {"channels": dims}}) == listed


# how a chapter ends ---------------------------------------------------------------------------------------------------


@pytest.fixture
def concluded(tmp_path, monkeypatch):
    """Stores a reference run, of a chapter and values, and returns the text that ends the chapter."""
    monkeypatch.setattr(results, "REFERENCE", tmp_path)
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("DGKIT_COMMAND", "dgkit run x")

    def conclude(chapter: str, values: dict[str, Any], model: str = "tiny-dit") -> str:
        result = Result(chapter, model="tiny-dit")
        result.update(tables(values))
        result.save()
        return verdicts.conclusion(Result(chapter, model=model)).data

    return conclude


def test_a_chapter_ends_with_its_verdict_once_its_parts_and_what_was_run(concluded) -> None:
    values = HOLDS["06_imagenet"] | {"settings.cond+dg.is": Interval(4, 3.9, 4.8)}
    text = concluded("06_imagenet", values)
    verdict, table, run = text.split("\n\n")
    assert text.count("5 of 6 parts reproduced") == 1 and "5 of 6 parts reproduced" in verdict
    assert len(table.splitlines()) == 2 + 6
    assert r"| **does not hold** | 4.00 \[3.90, 4.80\] against 6.00 \[5.00, 7.00\] |" in table
    assert re.match(r"Reference run: `dgkit run x` at commit \w+( with uncommitted changes)?, \d+ s on ", run)


def test_a_chapter_that_claims_nothing_ends_with_what_was_run(concluded) -> None:
    text = concluded("07_ambiguities", {"settings.ours.distance": Interval(0, 0, 0)})
    assert text.startswith("Reference run: `dgkit run x`") and "erdict" not in text


def test_a_model_without_reference_run_gets_no_verdict(concluded) -> None:
    text = concluded("02_timestep_vs_text", HOLDS["02_timestep_vs_text"], model="sd3")
    assert text == "No reference run of this chapter on this model is stored."
