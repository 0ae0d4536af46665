"""Scores of whole sets of images as in guided-diffusion's evaluator (Dhariwal and Nichol 2021), on the same Inception.

The network is torch-fidelity's "inception-v3-compat", the 2015 TensorFlow Inception with its own resizing. Two things
are better here than in the evaluator and move the last digits: the root of the covariances is taken from symmetric
eigenvalues, and distances for precision and recall are float64, not float16.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dgbook.measures.arrays import numbers
from dgbook.measures.base import MetricId, as_images, full_float32
from dgbook.measures.classifier import inception_score as score_of_logits
from dgbook.measures.frechet import frechet_distance_to
from dgbook.measures.precision_recall import PrecisionRecall, precision_recall
from dgbook.paper_scale.scores.weights import label, package, tensors, weights
from dgbook.readers import read_npz
from dgkit.errors import DataError, DgkitError

SPLIT = 5_000
"""Images per part of the Inception Score."""
NEIGHBOURS = 3
"""k of precision and recall."""

_BATCH = 32
_PUBLISHED = 50_000  # images of the published protocol; only sets of this size may carry its name


class Features(NamedTuple):
    """What Inception says of N images: `pool` (N, 2048) and `logits` (N, 1008, without bias), float32."""

    pool: NDArray[np.float32]
    logits: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: "list[Features]") -> "Features":
        """Features of sets one after the other."""
        return cls(np.concatenate([part.pool for part in parts]), np.concatenate([part.logits for part in parts]))


@dataclass(frozen=True)
class Reference:
    """The real images that a set is compared with.

    Attributes:
        name: of the reference, part of the metric id.
        mean, covariance: of the pool features of all of them.
        pool: features (M, 2048) of a sample of them, for precision and recall; None if there is none.
    """

    name: str
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    pool: NDArray[np.float32] | None


@dataclass(frozen=True)
class SetScore:
    """One number for a set of images.

    Attributes:
        name: "FID-50K" for exactly 50,000 images, else with the number, "FID-10000"; the same for "IS" and the others.
        value: None if it cannot be computed, for the `reason`.
        id: what was computed.
    """

    name: str
    value: float | None
    id: MetricId
    reason: str = ""


class Inception:
    """The Inception network of FID, IS, precision and recall."""

    def __init__(self, device: str = "cpu") -> None:
        extractor = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        found = weights("inception-2015-12-05")
        buffer = io.BytesIO()  # its constructor unpickles whatever it is given: give it our own copy of checked tensors
        torch.save(tensors(found), buffer)
        buffer.seek(0)
        try:
            self.network = extractor.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
            ).to(device)
        except RuntimeError as error:
            raise DataError(f"{found.path} does not fit Inception: {str(error).splitlines()[0]}") from error
        self.device = device
        self.id = MetricId(
            "inception", label("inception-2015-12-05", found), "tf1-bilinear-299", False, "float32", "features"
        )

    @torch.no_grad()
    def features(self, images: Any) -> Features:
        """Features of uint8 images (N, H, W, 3).

        Raises:
            DgkitError: images of another shape or type.
        """
        pixels = torch.from_numpy(as_images(images)).permute(0, 3, 1, 2)
        with full_float32():
            parts = [
                Features(*(part.cpu().numpy() for part in self.network(batch.to(self.device).contiguous())))
                for batch in pixels.split(_BATCH)
            ]
        return Features.joined(parts)


def imagenet_reference(inception: Inception) -> Reference:
    """guided-diffusion's reference batch of ImageNet 256x256: statistics of the training set and 10,000 of its images.

    Raises:
        MetricUnavailable: the file (2 GB) is neither here nor to be downloaded.
        DataError: it is not such a file.
    """
    found = weights("imagenet-256-reference")
    return read_reference(found.path, inception, label("imagenet-256", found))


def read_reference(path: str | Path, inception: Inception, name: str) -> Reference:
    """A reference in guided-diffusion's npz format: images `arr_0`, and `mu` and `sigma` where they are of more images.

    Raises:
        DataError: not such a file.
    """
    arrays = read_npz(Path(path), ("arr_0", "mu", "sigma"))
    if "arr_0" not in arrays:
        raise DataError(f"{path} is not a reference batch: it has no images in arr_0")
    try:
        pool = inception.features(arrays["arr_0"]).pool
        if not {"mu", "sigma"} <= arrays.keys():
            return Reference(name, *_gaussian(pool), pool)
        mean, covariance = numbers("mu", arrays["mu"], 1), numbers("sigma", arrays["sigma"], 2)
    except DgkitError as error:
        raise DataError(f"{path} is not a reference batch with images in arr_0: {error}") from error
    if covariance.shape != (*mean.shape, *mean.shape) or mean.shape != pool.shape[1:]:
        raise DataError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} are not those of {pool.shape[1]} features"
        )
    return Reference(name, mean, covariance, pool)


def fid(pool: Any, reference: Reference) -> float:
    """Frechet Inception Distance (Heusel et al. 2017) of pool features (N, F) to the reference.

    Raises:
        DgkitError: not more images than features: their covariance is singular and the distance mostly bias.
    """
    table = np.asarray(pool)
    if table.ndim == 2 and len(table) <= table.shape[1]:
        raise DgkitError(
            f"{len(table)} images are too few for a Frechet distance on {table.shape[1]} features: with no more images "
            "than features the covariance is singular and the distance mostly bias"
        )
    return frechet_distance_to(table, reference.mean, reference.covariance)


def inception_score(logits: Any) -> float:
    """Inception Score (Salimans et al. 2016): mean over consecutive parts of 5,000 images, a last part may be smaller.

    Args:
        logits: (N, 1008) without bias.

    Raises:
        DgkitError: fewer than 5,000 images, for which the score is another quantity: it grows with the part's size.
    """
    table = np.asarray(logits)
    if len(table) < SPLIT:
        raise DgkitError(
            f"{len(table)} images are too few for the Inception Score: it is defined on parts of {SPLIT}, and smaller "
            "parts score lower"
        )
    return float(np.mean([score_of_logits(table[i : i + SPLIT]) for i in range(0, len(table), SPLIT)]))


def set_scores(inception: Inception, features: Features, reference: Reference | None) -> dict[str, SetScore]:
    """Scores "fid", "is", "precision" and "recall" of a set; those that cannot be computed carry the reason.

    Precision and recall (Kynkaanniemi et al. 2019) are those of `metrics.precision_recall` with k = 3 on the pool
    features; they too depend on the number of images.
    """
    count = len(features.pool)

    def against() -> Reference:
        if reference is None:
            raise DgkitError("no reference images were given")
        return reference

    @cache
    def shares() -> PrecisionRecall:
        if against().pool is None:
            raise DgkitError(f"the reference {against().name} has statistics but no images")
        return precision_recall(against().pool, features.pool, NEIGHBOURS)

    rows: dict[str, tuple[str, str, Callable[[], float]]] = {
        "fid": ("FID", "distance", lambda: fid(features.pool, against())),
        "is": ("IS", f"exp(KL),parts-of-{SPLIT}", lambda: inception_score(features.logits)),
        "precision": ("precision", f"share,k={NEIGHBOURS}", lambda: shares().precision),
        "recall": ("recall", f"share,k={NEIGHBOURS}", lambda: shares().recall),
    }
    scores = {}
    for key, (name, scale, compute) in rows.items():
        against_name = f"+{reference.name}" if reference and key != "is" else ""
        metric = replace(inception.id, name=key, weights=inception.id.weights + against_name, scale=scale)
        try:
            scores[key] = SetScore(sized(name, count), compute(), metric)
        except DgkitError as error:
            scores[key] = SetScore(sized(name, count), None, metric, str(error))
    return scores


def sized(name: str, count: int) -> str:
    """The score's name with the number of images: "FID-50K" for exactly 50,000, "FID-10000" for 10,000."""
    return f"{name}-50K" if count == _PUBLISHED else f"{name}-{count}"


def _gaussian(pool: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    table = np.asarray(pool, np.float64)
    return table.mean(axis=0), np.atleast_2d(np.cov(table, rowvar=False))
