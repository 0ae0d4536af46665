"""What diffusers' own hooks do to the blocks: caches, which guidance cannot live with, and group offloading."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dgkit.anatomy.dissection import Block
from dgkit.errors import ModelError


def _diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry.hooks if registry else {}


def refuse_caches(model: nn.Module, *, scan: bool = True) -> None:
    """diffusers' caches (`enable_cache`) keep what blocks put out from call to call, and would mix up the branches.

    Without `scan` only the model's own word is taken, which costs nothing in each step.
    """
    cached = getattr(model, "_cache_config", None) is not None
    hooks = (hook for module in model.modules() for hook in _diffusers_hooks(module).values())
    if cached or (scan and any(hook._is_stateful for hook in hooks)):
        raise ModelError(
            "the transformer has one of diffusers' caches, which take the passes of guidance for sampling steps: call "
            "`transformer.disable_cache()`, and use a `Schedule` to skip passes"
        )


@contextmanager
def offloaded_groups_loaded(blocks: Sequence[Block], standing_in: set[int]) -> Iterator[None]:
    """Load the groups of group offloading that would not be: the first block of a group loads all, but may stand in."""
    members: dict[Any, set[int]] = {}
    for block in blocks:
        if hook := _diffusers_hooks(block.module).get("group_offloading"):
            members.setdefault(hook.group, set()).add(block.index)
    split = [group for group, indices in members.items() if indices & standing_in and indices - standing_in]
    try:
        for group in split:
            group.onload_()
        yield
    finally:
        for group in split:
            group.offload_()
