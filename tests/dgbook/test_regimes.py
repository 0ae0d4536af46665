"""The sweep over channels, blocks and steps against edits by hand, and the regimes against cases made by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dgkit
from dgbook.chapters import regimes
from dgbook.chapters.sampling import observe, samples
from dgbook.measures.spectrum import band_error
from dgbook.pages import figures
from dgkit.errors import DgkitError
from tests.tiny_models import pipeline


@pytest.fixture
def pipe() -> Any:
    return pipeline("dit")


class Bright:
    """A judge that finds what was asked for in images that are brighter than a threshold."""

    sharpness_of_real = 1.0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def first(self, count: int) -> "Bright":
        return self

    def agreement(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2, 3)) > self.threshold


def test_every_setting_is_the_edit_it_names(pipe: Any) -> None:
    run = samples(pipe, 3, seed=5, steps=4)
    trace = observe(pipe, run)
    original = run.images(pipe)
    judge = Bright(float(original.mean()))
    table = regimes.sweep(pipe, run, trace, blocks=[0, 1], counts=[1, 4], timed=1, seed=7, judge=judge)  # type: ignore[arg-type]
    assert len(table) == (2 * 2 + 2) * 2
    for row in table.to_dict("records"):
        z = trace.mean_abs()[row["block"]]
        dims = torch.topk(z, row["k"]).indices.tolist()
        start, stop = {"all steps": (0, 1), "first half": (0, 0.5), "second half": (0.5, 1)}[row["steps"]]
        kind = "zero" if row["channels"] == "largest" else "random"
        with dgkit.disrupt(pipe, block=row["block"], dims=dims, kind=kind, seed=7, start=start, stop=stop):
            images = run.images(pipe)
        low, high = band_error(images, original)
        assert row["low_error"] == pytest.approx(low.mean()) and row["high_error"] == pytest.approx(high.mean())
        change = judge.agreement(images).mean() - judge.agreement(original).mean()
        assert row["agreement_change"] == pytest.approx(change)
    halves = table[table["steps"] != "all steps"]
    assert set(halves["block"]) == {1} and set(halves["channels"]) == {"largest"}
    assert figures.regimes(table).axes and list(regimes.regime_table(table)) == [
        "channels",
        "steps",
        "block",
        "k = 1",
        "k = 4",
    ]
    assert len(regimes.regime_table(table)) == 6


def test_without_a_judge_nothing_is_decided(pipe: Any) -> None:
    run = samples(pipe, 2, seed=5, steps=2)
    trace = observe(pipe, run)
    table = regimes.sweep(pipe, run, trace, blocks=[0], counts=[2], timed=0, seed=0, judge=None)
    assert "agreement_change" not in table and set(table["regime"]) == {"undecided"}
    found = regimes.values(table)["regimes"]
    assert found["settings"] == 1 and list(found["random"]) == ["all steps"]
    assert list(found["largest"]) == ["all steps", "first half", "second half"]
    assert figures.regimes(table).axes


@pytest.mark.parametrize("k", [0, 9, 1.0, True])
def test_bad_counts_are_refused(pipe: Any, k: Any) -> None:
    run = samples(pipe, 1, seed=5, steps=1)
    trace = observe(pipe, run)  # 16 channels
    with pytest.raises(DgkitError, match=r"channel_counts=\[1, .*\] is not allowed because of .* from 1 to 8"):
        regimes.sweep(pipe, run, trace, blocks=[0], counts=[1, k], timed=0, seed=0, judge=None)


@pytest.mark.parametrize(
    ("low", "high", "change", "found"),
    [
        ((0.00, 0.04), (0.06, 0.90), (-0.04, 0.10), "detail only"),
        ((0.00, 0.04), (0.00, 0.04), (-0.04, 0.10), "almost nothing"),
        ((0.00, 0.04), (0.06, 0.90), (-0.30, -0.01), "content lost"),
        ((0.00, 0.04), (0.00, 0.04), (-0.30, -0.01), "content lost"),
        ((0.00, 0.04), (0.06, 0.90), (-0.06, 0.10), "undecided"),  # too few images to say that none is lost
        ((0.00, 0.06), (0.06, 0.90), (-0.04, 0.10), "undecided"),  # the structure changes, too
        ((0.00, 0.04), (0.04, 0.90), (-0.04, 0.10), "undecided"),
    ],
)
def test_regimes(low: tuple[float, float], high: tuple[float, float], change: tuple[float, float], found: str) -> None:
    row = {"agreement_change": sum(change) / 2}
    for name, ends in (("low_error", low), ("high_error", high), ("agreement_change", change)):
        row |= {f"{name}.low": ends[0], f"{name}.high": ends[1]}
    assert regimes.regime(row) == found
    assert regimes.regime({key: value for key, value in row.items() if "agreement" not in key}) == "undecided"


def test_values_count_settings_over_all_steps() -> None:
    measures = ("low_error", "high_error", "sharpness_ratio", "agreement_change")
    base = {f"{m}{end}": i + j / 10 for i, m in enumerate(measures) for j, end in enumerate(("", ".low", ".high"))}
    cases = [
        ("largest", "all steps", 0, 1, "detail only"),
        ("largest", "all steps", 0, 8, "content lost"),
        ("largest", "all steps", 3, 8, "neither"),
        ("random", "all steps", 0, 1, "detail only"),
        ("random", "all steps", 0, 8, "detail only"),
        ("random", "all steps", 3, 8, "neither"),
        ("largest", "first half", 3, 1, "content lost"),
    ]
    keys = ("channels", "steps", "block", "k", "regime")
    found = regimes.values(pd.DataFrame([dict(zip(keys, case, strict=True)) | base for case in cases]))["regimes"]
    largest, random = found["largest"], found["random"]
    assert found["settings"] == 3
    assert largest["collapse_at"] == 8 and random["collapse_at"] == 0
    assert largest["detail only"] == 1 and random["detail only"] == 2
    assert largest["content lost"] == 1 and random["content lost"] == 0
    expected = [[3, 1, 0, 0.1, 0.2, 1, 1.1, 1.2, 2, 2.1, 2.2, 3, 3.1, 3.2]]
    assert np.allclose(largest["first half"], expected)


def test_blocks_to_sweep() -> None:
    assert regimes.blocks_to_sweep(8, 4) == [0, 4, 6] and regimes.blocks_to_sweep(24, 5) == [0, 5, 12, 22]
    assert regimes.blocks_to_sweep(1, 0) == [0]
