"""The check that numbers are numbers: every measure takes what it is given through this."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgkit.errors import DgkitError, first_line


def numbers(name: str, values: Any, axes: int, rows: int = 1) -> NDArray[np.float64]:
    """Finite numbers in float64 with `axes` axes, none of them empty, and at least `rows` along the first.

    Raises:
        DgkitError: `values`, which are called `name`, are not such numbers.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:  # ragged, words, or a tensor on a GPU
        raise DgkitError(f"{name} is not an array of numbers: {first_line(error)}") from error
    if array.ndim != axes or len(array) < rows or 0 in array.shape:
        raise DgkitError(f"{name} has shape {array.shape}: {axes} axes and at least {rows} images are needed")
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise DgkitError(f"{name} holds {len(bad)} values that are not finite, the first at {bad[0].tolist()}")
    return array
