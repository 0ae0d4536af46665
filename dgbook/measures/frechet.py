"""Distance between two sets of features as between two Gaussians."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbook.measures.arrays import numbers
from dgkit.errors import DgkitError


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Frechet distance of two samples' Gaussians (Heusel et al. 2017): means m, covariances C, in float64.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is taken from the symmetric
    C_a^(1/2) C_b C_a^(1/2), whose eigenvalues are those of C_a C_b, so it stays real when there are fewer samples than
    features. The estimate is biased upwards at small N: compare only sets of equal size. It is called FID only on
    Inception features of 50,000 samples.

    Args:
        features_a: (N_a, features), NumPy or CPU tensor.
        features_b: (N_b, features).

    Raises:
        DgkitError: fewer than 2 samples, different widths, or features that are not finite.
    """
    a, b = numbers("features_a", features_a, 2, 2), numbers("features_b", features_b, 2, 2)
    if a.shape[1] != b.shape[1]:
        raise DgkitError(f"features_a has {a.shape[1]} features and features_b {b.shape[1]}: they must agree")
    return frechet_distance_to(a, b.mean(axis=0), np.atleast_2d(np.cov(b, rowvar=False)))


def frechet_distance_to(features: Any, mean: Any, covariance: Any) -> float:
    """`frechet_distance` of a sample to a Gaussian whose `mean` (features,) and `covariance` are already known.

    Raises:
        DgkitError: as for `frechet_distance`, also of `mean` and `covariance`; or the three widths do not agree, the
            covariance is not symmetric, or the numbers are too large for squares in float64.
    """
    sample, m, c = numbers("features", features, 2, 2), numbers("mean", mean, 1), numbers("covariance", covariance, 2)
    width = sample.shape[1]
    if m.shape != (width,) or c.shape != (width, width):
        raise DgkitError(f"mean {m.shape} and covariance {c.shape} are not those of {width} features")
    if not np.allclose(c, c.T):  # of which only one half would be read
        raise DgkitError("covariance is not symmetric: give one that is")
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            own = np.atleast_2d(np.cov(sample, rowvar=False))
            values, vectors = np.linalg.eigh(own)
            root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
            product = np.linalg.eigvalsh(root @ c @ root)
            shift = sample.mean(axis=0) - m
            distance = float(shift @ shift + np.trace(own) + np.trace(c) - 2 * np.sqrt(product.clip(0)).sum())
        except np.linalg.LinAlgError:  # of infinities
            distance = np.nan
    if not np.isfinite(distance):
        largest = max(np.abs(array).max() for array in (sample, m, c))
        raise DgkitError(
            f"features, mean or covariance up to {largest:g} are too large: their squares overflow float64"
        )
    return max(0.0, distance)


def frechet_contributions(features: Any, mean: Any, covariance: Any) -> NDArray[np.float64]:
    """What each sample adds to `frechet_distance_to`: numbers (N,) whose mean is the distance.

    The distance plus the sample's empirical influence (Efron and Tibshirani 1993, chapter 21): what the distance gains,
    per unit of weight, where the sample weighs more than the others. The distance of a resample is to first order the
    mean of its contributions, so that distances are compared image by image, as any other mean.

    Raises:
        DgkitError: as for `frechet_distance_to`.
    """
    distance = frechet_distance_to(features, mean, covariance)
    sample, m, c = numbers("features", features, 2, 2), numbers("mean", mean, 1), numbers("covariance", covariance, 2)
    centred = sample - sample.mean(axis=0)
    own = np.atleast_2d(np.cov(sample, rowvar=False))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    values, vectors = np.linalg.eigh(root @ own @ root)
    kept = values > 1e-10 * values.max()  # the derivative of the root is taken within the range of the samples
    inverse = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    gradient = np.eye(len(c)) - root @ inverse @ root  # by the covariance; by the mean it is 2 (sample mean - m)
    spread = np.einsum("ni,ij,nj->n", centred, gradient, centred) * len(sample) / (len(sample) - 1)
    return distance + 2 * centred @ (sample.mean(axis=0) - m) + spread - np.trace(gradient @ own)
