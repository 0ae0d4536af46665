"""Detail Guidance in the plainest way, for comparison: every pass of the transformer is made a second time as a whole.

Nothing here knows dgkit. What is in a call, and where in a block's output, is said by a `Family` of `small_pipelines`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.small_pipelines import Family, Stack


def image(output: Any, stack: Stack) -> Tensor:
    """The generated image's tokens in a block's output, (rows, tokens, channels): a view."""
    tensor = output if stack.index is None else output[stack.index]
    return tensor[:, stack.tokens] if stack.axis == 1 else tensor[stack.tokens].transpose(0, 1)


def zeroed(output: Any, stack: Stack, dims: list[int]) -> Any:
    """The block's output with these channels of the generated image's tokens zero."""
    parts = [output] if stack.index is None else list(output)
    parts = [part.clone() if isinstance(part, Tensor) else part for part in parts]
    changed = parts[0] if stack.index is None else tuple(parts)
    image(changed, stack)[..., dims] = 0
    return changed


def conditional_rows(order: str, with_cfg: bool, call: int, rows: int) -> list[int]:
    """The conditional rows of the transformer's `call`-th call of a run, by the order that the family has."""
    if not with_cfg:
        return list(range(rows))
    return {
        "uncond, cond": list(range(rows // 2, rows)),
        "cond, uncond": list(range(rows // 2)),
        "two calls": list(range(rows)) if call % 2 == 0 else [],
    }[order]


def again(values: Any) -> Any:
    """Arguments for another pass: a list may be emptied by the first one."""
    if isinstance(values, dict):
        return {name: again(value) for name, value in values.items()}
    return list(values) if isinstance(values, list) else values


def rows_of(prediction: Any) -> list[Tensor]:
    """A transformer's prediction, which is a tensor or a list, row by row and at least in float32."""
    return [row.to(torch.promote_types(row.dtype, torch.float32)) for row in prediction]


def with_rows(output: Any, rows: list[Tensor]) -> Any:
    """The transformer's output with another prediction."""
    old = output[0]
    new: Any = torch.stack(rows).to(old.dtype) if isinstance(old, Tensor) else rows
    return (new, *output[1:]) if isinstance(output, tuple) else type(output)(sample=new)


@contextmanager
def naive_detail_guidance(
    pipe: Any, family: Family, block: int, dims: list[int], w: float, with_cfg: bool
) -> Iterator[None]:
    """Eq. 4, and beside CFG Eq. 5: w (c - c_m) is added to c and, as CFG is affine, to u as well."""
    with ExitStack() as handles:
        for model in family.models(pipe):
            _guide(model, family, block, dims, w, with_cfg, handles)
        yield


def _guide(
    model: nn.Module, family: Family, block: int, dims: list[int], w: float, with_cfg: bool, handles: ExitStack
) -> None:
    edited, stack = family.blocks(model)[block]
    calls: list[tuple[Any, Any]] = []  # arguments of the calls under way, copied before they are made
    added: list[Tensor] = []  # w (c - c_m) of the latest conditional rows
    count = 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[:] = [([again(value) for value in args], again(kwargs))]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal count
        whole = rows_of(output[0])
        conditional = conditional_rows(family.order, with_cfg, count, len(whole))
        count += 1
        if conditional:
            own_args, own_kwargs = calls[0]
            handle = edited.register_forward_hook(lambda module, args, output: zeroed(output, stack, dims))
            try:
                degraded = rows_of(model.forward(*own_args, **own_kwargs)[0])
            finally:
                handle.remove()
            added[:] = [w * (whole[row] - degraded[row]) for row in conditional]
            for direction in added:
                if family.predicted is not None:
                    direction[family.predicted :] = 0
        return with_rows(output, [row + added[i % len(added)] for i, row in enumerate(whole)])

    handles.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    handles.callback(model.register_forward_hook(after, with_kwargs=True).remove)


@contextmanager
def seen_by_plain_hooks(model: nn.Module, family: Family, with_cfg: bool) -> Iterator[Callable[[], Tensor]]:
    """Inside, a transformer's conditional rows are watched; the call gives their mean |z|, (blocks, channels)."""
    sums: dict[int, list[Tensor]] = {}
    calls, rows = 0, 0  # rows of the call under way: a ControlNet may run the same blocks outside of one

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal rows
        rows = len(args[0] if args else next(iter(kwargs.values())))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls, rows
        calls, rows = calls + 1, 0

    def look(index: int, stack: Stack) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            chosen = conditional_rows(family.order, with_cfg, calls, rows) if rows else []
            if chosen:
                # a video's blocks may have one row for each frame, or for each place, of a video
                magnitude = image(output, stack).detach().double().abs().unflatten(0, (rows, -1)).mean((1, 2))
                sums.setdefault(index, []).append(magnitude[chosen])

        return hook

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        handles.callback(model.register_forward_hook(after).remove)
        for index, (block, stack) in enumerate(family.blocks(model)):
            handles.callback(block.register_forward_hook(look(index, stack)).remove)
        yield lambda: torch.stack([torch.cat(sums[index]).mean(0) for index in sorted(sums)])
