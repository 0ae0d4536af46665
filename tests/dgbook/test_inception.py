"""Scores of sets against torch-fidelity's own functions, on the same random Inception and the same features."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dgbook.measures.precision_recall import precision_recall
from dgbook.paper_scale.scores import scorer, sets
from dgbook.paper_scale.scores.sets import Features, Inception, Reference
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgkit.errors import DataError, DgkitError
from tests.hub_layout import isolate

Extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def install(patcher: pytest.MonkeyPatch, home: Path, state: dict[str, torch.Tensor]) -> Path:
    buffer = BytesIO()
    torch.save(state, buffer)
    path = home / ".cache" / "dgkit" / WEIGHTS["inception-2015-12-05"].files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    patcher.setitem(WEIGHTS, "inception-2015-12-05", replace(WEIGHTS["inception-2015-12-05"], sha256=sha256))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A machine with random weights of the real Inception."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patcher, torch.random.fork_rng():
        torch.manual_seed(0)
        isolate(patcher, home)
        # the constructor insists on loading
        with (
            patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}),
            patch.object(Extractor, "load_state_dict", lambda *_: None),
        ):
            network = Extractor("inception-v3-compat", ["2048"])
        for layer in network.modules():  # the default would let the images vanish over so many layers
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
        install(patcher, home, network.state_dict())
        yield home


@pytest.fixture(scope="module")
def inception(home: Path) -> Inception:
    return scorer("fid")


def test_features_are_those_of_torch_fidelity(home: Path, inception: Inception) -> None:
    path = home / ".cache" / "dgkit" / WEIGHTS["inception-2015-12-05"].files[0]
    network = Extractor("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    pool, logits = network(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    features = inception.features(IMAGES)
    assert features.pool.shape == (3, 2048) and features.logits.shape == (3, 1008)
    np.testing.assert_allclose(features.pool, pool.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(features.logits, logits.numpy(), rtol=1e-6, atol=1e-7)
    assert np.ptp(features.pool, axis=0).max() > 1e-3  # the images can be told apart
    sha256 = WEIGHTS["inception-2015-12-05"].sha256
    assert sha256 and inception.id.weights == f"inception-2015-12-05@{sha256[:12]}"


def test_weights_that_do_not_fit_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)
    install(monkeypatch, tmp_path, {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(DataError, match="does not fit Inception"):
        Inception()


def test_bad_images_are_refused(inception: Inception) -> None:
    with pytest.raises(DgkitError, match="uint8"):
        inception.features(IMAGES / 255)


# On features ----------------------------------------------------------------------------------------------------------


def sample(count: int, seed: int, shift: float = 0.0, width: int = 16) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(size=(width, width)) + shift


def reference(pool: np.ndarray) -> Reference:
    return Reference("real", pool.mean(axis=0), np.cov(pool.T), pool)


def test_fid_is_torch_fidelitys() -> None:
    real, generated = sample(400, 0), sample(300, 1, shift=0.5)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (generated, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert sets.fid(generated, reference(real)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("parts", [1, 2])
def test_inception_score_is_torch_fidelitys(parts: int) -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(5000 * parts, 10))
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=parts, shuffle=False)["inception_score_mean"]
    assert sets.inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_inception_scores_last_part_may_be_smaller() -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(7000, 10))
    expected = [
        isc_features_to_metric(torch.from_numpy(part), splits=1, shuffle=False)["inception_score_mean"]
        for part in (logits[:5000], logits[5000:])
    ]
    assert sets.inception_score(logits) == pytest.approx(np.mean(expected), rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    real, generated = sample(300, 0, width=4), sample(200, 1, shift=0.5, width=4)
    expected = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=64,
        save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    precision, recall = precision_recall(real, generated, k=3)
    assert precision == pytest.approx(expected["precision"], abs=1e-6)
    assert recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_a_collapsed_set_is_precise_and_recalls_little(inception: Inception) -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(500, 8))
    collapsed = Features(0.05 * generator.normal(size=(400, 8)), np.zeros((400, 3)))
    scores = sets.set_scores(inception, collapsed, reference(real))
    assert scores["precision"].value > 0.95 and scores["recall"].value < 0.05
    scattered = Features(3 * generator.normal(size=(400, 8)), np.zeros((400, 3)))
    scores = sets.set_scores(inception, scattered, reference(real))
    assert scores["precision"].value < 0.5 < 0.9 < scores["recall"].value


def test_names_tell_the_number_of_images(inception: Inception) -> None:
    assert [sets.sized("FID", n) for n in (49_999, 50_000, 50_001)] == ["FID-49999", "FID-50K", "FID-50001"]
    features = Features(sample(5000, 1), np.random.default_rng(0).normal(size=(5000, 10)))
    real = reference(sample(400, 0))
    scores = sets.set_scores(inception, features, replace(real, pool=real.pool[:100]))
    assert [score.name for score in scores.values()] == [f"{x}-5000" for x in ("FID", "IS", "precision", "recall")]
    assert scores["fid"].value == sets.fid(features.pool, real) and scores["fid"].reason == ""
    assert scores["is"].value == sets.inception_score(features.logits)
    shares = precision_recall(real.pool[:100], features.pool)
    assert (scores["precision"].value, scores["recall"].value) == shares
    assert {name: str(score.id) for name, score in scores.items()} == {
        name: f"{name}|{inception.id.weights}{against}|tf1-bilinear-299|no-antialias|float32|{scale}"
        for name, against, scale in (("fid", "+real", "distance"), ("is", "", "exp(KL),parts-of-5000"),
                                     ("precision", "+real", "share,k=3"), ("recall", "+real", "share,k=3"))
    }  # fmt: skip


def test_scores_of_too_few_images_carry_the_reason(inception: Inception) -> None:
    few = Features(sample(16, 1), np.zeros((16, 10)))
    scores = sets.set_scores(inception, few, replace(reference(sample(400, 0)), pool=None))
    assert all(score.value is None for score in scores.values())
    assert "covariance is singular" in scores["fid"].reason and "parts of 5000" in scores["is"].reason
    assert "no images" in scores["precision"].reason and "no images" in scores["recall"].reason
    assert "no reference" in sets.set_scores(inception, few, None)["fid"].reason
    three = Features(few.pool[:3], few.logits[:3])
    assert "at least 4 images" in sets.set_scores(inception, three, reference(sample(9, 0)))["recall"].reason


# References -----------------------------------------------------------------------------------------------------------


def test_reference_batches(inception: Inception, tmp_path: Path) -> None:
    pool = inception.features(IMAGES).pool
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    plain = sets.read_reference(tmp_path / "images.npz", inception, "three")
    np.testing.assert_array_equal(plain.pool, pool)
    np.testing.assert_allclose(plain.mean, pool.astype(float).mean(axis=0))
    np.testing.assert_allclose(plain.covariance, np.cov(pool.astype(float).T), atol=1e-12)

    mu, sigma = np.arange(2048, dtype=np.float32), np.eye(2048)
    np.savez(tmp_path / "full.npz", arr_0=IMAGES, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    full = sets.read_reference(tmp_path / "full.npz", inception, "full")
    np.testing.assert_array_equal(full.mean, mu)
    np.testing.assert_array_equal(full.covariance, sigma)
    np.testing.assert_array_equal(full.pool, pool)


@pytest.mark.parametrize("content", [b"no archive", None])
def test_a_file_that_is_no_reference_is_refused(content: bytes | None, inception: Inception, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    if content:
        path.write_bytes(content)
    else:
        np.savez(path, other=IMAGES)
    with pytest.raises(DataError, match="arr_0|not a whole npz"):
        sets.read_reference(path, inception, "broken")
