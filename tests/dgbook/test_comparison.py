"""The comparison of methods: equal cost, honest choice of scales, distances as defined."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dgkit
from dgbook.chapters import comparison, guidance, settings
from dgbook.chapters.comparison import chosen_scales, comparison_table, comparison_values, methods, scales_of
from dgbook.chapters.sampling import Samples, samples
from dgbook.chapters.settings import Outcome, Setting
from dgbook.claims import names
from dgbook.claims.results import Record, leaves
from dgbook.measures.judges import FashionJudge, judge_of, tile_captions
from dgkit.errors import DgkitError
from dgkit.guidance import METHODS, PAG, SGPrev
from tests.dgbook.chapter_examples import outcome
from tests.tiny_models import build, pipeline, sample
from training import autoencoder, flow


@pytest.fixture(scope="module")
def pipe() -> Any:
    return dgkit.load("tiny-dit")


@pytest.fixture(scope="module")
def run(pipe: Any) -> Samples:
    return samples(pipe, 2, 0, 6)


def test_every_registered_method_is_compared(pipe: Any) -> None:
    compared = methods(pipe, 4.0, 2, [7], 0)
    assert {type(setting.method) for setting in compared.values() if setting.method} == set(METHODS.values()) - {SGPrev}
    assert compared.keys() == {"none", *comparison.SCALES}
    assert all(names.label(name) != name for name in comparison.SCALES)


def test_steps_make_the_costs_equal(pipe: Any, run: Samples) -> None:
    """Budget: 2 passes x 8 blocks x 6 steps = 96 evaluations an image; each method within half a step of it."""
    compared = comparison.compare(pipe, run, methods(pipe, 4.0, 2, [7], 0), {"cfg+pag": 0.3})
    per_step = {"none": 8, "cfg": 16, "apg": 16, "cfg+dg": 16 + 5, "cfg+pag": 16 + 4, "cfg+slg": 16 + 3}
    for name, cost in per_step.items():
        assert compared[name].block_evaluations == 2 * cost * compared[name].steps
        assert abs(cost * compared[name].steps - 96) <= cost / 2
    assert (compared["cfg+pag"].setting.scale, compared["cfg+seg"].setting.scale) == (0.3, 1.0)
    assert all(len(c.images) == 2 for c in compared.values())
    assert not np.array_equal(compared["cfg"].images, compared["apg"].images)


def test_the_chosen_scale_has_the_lowest_distance(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    """With distances planted by scale, in two methods whose best differs."""
    planted = {("a", 1.0): 3.0, ("a", 2.0): 1.0, ("b", 1.0): 0.5, ("b", 2.0): 2.0}
    seen: list[tuple[str, float]] = []

    def compare(pipe: Any, run: Any, settings: Any, scales: Any) -> dict[str, Outcome]:
        ((name, setting),) = settings.items()
        seen.append((name, setting.guidance_scale))
        return {name: outcome(np.zeros((1, 28, 28, 3), np.uint8))}

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(comparison, "SCALES", {"a": (1.0, 2.0), "b": (1.0, 2.0)})
    monkeypatch.setattr(FashionJudge, "frechet", lambda judge, features: planted[seen[-1]])
    compared = {"a": Setting(9.0), "b": Setting(9.0), "none": Setting()}
    big = samples(pipe, 150, 0, 2)
    table = comparison.choose_scales(pipe, big, compared)
    assert chosen_scales(table) == {"a": 2.0, "b": 1.0} and list(seen) == list(planted)
    with pytest.raises(DgkitError, match="calibration_samples=10 is not allowed: give 150 or more"):
        comparison.choose_scales(pipe, big.first(10), compared)
    seen.clear()
    assert comparison.scales_for(pipe, compared, None, 150, 0, 2) == {"a": 2.0, "b": 1.0} and seen == list(planted)


def test_scales_are_not_chosen_without_a_judge() -> None:
    unknown = pipeline("dit")
    with pytest.raises(DgkitError, match="calibration_samples=160 is not allowed: .* which this model has not; give 0"):
        comparison.choose_scales(unknown, samples(unknown, 160, 0, 2), {"cfg": Setting(4.0)})


def test_scales_are_chosen_with_the_images_asked_for(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    asked = []

    def choose_scales(pipe: Any, run: Any, settings: Any) -> pd.DataFrame:
        asked.append(run)
        return pd.DataFrame({"method": ["a"], "scale": [2.0], "frechet": [1.0], "chosen": [True]})

    monkeypatch.setattr(comparison, "choose_scales", choose_scales)
    assert comparison.scales_for(pipe, {}, Record("n", {}, {}, {"methods": {"a": {"scale": 0.3}}}), 0, 5, 7) == {
        "a": 0.3
    }
    assert comparison.scales_for(pipe, {}, None, 0, 5, 7) == {} and not asked
    assert comparison.scales_for(pipe, {}, Record("n", {}, {}, {"methods": {"a": {"scale": 0.3}}}), 12, 5, 7) == {
        "a": 2.0
    }
    assert asked == [samples(pipe, 12, 5, 7)]


def test_scales_come_from_the_reference_run() -> None:
    assert scales_of(None) == {}
    measured = {"cfg+dg": {"scale": 0.3, "steps": 15}}
    assert scales_of(Record("n", {}, {}, {"methods": measured, "blocks": 8})) == {"cfg+dg": 0.3}


def test_values_and_table(pipe: Any, run: Samples) -> None:
    images = replace(run, guidance_scale=4.0).images(pipe)
    same = outcome(images.copy(), 180, setting=Setting(4.0, PAG(scale=0.5)), steps=5)
    compared = {"cfg": outcome(images, 192, setting=Setting(4.0), steps=6), "cfg+pag": same}
    values = comparison_values(compared, FashionJudge(run.conditions))
    found = values["methods"]
    assert found["cfg+pag"]["sharpness_ratio"].value == pytest.approx(1.0)
    assert [found["cfg+pag"][measure] for measure in ("scale", "steps", "cost")] == [0.5, 5, 90.0]
    assert "frechet" not in found["cfg"], "two images are too few for a Frechet distance"
    table = comparison_table(values)
    assert list(table.index) == ["CFG", "CFG + PAG"]
    assert table.loc["CFG + PAG"].tolist()[:4] == ["0.5", "5", "90", "1.00"]
    assert all("agreement" in measured for measured in found.values()) and "agreement" in table
    assert not [path for path in leaves(comparison_values(compared, None)) if "agreement" in path]


def test_frechet_needs_enough_images_and_is_paired_with_cfg(pipe: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (160, 28, 28, 3), dtype=np.uint8)
    compared = {"cfg": outcome(noise), "same": outcome(noise.copy())}
    values = comparison_values(compared, FashionJudge([i % 10 for i in range(160)]))
    change = values["methods"]["same"]["frechet_change"]
    assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    assert {"Frechet", "change"} <= set(comparison_table(values).columns)


def test_noisy_copy_is_worse_by_the_stated_amount_and_leaves_the_model_alone() -> None:
    model = build("dit")
    before = {name: value.clone() for name, value in model.named_parameters()}
    noisy = dict(settings.noisy_copy(model, seed=1).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    large = "transformer_blocks.0.norm1.linear.weight"
    added = (noisy[large] - before[large]).detach()
    assert float(added.std() / before[large].std()) == pytest.approx(0.1, rel=0.05)
    assert all(torch.equal(noisy[n], before[n]) for n in before if before[n].ndim == 1)


def test_the_distance_is_zero_for_full_dg_and_one_for_none(pipe: Any, run: Samples) -> None:
    values = comparison.schedule_values(pipe, replace(run, steps=8), 0.5, 2, [7, 83], 4.0)
    reuse = values["reuse"]
    assert reuse["every-1"]["distance"].value == 0.0
    # CFG + DG computes 2 x 8 + 5 blocks a step, of which every 2nd step saves the 5
    assert reuse["every-1"]["cost"] == pytest.approx(21 / 16)
    assert reuse["every-2"]["cost"] == pytest.approx((21 + 16) / 32)
    # DG in steps 0, 2, 4, 6; u in 0, 1, 2, then 4, 6
    assert reuse["cheap"]["cost"] == pytest.approx((8 * 8 + 4 * 5 + 5 * 8) / (8 * 16))
    assert (reuse["none"]["cost"], reuse["none"]["distance"].value) == (1.0, pytest.approx(1.0))
    assert reuse["SG-prev in place of DG"]["cost"] == 1.0 and set(comparison.SCHEDULES) < set(reuse)
    images = replace(run, guidance_scale=4.0).images(pipe).astype(float)
    black = np.zeros_like(images)
    assert comparison.distance(images, black) == pytest.approx([np.sqrt((i**2).mean()) for i in images])
    table = comparison.schedule_table(values)
    assert list(table.index) == [names.label(name) for name in reuse]
    assert table.loc["every step"].tolist() == ["1.31", "0.000 [0.000, 0.000]"]


def test_a_small_run_shows_the_reference_runs_numbers() -> None:
    small, large = ({"methods": {"cfg": measured}} for measured in ({"steps": 20}, {"steps": 20, "frechet": 3.0}))
    reference = Record("n", {}, {}, {"methods": {"cfg": {"frechet": 2.5}}})
    assert comparison.larger_run(small, reference) == {"methods": {"cfg": {"frechet": 2.5}}}
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
    run = samples(pipe, 2, 0, 2)
    assert run.conditions == list(captions[:2])
    known = methods(pipe, 4.0, 2, [7], 0)
    assert len(known) == 2 + len(METHODS) - 1  # SG-prev is among the schedules
    per_step = {"none": 8, "cfg": 16, "apg": 16, "cfg-zero*": 16, "cfg+dg": 16 + 5}
    compared = comparison.compare(pipe, run, {method: known[method] for method in per_step}, {})
    for method, cost in per_step.items():
        assert compared[method].block_evaluations == 2 * cost * compared[method].steps
        assert abs(cost * compared[method].steps - 32) <= cost / 2
    assert all(c.images.shape == (2, 32, 32, 3) for c in compared.values())
    values = comparison_values(compared, judge_of(pipe, run.conditions))["methods"]
    assert all("agreement" in values[method] for method in per_step)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_methods_run_on_text_pipelines_too(name: str) -> None:
    """At the settings of the comparison; each changes the images of CFG, and of each other."""
    pipe = pipeline(name)
    seen = [sample(pipe, name, guidance_scale=4.0)]
    for setting in methods(pipe, 4.0, 1, [3], 0).values():
        if setting.method is not None:
            with dgkit.guide(pipe, setting.method):
                seen.append(sample(pipe, name, guidance_scale=setting.guidance_scale))
    assert len(seen) == 12
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_cfg_zero_has_its_zero_step_where_the_velocity_is_predicted(pipe: Any) -> None:
    steps = {}
    for name, model in (("sd3", pipeline("sd3")), ("flux", pipeline("flux")), ("dit", pipe)):
        steps[name] = methods(model, 4.0, 1, [3], 0)["cfg-zero*"].method.zero_steps  # type: ignore[union-attr]
    assert steps == {"sd3": 1, "flux": 1, "dit": 0}


def test_large_models_are_not_copied(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(settings, "LARGEST_COPY", 1_000)
    monkeypatch.setattr(settings, "noisy_copy", lambda *_: pytest.fail("copied"))
    assert "cfg+autoguidance" not in methods(pipe, 4.0, 2, [7], 0)
    assert list(guidance.control_settings(pipe, 1.0, 0)) == ["blurred"]
