"""Disruptions against hooks put in by hand, and their effects against closed forms."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

import dgkit
from dgbook.chapters import intervention
from dgbook.measures.classifier import fashion_classifier
from dgbook.measures.judges import FashionJudge
from dgbook.measures.spectrum import band_error, sharpness
from dgbook.measures.stats import Interval
from dgkit.errors import DgkitError
from tests.dgbook.chapter_examples import BLOCK, CHANNELS, DIMS, WhiteJudge, halved, random_images, study_of


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
    monkeypatch.setattr(intervention, "equal_energy", lambda *args: [1, 2, 4])
    monkeypatch.setattr(intervention, "equal_counts", lambda *args: [5, 6])
    images = intervention.intervene(study_of(pipe, run), draws=4, drawn_samples=2)
    assert list(images) == ["original", "massive", "left half", "norm kept", "mean", "next", "matched", "random"]
    assert np.array_equal(images["original"], plain) and np.array_equal(run.images(pipe), plain)
    assert np.array_equal(images["massive"], hooked(pipe, run, zero(DIMS)))
    assert np.array_equal(images["mean"], hooked(pipe, run, to_mean))
    assert np.array_equal(images["matched"], hooked(pipe, run, zero([1, 2, 4])))
    assert np.array_equal(images["next"], hooked(pipe, run, zero([5, 6])))
    half = intervention.left_half(pipe, run)
    for name, options in (("left half", {"tokens": half}), ("norm kept", {"keep_norm": True})):
        with original_disrupt(pipe, block=BLOCK, dims=DIMS, **options):
            assert np.array_equal(images[name], run.images(pipe))
    drawn = [edits[i].dims for i in range(6, 10)]
    for batch, dims in zip(images["random"], drawn, strict=True):
        assert len(set(dims)) == len(DIMS) and not set(dims) & set(DIMS)
        assert np.array_equal(batch, hooked(pipe, run.first(2), zero(dims)))
    assert len({tuple(dims) for dims in drawn}) == 4
    edited = [*(images[name] for name in images if name not in ("original", "random")), *images["random"]]
    assert all(not np.array_equal(batch, plain[: len(batch)]) for batch in edited)


def test_no_set_of_random_channels_is_drawn_twice(pipe, run):
    study = study_of(pipe, run.first(1), dims=[3])
    images = intervention.intervene(study, draws=CHANNELS - 1, drawn_samples=1)
    assert len({batch.tobytes() for batch in images["random"]}) == CHANNELS - 1
    with pytest.raises(DgkitError, match=f"random_draws={CHANNELS} is not allowed: there are {CHANNELS - 1} sets"):
        intervention.intervene(study, draws=CHANNELS, drawn_samples=1)
    with pytest.raises(DgkitError, match="drawn_samples=2 is not allowed"):
        intervention.intervene(study, draws=1, drawn_samples=2)


def test_controls_of_equal_count_and_of_equal_energy(pipe, run):
    trace = study_of(pipe, run).trace
    size = trace.mean_abs()[BLOCK].numpy()
    largest = [dim for dim in np.argsort(-size) if dim not in (3, 7)]
    assert intervention.equal_counts(trace, BLOCK, [3, 7]) == largest[:2]
    energy, wanted = size**2, (size[[3, 7]] ** 2).sum()
    needed = 1 + int(np.argmax(np.cumsum(energy[largest]) >= wanted))
    matched = intervention.equal_energy(trace, BLOCK, [3, 7])
    assert matched == (largest[:needed] if needed <= CHANNELS // 4 else [])
    assert intervention.equal_energy(trace, BLOCK, list(range(8))) == []  # half of the channels: no control


def test_an_identical_copy_has_no_effect():
    images = random_images()
    effects = measured_effects({"original": images, "copy": images.copy()}, "original")
    assert list(effects.columns) == [
        "setting", "image", "low_error", "high_error", "sharpness_ratio", "high_frequency_change"
    ]  # fmt: skip
    assert len(effects) == 8 and effects["setting"].tolist() == ["original"] * 4 + ["copy"] * 4
    assert effects["image"].tolist() == [0, 1, 2, 3] * 2
    assert (effects[["low_error", "high_error", "high_frequency_change"]] == 0).all(axis=None)
    assert (effects["sharpness_ratio"] == 1).all()


def test_halved_contrast_has_a_quarter_of_everything():
    images = random_images()
    effects = measured_effects({"original": images, "half": halved(images)}, "original")
    half = effects[effects["setting"] == "half"]
    for column in ("low_error", "high_error"):  # (1 - 1/2)^2 of the energy
        assert half[column].to_numpy() == pytest.approx(np.full(4, 0.25))
    sharp = sharpness(images)  # the Laplacian's variance is a quarter; its mean over images is the ratio of the means
    assert half["sharpness_ratio"].to_numpy() == pytest.approx(1 - 0.75 * sharp / sharp.mean())
    assert half["sharpness_ratio"].mean() == pytest.approx(0.25)
    assert half["high_frequency_change"].to_numpy() == pytest.approx(np.zeros(4), abs=1e-12)


def test_a_brighter_image_differs_in_the_low_band_alone():
    images = random_images() // 2
    effects = measured_effects({"original": images, "bright": images + np.uint8(64)}, "original")
    bright = effects[effects["setting"] == "bright"]
    assert bright["high_error"].to_numpy() == pytest.approx(np.zeros(4), abs=1e-12)
    assert bright["sharpness_ratio"].to_numpy() == pytest.approx(np.ones(4))
    assert (bright["low_error"] > 0.1).all()


def test_blur_costs_the_high_band():
    images = random_images()
    blurred = gaussian_filter(images.astype(float), (0, 1.5, 1.5, 0)).round().astype(np.uint8)
    effects = measured_effects({"original": images, "blurred": blurred}, "original")
    blur = effects[effects["setting"] == "blurred"]
    assert (blur["high_error"] > 0.5).all() and (blur["high_error"] > 5 * blur["low_error"]).all()
    assert (blur["sharpness_ratio"] < 0.1).all() and (blur["high_frequency_change"] < -0.3).all()


def measured_effects(images, baseline, judge=None):
    return intervention.image_effects(intervention.image_measures(images, baseline, judge))


def with_draws():
    images = random_images()
    some = images.copy()
    some[1:] = halved(images[1:])  # the first image is left alone
    return {"original": images, "massive": np.zeros_like(images), "random": np.stack([halved(images), some])}


def test_random_draws_are_averaged_per_image():
    effects = measured_effects(with_draws(), "original")
    assert effects["setting"].unique().tolist() == ["original", "massive", "random"]
    drawn = effects[effects["setting"] == "random"]
    assert drawn["image"].tolist() == [0, 1, 2, 3]
    assert drawn["high_error"].to_numpy() == pytest.approx([0.125, 0.25, 0.25, 0.25])
    sharp = sharpness(random_images())
    lost = np.array([0.375, 0.75, 0.75, 0.75])
    assert drawn["sharpness_ratio"].to_numpy() == pytest.approx(1 - lost * sharp / sharp.mean())


def test_agreement_is_the_judges():
    images = random_images(5)
    judge = WhiteJudge([*images[:3, 0, 0, 0], 1, 3])  # odd values do not occur
    effects = measured_effects({"original": images, "black": np.zeros_like(images)}, "original", judge)
    black = [float(c == 0) for c in judge.conditions]
    assert effects["agreement"].tolist() == [1, 1, 1, 0, 0, *black]
    assert "agreement" not in measured_effects({"original": images}, "original")


def test_class_agreement_is_the_classifiers():
    images = random_images(6)
    seen = np.asarray(fashion_classifier()(images)).argmax(1)
    asked = [int(c) for c in seen]
    asked[2] = (asked[2] + 1) % 10
    effects = measured_effects({"original": images}, "original", FashionJudge(asked))
    assert effects["agreement"].tolist() == [1, 1, 0, 1, 1, 1]


def test_summary_and_contrast_by_hand():
    effects = pd.DataFrame(
        {"setting": ["a"] * 3 + ["b"] * 3, "image": [0, 1, 2, 2, 1, 0], "m": [1.0, 5.0, 9.0, 7.0, 3.0, -1.0]}
    )
    summary = intervention.summarise(effects)
    assert {setting: list(columns) for setting, columns in summary.items()} == {"a": ["m"], "b": ["m"]}
    assert summary["a"]["m"].value == pytest.approx(5) and summary["b"]["m"].value == pytest.approx(3)
    assert 1 <= summary["a"]["m"].low < 5 < summary["a"]["m"].high <= 9
    # image by image a is larger by 2, whatever their order: a paired interval has no width
    assert intervention.contrast(effects, "a", "b", "m") == Interval(2.0, 2.0, 2.0)
    assert intervention.contrasts(effects, [("b", "a")], ["m"]) == {"b - a": {"m": Interval(-2.0, -2.0, -2.0)}}


def test_summaries_of_proportions_have_wilsons_interval():
    effects = pd.DataFrame({"setting": ["a"] * 10, "image": range(10), "agreement": [1.0] * 10})
    interval = intervention.summarise(effects)["a"]["agreement"]
    assert interval.low == pytest.approx(10 / (10 + 1.959964**2)) and interval.high == pytest.approx(1)


def test_left_half_of_the_tokens(pipe, run):
    with dgkit.record(pipe, keep=[0]) as trace:
        run.first(1).images(pipe)
    side = int(trace.tensors(0).shape[1] ** 0.5)
    grid = np.arange(side * side).reshape(side, side)
    assert intervention.left_half(pipe, run) == grid[:, : side // 2].ravel().tolist()


def test_effect_of_an_edit_on_both_halves_of_the_image(pipe, run):
    original = random_images()
    edited = original.copy()
    edited[:, :, :14] = 255 - edited[:, :, :14]  # the right half stays
    values = intervention.half_values(pipe, run, {"original": original, "left half": edited})["half"]
    assert values["other"]["high_error"].value == 0
    assert values["edited"]["high_error"].value == pytest.approx(band_error(edited, original)[1].mean())
    assert values["contrast"].value == values["edited"]["high_error"].value
    edited[:, :, 14:] = 255 - edited[:, :, 14:]  # all of it: both halves count against the whole image
    values = intervention.half_values(pipe, run, {"original": original, "left half": edited})["half"]
    assert values["other"]["high_error"].value == pytest.approx(values["edited"]["high_error"].value, rel=0.2)
    original[0, :, :14] = 7  # a flat half is no reason to stop
    values = intervention.half_values(pipe, run, {"original": original, "left half": edited})["half"]
    assert np.isfinite(values["contrast"].value)


def test_massive_channels_against_each_draw():
    original = random_images()
    images = {"original": original, "massive": halved(original), "random": np.stack([original, original * 0])}
    draws = intervention.draw_values(intervention.image_measures(images, "original"))[
        "draws"
    ]  # half the brightness leaves a quarter of the energy as error
    assert draws["high_error"] == pytest.approx([0, 1]) and draws["below"] == 1
    assert draws["massive"] == pytest.approx(0.25)


def test_intervention_values():
    effects = measured_effects(with_draws(), "original")
    values = intervention.intervention_values(effects)
    assert values["settings"]["massive"]["high_error"].value == pytest.approx(1)  # a black image has lost everything
    assert values["settings"]["random"]["high_error"].value == pytest.approx((0.125 + 3 * 0.25) / 4)
    (contrast,) = values["contrast"].values()
    assert list(values["contrast"]) == ["massive - random"] and contrast["high_error"].value == pytest.approx(
        1 - (0.125 + 3 * 0.25) / 4
    )
    sharp = sharpness(random_images())
    left = 1 - (np.array([0.375, 0.75, 0.75, 0.75]) * sharp).mean() / sharp.mean()
    assert contrast["sharpness_ratio"].value == pytest.approx(0 - left)
    assert list(contrast) == ["low_error", "high_error", "sharpness_ratio"]


def test_agreement_is_compared_with_the_originals_too():
    images = with_draws()
    judge = WhiteJudge(images["original"][:, 0, 0, 0])
    contrast = intervention.intervention_values(measured_effects(images, "original", judge))["contrast"]
    right = (images["massive"][:, 0, 0, 0] == judge.conditions).mean()
    assert list(contrast["massive - original"]) == ["agreement", "detail_distance", "frechet"]
    assert "agreement" in contrast["massive - random"] and "frechet" not in contrast["massive - random"]
    assert contrast["massive - original"]["agreement"].value == pytest.approx(right - 1)


def test_spectra_are_means_over_the_images_of_each_setting():
    wave = 100 + 50 * np.cos(2 * np.pi * 7 * np.arange(28) / 28)  # a quarter of a cycle per pixel
    images = np.broadcast_to(wave[None, None, :, None], (2, 28, 28, 3)).round().astype(np.uint8)
    flat = np.full_like(images, 90)
    frequencies, powers = intervention.spectra({"striped": images, "mixed": np.concatenate([images, flat])})
    assert list(powers) == ["striped", "mixed"] and len(frequencies) == len(powers["striped"])
    striped, mixed = powers["striped"][1:], powers["mixed"][1:]  # without the mean
    assert frequencies[1 + striped.argmax()] == pytest.approx(0.25, abs=0.02)
    assert mixed == pytest.approx(striped / 2, abs=1e-6 * striped.max())
