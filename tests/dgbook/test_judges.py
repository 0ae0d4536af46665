"""The judges: which model has which, bound to conditions, against their networks and statistics used directly."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

import dgkit
from dgbook.measures import judges
from dgbook.measures.classifier import fashion_classifier
from dgbook.measures.judges import FashionJudge, Judge, TileJudge, judge_of, judge_set_scores
from dgbook.measures.matcher import load_matcher
from dgkit import zoo
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from tests import tiny_models

JUDGES: list[tuple[type[Judge], int, Any, int]] = [(FashionJudge, 28, fashion_classifier, 64),
                                                   (TileJudge, 32, load_matcher, 48)]  # fmt: skip


def noise(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_a_model_is_judged_by_the_network_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(judge_of(dgkit.load("tiny-dit"), [3]), FashionJudge)
    pipes = {"sd3": tiny_models.pipeline("sd3"), "flux": tiny_models.pipeline("flux")}
    assert all(judge_of(pipe, ["a cat"]) is None for pipe in pipes.values())
    preset = zoo.Preset(None, None, None, None, 1.0, 1, "this test")
    for name, pipe in pipes.items():
        anatomy = dgkit.anatomy.dissect(pipe)
        row = zoo.Model(None, type(pipe).__name__, type(pipe.transformer).__name__, len(anatomy.blocks),
                        anatomy.channels, "", 0.0, preset, data="dungeon-tiles", dual=name == "sd3")  # fmt: skip
        monkeypatch.setattr(zoo, "MODELS", {name: row})
        judge = judge_of(pipe, ("red ring item",))
        assert isinstance(judge, TileJudge) and judge.conditions == ["red ring item"]


def test_every_data_set_of_the_zoo_has_a_judge() -> None:
    assert {row.data for row in zoo.MODELS.values()} - {""} == {judge.data for judge in judges.JUDGES}


@pytest.mark.parametrize(("kind", "size", "network", "width"), JUDGES)
def test_features_and_distance(kind: type[Judge], size: int, network: Any, width: int) -> None:
    images, judge = noise(40, size), kind(())
    features = judge.features(images)
    assert features.dtype == np.float64 and features.shape == (40, width)
    np.testing.assert_array_equal(features, network().features(images).numpy())
    real = {k: v.astype(float) for k, v in load_file(DATA / "reference" / f"{judge.data}.safetensors").items()}
    covariance = np.cov(features.T) + 1e-9 * np.eye(width)  # scipy's root needs a regular matrix
    root = sqrtm(covariance @ real["covariance"]).real
    distance = ((features.mean(0) - real["mean"]) ** 2).sum() + np.trace(covariance + real["covariance"] - 2 * root)
    assert judge.frechet(features) == pytest.approx(distance, rel=1e-3)
    np.testing.assert_array_equal(judge.real_features, real["sample"])
    assert judge.sharpness_of_real == real["sharpness"] > 0


def test_scores_of_a_set_are_their_definitions() -> None:
    images, judge = noise(40, 28), FashionJudge(())
    found = judge_set_scores(judge, images)
    generated, real = judge.features(images), judge.real_features.astype(np.float64)
    assert found["frechet"] == judge.frechet(generated)
    p = np.exp(log_softmax(np.asarray(fashion_classifier()(images), np.float64), axis=1))
    divergence = (p * np.log(p / p.mean(axis=0))).sum(axis=1)
    assert found["is"] == pytest.approx(np.exp(divergence.mean()), rel=1e-6)

    def covered(samples: np.ndarray, manifold: np.ndarray) -> float:
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, 3]  # the nearest is the sample itself
        return float((cdist(samples, manifold) <= radii).any(axis=1).mean())

    assert (found["precision"], found["recall"]) == (covered(generated, real), covered(real, generated))


@pytest.mark.parametrize(("kind", "size", "network", "width"), JUDGES)
def test_real_features_are_nearer_than_noise(kind: type[Judge], size: int, network: Any, width: int) -> None:
    judge = kind(())
    real = judge.real_features.astype(float)
    # fewer real features than pixels or prompts, so the same number of each
    assert judge.frechet(real[:200]) < 0.2 * judge.frechet(judge.features(noise(200, size)))


def test_agreement_with_a_class_is_the_classifiers() -> None:
    images = noise(12, 28)
    seen = np.asarray(fashion_classifier()(images)).argmax(1)
    assert FashionJudge(seen).agreement(images).all()
    assert not FashionJudge((seen + 1) % 10).agreement(images).any()


def test_agreement_with_a_caption_is_to_be_nearest_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption farthest of all captions is never found, the nearest always; a draw of 15 others decides between."""
    images, captions = noise(20, 32), judges.tile_captions()
    similarity = load_matcher().similarity(images, captions).numpy()
    nearest, farthest = ([captions[i] for i in order] for order in (similarity.argmax(1), similarity.argmin(1)))
    assert TileJudge(nearest).agreement(images).all()
    assert not TileJudge(farthest).agreement(images).any()
    ranked = similarity.argsort(1)[:, ::-1]
    shares = []
    for rank in (20, 60, 200):
        asked = [captions[i] for i in ranked[:, rank]]
        # `rank` captions are nearer, and the image wins if none of these is drawn
        expected = np.prod([(999 - rank - k) / (999 - k) for k in range(judges.CHOICES - 1)])
        shares.append(TileJudge(asked).agreement(images).mean() - expected)
    assert np.abs(shares).max() < 0.35  # 20 images: three standard errors at most


def test_the_same_caption_in_the_same_place_meets_the_same_others() -> None:
    images, asked = noise(20, 32), list(judges.tile_captions()[:20])
    first = TileJudge(asked).agreement(images)
    assert np.array_equal(TileJudge(asked).agreement(images), first)
    assert np.array_equal(TileJudge(asked[:9]).agreement(images[:9]), first[:9])


@pytest.mark.parametrize(("kind", "size", "asked"), [(FashionJudge, 28, 3), (TileJudge, 32, "red ring item")])
def test_one_condition_per_image(kind: type[Judge], size: int, asked: Any) -> None:
    with pytest.raises(DgkitError, match="one (label )?for each of 3 images is needed"):
        kind([asked] * 2).agreement(noise(3, size))


def test_a_prompt_of_unknown_words_cannot_be_judged() -> None:
    with pytest.raises(DgkitError, match="caption 'photograph of Lisbon' is not allowed"):
        TileJudge(["photograph of Lisbon"]).agreement(noise(1, 32))


@pytest.mark.parametrize("kind", [FashionJudge, TileJudge])
def test_weights_are_read_once(kind: type[Judge]) -> None:
    assert kind([0]).network is kind([1]).network


def test_the_shipped_captions() -> None:
    captions = judges.tile_captions()
    assert len(captions) == len(set(captions)) == 1000 and all(len(caption.split()) >= 2 for caption in captions)
    load_matcher().bags(captions)  # knows them all
