"""Independent networks that say whether a sample shows what was asked for, one for each data set of our own models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dgbook.measures.classifier import agreement, fashion_classifier, inception_score
from dgbook.measures.frechet import frechet_contributions, frechet_distance_to
from dgbook.measures.matcher import TileMatcher, load_matcher, matching_score
from dgbook.measures.precision_recall import precision_recall
from dgbook.measures.spectrum import detail_distance
from dgbook.readers import read_weights
from dgkit.files import read_lines
from dgkit.paths import DATA
from dgkit.zoo import row_of

CHOICES = 16
"""Captions among which `tile-matcher` has to find an image's own."""


class Judge(ABC):
    """One of the networks below, bound to what was asked for.

    Args:
        conditions: one per image, in the images' order.
    """

    name: ClassVar[str]
    """Of the network."""
    data: ClassVar[str]
    """Name of the data set, as in `zoo.Model.data`."""

    def __init__(self, conditions: Sequence[Any]) -> None:
        self.conditions = list(conditions)

    def first(self, count: int) -> Self:
        """The judge of the first `count` images."""
        return type(self)(self.conditions[:count])

    @abstractmethod
    def agreement(self, images: Any) -> NDArray[np.bool_]:
        """Whether each of the uint8 images (N, H, W, 3) shows its condition, (N,).

        Raises:
            DgkitError: images of another shape, not one per condition, or a condition unknown to the judge.
        """

    @property
    @abstractmethod
    def network(self) -> Any:
        """The judging network."""

    def features(self, images: Any) -> NDArray[np.float64]:
        """Penultimate features (N, F) of uint8 images (N, H, W, 3)."""
        return np.asarray(self.network.features(images), np.float64)

    def frechet(self, features: Any) -> float:
        """Frechet distance of features (N, F) to those of the real images that the model was trained on."""
        real = _reference(self.data)
        return frechet_distance_to(features, real["mean"], real["covariance"])

    def frechet_contributions(self, features: Any) -> NDArray[np.float64]:
        """What each image adds to `frechet` of features (N, F): numbers (N,) whose mean is the distance."""
        real = _reference(self.data)
        return frechet_contributions(features, real["mean"], real["covariance"])

    def detail_distance(self, images: Any) -> NDArray[np.float64]:
        """`spectrum.detail_distance` to the real images that the model was trained on, (N,)."""
        return detail_distance(images, _reference(self.data)["spectrum"])

    @property
    def real_features(self) -> NDArray[Any]:
        """Features of a sample of real images that nothing was trained on, (M, F)."""
        return _reference(self.data)["sample"]

    @property
    def sharpness_of_real(self) -> float:
        """Mean of `spectrum.sharpness` over the real images that the model was trained on."""
        return float(_reference(self.data)["sharpness"])


class FashionJudge(Judge):
    """`fashion-classifier`: whether its most probable class is the one asked for."""

    name, data = "fashion-classifier", "fashion-mnist"

    @property
    def network(self) -> Any:
        return fashion_classifier()

    def agreement(self, images: Any) -> NDArray[np.bool_]:
        return agreement(self.network(images), self.conditions)


class TileJudge(Judge):
    """`tile-matcher`: whether the image's caption is the nearest of `CHOICES`, chance being 1 / `CHOICES`.

    The others are drawn from `data/prompts/dungeon-tiles.txt`; which ones depends on the image's position and caption.
    """

    name, data = "tile-matcher", "dungeon-tiles"

    @property
    def network(self) -> TileMatcher:
        return _tile_matcher()

    def agreement(self, images: Any) -> NDArray[np.bool_]:
        return matching_score(self.network, images, self.conditions, CHOICES, pool=tile_captions())


JUDGES: tuple[type[Judge], ...] = (FashionJudge, TileJudge)


def judge_of(pipe: Any, conditions: Sequence[Any]) -> Judge | None:
    """The judge of the data set that the model was trained on; None for models that are not of this project.

    Args:
        pipe: a pipeline, known by its row in the zoo.
        conditions: class ids or prompts, one per image that will be judged.
    """
    row = row_of(pipe)
    kind = next((judge for judge in JUDGES if row and judge.data == row.data), None)
    return kind(conditions) if kind else None


def judge_set_scores(judge: FashionJudge, images: Any) -> dict[str, float]:
    """Scores of a set of images on the judge's network, as those of Inception are on its own.

    Args:
        judge: one with classes; what was asked for does not count.
        images: uint8 (N, H, W, 3). With no more of them than features the Frechet distance is mostly bias.

    Returns:
        "frechet": distance to the training set; "is": exp(KL) of the classes' probabilities, in one part; "precision",
        "recall": of Kynkaanniemi et al. 2019 with k = 3, against real images that nothing was trained on.

    Raises:
        DgkitError: images of another shape, or fewer than 4.
    """
    features = judge.features(images)
    shares = precision_recall(judge.real_features, features)
    return {
        "frechet": judge.frechet(features),
        "is": inception_score(judge.network(images)),
        "precision": shares.precision,
        "recall": shares.recall,
    }


@cache
def tile_captions() -> tuple[str, ...]:
    """The captions of `data/prompts/dungeon-tiles.txt`."""
    return tuple(read_lines(DATA / "prompts" / "dungeon-tiles.txt"))


@cache
def _tile_matcher() -> TileMatcher:

    return load_matcher()


@cache
def _reference(data: str) -> dict[str, NDArray[Any]]:
    return read_weights(DATA / "reference" / f"{data}.safetensors", load_file)
