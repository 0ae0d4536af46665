"""What parts of the claims compare or show that no result stores: each a small function of a result's values.

`data/paper/parts.csv` names them as "derived.FUNCTION".
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dgbook.claims import names
from dgbook.claims.results import at
from dgbook.measures.stats import Interval

Values = Mapping[str, Any]


def value_at(values: Values, path: str) -> Any:
    """The value stored at `path`, or, for "derived.FUNCTION", what that function makes of the values.

    Raises:
        KeyError: it was not measured.
    """
    value = _DERIVED[path](values) if path in _DERIVED else at(values, path)
    if value is None:
        raise KeyError(path)
    return value


def fixed_channels_listed(v: Values) -> str:
    """The channels that are most often the largest, such as "7, 8 and 9"."""
    words = [str(int(dim)) for dim in v["fixed"]["channels"]]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def last_block(v: Values) -> int:
    """The index of the last block."""
    return int(v["blocks"]) - 1


def sharpest_block(v: Values) -> int:
    """The block at which DG makes the images sharpest."""
    return int(_sharpest(v)[0])


def largest_sharpness_ratio(v: Values) -> float:
    """Sharpness with DG at its sharpest block over that without guidance."""
    return float(_sharpest(v)[1])


def sharpest_block_from_the_ends(v: Values) -> int:
    """How far the sharpest block is from the nearer end; 0, too, where DG sharpens nothing beyond chance."""
    block, _, low, _ = _sharpest(v)
    return min(int(block), last_block(v) - int(block)) if low > 1 else 0


def block_of_least_effect(v: Values) -> int:
    """The block at which DG changes sharpness least, up or down."""
    ratios = v["sweeps"]["block"]["sharpness_ratio"]
    return int(ratios[np.abs(np.log(ratios[:, 1])).argmin(), 0])


def worst_agreement_change(v: Values) -> Interval:
    """The lowest agreement change of the sweep over w, and the lowest end at either side: a bound on every w."""
    return Interval(*v["sweeps"]["w"]["agreement_change"][:, 1:].min(axis=0).tolist())


def agreement_changes_listed(v: Values) -> str:
    """The agreement change at each w of the sweep as text."""
    return ", ".join(f"{change:+.2f} (w = {w:g})" for w, change, *_ in v["sweeps"]["w"]["agreement_change"])


def smallest_other_frechet_change(v: Values) -> Interval:
    """The lowest change of any method but CFG + DG and no guidance, and the lowest end at either side."""
    changes = _other_frechet_changes(v).values()
    return Interval(*(min(getattr(change, end) for change in changes) for end in ("value", "low", "high")))


def best_other_method(v: Values) -> str:
    """The name of the method with the lowest change and its change as text."""
    method, change = min(_other_frechet_changes(v).items(), key=lambda item: item[1].value)
    return f"{names.label(method)} {change:+.2f}"


def _sharpest(v: Values) -> Any:
    """(block, sharpness over that without guidance, low, high) of the block where DG makes images sharpest."""
    return max(v["sweeps"]["block"]["sharpness_ratio"], key=lambda row: row[1])


def _other_frechet_changes(v: Values) -> dict[str, Interval]:
    """By method at equal cost, but CFG + DG and no guidance at all."""
    others = {name: method for name, method in v["methods"].items() if name not in ("cfg+dg", "none")}
    return {name: method["frechet_change"] for name, method in others.items()}


_DERIVED: dict[str, Callable[[Values], Any]] = {
    f"derived.{function.__name__}": function
    for function in (
        fixed_channels_listed,
        last_block,
        sharpest_block,
        largest_sharpness_ratio,
        sharpest_block_from_the_ends,
        block_of_least_effect,
        worst_agreement_change,
        agreement_changes_listed,
        smallest_other_frechet_change,
        best_other_method,
    )
}
