"""The blocks, streams and residual gates of each transformer class: to add one, add a row to `TRANSFORMERS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.errors import DgkitError, ModelError


@dataclass(frozen=True)
class Gate:
    """Where one residual gate alpha of Eq. 2 comes from: `output[index]` of the block's submodule `module`.

    The paper's single alpha_k is in fact one gate per branch: attention ("msa"), second attention of dual-attention
    blocks ("msa2"), feed-forward ("mlp"), or both at once in Flux's single blocks ("msa+mlp").
    """

    branch: str
    module: str
    index: int


@dataclass(frozen=True)
class Stack:
    """A `ModuleList` of blocks with the same output: its attribute, and the image stream's place in the output.

    `image` is None when the block returns the image tokens (B, T, C) alone.
    """

    path: str
    image: int | None
    gates: tuple[Gate, ...]


MSA, MSA2, MLP = Gate("msa", "norm1", 1), Gate("msa2", "norm1", 6), Gate("mlp", "norm1", 4)


@dataclass(frozen=True)
class Transformer:
    """The row of one transformer class: its stacks in order, and which output channels are the prediction."""

    stacks: tuple[Stack, ...]
    predicted_channels: Callable[[nn.Module], int | None] = lambda model: None


def _noise_channels(model: nn.Module) -> int | None:
    """DiT predicts noise in the first `in_channels` channels and sigma in the rest; guidance is for the noise."""
    config: Any = model.config
    return config.in_channels if config.out_channels == 2 * config.in_channels else None


TRANSFORMERS: dict[str, Transformer] = {
    "SD3Transformer2DModel": Transformer((Stack("transformer_blocks", 1, (MSA, MSA2, MLP)),)),
    "FluxTransformer2DModel": Transformer(
        (
            Stack("transformer_blocks", 1, (MSA, MLP)),
            Stack("single_transformer_blocks", 1, (Gate("msa+mlp", "norm", 1),)),
        )
    ),
    "DiTTransformer2DModel": Transformer((Stack("transformer_blocks", None, (MSA, MLP)),), _noise_channels),
}


@dataclass(frozen=True)
class Block:
    """One block: its zero-based index over all stacks, its stack, and the module."""

    index: int
    stack: Stack
    module: nn.Module

    def image(self, output: Any) -> Tensor:
        """The image tokens (B, T, C) in this block's `output`."""
        return output if self.stack.image is None else output[self.stack.image]

    def with_image(self, output: Any, image: Tensor) -> Any:
        """A copy of `output` with `image` as its image tokens."""
        if self.stack.image is None:
            return image
        return (*output[: self.stack.image], image, *output[self.stack.image + 1 :])

    @property
    def gates(self) -> list[tuple[Gate, nn.Module]]:
        """The residual gates that this very block has, each with the submodule that computes it."""
        dual = getattr(self.module, "use_dual_attention", False)
        return [(g, self.module.get_submodule(g.module)) for g in self.stack.gates if g is not MSA2 or dual]


@dataclass(frozen=True)
class Anatomy:
    """A transformer taken apart.

    Attributes:
        model: the transformer.
        blocks: all blocks in the order in which they run.
        channels: width C of the image stream.
        predicted_channels: how many of the output's channels are the prediction that guidance acts on; None for all.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    channels: int
    predicted_channels: int | None

    def block(self, index: int) -> Block:
        """The block at zero-based `index`.

        Raises:
            DgkitError: `index` is not an integer from 0 to the number of blocks - 1.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.blocks):
            raise DgkitError(
                f"block={index!r} is not allowed: {type(self.model).__name__} has blocks 0 to {len(self.blocks) - 1}"
            )
        return self.blocks[index]

    def dims(self, dims: Sequence[int]) -> list[int]:
        """`dims` as a checked list of channels.

        Raises:
            DgkitError: `dims` is empty, repeats a channel or holds anything but integers from 0 to C - 1.
        """
        allowed = f"a non-empty list of distinct channels from 0 to {self.channels - 1}"
        if isinstance(dims, str | bytes) or not isinstance(dims, Sequence) or not dims:
            raise DgkitError(f"dims={dims!r} is not allowed: give {allowed}")
        for dim in dims:
            if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < self.channels:
                raise DgkitError(f"dims={list(dims)!r} is not allowed because of {dim!r}: give {allowed}")
        if len(set(dims)) != len(dims):
            raise DgkitError(f"dims={list(dims)!r} is not allowed because a channel is repeated: give {allowed}")
        return list(dims)


def dissect(target: Any) -> Anatomy:
    """The anatomy of a pipeline's transformer or of a bare transformer.

    Raises:
        ModelError: `target` is neither, or its transformer's class has no row in `TRANSFORMERS`, or the transformer is
            compiled as a whole (a compiled module ignores hooks that are added later; compile its blocks instead).
    """
    model = getattr(target, "transformer", target)
    # torch.compile(model) wraps the module as `_orig_mod`; model.compile() sets `_compiled_call_impl`
    if isinstance(model, nn.Module) and (hasattr(model, "_orig_mod") or model._compiled_call_impl is not None):
        raise ModelError(
            "the transformer is compiled as a whole, which ignores hooks added later: use the uncompiled transformer, "
            "or compile block by block (`for block in transformer.transformer_blocks: block.compile()`)"
        )
    name = type(model).__name__
    row = TRANSFORMERS.get(name)
    if row is None or not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a diffusers pipeline with a transformer, or a transformer of class "
            f"{', '.join(TRANSFORMERS)}, got {name} (to add a class: one row in dgkit.anatomy.TRANSFORMERS)"
        )
    blocks = [(stack, module) for stack in row.stacks for module in model.get_submodule(stack.path).children()]
    return Anatomy(
        model=model,
        blocks=tuple(Block(i, stack, module) for i, (stack, module) in enumerate(blocks)),
        channels=model.inner_dim,  # type: ignore[arg-type]
        predicted_channels=row.predicted_channels(model),
    )


@dataclass
class Call:
    """One call of a transformer: its arguments by name, as far as dgkit has to read them."""

    hidden_states: Tensor
    timestep: Tensor
    class_labels: Tensor | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Read the call; in all rows of `TRANSFORMERS` `hidden_states` is the first argument."""
        return cls(
            hidden_states=args[0] if args else kwargs["hidden_states"],
            timestep=kwargs["timestep"],
            class_labels=kwargs.get("class_labels"),
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.hidden_states)

    @property
    def halves_equal(self) -> bool:
        """Whether the batch is one batch of latents twice, which is how pipelines batch CFG."""
        half = self.batch // 2
        return self.batch % 2 == 0 and torch.equal(self.hidden_states[:half], self.hidden_states[half:])

    def timesteps(self) -> list[float]:
        """The timestep of each row, as the transformer receives it (Flux: from 1 to 0)."""
        values = self.timestep.reshape(-1).tolist()
        return [float(v) for v in (values * self.batch if len(values) == 1 else values)]


def select_rows(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, batch: int) -> tuple[Any, Any]:
    """The arguments of a transformer call cut down to the given `rows` of its `batch`.

    Tensors whose first axis is the batch are cut; `joint_attention_kwargs` is copied because some forwards change it.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            return value if len(rows) == batch else value[rows]
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return value

    return tuple(cut(a) for a in args), {name: cut(value) for name, value in kwargs.items()}
