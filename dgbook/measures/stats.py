"""Uncertainty of what was measured: paired bootstrap, win probability, shares of variance.

Images (or prompts) are the unit that is drawn at random, so they are what is resampled: 10,000 resamples from a fixed
seed, percentile intervals at 95 % (Efron and Tibshirani 1993, chapter 13).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dgbook.measures.arrays import numbers
from dgkit.errors import DgkitError

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval; prints as "0.123 [0.101, 0.140]", or with a format such as `:.1f`."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


def bootstrap(values: ArrayLike, statistic: Literal["mean", "median"] = "mean") -> Interval:
    """Mean (or median) of `values` (n,) over images, with a percentile bootstrap interval.

    Raises:
        DgkitError: fewer than two values, more than one axis, values that are not finite, or an unknown statistic.
    """
    if statistic not in ("mean", "median"):
        raise DgkitError(f'statistic={statistic!r} is not allowed: use "mean" or "median"')
    sample = numbers("values", values, 1, 2)
    function = np.mean if statistic == "mean" else np.median
    with np.errstate(invalid="ignore"):  # scipy's standard error of constant values, which is not used
        interval = stats.bootstrap(
            (sample,),
            function,
            n_resamples=RESAMPLES,
            batch=max(1, 4_000_000 // len(sample)),
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Interval(float(function(sample)), float(interval.low), float(interval.high))


def mean(values: ArrayLike) -> Interval:
    """Mean of `values` (n,) over images: a bootstrap, but Wilson's interval where all are 0 or 1, a share.

    A bootstrap of a share has no width at 0 and 1.

    Raises:
        DgkitError: as for `bootstrap`.
    """
    sample = numbers("values", values, 1, 2)
    return wilson(sample.sum(), len(sample)) if np.isin(sample, (0, 1)).all() else bootstrap(sample)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike | None = None, statistic: Literal["mean", "median"] = "mean"
) -> Interval:
    """Mean (or median) of a - b over pairs: same condition, same noise.

    Args:
        a: One value per image (n,).
        b: The other method's value for the same images (n,); None if `a` already holds differences.
        statistic: What is taken over the differences.

    Raises:
        DgkitError: `a` and `b` have different lengths, and as for `bootstrap`.
    """
    return bootstrap(a if b is None else np.subtract(*_pair(a, b)), statistic)


def win_probability(a: ArrayLike, b: ArrayLike) -> Interval:
    """Probability that `a` beats `b` on the same image, ties counted half, with a paired bootstrap interval.

    Where all pairs have the same outcome a resample cannot differ and the bootstrap would claim certainty; there the
    interval is Wilson's.

    Args:
        a: One value per image (n,); larger is better.
        b: The other method's value for the same images (n,).

    Raises:
        DgkitError: as for `paired_bootstrap`.
    """
    first, second = _pair(a, b)
    scores = (np.sign(first - second) + 1) / 2
    return wilson(scores.sum(), len(scores)) if np.ptp(scores) == 0 else bootstrap(scores)


def wilson(wins: float, n: int) -> Interval:
    """Share of `wins` in `n` independent trials with Wilson's score interval (Wilson 1927); `wins` may count halves.

    Raises:
        DgkitError: `n` is not positive or `wins` is not in [0, n].
    """
    if not n > 0 or not 0 <= wins <= n:
        raise DgkitError(f"wins={wins}, n={n} is not allowed: n must be positive and wins within [0, n]")
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share = wins / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(float(share), max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def variance_explained(
    values: ArrayLike, labels: ArrayLike | None = None, *, sampled_labels: bool = False
) -> dict[str, Interval]:
    """Shares of the variance of a table that timestep and condition explain (they add to 1).

    Two-way analysis of variance without replication: the total sum of squares is split into the part of the timestep
    means, the part of the image means and the rest (eta squared). With labels the image part is split further into the
    part of the class means and that of the images within their class; what class means differ by from chance alone,
    (classes - 1) times the mean square within classes, is counted with the latter (epsilon squared, Kelley 1935), so
    the class share is 0 on average, and may be below it, if classes mean nothing.

    Args:
        values: One row per image, one column per timestep (images, timesteps).
        labels: Class of each image (images,).
        sampled_labels: Whether the labels are a sample, as captions are, so that intervals are over labels with all
            their images; else over images within their class.

    Returns:
        "timestep", "image", "residual", or with labels "timestep", "class", "image" (within class), "residual"; each
        with a bootstrap interval over images, or as by `sampled_labels`.

    Raises:
        DgkitError: fewer than two images or timesteps, values that are not finite or all equal, labels of another
            length, or a class with a single image.
    """
    table = numbers("values", values, 2, 2)
    images, timesteps = table.shape
    if timesteps < 2:
        raise DgkitError(f"values has {timesteps} timestep: at least 2 are needed")
    table = table - table.mean()
    if not np.any(np.abs(table) > 1e-12 * np.abs(np.asarray(values, dtype=float)).max()):
        raise DgkitError("values are all equal: there is no variance to explain")
    if labels is None:
        groups = np.zeros(images, dtype=int)
    else:
        names, groups, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
        if groups.shape != (images,):
            raise DgkitError(f"labels has shape {np.shape(labels)}: one label for each of {images} images is needed")
        if counts.min() < 2:
            raise DgkitError(f"labels: class {names[counts.argmin()]} has one image, at least 2 are needed")
    members = np.equal.outer(np.arange(groups.max() + 1), groups)  # (classes, images)

    # Every sum of squares depends on a resample only through how often it drew each image, so all resamples are
    # evaluated at once; the first row is the sample itself.
    generator = np.random.default_rng(0)
    draws = np.zeros((1 + RESAMPLES, images))
    draws[0] = 1
    classes = len(members)
    if sampled_labels and labels is not None:
        draws[1:] = generator.multinomial(classes, np.full(classes, 1 / classes), RESAMPLES)[:, groups]
    else:
        for member in members:
            draws[1:, member] = generator.multinomial(member.sum(), np.full(member.sum(), 1 / member.sum()), RESAMPLES)

    image_means = table.mean(axis=1)
    drawn = draws.sum(axis=1)  # images; resampled classes may differ in size
    mean = draws @ image_means / drawn
    total = draws @ (table**2).sum(axis=1) - drawn * timesteps * mean**2
    by_timestep = ((draws @ table) ** 2).sum(axis=1) / drawn - drawn * timesteps * mean**2
    sizes = np.maximum(draws @ members.T, 1)
    by_class = timesteps * (((draws @ (members * image_means).T) ** 2 / sizes).sum(axis=1) - drawn * mean**2)
    by_image = timesteps * (draws @ image_means**2 - drawn * mean**2) - by_class
    if labels is not None:
        chance = (classes - 1) / (drawn - classes) * by_image
        by_class, by_image = by_class - chance, by_image + chance
    parts = {"timestep": by_timestep, "image": by_image, "residual": total - by_timestep - by_class - by_image}
    if labels is not None:
        parts = {"timestep": by_timestep, "class": by_class, **parts}
    # A resample of one image drawn over and over may have no variance at all: it cannot say how it is shared.
    varied = total > 1e-12 * total[0]
    return {name: _percentiles(part[varied] / total[varied]) for name, part in parts.items()}


def p_value(values: ArrayLike, bound: float, *, share: bool = False) -> float:
    """Two-sided p of the hypothesis that the mean of `values` (n,) over images is `bound`.

    Of a `share` (all values 0 or 1): twice the smaller exact binomial tail. Else twice the smaller share of the
    bootstrap's resampled means that lie at the bound or beyond it, counting the sample itself, so never below
    2 / (RESAMPLES + 1). 1 where all values are the bound.

    Raises:
        DgkitError: as for `bootstrap`.
    """
    sample = numbers("values", values, 1, 2)
    if share:
        tails = (stats.binomtest(int(sample.sum()), len(sample), bound, side).pvalue for side in ("less", "greater"))
        return min(1.0, 2 * min(tails))
    generator, means = np.random.default_rng(0), []
    for part in np.array_split(np.arange(RESAMPLES), 10):  # bounded memory
        means.append(sample[generator.integers(len(sample), size=(len(part), len(sample)))].mean(axis=1))
    drawn = np.concatenate(means)
    tail = min((drawn <= bound).sum(), (drawn >= bound).sum())
    return min(1.0, 2 * float(1 + tail) / (1 + RESAMPLES))


def rank_p_value(value: float, drawn: ArrayLike) -> float:
    """One-sided p of `value` being no larger than one of the draws (n,): (1 + those as large) / (1 + n)."""
    sample = numbers("drawn", drawn, 1, 2)
    return float(1 + (sample >= value).sum()) / (1 + len(sample))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values (n,) adjusted for n tests (Holm 1979): those below 0.05 are wrong in one family of twenty at most."""
    p = np.asarray(p_values, dtype=np.float64)
    order = p.argsort(kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[order.argsort(kind="stable")]


def _percentiles(replicates: NDArray[np.float64]) -> Interval:
    """Interval of the resamples' values (1 + resamples,), of which the first is the sample's own."""
    low, high = np.quantile(replicates[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(replicates[0]), float(low), float(high))


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = numbers("a", a, 1, 2), numbers("b", b, 1, 2)
    if len(first) != len(second):
        raise DgkitError(f"a has {len(first)} values and b {len(second)}: a paired comparison needs the same images")
    return first, second
