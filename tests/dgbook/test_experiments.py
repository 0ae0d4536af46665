"""Experiments against hooks put in by hand, closed forms and examples worked by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.special import softmax

import dgkit
from dgbook import chapters
from dgbook.chapters import GuidedRun, Setting, imagenet, intervention, layers
from dgbook.measures.classifier import fashion_classifier
from dgbook.measures.datasets import FASHION_MNIST_CLASSES
from dgbook.measures.judges import FashionJudge, Judge
from dgbook.measures.spectrum import band_error, sharpness
from dgbook.measures.stats import Interval
from dgkit import guidance, zoo
from dgkit.anatomy import dissect
from dgkit.errors import DgkitError
from dgkit.guidance import SEG, Autoguidance
from dgkit.massive import Massive
from dgkit.paths import DATA
from dgkit.sampling import generate
from tests import tiny_models

BLOCKS, CHANNELS, BLOCK, DIMS = 3, 16, 1, [3, 7]


@pytest.fixture
def pipe():
    """A random DiT whose labels are those of Fashion-MNIST."""
    pipe = tiny_models.pipeline("dit")
    pipe.labels = {name: i for i, name in enumerate(FASHION_MNIST_CLASSES)}
    return pipe


@pytest.fixture
def run(pipe):
    return chapters.samples(pipe, 3, seed=5, steps=2)


def random_images(count=4, size=28, seed=0):
    even = np.random.default_rng(seed).integers(0, 128, (count, size, size, 3), dtype=np.uint8) * 2
    return even  # so that halving is exact


def halved(images):
    return images // 2


# What to generate -----------------------------------------------------------------------------------------------------


def test_samples_cycle_through_the_classes_with_distinct_seeds(pipe):
    run = chapters.samples(pipe, 23, seed=1, steps=4, guidance_scale=2.0)
    assert run.conditions == [*range(10), *range(10), 0, 1, 2]
    assert len(set(run.seeds)) == 23 and (run.steps, run.guidance_scale) == (4, 2.0)
    assert not set(run.seeds) & set(chapters.samples(pipe, 23, seed=2, steps=4).seeds)
    assert run.seeds[:5] == chapters.samples(pipe, 5, seed=1, steps=4).seeds


def test_samples_of_a_text_pipeline_are_the_shipped_prompts():
    prompts = (DATA / "prompts" / "offline.txt").read_text().strip().split("\n")
    run = chapters.samples(tiny_models.pipeline("sd3"), len(prompts) + 1, seed=0, steps=1)
    assert run.conditions == [*prompts, prompts[0]] and all(prompt.strip() for prompt in run.conditions)


def test_samples_without_labels_use_the_class_table():
    assert chapters.samples(tiny_models.pipeline("dit"), 1001, seed=0, steps=1).conditions == [*range(1000), 0]


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_a_bad_number_of_samples_is_refused(pipe, count):
    with pytest.raises(DgkitError, match="num_samples"):
        chapters.samples(pipe, count, seed=0, steps=1)


def test_a_run_generates_its_own_images(pipe, run):
    assert run.first(2) == chapters.Samples(run.conditions[:2], run.seeds[:2], 2, 1.0)
    assert np.array_equal(run.images(pipe), generate(pipe, run.conditions, run.seeds, num_inference_steps=2))
    guided = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=5.0)
    assert np.array_equal(run.images(pipe, 5.0), guided) and not np.array_equal(run.images(pipe), guided)


def test_condition_names(pipe):
    assert chapters.condition_names(pipe, [2, 0, 1000]) == ["pullover", "T-shirt", "1000"]
    assert chapters.condition_names(tiny_models.pipeline("sd3"), ["a cat"]) == ["a cat"]
    synonyms = SimpleNamespace(labels={"ankle boot": 9, "boot": 9})
    assert chapters.condition_names(synonyms, [9]) == ["ankle boot"]


def test_each_condition_as_often_as_asked_in_turn(pipe):
    run = chapters.samples(pipe, 6, seed=1, steps=4, each=3)
    assert run.conditions == [0, 1, 0, 1, 0, 1] and len(set(run.seeds)) == 6
    # ten classes, four times each: the same as without `each`
    assert chapters.samples(pipe, 40, seed=1, steps=4, each=4) == chapters.samples(pipe, 40, seed=1, steps=4)


@pytest.mark.parametrize("each", [0, -2, 2.0, True, None])
def test_a_bad_number_of_images_per_condition_is_refused(pipe, each):
    with pytest.raises(DgkitError, match="images_per_condition=.* is not allowed: give an integer, 1 or above"):
        chapters.samples(pipe, 8, seed=0, steps=1, each=each)


def test_images_per_condition_divide_the_number_of_samples(pipe):
    with pytest.raises(DgkitError, match="images_per_condition=3 is not allowed: give a divisor of num_samples=8"):
        chapters.samples(pipe, 8, seed=0, steps=1, each=3)


# The subject ----------------------------------------------------------------------------------------------------------


def preset(monkeypatch, block, dims, scale=None):
    w_cfg = None if scale is None else scale / 2
    row = zoo.Model(None, "DiTPipeline", "DiTTransformer2DModel", BLOCKS, CHANNELS, "", 0.0,
                    zoo.Preset(block, dims, scale, w_cfg, 1.0, 1, "this test"))  # fmt: skip
    monkeypatch.setattr(zoo, "MODELS", {"random": row})


def planted(pipe, block, dim):
    """Make one channel of one block's output large by hand, before anything is recorded."""

    def hook(module, args, output):
        output = output.clone()
        output[..., dim] += 500.0
        return output

    return pipe.transformer.transformer_blocks[block].register_forward_hook(hook)


def test_subject_as_given(monkeypatch, pipe, run):
    preset(monkeypatch, 2, (9,))
    trace = chapters.observe(pipe, run)
    assert chapters.subject(trace, 1, [4, 2]) == (1, [4, 2])
    assert chapters.subject(trace, None, [4]) == (2, [4])
    assert chapters.subject(trace, 0, None) == (0, [9])


def test_subject_of_the_preset(monkeypatch, pipe, run):
    preset(monkeypatch, 2, (9, 11))
    assert chapters.subject(chapters.observe(pipe, run), None, None) == (2, [9, 11])


def test_subject_detected(monkeypatch, pipe, run):
    handle = planted(pipe, 0, 5)
    trace = chapters.observe(pipe, run)
    handle.remove()
    assert chapters.subject(trace, None, None) == (0, [5])  # a quarter of the way into three blocks
    preset(monkeypatch, 1, None)  # a preset that states the block alone: the planted channel flows on through it
    assert chapters.subject(trace, None, None) == (1, [5])


def test_subject_is_the_largest_channel_when_none_is_massive(pipe, run):
    trace = chapters.observe(pipe, run, keep=[1])
    assert dgkit.detect_massive(trace).in_block(1) == []
    largest = trace.tensors(1).abs().mean((0, 1)).argmax().item()
    assert chapters.subject(trace, 1, None) == (1, [largest])


@pytest.mark.parametrize(("block", "dims"), [(3, [0]), (-1, [0]), (0, [16]), (0, [])])
def test_a_bad_subject_is_refused(pipe, run, block, dims):
    with pytest.raises(DgkitError):
        chapters.subject(chapters.observe(pipe, run.first(1)), block, dims)


@pytest.mark.parametrize(
    ("given", "stated", "expected"),
    [(2.5, 3.0, (2.5, 2.5)), (0.0, 3.0, (0.0, 0.0)), (None, 3.0, (3.0, 1.5)), (None, None, (1.0, 1.0))],
)
def test_dg_scales(monkeypatch, pipe, given, stated, expected):
    preset(monkeypatch, None, None, stated)
    assert chapters.dg_scales(pipe, given) == expected


# Section 4.1 ----------------------------------------------------------------------------------------------------------


class FakeTrace:
    """A trace whose tracked values (timesteps, images), gates (G, C) and mean |z| (L, C) are given."""

    def __init__(self, values=None, *, mean_abs=None, gates=None, token_share=None, timesteps=(900.0, 500.0, 100.0)):
        values = np.zeros((3, 2)) if values is None else values
        self.track = [7, 9]
        # at block 1 alone the first tracked dim holds the values, the second the same halved
        self.values = np.random.default_rng(3).uniform(size=(*values.shape, 2, 2))
        self.values[:, :, 1, 0], self.values[:, :, 1, 1] = values, values / 2
        self.mean, self.alpha, self.share = mean_abs, gates, token_share
        self.gate_rows = [(0, "msa"), (0, "mlp"), (1, "msa")]
        self.anatomy = SimpleNamespace(channels=4)
        self.steps = list(timesteps)

    def tracked(self):
        return torch.from_numpy(self.values)

    def num_gates_seen(self, label=None, timestep=None):
        return len(self.gate_rows)

    def timesteps(self):
        return self.steps

    def mean_abs(self, label=None):
        return self.mean

    def token_share(self):
        return self.share

    def gates(self, label=None, timestep=None, absolute=True):
        return self.alpha


TIME = np.array([1.0, 2.0, 4.0])[:, None]  # at each of three timesteps
CLASS = np.array([1.0, 1.0, 2.0, 2.0, 5.0, 5.0])  # of each of six images
CONDITIONS = [0, 0, 1, 1, 2, 2]


def test_scale_of_cfg_is_as_given_else_the_presets_else_4(monkeypatch):
    pipe = tiny_models.pipeline("dit")
    assert chapters.cfg_scale(pipe, 2.5) == 2.5
    assert chapters.cfg_scale(pipe, None) == 4.0
    preset = zoo.Preset(None, None, None, None, 1.75, 20, "test")
    row = zoo.Model(None, "", "DiTTransformer2DModel", BLOCKS, CHANNELS, "", 0.0, preset)
    monkeypatch.setattr(zoo, "MODELS", {"random": row})
    assert chapters.cfg_scale(pipe, None) == 1.75
    assert chapters.cfg_scale(pipe, 1.0) == 1.0


@pytest.mark.parametrize("dim", [7, 9])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (TIME + 0 * CLASS, {"timestep": 1, "condition": 0, "noise": 0, "residual": 0}),
        (0 * TIME + CLASS, {"timestep": 0, "condition": 1, "noise": 0, "residual": 0}),
        # variances 14/9 of (1, 2, 4) and 26/9 of (1, 2, 5)
        (TIME + CLASS, {"timestep": 14 / 40, "condition": 26 / 40, "noise": 0, "residual": 0}),
        (0 * TIME + np.array([1, 2, 1, 2, 1, 2]), {"timestep": 0, "condition": -2 / 3, "noise": 5 / 3, "residual": 0}),
    ],
)
def test_timestep_shares_of_constructed_values(values, expected, dim):
    shares = chapters.timestep_shares(FakeTrace(values), CONDITIONS, block=1)[dim]
    assert {part: interval.value for part, interval in shares.items()} == pytest.approx(expected, abs=1e-12)


def test_a_class_of_one_image_is_not_told_from_its_image():
    for conditions in (list(range(6)), [0] * 6, [0, 0, 0, 1, 1, 2]):
        shares = chapters.timestep_shares(FakeTrace(TIME + CLASS), conditions, block=1)[7]
        assert {part: interval.value for part, interval in shares.items()} == pytest.approx(
            {"timestep": 14 / 40, "condition and noise": 26 / 40, "residual": 0}, abs=1e-12
        )


def test_timestep_values():
    mean_abs = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    gates = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2, 0.3, 0.1, 0.05]])
    trace = FakeTrace(TIME * CLASS, mean_abs=mean_abs, gates=gates)
    values = chapters.timestep_values(trace, CONDITIONS, block=1)
    assert values["dim"] == 7 and values["timesteps"] == [900.0, 500.0, 100.0]
    assert values["magnitude_by_timestep"] == pytest.approx([16 / 6, 32 / 6, 64 / 6])
    assert values["trend"] == Interval(4.0, 4.0, 4.0)  # of every image
    assert (values["gates.count"], values["gates.same_largest"]) == (3, 1)
    # ranks: equal (1); reversed (-1); 3 4 2 1 against 4 3 2 1: 1 - 6 * 2 / (4 * 15) = 0.8
    assert values["gates.rank_correlation"] == pytest.approx(0.8)
    shares = chapters.timestep_shares(trace, CONDITIONS, block=1)[7]
    assert values["share.timestep"] == shares["timestep"] and values["share.condition"] == shares["condition"]
    assert "share.condition_and_noise" not in values
    alone = chapters.timestep_values(trace, list(range(6)), block=1)
    together = shares["condition"].value + shares["noise"].value
    assert alone["share.condition_and_noise"].value == pytest.approx(together) and "share.condition" not in alone


def test_tracked_values_are_those_of_a_hand_hook(pipe, run):
    seen = []

    def hook(module, args, output):
        seen.append(output.abs().mean(1)[:, 7].numpy())

    handle = pipe.transformer.transformer_blocks[BLOCK].register_forward_hook(hook)
    trace = chapters.observe(pipe, run, track=[7])
    handle.remove()
    assert np.allclose(trace.tracked()[:, :, BLOCK, 0], seen, rtol=1e-6)


def test_layer_values():
    mean_abs = torch.tensor([[1.0, 1, 2, 60], [2.0, 2, 2, 40]])
    share = torch.tensor([[0.0, 0, 0, 0.75], [0, 0, 0, 0.5]])
    rows = pd.DataFrame({"block": [0, 1], "dim": [3, 3], "ratio": [40.0, 20.0]})
    values = chapters.layer_values(FakeTrace(mean_abs=mean_abs, token_share=share), Massive("", 2, rows), 5.0)
    assert values["blocks"] == values["blocks_with_massive"] == 2 and values["threshold"] == 5.0
    assert values["massive_dims"] == values["fixed_dims"] == [3]
    assert (values["largest.block"], values["largest.dim"]) == (0, 3)
    assert values["largest.ratio"] == pytest.approx(40) and values["largest.token_share"] == 0.75  # median 1.5
    assert values["largest_ratio_by_block"].tolist() == pytest.approx([40, 20])
    assert torch.equal(values["mean_abs"], mean_abs)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_token_maps_equal_tensors_kept_by_hand(pipe, guidance_scale):
    run = chapters.samples(pipe, 3, seed=5, steps=4, guidance_scale=guidance_scale)
    seen = []
    block = pipe.transformer.transformer_blocks[BLOCK]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    run.first(2).images(pipe)
    handle.remove()
    maps, timesteps = chapters.token_maps(pipe, run, BLOCK, 7, count=2)
    assert timesteps == sorted(timesteps, reverse=True) and len(set(timesteps)) == 3 == len(maps)
    for shown, output in zip(maps, (seen[0], seen[2], seen[3]), strict=True):
        conditional = output[:2]  # the first half of a DiT batch
        assert np.array_equal(shown, conditional[..., 7].abs().reshape(2, 4, 4).numpy())


def test_token_maps_refuse_tokens_that_form_no_square(monkeypatch, pipe, run):
    fake = SimpleNamespace(timesteps=lambda: [1.0], tensors=lambda block, timestep: torch.zeros(1, 12, CHANNELS))
    monkeypatch.setattr(layers, "observe", lambda *args, **kwargs: fake)
    with pytest.raises(DgkitError, match="12 image tokens"):
        chapters.token_maps(pipe, run, BLOCK, 7)


# Section 4.2 ----------------------------------------------------------------------------------------------------------


def hooked(pipe, run, change):
    """Images with `change` done in place to a copy of the block's output, by a hook of our own."""

    def hook(module, args, output):
        output = output.clone()
        change(output)
        return output

    handle = pipe.transformer.transformer_blocks[BLOCK].register_forward_hook(hook)
    images = run.images(pipe)
    handle.remove()
    return images


def zero(dims):
    def change(output):
        for dim in dims:
            output[:, :, dim] = 0

    return change


def to_mean(output):
    for dim in DIMS:
        output[:, :, dim] = output[:, :, dim].mean(dim=1)[:, None]


def test_intervene_equals_edits_by_hand(monkeypatch, pipe, run):
    plain = run.images(pipe)
    edits = {}
    original_disrupt = intervention.disrupt

    def watched(target, **kwargs):
        manager = original_disrupt(target, **kwargs)

        class Watched:
            def __enter__(self):
                edits[len(edits)] = edit = manager.__enter__()
                return edit

            def __exit__(self, *error):
                return manager.__exit__(*error)

        return Watched()

    monkeypatch.setattr(intervention, "disrupt", watched)
    images = chapters.intervene(pipe, run, block=BLOCK, dims=DIMS, matched=[1, 2, 4], draws=4, seed=9)
    draws = [f"random {k}" for k in range(1, 5)]
    assert list(images) == ["original", "massive", "left half", "norm kept", "mean", "matched", *draws]
    assert np.array_equal(images["original"], plain) and np.array_equal(run.images(pipe), plain)
    assert np.array_equal(images["massive"], hooked(pipe, run, zero(DIMS)))
    assert np.array_equal(images["mean"], hooked(pipe, run, to_mean))
    assert np.array_equal(images["matched"], hooked(pipe, run, zero([1, 2, 4])))
    half = chapters.left_half(pipe, run)
    for name, options in (("left half", {"tokens": half}), ("norm kept", {"keep_norm": True})):
        with original_disrupt(pipe, block=BLOCK, dims=DIMS, **options):
            assert np.array_equal(images[name], run.images(pipe))
    drawn = [edits[i].dims for i in range(5, 9)]
    for name, dims in zip(draws, drawn, strict=True):
        assert len(set(dims)) == len(DIMS) and not set(dims) & set(DIMS)
        assert np.array_equal(images[name], hooked(pipe, run, zero(dims)))
    assert len({tuple(dims) for dims in drawn}) == 4
    assert all(not np.array_equal(images[name], plain) for name in images if name != "original")


def test_no_set_of_random_channels_is_drawn_twice(pipe, run):
    images = chapters.intervene(pipe, run.first(1), block=BLOCK, dims=[3], matched=[1], draws=CHANNELS - 1, seed=2)
    assert len({batch.tobytes() for name, batch in images.items() if name.startswith("random")}) == CHANNELS - 1
    with pytest.raises(DgkitError, match=f"random_draws={CHANNELS} is not allowed: there are {CHANNELS - 1} sets"):
        chapters.intervene(pipe, run.first(1), block=BLOCK, dims=[3], matched=[1], draws=CHANNELS, seed=2)


def test_an_identical_copy_has_no_effect():
    images = random_images()
    effects = chapters.image_effects({"original": images, "copy": images.copy()}, "original")
    assert list(effects.columns) == [
        "setting", "image", "low_error", "high_error", "sharpness_ratio", "high_frequency_change"
    ]  # fmt: skip
    assert len(effects) == 8 and effects["setting"].tolist() == ["original"] * 4 + ["copy"] * 4
    assert effects["image"].tolist() == [0, 1, 2, 3] * 2
    assert (effects[["low_error", "high_error", "high_frequency_change"]] == 0).all(axis=None)
    assert (effects["sharpness_ratio"] == 1).all()


def test_halved_contrast_has_a_quarter_of_everything():
    images = random_images()
    effects = chapters.image_effects({"original": images, "half": halved(images)}, "original")
    half = effects[effects["setting"] == "half"]
    for column in ("low_error", "high_error"):  # (1 - 1/2)^2 of the energy
        assert half[column].to_numpy() == pytest.approx(np.full(4, 0.25))
    sharp = sharpness(images)  # the Laplacian's variance is a quarter; its mean over images is the ratio of the means
    assert half["sharpness_ratio"].to_numpy() == pytest.approx(1 - 0.75 * sharp / sharp.mean())
    assert half["sharpness_ratio"].mean() == pytest.approx(0.25)
    assert half["high_frequency_change"].to_numpy() == pytest.approx(np.zeros(4), abs=1e-12)


def test_a_brighter_image_differs_in_the_low_band_alone():
    images = random_images() // 2
    effects = chapters.image_effects({"original": images, "bright": images + np.uint8(64)}, "original")
    bright = effects[effects["setting"] == "bright"]
    assert bright["high_error"].to_numpy() == pytest.approx(np.zeros(4), abs=1e-12)
    assert bright["sharpness_ratio"].to_numpy() == pytest.approx(np.ones(4))
    assert (bright["low_error"] > 0.1).all()


def test_blur_costs_the_high_band():
    images = random_images()
    blurred = gaussian_filter(images.astype(float), (0, 1.5, 1.5, 0)).round().astype(np.uint8)
    effects = chapters.image_effects({"original": images, "blurred": blurred}, "original")
    blur = effects[effects["setting"] == "blurred"]
    assert (blur["high_error"] > 0.5).all() and (blur["high_error"] > 5 * blur["low_error"]).all()
    assert (blur["sharpness_ratio"] < 0.1).all() and (blur["high_frequency_change"] < -0.3).all()


def with_draws():
    images = random_images()
    some = images.copy()
    some[1:] = halved(images[1:])  # the first image is left alone
    return {"original": images, "massive": np.zeros_like(images), "random 1": halved(images), "random 2": some}


def test_random_draws_are_averaged_per_image():
    effects = chapters.image_effects(with_draws(), "original")
    assert effects["setting"].unique().tolist() == ["original", "massive", "random"]
    drawn = effects[effects["setting"] == "random"]
    assert drawn["image"].tolist() == [0, 1, 2, 3]
    assert drawn["high_error"].to_numpy() == pytest.approx([0.125, 0.25, 0.25, 0.25])
    sharp = sharpness(random_images())
    lost = np.array([0.375, 0.75, 0.75, 0.75])
    assert drawn["sharpness_ratio"].to_numpy() == pytest.approx(1 - lost * sharp / sharp.mean())


class WhiteJudge(Judge):
    """Finds what was asked for where an image's first value is the condition; its features are the means of three
    parts of the image, those of real images standard normal."""

    data = "white"
    network = None

    def agreement(self, images):
        return images[:, 0, 0, 0] == self.conditions

    def features(self, images):
        return np.stack([part.mean((1, 2, 3)) for part in np.array_split(images.astype(float), 3, axis=1)], axis=1)

    def frechet(self, features):  # to a standard normal, with scipy
        covariance = np.cov(np.asarray(features).T)
        root = sqrtm(covariance + 1e-12 * np.eye(3)).real
        return (features.mean(0) ** 2).sum() + np.trace(covariance + np.eye(3) - 2 * root)


def test_agreement_is_the_judges():
    images = random_images(5)
    judge = WhiteJudge([*images[:3, 0, 0, 0], 1, 3])  # odd values do not occur
    effects = chapters.image_effects({"original": images, "black": np.zeros_like(images)}, "original", judge)
    black = [float(c == 0) for c in judge.conditions]
    assert effects["agreement"].tolist() == [1, 1, 1, 0, 0, *black]
    assert "agreement" not in chapters.image_effects({"original": images}, "original")


def test_class_agreement_is_the_classifiers():
    images = random_images(6)
    seen = np.asarray(fashion_classifier()(images)).argmax(1)
    asked = [int(c) for c in seen]
    asked[2] = (asked[2] + 1) % 10
    effects = chapters.image_effects({"original": images}, "original", FashionJudge(asked))
    assert effects["agreement"].tolist() == [1, 1, 0, 1, 1, 1]


def test_summary_and_contrast_by_hand():
    effects = pd.DataFrame(
        {"setting": ["a"] * 3 + ["b"] * 3, "image": [0, 1, 2, 2, 1, 0], "m": [1.0, 5.0, 9.0, 7.0, 3.0, -1.0]}
    )
    summary = chapters.summarise(effects)
    assert summary.keys() == {"a.m", "b.m"}
    assert summary["a.m"].value == pytest.approx(5) and summary["b.m"].value == pytest.approx(3)
    assert 1 <= summary["a.m"].low < 5 < summary["a.m"].high <= 9
    # image by image a is larger by 2, whatever their order: a paired interval has no width
    assert chapters.contrast(effects, "a", "b", "m") == Interval(2.0, 2.0, 2.0)
    assert chapters.contrast(effects, "b", "a", "m") == Interval(-2.0, -2.0, -2.0)


def test_left_half_of_the_tokens(pipe, run):
    with dgkit.record(pipe, keep=[0]) as trace:
        run.first(1).images(pipe)
    side = int(trace.tensors(0).shape[1] ** 0.5)
    grid = np.arange(side * side).reshape(side, side)
    assert chapters.left_half(pipe, run) == grid[:, : side // 2].ravel().tolist()


def test_effect_of_an_edit_on_both_halves_of_the_image(pipe, run):
    original = random_images()
    edited = original.copy()
    edited[:, :, :14] = 255 - edited[:, :, :14]  # the right half stays
    values = chapters.half_values(pipe, run, {"original": original, "left half": edited})
    assert values["half.other.high_error"].value == 0
    assert values["half.edited.high_error"].value == pytest.approx(band_error(edited, original)[1].mean())
    assert values["half.contrast"].value == values["half.edited.high_error"].value
    edited[:, :, 14:] = 255 - edited[:, :, 14:]  # all of it: both halves count against the whole image
    values = chapters.half_values(pipe, run, {"original": original, "left half": edited})
    assert values["half.other.high_error"].value == pytest.approx(values["half.edited.high_error"].value, rel=0.2)
    original[0, :, :14] = 7  # a flat half is no reason to stop
    assert np.isfinite(
        chapters.half_values(pipe, run, {"original": original, "left half": edited})["half.contrast"].value
    )


def test_massive_channels_against_each_draw():
    original = random_images()
    images = {"original": original, "massive": halved(original), "random 1": original, "random 2": original * 0}
    values = chapters.draw_values(images)  # half the brightness leaves a quarter of the energy as error
    assert values["draws.high_error"] == pytest.approx([0, 1]) and values["draws.below"] == 1


def test_intervention_values():
    effects = chapters.image_effects(with_draws(), "original")
    values = chapters.intervention_values(effects, matched=(4, 5))
    assert values["matched_dims"] == [4, 5]
    assert values["massive.high_error"].value == pytest.approx(1)  # a black image has lost everything
    assert values["random.high_error"].value == pytest.approx((0.125 + 3 * 0.25) / 4)
    assert values["contrast.random.high_error"].value == pytest.approx(1 - (0.125 + 3 * 0.25) / 4)
    sharp = sharpness(random_images())
    left = 1 - (np.array([0.375, 0.75, 0.75, 0.75]) * sharp).mean() / sharp.mean()
    assert values["contrast.random.sharpness_ratio"].value == pytest.approx(0 - left)
    contrasts = {name for name in values if name.startswith("contrast.")}
    assert contrasts == {f"contrast.random.{c}" for c in ("low_error", "high_error", "sharpness_ratio")}


# Sections 4.3 and 5.3 -------------------------------------------------------------------------------------------------


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
        setting = Setting(guidance_scale, 1.5, block, DIMS)
        guided, computed = counted(pipe, lambda setting=setting: chapters.guide(pipe, run, setting))
        assert guided.block_evaluations == computed
        assert guided.cost_ratio == pytest.approx((passes * BLOCKS - depth) / (passes * BLOCKS))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guide_without_dg_is_a_plain_run(pipe, run, guidance_scale):
    guided, computed = counted(pipe, lambda: chapters.guide(pipe, run, Setting(guidance_scale)))
    assert guided.block_evaluations == computed and guided.cost_ratio == 1
    plain = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=guidance_scale)
    assert np.array_equal(guided.images, plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guide_is_detail_guidance(pipe, run, guidance_scale):
    guided = chapters.guide(pipe, run, Setting(guidance_scale, 1.5, BLOCK, DIMS)).images
    with dgkit.detail_guidance(pipe, scale=1.5, block=BLOCK, dims=DIMS, sharing="none"):
        expected = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=guidance_scale)
    assert np.array_equal(guided, expected)
    assert not np.array_equal(guided, chapters.guide(pipe, run, Setting(guidance_scale)).images)


def test_guide_all_starts_from_the_same_noise(pipe, run):
    settings = chapters.guidance_settings(1.5, 0.5, 4.0, BLOCK, DIMS)
    assert settings == {
        "none": Setting(1.0, 0.0),
        "DG": Setting(1.0, 1.5, BLOCK, DIMS),
        "CFG": Setting(4.0, 0.0),
        "CFG+DG": Setting(4.0, 0.5, BLOCK, DIMS),
    }
    runs = chapters.guide_all(pipe, run, settings)
    for name, setting in settings.items():
        assert np.array_equal(runs[name].images, chapters.guide(pipe, run, setting).images)


def test_guidance_values():
    images = random_images()
    runs = {
        "none": GuidedRun(images),
        "DG": GuidedRun(halved(images), 0.75, 10),
        "CFG": GuidedRun(np.zeros_like(images)),
        "CFG+DG": GuidedRun(images, 0.875, 20),
    }
    values = chapters.guidance_values(runs, None)
    assert values["DG.cost"] == 0.75 and values["CFG+DG.cost"] == 0.875 and values["none.cost"] == 1
    assert values["DG.sharpness_ratio"].value == pytest.approx(0.25)
    assert values["none.sharpness_ratio"] == Interval(1.0, 1.0, 1.0)
    assert values["contrast.cfg.sharpness_ratio"].value == pytest.approx(1 - 0)
    assert values["contrast.cfg.high_error"].value == pytest.approx(0 - 1)


def test_controls_of_detail_guidance(pipe, run):
    settings = chapters.control_settings(pipe, 1.5, seed=3)
    runs = chapters.guide_all(pipe, run, settings)
    with guidance.guide(pipe, SEG(scale=1.5)):
        assert np.array_equal(runs["blurred"].images, run.images(pipe, 1.0))
    worse = chapters.noisy_copy(pipe.transformer, 3)
    with guidance.guide(pipe, Autoguidance(scale=1.5, bad=worse)):
        assert np.array_equal(runs["autoguidance"].images, run.images(pipe, 1.0))
    images = random_images()
    runs = {name: GuidedRun(images) for name in ("none", "CFG", "CFG+DG", "blurred", "autoguidance")}
    runs["DG"], runs["blurred"] = GuidedRun(images // 2 * 0), GuidedRun(halved(images))
    values = chapters.guidance_values(runs, None)
    assert values["contrast.blurred.sharpness_ratio"].value == pytest.approx(0 - 0.25)
    assert values["contrast.autoguidance.sharpness_ratio"].value == pytest.approx(0 - 1)


def test_guidance_values_of_a_judge():
    """Any judge's agreement and distances, paired with what each is compared with."""
    images = random_images(6)
    runs = {"none": images, "DG": halved(images), "CFG": images // 4, "CFG+DG": images.copy()}
    judge = WhiteJudge([*images[:4, 0, 0, 0], 1, 1])
    values = chapters.guidance_values({name: GuidedRun(batch) for name, batch in runs.items()}, judge)
    assert values["none.agreement"].value == pytest.approx(4 / 6)
    distance = {name: judge.frechet(judge.features(batch)) for name, batch in runs.items()}
    assert {name: values[f"{name}.frechet"] for name in runs} == pytest.approx(distance)
    assert values["contrast.none.frechet"].value == pytest.approx(distance["DG"] - distance["none"])
    assert values["contrast.cfg.frechet"].value == pytest.approx(distance["CFG+DG"] - distance["CFG"])
    assert values["contrast.none.agreement"].value == pytest.approx(
        (halved(images)[:, 0, 0, 0] == judge.conditions).mean() - 4 / 6
    )
    assert not [name for name in chapters.guidance_values({n: GuidedRun(b) for n, b in runs.items()}, None)
                if "agreement" in name or "frechet" in name]  # fmt: skip


def test_ablation_settings(pipe):
    settings = chapters.ablation_settings(pipe, (1.5, 0.5), BLOCK, DIMS, [0, 1, 2], [0, 3.5])
    assert {name: list(sweep) for name, sweep in settings.items()} == {
        "block": [0, 1, 2], "w": [0, 1, 2], "lambda": [0, 3.5]
    }  # fmt: skip
    assert settings["block"] == {b: Setting(1.0, 1.5, b, DIMS) for b in range(BLOCKS)}
    assert settings["w"] == {w: Setting(1.0, w, BLOCK, DIMS) for w in (0, 1, 2)}
    assert settings["lambda"] == {0: Setting(1.0, 0.5, BLOCK, DIMS), 3.5: Setting(4.5, 0.5, BLOCK, DIMS)}


def test_sweep_rows():
    images = random_images()
    table = chapters.sweep({0.5: GuidedRun(halved(images)), 2.0: GuidedRun(images)}, images, None)
    assert list(table.columns) == ["key", "measure", "value", "low", "high"]
    measures = ["low_error", "high_error", "sharpness_ratio", "high_frequency_change"]
    assert table["key"].tolist() == [0.5] * 4 + [2.0] * 4 and table["measure"].tolist() == measures * 2
    assert table["value"].to_numpy() == pytest.approx([0.25, 0.25, 0.25, 0, 0, 0, 1, 0], abs=1e-12)
    assert (table["low"] <= table["value"] + 1e-12).all() and (table["value"] <= table["high"] + 1e-12).all()


def test_sweep_pairs_the_agreement_with_that_of_the_baseline():
    images = random_images(6)
    judge = WhiteJudge([*images[:4, 0, 0, 0], 1, 1])
    table = chapters.sweep({1.0: GuidedRun(halved(images))}, images, judge).set_index("measure")
    right, before = (halved(images)[:, 0, 0, 0] == judge.conditions), (images[:, 0, 0, 0] == judge.conditions)
    assert table.loc["agreement_change", "value"] == pytest.approx(right.mean() - before.mean())


def test_sweep_values():
    def table(keys, sharpness):
        rows = [{"key": k, "measure": "sharpness_ratio", "value": s, "low": s / 2, "high": s * 2}
                for k, s in zip(keys, sharpness, strict=True)]  # fmt: skip
        return pd.DataFrame(rows)

    values = chapters.sweep_values(
        {
            "block": table([0, 1, 2], [1.5, 0.5, 1.25]),  # a half moves further than one and a half times
            "w": table([0, 1, 2, 3], [1.0, 1.2, 1.1, 1.4]),
            "lambda": table([1, 2, 3], [3.0, 2.0, 1.0]),
        }
    )
    assert (values["blocks"], values["block.strongest"]) == (3, 1)
    assert (values["block.strongest_ratio"], values["block.last_ratio"]) == (0.5, 1.25)
    assert values["w.rank_correlation"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # one pair of ranks swapped
    assert values["lambda.rank_correlation"] == pytest.approx(-1)
    assert np.array_equal(values["lambda.sharpness_ratio"], [[1, 3, 1.5, 6], [2, 2, 1, 4], [3, 1, 0.5, 2]])


# Table 6 --------------------------------------------------------------------------------------------------------------


def test_table_6_settings():
    assert chapters.table_6_settings(1.5, BLOCK, DIMS) == {
        "uncond": (Setting(), False),
        "uncond+DG": (Setting(1.0, 1.5, BLOCK, DIMS), False),
        "cond": (Setting(), True),
        "cond+DG": (Setting(1.0, 1.5, BLOCK, DIMS), True),
    }


def by_hand(images):
    """The four measures with scipy and NumPy alone."""
    stored = load_file(DATA / "reference" / "fashion-mnist.safetensors")
    real = {name: array.astype(np.float64) for name, array in stored.items()}
    classifier = fashion_classifier()
    features = np.asarray(classifier.features(images), np.float64)
    covariance = np.cov(features.T)
    # a little ridge: scipy's root needs a regular matrix
    root = sqrtm((covariance + 1e-9 * np.eye(64)) @ real["covariance"]).real
    frechet = ((features.mean(0) - real["mean"]) ** 2).sum() + np.trace(covariance + real["covariance"] - 2 * root)
    p = softmax(np.asarray(classifier(images), np.float64), axis=1)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())

    def covered(points, manifold):
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, 3]
        return (cdist(points, manifold) <= radii).any(1).mean()

    return [frechet, score, covered(features, real["sample"]), covered(real["sample"], features)]


@pytest.fixture
def blobs(monkeypatch):
    """Stand-ins for `guide`'s images, which the random pipeline makes too small: smooth blobs, and what was asked."""
    asked = []

    def guide(pipe, run, setting):
        rng = np.random.default_rng(len(asked))
        noise = gaussian_filter(rng.normal(size=(len(run.seeds), 28, 28)), (0, 3, 3))
        images = np.repeat(((noise > 0) * 200).astype(np.uint8)[..., None], 3, axis=-1)
        asked.append((run, setting, images))
        return GuidedRun(images)

    monkeypatch.setattr(imagenet, "guide", guide)
    return asked


def test_table_6(pipe, blobs):
    settings = chapters.table_6_settings(1.5, BLOCK, DIMS)
    table = chapters.table_6(chapters.table_6_runs(pipe, settings, 12, [4, 5], 2))
    assert list(table.columns) == ["setting", "seed", "frechet", "is", "precision", "recall"]
    assert table["setting"].tolist() == np.repeat(list(settings), 2).tolist()
    assert table["seed"].tolist() == [4, 5] * 4
    for (run, setting, images), (_, row) in zip(blobs, table.iterrows(), strict=True):
        guidance, conditional = settings[row["setting"]]
        assert setting == guidance and run.guidance_scale == 1 and run.steps == 2
        assert run.conditions == ([*range(10), 0, 1] if conditional else [1000] * 12)
        assert run.seeds == chapters.samples(pipe, 12, row["seed"], 2).seeds
        measured = row[["frechet", "is", "precision", "recall"]].astype(float).to_numpy()
        assert measured == pytest.approx(by_hand(images), rel=1e-3)


def test_efficientnet_values(monkeypatch, pipe, blobs):
    given = []

    def features(images):  # any two features will do for the plumbing
        given.append(len(images))
        return np.asarray(images, float).reshape(len(images), -1)[:, [300, 1200]]

    real = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(imagenet, "efficientnet_features", features)
    monkeypatch.setattr(imagenet, "fashion_mnist", lambda split: (real, torch.zeros(100)))
    runs = chapters.table_6_runs(pipe, {"cond": (Setting(), True)}, 12, [4, 5], 2)
    values = chapters.efficientnet_values(runs)
    theirs = features(real[:24].movedim(1, -1).expand(-1, -1, -1, 3))
    ours = np.concatenate([batch for _, _, batch in blobs]).reshape(24, -1)[:, [300, 1200]].astype(float)
    a, b = np.cov(ours.T), np.cov(theirs.T)
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert given[:2] == [24, 24] and values["efficientnet_count"] == 24
    assert values["cond.frechet_efficientnet"] == pytest.approx(expected, rel=1e-5) and len(values) == 2


TABLE = pd.DataFrame(
    {
        "setting": np.repeat(["uncond", "uncond+DG", "cond", "cond+DG"], 3),
        "seed": [0, 1, 2] * 4,
        "frechet": [10.0, 12, 14, 9, 8, 16, 6, 6, 6, 5, 4, 3],
        "is": np.arange(12.0),
        "precision": np.arange(12.0) / 12,
        "recall": np.arange(12.0)[::-1] / 12,
    }
)


def test_spectra_are_means_over_the_images_of_each_setting():
    wave = 100 + 50 * np.cos(2 * np.pi * 7 * np.arange(28) / 28)  # a quarter of a cycle per pixel
    images = np.broadcast_to(wave[None, None, :, None], (2, 28, 28, 3)).round().astype(np.uint8)
    flat = np.full_like(images, 90)
    frequencies, powers = chapters.spectra({"striped": images, "mixed": np.concatenate([images, flat])})
    assert list(powers) == ["striped", "mixed"] and len(frequencies) == len(powers["striped"])
    striped, mixed = powers["striped"][1:], powers["mixed"][1:]  # without the mean
    assert frequencies[1 + striped.argmax()] == pytest.approx(0.25, abs=0.02)
    assert mixed == pytest.approx(striped / 2, abs=1e-6 * striped.max())


def test_table_6_values():
    values = chapters.table_6_values(TABLE.sample(frac=1, random_state=0))
    assert values["uncond.frechet"] == Interval(12, 10, 14) and values["uncond+DG.frechet"] == Interval(11, 8, 16)
    assert values["cond+DG.is"] == Interval(10, 9, 11)
    assert values["uncond.frechet_change"] == Interval(-1, -4, 2)  # -1, -4, 2: guided minus plain of the same seed
    assert values["cond.frechet_change"] == Interval(-2, -3, -1)
    assert len(values) == 4 * 4 + 2


def test_table_6_beside_the_papers():
    beside = chapters.table_6_beside_paper(chapters.table_6_values(TABLE))
    assert list(beside.columns) == ["measure", "setting", "ours", "paper"]
    beside = beside.set_index(["measure", "setting"])
    printed = [line.split(",") for line in (DATA / "paper" / "table6.csv").read_text().split()[1:]]
    measures = ("frechet (paper: fid)", "is", "precision", "recall")
    settings = ["uncond", "uncond+DG", "cond", "cond+DG"]
    assert beside.index.tolist() == [(measure, setting) for measure in measures for setting in settings]
    for (_, _, *numbers), setting in zip(printed, settings, strict=True):
        assert [beside.loc[(m, setting), "paper"] for m in measures] == [float(n) for n in numbers]
    assert beside.loc[(measures[0], "uncond")].tolist() == ["12 [10, 14]", 16.95]
    assert beside.loc[(measures[0], "cond+DG"), "paper"] == 5.77
    assert beside.loc[("is", "cond+DG"), "ours"] == "10 [9, 11]"


def test_hooks_are_gone_after_the_experiments(pipe, run):
    chapters.token_maps(pipe, run, BLOCK, 7, count=1)
    chapters.intervene(pipe, run.first(1), block=BLOCK, dims=DIMS, matched=[1], draws=1, seed=0)
    chapters.guide(pipe, run.first(1), Setting(4.0, 1.0, BLOCK, DIMS))
    modules = [pipe.transformer, *(block.module for block in dissect(pipe).blocks)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_training_history(monkeypatch, tmp_path):
    (tmp_path / "models" / "m").mkdir(parents=True)
    rows = [{"step": 5, "ratio": [2.0, 3.0], "dim": [1, 7]}, {"step": 9, "ratio": [4.0, 8.5], "dim": [1, 1]}]
    (tmp_path / "models" / "m" / "quality.json").write_text(json.dumps({"massive": rows}))
    monkeypatch.setattr(layers, "DATA", tmp_path)
    history = chapters.training_history("m")
    assert history.to_numpy().tolist() == [[5, 0, 2, 1], [5, 1, 3, 7], [9, 0, 4, 1], [9, 1, 8.5, 1]]
    assert chapters.training_history("other").empty
    assert list(chapters.training_history("other").columns) == ["step", "block", "ratio", "dim"]


def test_frechet_change_against_the_distances_themselves():
    rng = np.random.default_rng(0)
    real = load_file(DATA / "reference" / "fashion-mnist.safetensors")
    spread = np.linalg.cholesky(real["covariance"].astype(float) + 1e-6 * np.eye(64))
    near = real["mean"] + rng.normal(size=(200, 64)) @ spread.T
    far = near + 0.5  # the same spread, so only |shift|^2 differs
    shift = lambda x: ((x.mean(0) - real["mean"]) ** 2).sum()  # noqa: E731
    change = chapters.frechet_change(FashionJudge(()), far, near, resamples=50)
    assert change.value == pytest.approx(shift(far) - shift(near), rel=1e-6)
    assert change.low < change.value < change.high and change.low > 0
    assert chapters.frechet_change(FashionJudge(()), near, near, resamples=20) == Interval(0.0, 0.0, 0.0)


def test_summaries_of_proportions_have_wilsons_interval():
    effects = pd.DataFrame({"setting": ["a"] * 10, "image": range(10), "agreement": [1.0] * 10})
    interval = chapters.summarise(effects)["a.agreement"]
    assert interval.low == pytest.approx(10 / (10 + 1.959964**2)) and interval.high == pytest.approx(1)
