"""The comparison of methods: equal cost, honest choice of scales, distances as defined."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dgkit
from dgbook import chapters
from dgbook.chapters import comparison, guidance
from dgbook.chapters.comparison import (
    Compared,
    Entry,
    chosen_scales,
    comparison_table,
    comparison_values,
    entries,
    scales_of,
)
from dgbook.claims.results import Record
from dgbook.measures.judges import FashionJudge, judge_of, tile_captions
from dgkit.errors import DgkitError
from dgkit.guidance import METHODS, PAG
from tests.tiny_models import build, pipeline, sample
from training import autoencoder, flow


@pytest.fixture(scope="module")
def pipe() -> Any:
    return dgkit.load("tiny-dit")


@pytest.fixture(scope="module")
def run(pipe: Any) -> chapters.Samples:
    return chapters.samples(pipe, 2, 0, 6)


def test_every_registered_method_is_compared(pipe: Any) -> None:
    compared = {type(entry.method) for entry in entries(pipe, 4.0, 2, [7], 0).values() if entry.method}
    assert compared == set(METHODS.values())


def test_steps_make_the_costs_equal(pipe: Any, run: chapters.Samples) -> None:
    """Budget: 2 passes x 8 blocks x 6 steps = 96 evaluations an image; each method within half a step of it."""
    methods = entries(pipe, 4.0, 2, [7], 0)
    compared = comparison.compare(pipe, run, methods, {})
    per_step = {"none": 8, "CFG": 16, "APG": 16, "CFG + DG": 16 + 5, "CFG + PAG": 16 + 4, "CFG + SLG": 16 + 3}
    for name, cost in per_step.items():
        assert compared[name].per_image == cost * compared[name].steps
        assert abs(compared[name].per_image - 96) <= cost / 2
    assert all(len(c.images) == 2 for c in compared.values())
    assert not np.array_equal(compared["CFG"].images, compared["APG"].images)


def test_scales_are_set_where_each_method_has_them() -> None:
    plain = Entry(None, 4.0, (2.0,))
    assert plain.at(2.0).guidance_scale == 2.0
    beside = Entry(PAG(scale=1.0), 4.0, (0.1,)).at(0.1)
    assert beside.guidance_scale == 4.0 and beside.method is not None and beside.method.scale == 0.1


def test_the_chosen_scale_has_the_lowest_distance(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    """With distances planted by scale, in two methods whose best differs."""
    planted = {("a", 1.0): 3.0, ("a", 2.0): 1.0, ("b", 1.0): 0.5, ("b", 2.0): 2.0}
    seen: list[tuple[str, float]] = []

    def compare(pipe: Any, run: Any, methods: Any, scales: Any) -> dict[str, Compared]:
        ((name, entry),) = methods.items()
        seen.append((name, entry.guidance_scale))
        return {name: Compared(np.zeros((1, 28, 28, 3), np.uint8), 0.0, 1, 1.0)}

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(FashionJudge, "frechet", lambda judge, features: planted[seen[-1]])
    methods = {"a": Entry(None, 9.0, (1.0, 2.0)), "b": Entry(None, 9.0, (1.0, 2.0)), "none": Entry(None, 1.0)}
    big = chapters.samples(pipe, 150, 0, 2)
    table = comparison.choose_scales(pipe, big, methods)
    assert chosen_scales(table) == {"a": 2.0, "b": 1.0} and list(seen) == list(planted)
    with pytest.raises(DgkitError, match="calibration_samples=10 is not allowed: give 150 or more"):
        comparison.choose_scales(pipe, big.first(10), methods)
    seen.clear()
    assert comparison.scales_for(pipe, methods, None, 150, 0, 2) == {"a": 2.0, "b": 1.0} and seen == list(planted)


def test_scales_are_not_chosen_without_a_judge() -> None:
    unknown = pipeline("dit")
    with pytest.raises(DgkitError, match="calibration_samples=160 is not allowed: .* which this model has not; give 0"):
        comparison.choose_scales(unknown, chapters.samples(unknown, 160, 0, 2), {"a": Entry(None, 4.0, (2.0,))})


def test_scales_are_chosen_with_the_images_asked_for(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    asked = []

    def choose_scales(pipe: Any, run: Any, methods: Any) -> pd.DataFrame:
        asked.append(run)
        return pd.DataFrame({"method": ["a"], "scale": [2.0], "frechet": [1.0], "chosen": [True]})

    monkeypatch.setattr(comparison, "choose_scales", choose_scales)
    assert comparison.scales_for(pipe, {}, Record("n", {}, {}, {"a.scale": 0.3}), 0, 5, 7) == {"a": 0.3}
    assert comparison.scales_for(pipe, {}, None, 0, 5, 7) == {} and not asked
    assert comparison.scales_for(pipe, {}, Record("n", {}, {}, {"a.scale": 0.3}), 12, 5, 7) == {"a": 2.0}
    assert asked == [chapters.samples(pipe, 12, 5, 7)]


def test_scales_come_from_the_reference_run() -> None:
    assert scales_of(None) == {}
    assert scales_of(Record("n", {}, {}, {"CFG + DG.scale": 0.3, "CFG + DG.steps": 15})) == {"CFG + DG": 0.3}


def test_values_and_table(pipe: Any, run: chapters.Samples) -> None:
    images = run.images(pipe, 4.0)
    compared = {"CFG": Compared(images, 4.0, 6, 96.0), "same": Compared(images.copy(), 0.5, 5, 90.0)}
    values = comparison_values(compared, FashionJudge(run.conditions))
    assert values["same.sharpness_ratio"].value == pytest.approx(1.0) and values["same.steps"] == 5
    assert "CFG.frechet" not in values, "two images are too few for a Frechet distance"
    table = comparison_table(values)
    assert list(table.index) == ["CFG", "same"]
    assert table.loc["same"].tolist()[:4] == ["0.5", "5", "90", "1.00"]
    assert {"CFG.agreement", "same.agreement"} <= set(values) and "agreement" in table
    assert "agreement" not in " ".join(comparison_values(compared, None))


def test_frechet_needs_enough_images_and_is_paired_with_cfg(pipe: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (160, 28, 28, 3), dtype=np.uint8)
    compared = {"CFG": Compared(noise, 4.0, 6, 96.0), "same": Compared(noise.copy(), 1.0, 6, 96.0)}
    values = comparison_values(compared, FashionJudge([i % 10 for i in range(160)]))
    change = values["same.frechet_change"]
    assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    assert {"Frechet", "change"} <= set(comparison_table(values).columns)


def test_noisy_copy_is_worse_by_the_stated_amount_and_leaves_the_model_alone() -> None:
    model = build("dit")
    before = {name: value.clone() for name, value in model.named_parameters()}
    noisy = dict(chapters.noisy_copy(model, seed=1).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    large = "transformer_blocks.0.norm1.linear.weight"
    added = (noisy[large] - before[large]).detach()
    assert float(added.std() / before[large].std()) == pytest.approx(0.1, rel=0.05)
    assert all(torch.equal(noisy[n], before[n]) for n in before if before[n].ndim == 1)


def test_reuse_distance_is_zero_for_full_dg_and_one_for_none(pipe: Any, run: chapters.Samples) -> None:
    values = comparison.reuse_values(pipe, replace(run, steps=8), 0.5, 2, [7, 83], 4.0)
    assert values["every step.reuse_distance"].value == 0.0
    # CFG + DG computes 2 x 8 + 5 blocks a step, of which every 2nd step saves the 5
    assert values["every step.reuse_cost"] == pytest.approx(21 / 16)
    assert values["every 2nd step.reuse_cost"] == pytest.approx((21 + 16) / 32)
    images = run.images(pipe, 4.0).astype(float)
    black = np.zeros_like(images)
    assert comparison.distance(images, black) == pytest.approx([np.sqrt((i**2).mean()) for i in images])
    assert list(comparison.reuse_table(values).index) == list(comparison.REUSES)


def test_reuse_table_keeps_one_row_per_setting() -> None:
    fake = {f"{n}.reuse_cost": 1.0 for n in comparison.REUSES} | {f"{n}.reuse_distance": 0.5 for n in comparison.REUSES}
    table = comparison.reuse_table(fake)
    assert isinstance(table, pd.DataFrame) and len(table) == len(comparison.REUSES)


def test_a_small_run_shows_the_reference_runs_numbers() -> None:
    small, large = {"CFG.steps": 20}, {"CFG.steps": 20, "CFG.frechet": 3.0}
    reference = Record("n", {}, {}, {"CFG.frechet": 2.5})
    assert comparison.larger_run(small, reference) == {"CFG.frechet": 2.5}
    assert comparison.larger_run(large, reference) is large and comparison.larger_run(small, None) is small


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_text_models_are_compared_and_judged(name: str) -> None:
    """Untrained ones of the shipped shapes (8 blocks), from prompts; Flux, whose CFG is a second call, as well."""
    recipes = Path(flow.__file__).parent
    torch.manual_seed(0)
    captions = tile_captions()
    network = flow.FAMILIES[name](flow.Recipe.read(recipes / f"{name}.toml"), captions).eval()
    torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)  # zero before training
    vae = autoencoder.build_autoencoder(autoencoder.Recipe.read(recipes / "tile-autoencoder.toml").config)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    pipe = network.pipeline(vae.eval())
    run = chapters.samples(pipe, 2, 0, 2)
    assert run.conditions == list(captions[:2])
    methods = entries(pipe, 4.0, 2, [7], 0)
    assert len(methods) == 2 + len(METHODS)
    per_step = {"none": 8, "CFG": 16, "APG": 16, "CFG-Zero*": 16, "CFG + DG": 16 + 5}
    compared = comparison.compare(pipe, run, {method: methods[method] for method in per_step}, {})
    for method, cost in per_step.items():
        assert compared[method].per_image == cost * compared[method].steps
        assert abs(compared[method].per_image - 32) <= cost / 2
    assert all(c.images.shape == (2, 32, 32, 3) for c in compared.values())
    values = comparison_values(compared, judge_of(pipe, run.conditions))
    assert {f"{method}.agreement" for method in per_step} <= set(values)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_methods_run_on_text_pipelines_too(name: str) -> None:
    """At the settings of the comparison; each changes the images of CFG, and of each other."""
    pipe = pipeline(name)
    seen = [sample(pipe, name, guidance_scale=4.0)]
    for entry in entries(pipe, 4.0, 1, [3], 0).values():
        if entry.method is not None:
            with dgkit.guide(pipe, entry.method):
                seen.append(sample(pipe, name, guidance_scale=entry.guidance_scale))
    assert len(seen) == 12
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_cfg_zero_has_its_zero_step_where_the_velocity_is_predicted(pipe: Any) -> None:
    steps = {}
    for name, model in (("sd3", pipeline("sd3")), ("flux", pipeline("flux")), ("dit", pipe)):
        steps[name] = entries(model, 4.0, 1, [3], 0)["CFG-Zero*"].method.zero_steps  # type: ignore[union-attr]
    assert steps == {"sd3": 1, "flux": 1, "dit": 0}


def test_large_models_are_not_copied(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(guidance, "LARGEST_COPY", 1_000)
    monkeypatch.setattr(guidance, "noisy_copy", lambda *_: pytest.fail("copied"))
    assert "CFG + autoguidance" not in entries(pipe, 4.0, 2, [7], 0)
    assert list(chapters.control_settings(pipe, 1.0, 0)) == ["blurred"]
