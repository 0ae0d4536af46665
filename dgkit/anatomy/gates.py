"""Where a block's residual gates come from: readers for the rows of `dgkit.anatomy.transformers`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor, nn

from dgkit.anatomy.arguments import named


@dataclass(frozen=True)
class Gate:
    """Where one residual gate alpha of Eq. 2 comes from.

    The paper's single alpha_k is in fact one gate per branch: attention ("msa"), second attention of dual-attention
    blocks ("msa2"), cross-attention ("cross"), feed-forward ("mlp"), or attention and feed-forward at once where they
    run in parallel ("msa+mlp"). A branch without a gate (cross-attention in most classes) is added as it is.

    Attributes:
        branch: "msa", "msa2", "cross", "mlp" or "msa+mlp".
        module: path of a submodule of the block, "" for the block itself.
        read: alpha (B, C) from one call of that submodule: (module, args, kwargs, output). Where a class modulates each
            token by its own timestep (image-to-video of Wan 2.2 and LTX), alpha is the mean over tokens.
    """

    branch: str
    module: str
    read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor]


def _per_image(gate: Tensor) -> Tensor:
    """(B, C) from (B, C), (B, 1, C) or (B, T, C)."""
    return gate if gate.ndim == 2 else gate.mean(1)


def output(branch: str, module: str) -> Gate:
    """The gate is all that a layer puts out."""
    return Gate(branch, module, lambda m, args, kwargs, output: _per_image(output))


def at(branch: str, module: str, index: int, *, tanh: bool = False) -> Gate:
    """The gate is `output[index]` of an adaLN module."""
    return Gate(branch, module, lambda m, args, kwargs, output: _squash(_per_image(output[index]), tanh))


def chunk(branch: str, module: str, index: int, of: int, *, tanh: bool = False, limit: float = inf) -> Gate:
    """The gate is the `index`-th of `of` equal parts of the output of a modulation layer, cut off at +-`limit`."""

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return _squash(_per_image(output.chunk(of, -1)[index]).clamp(-limit, limit), tanh)

    return Gate(branch, module, read)


def table(branch: str, index: int, argument: str, *, rows_first: bool = False) -> Gate:
    """The gate is row `index` of the block's `scale_shift_table` plus the embedded timestep, an argument of the block.

    The embedding is (B, 6 C), (B, 6, C) or, with a timestep per token, (B, T, 6 C), (B, T, 6, C) or, with `rows_first`,
    (B, 6, T, C).
    """

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        rows = module.scale_shift_table.reshape(6, -1)  # type: ignore[operator, union-attr]
        embedding = named(module, args, kwargs)[argument]
        if rows_first and embedding.ndim == 4:
            embedding = embedding.transpose(1, 2)
        return rows[index] + embedding.reshape(len(embedding), -1, *rows.shape)[:, :, index].mean(1)

    return Gate(branch, "", read)


def argument(branch: str, name: str, index: int, of: int) -> Gate:
    """The gate is the `index`-th of `of` equal parts of the block's argument `name`: the same for all blocks."""
    return Gate(
        branch, "", lambda m, args, kwargs, output: _per_image(named(m, args, kwargs)[name].chunk(of, -1)[index])
    )


def _squash(gate: Tensor, tanh: bool) -> Tensor:
    return gate.tanh() if tanh else gate
