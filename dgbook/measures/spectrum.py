"""Local detail measured without a network: power at high spatial frequencies, error per frequency band, sharpness.

All functions work on the luma of ITU-R BT.601 in [0, 1] and on the spectrum of the image mirrored at its edges (the
two-dimensional DCT-II, which is the Fourier transform of the mirrored image). Mirroring has no jump where a periodic
continuation would have one, and unlike a Hann window it weights every pixel alike, so sums over the spectrum equal sums
over the pixels (Parseval). Frequencies are radial, sqrt(fx^2 + fy^2), in cycles/pixel: 0.5 along an axis is the finest
grating that pixels can carry, the corners reach 0.71.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from dgkit.errors import DgkitError, first_line

Array = NDArray[np.float64]

DETAIL = 0.125
"""Cycles/pixel above which is detail: the finest three quarters of the frequencies along an axis."""

_LUMA = np.array([0.299, 0.587, 0.114])
_NO_POWER = 1e-12  # far below one grey level in one pixel, (1/255)^2, far above rounding


def luminance(images: Any) -> Array:
    """Luma in [0, 1], (N, H, W), of images (N, H, W, 3): uint8, or floating point in [0, 1]; NumPy or CPU tensor.

    Raises:
        DgkitError: another shape or type, or values outside [0, 1].
    """
    try:
        array = np.asarray(images)
    except (TypeError, ValueError) as error:  # ragged, or a tensor on a GPU
        raise DgkitError(f"images is not an array: {first_line(error)}") from error
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise DgkitError(f"images has shape {array.shape}: (N, H, W, 3) is needed")
    if array.dtype == np.uint8:
        return array @ _LUMA / 255
    if array.dtype.kind != "f":
        raise DgkitError(f"images has type {array.dtype}: uint8 or floating point in [0, 1] is needed")
    if not (array.min() >= 0 and array.max() <= 1):
        raise DgkitError(f"images has values from {array.min()} to {array.max()}: floating point must be in [0, 1]")
    return array.astype(np.float64) @ _LUMA


def radial_power_spectrum(images: Any) -> tuple[Array, Array]:
    """Mean power of the spectrum in rings of equal radial frequency.

    Args:
        images: (N, H, W, 3), see `luminance`.

    Returns:
        Power (N, F), the mean over each ring's coefficients, and the rings' frequencies (F,) in cycles/pixel: 0 (the
        mean of the image alone), then steps of 1 / min(H, W) up to 0.5. The corners beyond are left out.
    """
    power, frequency = _spectrum(luminance(images))
    size = min(power.shape[1:])
    ring = np.floor(frequency * size + 0.5 + 1e-9).astype(int).ravel()  # halves go up on every machine
    rings = size // 2 + 1
    members = np.bincount(ring)[:rings]
    sums = np.stack([np.bincount(ring, weights=p.ravel())[:rings] for p in power])
    return sums / members, np.arange(rings) / size


def high_frequency_energy(images: Any, cutoff: float = 0.25) -> Array:
    """Share (N,) of the power, the image's mean apart, that lies above `cutoff` cycles/pixel; 0 for a flat image.

    Raises:
        DgkitError: `cutoff` is not between 0 and 0.5, and as for `luminance`.
    """
    power, frequency = _spectrum(luminance(images))
    high = power[:, frequency > _cutoff(cutoff)].sum(axis=1)
    total = power[:, frequency > 0].sum(axis=1)
    return np.divide(high, total, out=np.zeros_like(total), where=total > _NO_POWER)


def band_error(images: Any, reference: Any, cutoff: float = DETAIL) -> tuple[Array, Array]:
    """Relative squared error of each image against its reference, below and above a spatial frequency.

    The energy of the difference's spectrum in a band over the energy of the reference's spectrum in that band. The mean
    of the image belongs to the low band.

    Args:
        images: (N, H, W, 3), see `luminance`.
        reference: The images they are compared with, of the same shape.
        cutoff: Where the bands meet, in cycles/pixel; it belongs to the low band.

    Returns:
        Errors in the low and in the high band, (N,) each.

    Raises:
        DgkitError: shapes differ, `cutoff` is not between 0 and 0.5, or a reference is flat or black, so that its band
            has no energy to compare with.
    """
    luma, reference_luma = luminance(images), luminance(reference)
    if luma.shape != reference_luma.shape:
        raise DgkitError(f"images are {luma.shape} and reference {reference_luma.shape} (N, H, W): they must agree")
    error, frequency = _spectrum(luma - reference_luma)
    energy, _ = _spectrum(reference_luma)
    low = frequency <= _cutoff(cutoff)
    ratios = []
    for name, band in (("low", low), ("high", ~low)):
        whole = energy[:, band].sum(axis=1)
        if whole.min() <= _NO_POWER:
            raise DgkitError(f"reference image {whole.argmin()} has no power in the {name} band to compare with")
        ratios.append(error[:, band].sum(axis=1) / whole)
    return ratios[0], ratios[1]


def detail_distance(images: Any, real: Any) -> Array:
    """How far the detail of a set of images is from that of real ones, in dB: numbers (N,) whose mean is the distance.

    The root mean square, over the rings of `radial_power_spectrum` above `DETAIL` cycles/pixel, of
    10 log10(P / P_real), P being the power of a ring averaged over the images: 0 for as much detail as real images have
    at every scale; smoother images and noisier ones are both far. An image's number is the distance plus its empirical
    influence on it (see `frechet.frechet_contributions`).

    Args:
        images: (N, H, W, 3), see `luminance`.
        real: mean power (F,) of the rings of real images of the same size.

    Raises:
        DgkitError: `real` is of other rings or not positive, the images have no power in a ring, or as for `luminance`.
    """
    power, frequencies = radial_power_spectrum(images)
    target = np.asarray(real, np.float64)
    if target.shape != frequencies.shape or not (target > 0).all():
        raise DgkitError(f"real has shape {target.shape}: {len(frequencies)} positive powers are needed, one per ring")
    power, target = power[:, frequencies > DETAIL], target[frequencies > DETAIL]
    mean = power.mean(axis=0)
    if mean.min() <= _NO_POWER:
        raise DgkitError("the images have no detail: they are flat or smooth to the last bit")
    level = 10 * np.log10(mean / target)
    distance = np.sqrt((level**2).mean())
    if distance == 0:
        return np.zeros(len(power))
    gradient = level / (len(level) * distance) * 10 / np.log(10) / mean
    return distance + (power - mean) @ gradient


def sharpness(images: Any) -> Array:
    """Variance of the Laplacian of the luma (N,), edges mirrored (Pech-Pacheco et al. 2000)."""
    kernel = np.array([[[0, 1, 0], [1, -4, 1], [0, 1, 0]]], dtype=np.float64)
    return ndimage.convolve(luminance(images), kernel, mode="reflect").var(axis=(1, 2))


def _spectrum(luma: Array) -> tuple[Array, Array]:
    """Power (N, H, W) and radial frequency (H, W); the sum of the power is the sum of the squared pixels."""
    height, width = luma.shape[1:]
    power = fft.dctn(luma, axes=(1, 2), norm="ortho") ** 2
    frequency = np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width))
    return power, frequency


def _cutoff(value: float) -> float:
    if not 0 < value < 0.5:
        raise DgkitError(f"cutoff={value} is not allowed: a frequency between 0 and 0.5 cycles/pixel is needed")
    return value
