"""Scores from a classifier's logits, and the shipped Fashion-MNIST classifier."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from dgkit.errors import DgkitError

if TYPE_CHECKING:
    from dgkit.tiny.classifier import FashionClassifier


def inception_score(logits: Any, splits: int = 1) -> float:
    """exp of the mean KL divergence from p(y|x) to p(y) (Salimans et al. 2016), averaged over consecutive splits.

    Between 1 and the number of classes. It is the Inception Score only on Inception's logits; elsewhere name the
    classifier.

    Args:
        logits: (N, classes), NumPy or CPU tensor.
        splits: Number of parts of (almost) equal size.

    Raises:
        DgkitError: `logits` is not a finite table, or `splits` is not in 1..N.
    """
    table = _logits(logits)
    if not 1 <= splits <= len(table):
        raise DgkitError(f"splits={splits} is not allowed: 1 to {len(table)} for that many images")
    scores = []
    for part in np.array_split(log_softmax(table, axis=1), splits):
        marginal = logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def agreement(logits: Any, labels: Any) -> NDArray[np.bool_]:
    """Whether the most probable class is the label, per image (N,).

    Args:
        logits: (N, classes), NumPy or CPU tensor.
        labels: Class indices (N,).

    Raises:
        DgkitError: `logits` is not a finite table, or `labels` has another length.
    """
    table, classes = _logits(logits), np.asarray(labels)
    if classes.shape != (len(table),):
        raise DgkitError(f"labels has shape {classes.shape}: one label for each of {len(table)} images is needed")
    return table.argmax(axis=1) == classes


@cache
def fashion_classifier() -> "FashionClassifier":
    """The shipped Fashion-MNIST classifier: logits (N, 10) of uint8 images, and their 64 penultimate `.features`.

    Raises:
        DgkitError: its weights are missing or do not fit.
    """
    from dgkit.tiny.classifier import load_classifier  # the training code, which the scores above do not need

    return load_classifier()


def _logits(logits: Any) -> NDArray[np.float64]:
    table = np.asarray(logits, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all():
        raise DgkitError(f"logits has shape {table.shape}: a finite table (images, classes) is needed")
    return table
