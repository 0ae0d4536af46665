"""Fidelity and diversity apart: improved precision and recall."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgbook.measures.arrays import numbers
from dgkit.checks import integer
from dgkit.errors import DgkitError

_ROWS = 1024  # distances are computed for so many rows at a time


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Any, generated: Any, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of Kynkaanniemi et al. 2019 in float64.

    Each set's manifold is the union of balls around its samples that reach to the k-th nearest other sample. Precision
    is the share of generated samples in the real manifold, recall that of real samples in the generated one. Both
    depend on the number of samples: compare only sets of equal size.

    Args:
        real: Features (N, features), NumPy or tensor.
        generated: Features (M, features).
        k: Which neighbour sets the radius.

    Raises:
        DgkitError: a set has k samples or fewer, widths differ, or features are not finite.
    """
    rows = integer("k", k, 1) + 1
    a, b = (torch.from_numpy(numbers(n, v, 2, rows)) for n, v in (("real", real), ("generated", generated)))
    if a.shape[1] != b.shape[1]:
        raise DgkitError(f"real has {a.shape[1]} features and generated {b.shape[1]}: they must agree")
    return PrecisionRecall(precision=_covered(b, a, k), recall=_covered(a, b, k))


def _covered(samples: Tensor, manifold: Tensor, k: int) -> float:
    # the nearest of all samples is the sample itself
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(k + 1).values for rows in manifold.split(_ROWS)])
    inside = [(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in samples.split(_ROWS)]
    return torch.cat(inside).double().mean().item()
