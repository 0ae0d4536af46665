"""`dgkit reproduce`: the real path in small, and with stand-ins for networks and pipelines every number by hand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dgbook import cli, paths
from dgbook.measures.base import MetricId
from dgbook.measures.stats import Interval
from dgbook.paper_scale import generate, prompts, protocol, reproduce, scores, scoring
from dgbook.paper_scale.comparing import comparison, level, over_blocks, verdict
from dgbook.paper_scale.generate.store import Store, load_images
from dgbook.paper_scale.prompts import Prompt
from dgbook.paper_scale.reproduce import OthersAtWork, job_of, wanted
from dgbook.paper_scale.row import SMALL_SET_SCORES, block_evaluations, filled, in_small
from dgbook.paper_scale.scores.sets import Features, Reference
from dgbook.paper_scale.scores.weights import MetricUnavailable
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

COUNT = 10
CALLS: list[tuple[str, list[int]]] = []
"""What was asked of the stand-ins: the name of the job or score, and the seeds or image numbers."""


def brightness(job: Any, seed: int) -> int:
    """Of a stand-in's image: every change of the row moves it by something that depends on the seed."""
    noise = seed * 7 % 13
    dg = 30 + noise if job.methods else 0
    cfg = 60 - 2 * noise if job.guidance_scale > 1 else 0
    disrupted = {"zero": -20 - noise, "random": noise - 6}[job.disruption["kind"]] if job.disruption else 0
    return 50 + 3 * noise + dg + cfg + disrupted


class FakePipeline:
    """In place of `PipelineSampler`: flat grey images of `brightness`."""

    device = "fake device"

    def __init__(self, job: Any) -> None:
        self.job, self.identity = job, {"weights_sha256": {"transformer": "abc"}}

    def __call__(self, conditions: Any, seeds: Any) -> Any:
        CALLS.append((self.job.name, list(seeds)))
        return np.stack([np.full((4, 4, 3), brightness(self.job, seed), np.uint8) for seed in seeds])


class FakeScore:
    """In place of a network: `factor` times the brightness."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor, self.id = name, factor, MetricId(name, "fake@1", "none", None, "float64", "grey")

    def __call__(self, images: Any, prompts: list[str]) -> Any:
        assert all(prompt.startswith("prompt ") for prompt in prompts)
        CALLS.append((self.name, [int(prompt.split()[1]) for prompt in prompts]))
        return self.factor * images.mean(axis=(1, 2, 3))


class FakeInception:
    """In place of Inception: two features and three logits."""

    id = MetricId("inception", "fake@2", "none", None, "float64", "features")

    def features(self, images: Any) -> Features:
        CALLS.append(("inception", [len(images)]))
        grey = images.mean(axis=(1, 2, 3))[:, None]
        return Features(np.hstack([grey, grey**2 / 100]), np.hstack([grey / 20, 8 - grey / 20, grey * 0]))


FACTORS = {"clipscore": 0.1, "blipscore": -0.2, "hpsv2.1": 0.3}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for everything that is not on this machine; the aesthetic score is not there."""
    CALLS.clear()
    monkeypatch.setattr(generate.run, "PipelineSampler", FakePipeline)

    def scorer(name: str, device: str) -> Any:
        if name == "aesthetic":
            raise MetricUnavailable("its head is not on this machine and could not be downloaded")
        return FakeInception() if name == "fid" else FakeScore(name, FACTORS[name])

    monkeypatch.setattr(scores, "scorer", scorer)
    styles = ("anime", "photo")
    known = [Prompt(i, f"prompt {i}", styles[i % 2], None) for i in range(COUNT)]
    monkeypatch.setattr(prompts, "load", lambda name: known)
    rng = np.random.default_rng(0)
    pool = rng.normal(100, 30, (50, 2)).astype(np.float32)
    monkeypatch.setattr(
        scoring, "imagenet_reference", lambda inception: Reference("real", pool.mean(0), np.cov(pool.T), pool)
    )
    yield


def values(path: Path) -> dict[str, Any]:
    """Of a result file."""
    return json.loads(path.read_text())["values"]


def greys(label: str, table: str = "table1", count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Brightness of a row's images, from the row's settings alone."""
    row = next(row for row in protocol.rows(table) if row.label == label)
    return np.array([brightness(row, 1_000_000 * seed + i) for i in range(count)], float)


# The real path in small -----------------------------------------------------------------------------------------------


def test_table_1_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "table1", "--small", "--count", "6", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "tiny-sd3" / "table1-6.json").read_text())
    measured, provenance = record["values"], record["provenance"]
    assert "tiny-sd3 stands in for sd3" in printed and "not available" not in printed and "FID" not in printed
    header = next(line for line in printed.splitlines() if line.startswith("row"))
    assert header.split() == ["row", "score", "paper", "ours", "difference", "interval", "verdict"]

    # against the images themselves: the pairs have the same noise, and CFG makes the greater change
    folders = {path.name.split("-")[2]: path for path in (tmp_path / "images").iterdir()}
    assert folders.keys() == {"none", "dg", "cfg", "cfg+dg"}
    images = {name: load_images(path).astype(float) for name, path in folders.items()}
    change = {name: np.abs(batch - images["none"]).mean() for name, batch in images.items()}
    assert 0 < change["dg"] < change["cfg"]
    weights = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    luma = images["dg"][..., :] @ [0.299, 0.587, 0.114] / 255
    inner = sum(w * luma[:, 1 + i : 31 + i, 1 + j : 31 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)
                if (w := weights[i + 1, j + 1]))  # fmt: skip
    assert measured["tiny-sd3 Cond + DG.sharpness"]["value"] == pytest.approx(inner.var(axis=(1, 2)).mean(), rel=0.3)
    change = measured["tiny-sd3 Cond + DG.sharpness.change"]
    levels = [measured[f"tiny-sd3 {row}.sharpness"]["value"] for row in ("Cond + DG", "Cond")]
    assert change["value"] == pytest.approx(levels[0] - levels[1]) and change["low"] <= change["value"]
    assert 0 < measured["tiny-sd3 CFG + DG.structure-similarity"]["value"] < 1
    assert "tiny-sd3 Cond.structure-similarity" not in measured
    assert provenance["weights_sha256"] and provenance["device"] and provenance["generation_seconds"] > 0
    assert provenance["metrics"]["judge-agreement"].startswith("judge-agreement|tile-matcher@")
    after = 8 - (MODELS["tiny-sd3"].preset.block + 1)  # blocks that the degraded pass computes
    assert provenance["block_evaluations"] == 6 * 8 * (8 + 8 + after + 16 + 16 + after)


def test_table_6_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer images than the judge has features."""
    assert cli.main(["reproduce", "table6", "--small", "--count", "20", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "tiny-dit" / "table6-20.json").read_text())
    measured = record["values"]
    assert "tiny-dit stands in for dit-xl-2" in printed and "FID" not in printed
    assert printed.count("not available: 20 images are too few for a Frechet distance on 64 features") == 4
    assert record["parameters"]["seeds"] == [0, 1, 2] and record["parameters"]["count"] == 20
    assert len(list((tmp_path / "images").iterdir())) == 4 * 3
    # a trained conditional model shows more kinds of its data than its null class
    assert 1 < measured["Uncond.judge-is"]["value"] < measured["Cond.judge-is"]["value"] < 10
    assert all(0 <= measured[f"Cond.judge-{share}"]["value"] <= 1 for share in ("precision", "recall"))
    assert {key.rpartition(".")[0] for key in measured if key.endswith("change")} == {
        f"{row} + DG.{score}" for row in ("Cond", "Uncond") for score in SMALL_SET_SCORES if score != "judge-frechet"
    }


# Every number by hand -------------------------------------------------------------------------------------------------


def test_levels_and_changes_against_the_paper(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT)
    lines = {(line.row, line.quantity): line for line in found.lines}
    plain, guided = greys("SD3 Cond") * 0.1, greys("SD3 Cond + DG") * 0.1
    level = lines["SD3 Cond + DG", "CLIPScore"]
    assert level.paper == 24.15 and level.ours is not None
    assert level.ours.value == pytest.approx(guided.mean())
    assert level.ours.low < guided.mean() < level.ours.high
    assert level.difference is None and level.verdict == "not comparable: the paper's is of 500 images"
    change = lines["SD3 Cond + DG", "CLIPScore less SD3 Cond"]
    assert change.paper == pytest.approx(24.15 - 22.11) and change.ours is not None
    assert change.ours.value == pytest.approx((guided - plain).mean())
    # paired: the noise that both images share is not in the interval
    standard_error = (guided - plain).std() / np.sqrt(COUNT)
    assert change.ours.high - change.ours.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert change.verdict == "reproduced"
    # the stand-in lowers this one where the paper raises it, and beside CFG the other way round
    assert lines["SD3 Cond + DG", "BLIPScore less SD3 Cond"].verdict == "not reproduced"
    beside = lines["SD3 CFG + DG", "CLIPScore less SD3 CFG"]
    assert beside.paper == -0.39 and beside.verdict == "not reproduced"
    assert {line.verdict for line in found.lines if "less" in line.quantity} == {
        "reproduced", "not reproduced", "not available"
    }  # fmt: skip


def test_a_missing_score_says_why_and_is_never_blank(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT)
    lines = [line for line in str(found).splitlines() if "Aesthetic" in line]
    reason = "not available: its head is not on this machine and could not be downloaded"
    assert len(lines) == 4 + 2 and sum(line.endswith(reason) for line in lines) == 4
    assert all(len(line.cells()) == 7 and all(line.cells()) for line in found.lines)
    assert "  5.58  " in lines[0]  # the paper's number stays
    stored = values(found.path)
    assert stored["SD3 Cond.aesthetic.verdict"] == reason and "SD3 Cond.aesthetic" not in stored


def test_the_result_file(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table1", "sd3", output=tmp_path, count=4)
    assert found.path == tmp_path / "sd3" / "table1-4.json"
    record = json.loads(found.path.read_text())
    assert record["name"] == "table1" and record["parameters"]["model"] == "sd3" and record["parameters"]["count"] == 4
    stored = record["values"]
    assert stored["SD3 Cond.clipscore"]["value"] == pytest.approx(0.1 * greys("SD3 Cond", count=4).mean())
    assert stored["SD3 Cond.clipscore.paper"] == 22.11
    assert stored["SD3 CFG + DG.hpsv2.1.change.paper"] == 1.64
    provenance = record["provenance"]
    assert provenance["device"] == "fake device" and provenance["dtype"] == "bfloat16"
    assert provenance["weights_sha256"] == "abc" and provenance["seed"] == [0]
    assert provenance["metrics"]["clipscore"] == str(FakeScore("clipscore", 0).id)
    assert {"commit", "versions", "wall_seconds", "jobs"} <= provenance.keys()
    job = job_of(filled(protocol.rows("table1", "sd3")[1]), 0)
    assert len(provenance["jobs"]["SD3 Cond + DG"][0]) == len(job.sha256)


def test_styles_of_table_2_are_their_own_prompts(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table2", "sd3", output=tmp_path, count=COUNT)
    lines = {(line.row, line.quantity): line for line in found.lines}
    grey = 0.3 * greys("CFG", "table2")
    anime, photo = lines["CFG", "HPSv2.1, anime"].ours, lines["CFG", "HPSv2.1, photo"].ours
    assert anime and anime.value == pytest.approx(grey[::2].mean())
    assert photo and photo.value == pytest.approx(grey[1::2].mean())
    whole = lines["CFG", "HPSv2.1"].ours
    assert whole and whole.value == pytest.approx(grey.mean())
    assert lines["CFG", "HPSv2.1, paintings"].verdict == (
        "not available: too few of these 10 prompts are of this style"
    )
    assert lines["CFG+DG", "HPSv2.1, photo less CFG"].paper == pytest.approx(29.21 - 28.01)
    # the average of all styles is not that of the first prompts, whatever their interval holds
    assert lines["CFG", "HPSv2.1"].verdict == "not comparable: the paper's is of 3,200 images"


def test_win_probabilities_count_ties_half(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("fig5b", "sd3", output=tmp_path, count=26)
    lines = {(line.row, line.quantity): line for line in found.lines}
    change = (np.arange(26) * 7 % 13) - 6.0  # of the random disruption: below, above and equal
    won = lines["SD3 non-MAs disrupted", "P(CLIPScore above SD3 original)"]
    assert won.ours and won.ours.value == ((change > 0).sum() + (change == 0).sum() / 2) / 26 == 0.5
    lost = lines["SD3 MAs disrupted", "P(HPSv2.1 above SD3 original)"]
    assert lost.paper == 0.028 and lost.ours and lost.ours.value == 0 and lost.ours.high > 0
    assert lost.verdict == "reproduced" and lost.difference == -0.028
    blip = lines["SD3 MAs disrupted", "P(BLIPScore above SD3 original)"]  # the stand-in's is upside down
    assert blip.paper == 0.462 and blip.ours and blip.ours.value == 1 and blip.verdict == "not reproduced"
    assert lines["SD3 MAs disrupted", "CLIPScore"].paper is None


def test_figure_8_has_claims_but_no_numbers(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("fig8", "sd3", output=tmp_path, count=4)
    lines = {(line.row, line.quantity): line for line in found.lines}
    assert lines["DG, m = 6", "CLIPScore less Cond"].verdict == "reproduced"
    assert lines["DG, m = 24", "CLIPScore less Cond"].verdict == "higher"  # of which the paper claims nothing
    assert all(line.paper is None for line in found.lines)


# Scores of sets -------------------------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {"dims": [3, 4], "scale": 0.5}


def test_table_6_has_seed_blocks_and_names_that_fit_the_size(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table6", "dit-xl-2", output=tmp_path, count=20, **GIVEN)
    text = str(found)
    assert "FID-20" in text and "FID-50K" not in text and "precision-20" in text
    lines = {(line.row, line.quantity): line for line in found.lines}
    level = lines["Cond", "FID-20"]
    assert level.paper == 9.52 and level.difference is None
    assert level.verdict == "not comparable: the paper's is of 50,000 images"
    assert lines["Cond", "IS-20"].verdict.startswith("not available: 20 images are too few for the Inception Score")
    # the images depend on their seed, and so the mean is over three different sets
    blocks = [greys("Cond", "table6", 20, seed) for seed in range(3)]
    assert len({block.tobytes() for block in blocks}) == 3
    kept = sorted((tmp_path / "images").glob("*-none-*/scores/inception.json"))
    fids = [json.loads(path.read_text())["values"]["fid"]["value"] for path in kept]
    assert level.ours and min(fids) <= level.ours.value <= max(fids)
    change = lines["Cond + DG", "FID-20 less Cond"]
    assert change.paper == pytest.approx(5.77 - 9.52) and change.ours
    # what the paper does not state tells result files apart
    assert found.path.name == "table6-dims-3-4-scale-0.5-20.json"
    other = reproduce.reproduce("table6", "dit-xl-2", output=tmp_path, count=20, dims=[3], scale=0.25)
    assert other.path.name == "table6-dims-3-scale-0.25-20.json"


def test_fifty_thousand_images_are_the_papers_protocol() -> None:
    row = protocol.rows("table6")[2]
    line = level(row, "fid", scoring.Measured("FID-50K", np.array([9.5, 9.6, 9.4]), "id"), 50_000)
    assert row.count == 50_000 and line.verdict == "within our interval" and line.difference == pytest.approx(-0.02)


@pytest.mark.parametrize(
    ("label", "ours", "verdict"),
    [
        ("SD3.5 CFG", 29.94, "within our interval"),  # 29.9 is printed: all from 29.85 to 29.95
        ("SD3.5 CFG", 29.96, "higher than printed"),
        ("SD3.5 CFG", 29.84, "lower than printed"),
        ("SD3 CFG", 28.26, "higher than printed"),  # 28.23 is
        ("SD3 CFG", 28.234, "within our interval"),
    ],
)
def test_levels_with_the_papers_number_of_images(label: str, ours: float, verdict: str) -> None:
    row = next(row for row in protocol.rows("table1") if row.label == label)
    values = np.tile([ours - 1e-4, ours + 1e-4], 250)
    line = level(row, "hpsv2.1", scoring.Measured("HPSv2.1", values, "id"), 500)
    assert line.paper and line.verdict == verdict and line.difference == pytest.approx(ours - line.paper)


@pytest.mark.parametrize(("change", "word"), [(0.03, "higher"), (-0.03, "lower"), (0.0, "no difference seen")])
def test_a_difference_within_rounding_claims_nothing(change: float, word: str) -> None:
    """CFG + DG has a CLIPScore of 27.68 and CFG of 27.67; neither a sign nor the tolerance of shares applies."""
    rows = {row.label: row for row in protocol.rows("table1")}
    values = np.tile([27.0, 28.0], 250)
    mine = values + change + np.tile([-1e-3, -1e-3, 1e-3, 1e-3], 125)
    pair = [scoring.Measured("CLIPScore", v, "id") for v in (mine, values)]
    line = comparison(rows["SD3.5 CFG + DG"], rows["SD3.5 CFG"], "clipscore", *pair)
    assert line.paper == 0.01 and line.verdict == word
    beyond = comparison(rows["SD3.5 CFG + DG"], rows["SD3.5 CFG"], "hpsv2.1", *pair)
    assert beyond.paper == 0.8 and beyond.verdict == {"higher": "reproduced", "lower": "not reproduced"}.get(
        word, "undecided"
    )


def test_without_reference_images_only_is_is_left(fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(inception: Any) -> Any:
        raise MetricUnavailable("the reference (2 GB) is not on this machine")

    monkeypatch.setattr(scoring, "imagenet_reference", absent)
    monkeypatch.setattr("dgbook.paper_scale.scores.sets.SPLIT", 10)
    found = reproduce.reproduce("table6", "dit-xl-2", output=tmp_path, count=20, **GIVEN)
    lines = {line.quantity: line for line in found.lines if line.row == "Cond"}
    assert lines["FID-20"].verdict == "not available: the reference (2 GB) is not on this machine"
    assert lines["recall-20"].verdict == "not available: the reference (2 GB) is not on this machine"
    assert lines["IS-20"].ours


@pytest.mark.parametrize(
    ("count", "reasons"), [(3, {"frechet", "is", "precision", "recall"}), (64, {"frechet"}), (65, set())]
)
def test_too_few_small_images_say_so(count: int, reasons: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has 64 features, and neighbours need more than 3 images."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
    monkeypatch.setattr(scoring, "Store", lambda folder: SimpleNamespace(job=None))
    monkeypatch.setattr(scoring, "load_images", lambda folder: noise)
    row = replace(in_small(protocol.rows("table6")[2]), count=count)
    found = scoring._judge_scores(row.scores, [row], {row.label: [Path("a"), Path("b")]})
    assert {score for (_, score), one in found.items() if one.values is None} == {f"judge-{name}" for name in reasons}
    assert all(one.reason if one.values is None else one.values.shape == (2,) for one in found.values())
    frechet = found[row.label, "judge-frechet"]
    assert frechet.name == "Frechet distance (fashion-classifier)"
    assert not reasons or frechet.reason == f"{count} images are too few for a Frechet distance on 64 features"


def test_intervals_over_seed_blocks_are_students() -> None:
    sample = np.array([3.1, 2.7, 3.4])
    expected = ttest_1samp(sample, 0).confidence_interval(0.95)
    found = over_blocks(sample)
    assert (found.value, found.low, found.high) == pytest.approx((sample.mean(), expected.low, expected.high))


@pytest.mark.parametrize(
    ("low", "high", "neutral", "claim", "word"),
    [
        (0.1, 0.3, 0, 1, "reproduced"),
        (0.1, 0.3, 0, -1, "not reproduced"),
        (-0.1, 0.3, 0, 1, "undecided"),
        (-0.3, -0.1, 0, -1, "reproduced"),
        (0.0, 0.3, 0, 1, "undecided"),
        (0.45, 0.58, 0.5, 0, "reproduced"),
        (0.35, 0.58, 0.5, 0, "undecided"),
        (0.02, 0.1, 0.5, 0, "not reproduced"),
        (0.1, 0.3, 0, None, "higher"),
        (-0.3, -0.1, 0, None, "lower"),
        (-0.3, 0.1, 0, None, "no difference seen"),
    ],
)
def test_verdicts(low: float, high: float, neutral: float, claim: int | None, word: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high), neutral, claim) == word


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_run_goes_on(fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Killed in its first, third or sixth batch: nothing is made twice, and the numbers are the same."""
    whole = reproduce.reproduce("table1", "sd3", output=tmp_path / "whole", count=16)
    batches = [call for call in CALLS if call[1] and call[1][0] >= 0 and "sd3" in call[0]]
    CALLS.clear()

    class Killed(FakePipeline):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if len(CALLS) == at - 1:
                raise KeyboardInterrupt
            return super().__call__(conditions, seeds)

    with monkeypatch.context() as patched:
        patched.setattr(generate.run, "PipelineSampler", Killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce.reproduce("table1", "sd3", output=tmp_path / "resumed", count=16)
    assert len(CALLS) == at - 1 and not (tmp_path / "resumed" / "sd3").exists()
    resumed = reproduce.reproduce("table1", "sd3", output=tmp_path / "resumed", count=16)
    assert [call for call in CALLS if "sd3" in call[0]] == batches
    assert values(resumed.path) == values(whole.path)


def test_scores_are_kept_until_their_metric_changes(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = values(reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT).path)
    CALLS.clear()
    again = reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT)
    assert CALLS == [] and values(again.path) == first
    # fig. 5(b)'s original is table 1's CFG: only the two disrupted rows are new
    reproduce.reproduce("fig5b", "sd3", output=tmp_path, count=COUNT)
    assert {name.split("-")[1] for name, _ in CALLS if name.startswith("sd3-")} == {"cfg+disrupted"}
    CALLS.clear()
    monkeypatch.setattr(scores, "scorer", lambda name, device: FakeScore(f"{name} with new weights", 1.0))
    third = reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT)
    assert any("new weights" in name for name, _ in CALLS) and values(third.path) != first


def test_nothing_is_scored_before_all_images_are_there(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(FakePipeline):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if "prompt 3" in conditions:
                raise ValueError("poison")
            return super().__call__(conditions, seeds)

    monkeypatch.setattr(generate.run, "PipelineSampler", Poisoned)
    with pytest.raises(DgkitError, match=r"36 of 40 images are there; 4 could not be made, first image 3 of .*poison"):
        reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT)
    assert not list(tmp_path.rglob("*/scores")) and not (tmp_path / "sd3").exists()


COMMAND = ["reproduce", "table1", "--model", "sd3", "--count", "16", "--output"]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Of two, as torchrun says it."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_a_worker_that_has_made_its_share_ends_well_and_the_last_one_scores(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun kills all others when one ends with another status than 0."""
    as_rank(monkeypatch, 0)
    for _ in range(2):  # and again
        assert cli.main([*COMMAND, str(tmp_path)]) == 0
        assert capsys.readouterr().out == (
            "table1 on sd3: worker 1 of 2 has made its share: 32 of 64 images are there, and the worker that finishes "
            "last scores them\n"
        )
    assert not list(tmp_path.rglob("*/scores")) and not (tmp_path / "sd3").exists()
    as_rank(monkeypatch, 1)
    assert cli.main([*COMMAND, str(tmp_path)]) == 0
    assert "row" in capsys.readouterr().out and (tmp_path / "sd3" / "table1-16.json").is_file()


def test_the_worker_that_is_last_finds_what_others_made_meanwhile(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one makes all of its share while this one is at its last set."""
    as_rank(monkeypatch, 0)

    class Overtaken(FakePipeline):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if self.job.methods and self.job.guidance_scale > 1:  # the last row
                with monkeypatch.context() as other:
                    as_rank(other, 1)
                    other.setattr(generate.run, "PipelineSampler", FakePipeline)
                    with pytest.raises(OthersAtWork, match="56 of 64 images are there"):
                        reproduce.reproduce("table1", "sd3", output=tmp_path, count=16)
            return super().__call__(conditions, seeds)

    monkeypatch.setattr(generate.run, "PipelineSampler", Overtaken)
    assert reproduce.reproduce("table1", "sd3", output=tmp_path, count=16).path.is_file()


def test_a_worker_whose_own_share_failed_does_not_end_well(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Poisoned(FakePipeline):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if 3 in seeds:  # in the first of two blocks, so the first worker's
                raise ValueError("poison")
            return super().__call__(conditions, seeds)

    monkeypatch.setattr(generate.run, "PipelineSampler", Poisoned)
    as_rank(monkeypatch, 0)
    assert cli.main([*COMMAND, str(tmp_path)]) == 2
    assert "28 of 64 images are there; 4 could not be made, first image 3 of" in capsys.readouterr().err
    as_rank(monkeypatch, 1)
    assert cli.main([*COMMAND, str(tmp_path)]) == 0
    assert "worker 2 of 2 has made its share: 60 of 64" in capsys.readouterr().out


# What is asked for ----------------------------------------------------------------------------------------------------


def test_jobs_are_those_of_the_rows(fakes: None) -> None:
    row = next(row for row in protocol.rows("table1") if row.label == "SD3 CFG + DG")
    job = job_of(row, 2)
    assert (job.model, job.count, job.seed, job.steps, job.guidance_scale) == ("sd3", 500, 2, 28, 4.0)
    assert job.methods == {"dg": {"block": 5, "dims": [810], "scale": 1.0}} and job.dtype == "bfloat16"
    assert job.conditions[:2] == ("prompt 0", "prompt 1")
    assert job_of(row, 0, "some/model").model == "some/model"
    unconditional = protocol.rows("table6")[0]
    assert job_of(unconditional, 0).conditions == (1000,)
    assert job_of(in_small(protocol.rows("table6")[2]), 0).conditions == tuple(range(10))


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        ({"table": "table1"}, [("table1", "sd3"), ("table1", "sd3.5-large")]),
        ({"table": "table1", "model": "sd3.5-large"}, [("table1", "sd3.5-large")]),
        ({"table": "table1", "small": True}, [("table1", "sd3")]),
        ({"table": "fig5b", "small": True}, [("fig5b", "sd3"), ("fig5b", "flux-dev")]),
        ({"table": None, "model": "flux-dev"}, [("table3", "flux-dev"), ("fig5b", "flux-dev")]),
        ({"table": "table6", "dims": [1], "scale": 1.0}, [("table6", "dit-xl-2")]),
    ],
)
def test_what_a_command_wants(arguments: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    assert wanted(arguments.pop("table"), arguments.pop("model", None), **arguments) == pairs


def test_all_is_every_table() -> None:
    assert {table for table, _ in wanted(None, None)} == set(protocol.TABLES)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["table4"], "table='table4' is not allowed"),
        (["table1", "--model", "flux-dev"], "model='flux-dev' is not in table1"),
        (["--all", "--model", "nonsense"], "model='nonsense' is not in any table: use one of sd3"),
        (["table1", "--dims", "3"], "--dims is not needed here"),
        (["table1", "--weights", "x"], "--weights takes the place of one model"),
        (["table6"], "the paper does not state dims and scale for dit-xl-2: give --dims and --scale"),
        (["table3"], "a variant of flux-dev that the paper does not name: give --weights flux-dev-de-distill, or"),
        (["table6", "--small", "--scale", "1"], "--scale not allowed with --small"),
        (["table1", "--model", "sd3", "--count", "1"], "count=1 is not allowed"),
    ],
)
def test_refused_in_one_line(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", *command, "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and not list(tmp_path.iterdir())


def test_weights_take_the_models_place(fakes: None, tmp_path: Path) -> None:
    found = reproduce.reproduce("table3", "flux-dev", weights="owner/de-distilled", output=tmp_path, count=4)
    assert found.title == "table3 on owner/de-distilled"
    assert found.path == tmp_path / "owner-de-distilled" / "table3-4.json"
    assert all(name.startswith("de-distilled-") for name, _ in CALLS if name.count("-") > 1)
    assert "owner/de-distilled takes the place of flux-dev." in str(found)


def test_one_part_that_fails_does_not_stop_the_others(
    fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "fig5b", "--count", "4", "--output", str(tmp_path)]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "fig5b on sd3.5-large\n" in printed
    assert "fig5b on flux-dev was not reproduced: fig5b was measured on a variant" in printed
    assert (tmp_path / "sd3" / "fig5b-4.json").is_file() and not (tmp_path / "flux-dev").exists()


def test_a_trial_does_not_replace_the_full_result(fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = protocol.rows("table1", "sd3")
    monkeypatch.setattr(protocol, "rows", lambda table, model: [replace(row, count=COUNT) for row in settings])
    full = reproduce.reproduce("table1", "sd3", output=tmp_path)
    before = full.path.read_bytes()
    others = [
        reproduce.reproduce("table1", "sd3", output=tmp_path, **given).path
        for given in ({"count": 4}, {"weights": "a/b"}, {"weights": "a/b", "count": 4})
    ]
    assert reproduce.reproduce("table1", "sd3", output=tmp_path, count=COUNT).path == full.path
    assert full.path == tmp_path / "sd3" / "table1.json" and full.path.read_bytes() != b""
    assert len({full.path, *others}) == 4 and all(path.is_file() for path in others)
    assert values(full.path) == json.loads(before)["values"]
    # and what levels are compared with is this number of images, by default or given
    words = {line.verdict for line in full.lines if line.quantity == "CLIPScore"}
    assert words <= {"within our interval", "higher than printed", "lower than printed"}


def test_images_that_rows_share_are_counted_once(fakes: None, tmp_path: Path) -> None:
    """Fig. 8's m = 6 and w = 1 are one setting."""
    record = json.loads(reproduce.reproduce("fig8", "sd3", output=tmp_path, count=4).path.read_text())
    jobs = {job_of(row, 0).name: row for row in (replace(row, count=4) for row in protocol.rows("fig8"))}
    assert jobs.keys() == {path.name for path in (tmp_path / "images").iterdir()} and len(jobs) == 27
    assert record["provenance"]["block_evaluations"] == sum(map(block_evaluations, jobs.values()))
    shards = [entry for name in jobs for entry in Store(tmp_path / "images" / name).provenance()]
    assert record["provenance"]["generation_seconds"] == round(sum(shard["seconds"] for shard in shards), 1)


def test_the_default_folder(fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "build_dir", lambda: tmp_path)
    assert reproduce.reproduce("table1", "sd3", count=2).path == tmp_path / "reproduce" / "sd3" / "table1-2.json"
    assert paths.build_dir() != tmp_path


def test_what_is_missing_is_said_before_anything_starts(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scores, "available", lambda name: "a file of 2 GB is missing" if name == "hpsv2.1" else None)
    reproduce.reproduce("table1", "sd3", count=2, output=tmp_path)
    printed = capsys.readouterr().err
    assert printed.startswith("HPSv2.1: a file of 2 GB is missing\nrow 1 of 4")
