"""Guidance, its controls and the ablations against the library itself, counts of blocks and examples by hand."""

import numpy as np
import pandas as pd
import pytest

import dgkit
from dgbook.chapters import ablations, guidance, intervention, layers, settings
from dgbook.chapters.settings import Setting
from dgbook.claims.results import leaves
from dgbook.measures.stats import Interval
from dgkit.anatomy import dissect
from dgkit.guidance import DG, SEG, Autoguidance
from dgkit.sampling import generate
from tests.dgbook.chapter_examples import BLOCK, BLOCKS, DIMS, WhiteJudge, halved, outcome, random_images, study_of


def counted(pipe, sample):
    """How many blocks `sample` computes, times images: every block computes its attention once."""
    rows = []
    handles = [
        block.attn1.register_forward_hook(lambda module, args, output: rows.append(len(output)))
        for block in pipe.transformer.transformer_blocks
    ]
    result = sample()
    for handle in handles:
        handle.remove()
    return result, sum(rows)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_guidance_cost(pipe, run, block):
    depth = block + 1
    for guidance_scale, passes in ((1.0, 2), (4.0, 3)):
        setting = settings.with_dg(1.5, block, DIMS, guidance_scale)
        guided, computed = counted(pipe, lambda setting=setting: settings.sample(pipe, run, setting))
        assert guided.block_evaluations == computed
        assert guided.cost_ratio == pytest.approx((passes * BLOCKS - depth) / (passes * BLOCKS))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guide_without_dg_is_a_plain_run(pipe, run, guidance_scale):
    guided, computed = counted(pipe, lambda: settings.sample(pipe, run, Setting(guidance_scale)))
    assert guided.block_evaluations == computed and guided.cost_ratio == 1
    plain = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=guidance_scale)
    assert np.array_equal(guided.images, plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guide_is_detail_guidance(pipe, run, guidance_scale):
    guided = settings.sample(pipe, run, settings.with_dg(1.5, BLOCK, DIMS, guidance_scale)).images
    with dgkit.detail_guidance(pipe, scale=1.5, block=BLOCK, dims=DIMS, sharing="none"):
        expected = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=guidance_scale)
    assert np.array_equal(guided, expected)
    assert not np.array_equal(guided, settings.sample(pipe, run, Setting(guidance_scale)).images)


def test_settings_of_table_1_start_from_the_same_noise(pipe, run):
    compared = guidance.guidance_settings(1.5, 0.5, 4.0, BLOCK, DIMS)
    assert compared == {
        "none": Setting(1.0),
        "dg": Setting(1.0, DG(scale=1.5, block=BLOCK, dims=DIMS)),
        "cfg": Setting(4.0),
        "cfg+dg": Setting(4.0, DG(scale=0.5, block=BLOCK, dims=DIMS)),
    }
    outcomes = settings.sample_all(pipe, run, compared)
    for name, setting in compared.items():
        assert np.array_equal(outcomes[name].images, settings.sample(pipe, run, setting).images)


def test_a_setting_at_another_scale():
    plain, beside = Setting(4.0), Setting(4.0, SEG(scale=1.0))
    assert (plain.scale, plain.at(2.0)) == (4.0, Setting(2.0))
    assert (beside.scale, beside.at(0.1)) == (1.0, Setting(4.0, SEG(scale=0.1)))
    assert settings.with_dg(0.0, BLOCK, DIMS, 4.0) == plain  # nothing to compute


def test_costs_of_settings(pipe, run):
    outcomes = settings.sample_all(pipe, run, guidance.guidance_settings(1.5, 0.5, 4.0, BLOCK, DIMS))
    table = settings.cost_table(outcomes)
    assert list(table.index) == ["none", "DG", "CFG", "CFG + DG"]
    # 3 images, 2 steps, 3 blocks a pass, of which DG's shares 2
    assert table["block evaluations"].tolist() == [6 * 3, 6 * 4, 6 * 6, 6 * 7]
    assert table["of full passes"].tolist() == pytest.approx([1, 4 / 6, 1, 7 / 9])
    assert settings.total_cost(outcomes) == 6 * 20


def guidance_values(outcomes, judge):
    images = {name: found.images for name, found in outcomes.items()}
    return guidance.guidance_values(outcomes, intervention.image_measures(images, "none", judge))


def test_guidance_values():
    images = random_images()
    outcomes = {
        "none": outcome(images),
        "dg": outcome(halved(images), cost_ratio=0.75),
        "cfg": outcome(np.zeros_like(images)),
        "cfg+dg": outcome(images, cost_ratio=0.875),
    }
    values = guidance_values(outcomes, None)
    found, contrast = values["settings"], values["contrast"]
    assert (found["dg"]["cost"], found["cfg+dg"]["cost"], found["none"]["cost"]) == (0.75, 0.875, 1)
    assert found["dg"]["sharpness_ratio"].value == pytest.approx(0.25)
    assert found["none"]["sharpness_ratio"] == Interval(1.0, 1.0, 1.0)
    assert list(contrast) == ["dg - none", "cfg+dg - cfg"]
    assert contrast["cfg+dg - cfg"]["sharpness_ratio"].value == pytest.approx(1 - 0)
    assert contrast["cfg+dg - cfg"]["high_error"].value == pytest.approx(0 - 1)


def test_controls_of_detail_guidance(pipe, run):
    outcomes = settings.sample_all(pipe, run, guidance.control_settings(pipe, 1.5, seed=3))
    with dgkit.guide(pipe, SEG(scale=1.5)):
        assert np.array_equal(outcomes["blurred"].images, run.images(pipe))
    worse = settings.noisy_copy(pipe.transformer, 3)
    with dgkit.guide(pipe, Autoguidance(scale=1.5, bad=worse)):
        assert np.array_equal(outcomes["autoguidance"].images, run.images(pipe))
    images = random_images()
    outcomes = {name: outcome(images) for name in ("none", "cfg", "cfg+dg", "blurred", "autoguidance")}
    outcomes["dg"], outcomes["blurred"] = outcome(np.zeros_like(images)), outcome(halved(images))
    contrast = guidance_values(outcomes, None)["contrast"]
    assert contrast["dg - blurred"]["sharpness_ratio"].value == pytest.approx(0 - 0.25)
    assert contrast["dg - autoguidance"]["sharpness_ratio"].value == pytest.approx(0 - 1)


def test_guidance_values_of_a_judge():
    """Any judge's agreement and distances, paired with what each is compared with."""
    images = random_images(6)
    batches = {"none": images, "dg": halved(images), "cfg": images // 4, "cfg+dg": images.copy()}
    outcomes = {name: outcome(batch) for name, batch in batches.items()}
    judge = WhiteJudge([*images[:4, 0, 0, 0], 1, 1])
    values = guidance_values(outcomes, judge)
    found, contrast = values["settings"], values["contrast"]
    assert found["none"]["agreement"].value == pytest.approx(4 / 6)
    distance = {name: judge.frechet(judge.features(batch)) for name, batch in batches.items()}
    assert {name: measured["frechet"].value for name, measured in found.items()} == pytest.approx(distance)
    for a, b in (("dg", "none"), ("cfg+dg", "cfg")):
        assert contrast[f"{a} - {b}"]["frechet"].value == pytest.approx(distance[a] - distance[b])
    right = (halved(images)[:, 0, 0, 0] == judge.conditions).mean()
    assert contrast["dg - none"]["agreement"].value == pytest.approx(right - 4 / 6)
    unjudged = leaves(guidance_values(outcomes, None))
    assert not [path for path in unjudged if "agreement" in path or "frechet" in path]


def test_hooks_are_gone_after_the_experiments(pipe, run):
    layers.token_maps(pipe, run, BLOCK, 7, count=1)
    intervention.intervene(study_of(pipe, run.first(1)), draws=1, drawn_samples=1)
    settings.sample(pipe, run.first(1), settings.with_dg(1.0, BLOCK, DIMS, 4.0))
    modules = [pipe.transformer, *(block.module for block in dissect(pipe).blocks)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_ablation_settings(pipe):
    def dg(s, w, block=BLOCK):
        return Setting(s, DG(scale=w, block=block, dims=DIMS))

    assert ablations.ablation_settings(pipe, (1.5, 0.5), BLOCK, DIMS, [0, 1, 2], [0, 3.5]) == {
        "block": {b: dg(1.0, 1.5, b) for b in range(BLOCKS)},
        "w": {0: Setting(), 1: dg(1.0, 1), 2: dg(1.0, 2)},
        "lambda": {0: dg(1, 0.5), 3.5: dg(4.5, 0.5)},
    }


def test_the_strip_over_depth_begins_without_guidance() -> None:
    images = [np.full((1, 2, 2, 3), level, np.uint8) for level in range(3)]
    strip = ablations.depth_strip(images[2], {0: outcome(images[0]), 7: outcome(images[1])})
    assert [*strip] == ["none", "block 0", "block 7"]
    assert [int(batch.max()) for batch in strip.values()] == [2, 0, 1]


def test_sweep_rows():
    images = random_images()
    table = ablations.sweep({0.5: outcome(halved(images)), 2.0: outcome(images)}, images, None)
    assert list(table.columns) == ["key", "measure", "value", "low", "high"]
    measures = ["low_error", "high_error", "sharpness_ratio", "high_frequency_change"]
    assert table["key"].tolist() == [0.5] * 4 + [2.0] * 4 and table["measure"].tolist() == measures * 2
    assert table["value"].to_numpy() == pytest.approx([0.25, 0.25, 0.25, 0, 0, 0, 1, 0], abs=1e-12)
    assert (table["low"] <= table["value"] + 1e-12).all() and (table["value"] <= table["high"] + 1e-12).all()


def test_sweep_pairs_the_agreement_with_that_of_the_baseline():
    images = random_images(6)
    judge = WhiteJudge([*images[:4, 0, 0, 0], 1, 1])
    table = ablations.sweep({1.0: outcome(halved(images))}, images, judge).set_index("measure")
    right, before = (halved(images)[:, 0, 0, 0] == judge.conditions), (images[:, 0, 0, 0] == judge.conditions)
    assert table.loc["agreement_change", "value"] == pytest.approx(right.mean() - before.mean())


def test_sweep_values():
    def table(keys, sharpness):
        rows = [{"key": k, "measure": "sharpness_ratio", "value": s, "low": s / 2, "high": s * 2}
                for k, s in zip(keys, sharpness, strict=True)]  # fmt: skip
        return pd.DataFrame(rows)

    values = ablations.sweep_values(
        {
            "block": table([0, 1, 2], [1.5, 0.5, 1.25]),  # a half moves further than one and a half times
            "w": table([0, 1, 2, 3], [1.0, 1.2, 1.1, 1.4]),
            "lambda": table([1, 2, 3], [3.0, 2.0, 1.0]),
        }
    )
    block, w, by_lambda = (values["sweeps"][name] for name in ("block", "w", "lambda"))
    assert (values["blocks"], block["strongest"]) == (3, 1)
    assert (block["strongest_ratio"], block["last_ratio"]) == (0.5, 1.25)
    assert w["rank_correlation"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # one pair of ranks swapped
    assert by_lambda["rank_correlation"] == pytest.approx(-1)
    assert np.array_equal(by_lambda["sharpness_ratio"], [[1, 3, 1.5, 6], [2, 2, 1, 4], [3, 1, 0.5, 2]])
