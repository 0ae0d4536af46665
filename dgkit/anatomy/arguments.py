"""The arguments of a module's call, by name, and cut down to or grown by some rows of the batch."""

import inspect
from collections.abc import Callable, Container
from functools import cache
from typing import Any

from torch import Tensor, nn


def consecutive(rows: list[int]) -> slice | list[int]:
    """`rows` as an index; where they are consecutive a slice, which neither copies nor waits for a GPU."""
    start, stop = min(rows), max(rows) + 1
    return slice(start, stop) if rows == list(range(start, stop)) else rows


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without `self`


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of `forward`'s parameters: of the class, because an instance's own `forward` may be a stand-in."""
    inside: nn.Module = getattr(module, "_orig_mod", module)  # of torch.compile(module)
    return _parameters(type(inside).forward)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name."""
    return dict(zip(parameters(module), args, strict=False)) | kwargs


def map_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module` after `change(name, value)`, positional ones still positional."""
    changed = tuple(change(name, value) for name, value in zip(parameters(module), args, strict=False))
    return changed, {name: change(name, value) for name, value in kwargs.items()}


def map_tensors(name: str, value: Any, unbatched: Container[str], change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every tensor in nested tuples, lists and dicts whose name is not among the `unbatched`."""
    if name in unbatched:
        return value
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(key, item, unbatched, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(name, item, unbatched, change) for item in value)
    return value
