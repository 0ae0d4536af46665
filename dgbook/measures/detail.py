"""What stays the same when detail changes: structure of an image against a reference, without a network.

The reference has the same prompt and noise (guided and unguided, disrupted and intact): if only local detail differs,
the similarity stays near 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from dgbook.measures.base import MetricId, PairScorer, Scorer, as_images
from dgbook.measures.spectrum import high_frequency_energy, luminance, sharpness
from dgkit.errors import DgkitError

Array = NDArray[np.float64]

CUTOFF = 0.125
"""Cycles/pixel up to which `structure_similarity` compares, the same as `spectrum.band_error`'s."""

_WINDOW, _SIGMA = 11, 1.5  # SSIM's Gaussian window
_C1, _C2 = 0.01**2, 0.03**2


def structure_similarity(images: Any, reference: Any) -> Array:
    """SSIM (N,) of the low-passed luma: 1 where everything coarser than detail agrees.

    Both images keep only the frequencies up to `CUTOFF` of their two-dimensional DCT-II. Then the structural similarity
    of Wang et al. 2004 with its constants (Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, L = 1),
    averaged over the windows that lie inside the image.

    Raises:
        DgkitError: shapes differ, a side is shorter than the window, and as for `spectrum.luminance`.
    """
    a, b = _pair(images, reference)
    if min(a.shape[1:]) < _WINDOW:
        raise DgkitError(f"images of {a.shape[1]} x {a.shape[2]} pixels are too small: {_WINDOW} x {_WINDOW} at least")
    a, b = _low_pass(a), _low_pass(b)
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a, variance_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    ssim = ((2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)) / (
        (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    )
    edge = _WINDOW // 2
    return ssim[:, edge:-edge, edge:-edge].mean(axis=(1, 2))


class LocalScore(Scorer):
    """A function of the pixels alone, as a scorer; the prompts play no part."""

    def __init__(self, name: str, function: Callable[[Any], Array], scale: str) -> None:
        self.function, self.id = function, _pixel_id(name, scale)

    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        return self.function(images)


class PairScore(PairScorer):
    """A function of the pixels of an image and its reference, as a scorer."""

    def __init__(self, name: str, function: Callable[[Any, Any], Array], scale: str) -> None:
        self.function, self.id = function, _pixel_id(name, scale)

    def __call__(self, images: Any, reference: Any) -> Array:
        return self.function(as_images(images), as_images(reference))


def sharpness_score() -> LocalScore:
    """`spectrum.sharpness` as a scorer."""
    return LocalScore("sharpness", sharpness, "variance-of-laplacian")


def high_frequency_score() -> LocalScore:
    """`spectrum.high_frequency_energy` as a scorer."""
    return LocalScore("high-frequency-energy", high_frequency_energy, "share-above-0.25-cycles/pixel")


def structure_score() -> PairScore:
    """`structure_similarity` as a scorer."""
    return PairScore("structure-similarity", structure_similarity, f"ssim-below-{CUTOFF}-cycles/pixel")


def _pixel_id(name: str, scale: str) -> MetricId:
    return MetricId(name, "none", "luma-bt601", None, "float64", scale)


def _pair(images: Any, reference: Any) -> tuple[Array, Array]:
    a, b = luminance(images), luminance(reference)
    if a.shape != b.shape:
        raise DgkitError(f"images are {a.shape} and reference {b.shape} (N, H, W): they must agree")
    return a, b


def _low_pass(luma: Array) -> Array:
    height, width = luma.shape[1:]
    frequency = np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width))
    coefficients = fft.dctn(luma, axes=(1, 2), norm="ortho")
    return fft.idctn(np.where(frequency <= CUTOFF, coefficients, 0), axes=(1, 2), norm="ortho")


def _blur(maps: Array) -> Array:
    return ndimage.gaussian_filter(maps, _SIGMA, axes=(1, 2), radius=_WINDOW // 2)
