"""Checks of arguments: each returns the value or raises a DgkitError that says what is allowed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from dgkit.errors import DgkitError


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise the error of a value that is not allowed; `allowed` says what to give instead: "give an integer"."""
    raise DgkitError(f"{name}={value!r} is not allowed: {allowed}")


def is_integer(value: Any) -> bool:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, allowed: str | None = None
) -> int:
    """An integer from `low` to `high`, both included; `allowed` replaces the words for what is allowed."""
    if is_integer(value) and _within(value, low, high):
        return value
    limits = "" if low is None else f", {low} or above" if high is None else f" from {low} to {high}"
    refuse(name, value, allowed or f"give an integer{limits}")


def number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    infinite: bool = False,
    allowed: str | None = None,
) -> float:
    """A number from `low` to `high`, both included, or above `above`; finite, unless infinity may be given too."""
    known = is_number(value) or (infinite and value == math.inf)
    if known and _within(value, low, high) and (above is None or value > above):
        return value
    if above is not None:
        limits = f"a number above {above}"
    elif low is None:
        limits = "a finite number"
    else:
        limits = f"a number, {low} or above" if high is None else f"a number from {low} to {high}"
    refuse(name, value, allowed or f"give {limits}" + ", or infinity" * infinite)


def text(name: str, value: Any) -> str:
    """A string, which may be empty."""
    return value if isinstance(value, str) else refuse(name, value, "give a string")


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of `choices`."""
    if value not in (known := tuple(choices)):
        refuse(name, value, f"use one of {', '.join(known)}")
    return value


def distinct(name: str, values: Any, low: int, high: int | None = None, *, allowed: str) -> list[int]:
    """A non-empty sequence of distinct integers from `low` to `high`, as a list; `allowed` is what to give."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        refuse(name, values, f"give {allowed}")
    for value in values:
        if not (is_integer(value) and _within(value, low, high)):
            raise DgkitError(f"{name}={list(values)!r} is not allowed because of {value!r}: give {allowed}")
    if len(set(values)) != len(values):
        raise DgkitError(f"{name}={list(values)!r} is not allowed because one is repeated: give {allowed}")
    return list(values)


def part_of_steps(start: Any, stop: Any) -> None:
    """Check that `start` and `stop` are a part of the steps: numbers with 0 <= start < stop <= 1."""
    number("start", start, 0, 1)
    number("stop", stop, 0, 1)
    if start >= stop:
        refuse("start", start, f"give a number below stop={stop!r}")


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
