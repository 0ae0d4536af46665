"""The readings of the paper against guidance by hand, and their distances against a formula."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dgkit
from dgbook.chapters import readings
from dgbook.chapters.sampling import observe, samples
from dgbook.chapters.settings import Setting, sample
from dgbook.claims import paper
from tests.dgbook.chapter_examples import outcome
from tests.tiny_models import pipeline


@pytest.fixture
def pipe() -> Any:
    return pipeline("dit")


def test_every_reading_is_the_guidance_it_names(pipe: Any) -> None:
    run = samples(pipe, 2, seed=5, steps=4)
    trace = observe(pipe, run)
    settings = readings.settings(pipe, trace, 4.0, 1.5, 1, [3, 7])
    z = trace.mean_abs()[1].clone()
    z[[3, 7]] = 0
    by_hand: dict[str, tuple[float, dict[str, Any]]] = {
        "ours": (4.0, {"block": 1, "dims": [3, 7]}),
        "m counts from zero": (4.0, {"block": 2, "dims": [3, 7]}),
        "lambda is s": (3.0, {"block": 1, "dims": [3, 7]}),
        "another channel": (4.0, {"block": 1, "dims": [int(z.argmax())]}),
        "first half of the steps": (4.0, {"block": 1, "dims": [3, 7], "stop": 0.5}),
        "second half of the steps": (4.0, {"block": 1, "dims": [3, 7], "start": 0.5}),
    }
    cfg = {"cfg": Setting(4.0), "CFG at s + 1": Setting(5.0)}
    assert settings.keys() == cfg.keys() | by_hand.keys() and cfg.items() <= settings.items()
    for name, (s, options) in by_hand.items():
        with dgkit.detail_guidance(pipe, scale=1.5, **options):
            expected = replace(run, guidance_scale=s).images(pipe)
        assert np.array_equal(sample(pipe, run, settings[name]).images, expected), name
    assert "m counts from zero" not in readings.settings(pipe, trace, 4.0, 1.5, 2, [3])  # the last block


def test_no_reading_has_a_scale_below_that_of_no_cfg(pipe: Any) -> None:
    trace = observe(pipe, samples(pipe, 1, seed=5, steps=1))
    assert readings.settings(pipe, trace, 1.5, 1.0, 1, [3])["lambda is s"].guidance_scale == 1.0


def test_distances_are_shares_of_what_dg_changes() -> None:
    ours = np.random.default_rng(0).integers(90, 110, (3, 8, 8, 3), dtype=np.uint8)
    runs = {
        readings.CFG: outcome(ours + 40),
        readings.OURS: outcome(ours),
        "near": outcome(ours + 10),
        "far": outcome(ours - 60),
    }
    values = readings.values(runs)
    expected = {readings.CFG: 1, readings.OURS: 0, "near": 0.25, "far": 1.5}
    assert {name: found["distance"].value for name, found in values["settings"].items()} == pytest.approx(expected)
    table = readings.table(values)
    assert list(table.index) == ["CFG", "as in this book", "near", "far"]
    assert table.loc["near", "distance to our reading"].startswith("0.25 [")


def test_every_ambiguity_says_where_and_what_is_done() -> None:
    points = paper.ambiguities()
    assert list(points.columns) == ["id", "where", "issue", "taken_as", "matters"]
    assert points["id"].is_unique and (points != "").all(axis=None)
    named = [part.removeprefix("reading: ").removeprefix("readings: ") for part in points["matters"]]
    tested = {
        reading
        for text in named
        for reading in ("m counts from zero", "lambda is s", "another channel")
        if reading in text
    }
    assert tested == {"m counts from zero", "lambda is s", "another channel"}


def test_table_2_has_one_average_that_is_not_a_mean() -> None:
    """The point "table2-average", by the paper's own numbers."""
    table = paper.table(2)
    styles = [c for c in table.columns if c not in ("train", "method", "average", "aesthetic")]
    off = table[(table[styles].mean(axis=1) - table["average"]).abs() > 0.0051]
    assert list(off["method"]) == ["DG"] and isinstance(off, pd.DataFrame)
