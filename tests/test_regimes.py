"""The sweep over channels, blocks and steps against edits by hand, and the regimes against cases made by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dgkit
from dgkit import experiments, figures, regimes
from dgkit.errors import DgkitError
from dgkit.metrics.spectrum import band_error
from tests.tiny_models import pipeline


@pytest.fixture
def pipe() -> Any:
    return pipeline("dit")


class Bright:
    """A judge that finds what was asked for in images that are brighter than a threshold."""

    sharpness_of_real = 1.0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def agreement(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2, 3)) > self.threshold


def test_every_setting_is_the_edit_it_names(pipe: Any) -> None:
    run = experiments.samples(pipe, 3, seed=5, steps=4)
    trace = experiments.observe(pipe, run)
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
    assert figures.regimes(table).axes and regimes.regime_table(table).shape == (6, 2)


def test_without_a_judge_no_content_is_called_lost(pipe: Any) -> None:
    run = experiments.samples(pipe, 2, seed=5, steps=2)
    trace = experiments.observe(pipe, run)
    table = regimes.sweep(pipe, run, trace, blocks=[0], counts=[2], timed=0, seed=0, judge=None)
    assert "agreement_change" not in table and regimes.COLLAPSE not in set(table["regime"])
    assert figures.regimes(table).axes


@pytest.mark.parametrize("k", [0, 9, 1.0, True])
def test_bad_counts_are_refused(pipe: Any, k: Any) -> None:
    run = experiments.samples(pipe, 1, seed=5, steps=1)
    trace = experiments.observe(pipe, run)  # 16 channels
    with pytest.raises(DgkitError, match=r"channel_counts=\[1, .*\] is not allowed because of .* from 1 to 8"):
        regimes.sweep(pipe, run, trace, blocks=[0], counts=[1, k], timed=0, seed=0, judge=None)


def row(low: float, high: float, change: tuple[float, float] | None = None) -> dict[str, float]:
    """Errors with intervals of 0.1 to both sides, and the interval of the change of agreement."""
    made = {"low_error.low": low - 0.1, "low_error.high": low + 0.1, "high_error.low": high - 0.1}
    return made if change is None else made | {"agreement_change.low": change[0], "agreement_change.high": change[1]}


def test_regimes() -> None:
    assert regimes.regime(row(0.1, 0.5)) == "detail only"
    assert regimes.regime(row(0.1, 0.5, (-0.2, 0.0))) == "detail only"  # the interval holds no change
    assert regimes.regime(row(0.1, 0.5, (-0.3, -0.1))) == "content lost"
    assert regimes.regime(row(0.4, 0.5, (-0.1, 0.1))) == "neither"  # the intervals overlap


def test_values_count_settings_over_all_steps() -> None:
    base = {"low_error": 0.1, "high_error": 0.5, "sharpness_ratio": 1.0, "agreement_change": 0.0}
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
    found = regimes.values(pd.DataFrame([dict(zip(keys, case, strict=True)) | base for case in cases]))
    assert found["regimes.settings"] == 3
    assert found["regimes.largest.collapse_at"] == 8 and found["regimes.random.collapse_at"] == 0
    assert found["regimes.largest.detail only"] == 1 and found["regimes.random.detail only"] == 2
    assert found["regimes.largest.content lost"] == 1 and found["regimes.random.content lost"] == 0
    assert found["regimes.largest.first half"].tolist() == [[3, 1, 0.1, 0.5, 1.0, 0.0]]


def test_blocks_to_sweep() -> None:
    assert regimes.blocks_to_sweep(8, 4) == [0, 4, 6] and regimes.blocks_to_sweep(24, 5) == [0, 5, 12, 22]
    assert regimes.blocks_to_sweep(1, 0) == [0]
