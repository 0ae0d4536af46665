"""A transformer taken apart: its blocks, the image tokens in what they put out, and the rows of its calls."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy.arguments import consecutive, map_arguments, map_tensors, named, parameters
from dgkit.anatomy.batch_dependence import refuse_parallel
from dgkit.anatomy.gates import Gate
from dgkit.anatomy.grids import Grid
from dgkit.anatomy.loops import contexts_noted, loop_under_way
from dgkit.anatomy.pipelines import row_of_class
from dgkit.anatomy.transformers import MSA2, TRANSFORMERS, Stack, Transformer, research_row
from dgkit.checks import distinct, integer
from dgkit.errors import ModelError
from dgkit.taps import AfterCall, BeforeCall, Watched, compiled, forward_of, hook, standing_in


class Layout(threading.local):
    """Where the image tokens are in the call under way, in each thread.

    Attributes:
        inside: whether a call is under way. Blocks may run outside of one: Z-Image's ControlNet is made of some.
        tokens: how many image tokens there are, those of reference images included; None before the first call.
        generated: how many of them, the first ones, are the image that is generated; None: all.
    """

    inside: bool = False
    tokens: int | None = None
    generated: int | None = None


@dataclass(frozen=True)
class Block:
    """One block: its zero-based index over all stacks, its stack, module and width, and the layout of the last call."""

    index: int
    stack: Stack
    module: nn.Module
    channels: int
    layout: Layout

    def image(self, output: Any) -> Tensor:
        """The image tokens (B, T, C) in this block's `output`.

        Raises:
            ModelError: `output` is not (B, T, C), or holds fewer tokens than the transformer's call has image tokens.
        """
        tokens = output if self.stack.image is None else output[self.stack.image]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != self.channels:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
            raise ModelError(
                f"block {self.index} ({type(self.module).__name__}) returned {found}, not (batch, tokens, "
                f"{self.channels} channels): its class needs another row, see dgkit.anatomy.Transformer"
            )
        start, stop = self._place(tokens)
        return tokens if (start, stop) == (0, tokens.shape[1]) else tokens[:, start:stop]

    def with_image(self, output: Any, image: Tensor) -> Any:
        """A copy of `output` with `image` as its image tokens."""
        tokens = output if self.stack.image is None else output[self.stack.image]
        start, stop = self._place(tokens)
        if (start, stop) != (0, tokens.shape[1]):
            image = torch.cat([tokens[:, :start], image, tokens[:, stop:]], 1)
        if self.stack.image is None:
            return image
        return (*output[: self.stack.image], image, *output[self.stack.image + 1 :])

    def _place(self, tokens: Any) -> tuple[int, int]:
        """From where to where the image that is generated stands among `tokens` (B, T, C)."""
        if self.stack.text is None and self.layout.generated is None:
            return 0, tokens.shape[1]
        count = tokens.shape[1] if self.stack.text is None else self._count(tokens)
        start = tokens.shape[1] - count if self.stack.text == "before" else 0
        return start, start + (count if self.layout.generated is None else self.layout.generated)

    def _count(self, tokens: Any) -> int:
        """The number of image tokens among `tokens`, which must have room for them."""
        count = self.layout.tokens
        if count is None:
            raise ModelError("the number of image tokens is not known: enter `anatomy.follow()` before the model runs")
        if tokens.shape[1] < count:
            raise ModelError(
                f"block {self.index} ({type(self.module).__name__}) returned {tokens.shape[1]} tokens for {count} "
                f"image tokens: its class needs another row, see dgkit.anatomy.Transformer"
            )
        return count

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
        row: the row of its class.
        blocks: all blocks in the order in which they run.
        channels: width C of the image stream.
        predicted_channels: how many of the output's channels are the prediction that guidance acts on; None for all.
        layout: of the last call, as long as it is followed.
    """

    model: nn.Module
    row: Transformer = field(repr=False)
    blocks: tuple[Block, ...]
    channels: int
    predicted_channels: int | None
    layout: Layout

    def block(self, index: int) -> Block:
        """The block at zero-based `index`.

        Raises:
            DgkitError: `index` is not an integer from 0 to the number of blocks - 1.
        """
        name, last = type(self.model).__name__, len(self.blocks) - 1
        return self.blocks[integer("block", index, 0, last, allowed=f"{name} has blocks 0 to {last}")]

    def dims(self, dims: Sequence[int], name: str = "dims") -> list[int]:
        """`dims` as a checked list of channels; `name` is what the caller's argument is called.

        Raises:
            DgkitError: `dims` is empty, repeats a channel or holds anything but integers from 0 to C - 1.
        """
        allowed = f"a non-empty list of distinct channels from 0 to {self.channels - 1}"
        return distinct(name, dims, 0, self.channels - 1, allowed=allowed)

    def grid(self) -> Callable[[dict[str, Any]], Grid]:
        """What reads the grid of the generated image tokens from the arguments of a call, by name.

        Raises:
            ModelError: it is not known for this class; or, in the call, it cannot be told for that one.
        """
        read = self.row.grid
        if read is None:
            raise ModelError(
                f"the grid in which the image tokens of {type(self.model).__name__} stand is not known to dgkit: leave "
                f"out maps and Frames"
            )
        return lambda arguments: read(self.model, arguments)

    def norms_after(self, block: int) -> list[nn.LayerNorm]:
        """The LayerNorms that read the image tokens after block `block`.

        Raises:
            ModelError: they are not known for this class.
        """
        if not self.row.last_norm:
            known = ", ".join(name for name, row in TRANSFORMERS.items() if row.last_norm)
            raise ModelError(f"the LayerNorms of {type(self.model).__name__} are not known to dgkit, only of {known}")
        paths = [(later.module, norm) for later in self.blocks[block + 1 :] for norm in later.stack.norms]
        return [module.get_submodule(path) for module, path in (*paths, (self.model, self.row.last_norm))]  # type: ignore[misc]

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Inside, `Block.image` knows where the image tokens of the last call stand, in classes where calls differ.

        Raises (in the call):
            ModelError: image tokens that start at different places in the rows of one batch.
        """
        count, before = self.row.tokens, any(stack.text == "before" for stack in self.row.stacks)

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.layout.inside = True
            self.layout.generated = _generated_tokens()
            if count is None:
                return
            arguments = named(module, args, kwargs)
            lengths = self.row.text_lengths(arguments) if self.row.text_lengths else [0]
            if before and len(set(lengths)) > 1:
                raise ModelError(
                    f"the prompts of one batch have {lengths} tokens, so {type(module).__name__} puts their images at "
                    f"different places: use one prompt per call"
                )
            self.layout.tokens = count(module, arguments)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.layout.inside = False

        with self.watched(before=read, after=leave, always=True), contexts_noted(self.model):
            yield

    @contextmanager
    def watched(
        self, before: BeforeCall | None = None, after: AfterCall | None = None, *, always: bool = False
    ) -> Iterator[None]:
        """Inside, `before(model, args, kwargs)` and `after(model, args, kwargs, output)` run around each call.

        What `after` returns, if anything, is the output. With `always` it runs, with None, also after a call that
        raised an exception (but where calls are watched at `forward`).
        """
        with ExitStack() as taps:
            if self.row.direct:
                made = taps.enter_context(standing_in(self.model, "forward", Watched))
                taps.enter_context(made.watched(before, after))
                yield
                return
            if before is not None:
                taps.callback(hook(self.model, "register_forward_pre_hook", before, with_kwargs=True))
            if after is not None:
                taps.callback(hook(self.model, "register_forward_hook", after, with_kwargs=True, always_call=always))
            yield

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward, past whoever watches its calls."""
        return forward_of(self.model)(*args, **kwargs)

    def select_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[int], batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a transformer call cut down to the given `rows` of its `batch`.

        Dicts and lists are copied, because some forwards change them; what has no batch axis stays as it is.

        Raises:
            ModelError: without the other rows the joint sequence would be shorter, so that the blocks' outputs for the
                whole batch do not fit the cut one.
        """
        if self.row.text_lengths is not None:
            lengths = self.row.text_lengths(named(self.model, args, kwargs))
            if max(lengths[row] for row in rows) < max(lengths):
                raise ModelError(
                    f"the prompts of one batch have {lengths} tokens: rows {rows} alone would make a shorter "
                    f"sequence; use prompts (and negative prompts) of equal length"
                )

        picked = consecutive(rows)

        def cut(value: Tensor) -> Tensor:
            return value[picked] if value.ndim and len(value) == batch else value

        def change(name: str, value: Any) -> Any:
            if name in self.row.second_axis and isinstance(value, Tensor):
                return value[:, picked]
            if name in self.row.listed and isinstance(value, list) and len(value) == batch:
                return [value[row] for row in rows]
            return map_tensors(name, value, self.row.unbatched, cut)

        return map_arguments(self.model, args, kwargs, change)

    def grow(
        self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[int], batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of `block` with the given `rows` of its `batch` appended once more.

        Whatever has more than `batch` rows already stays as it is, and so does what has no batch axis.
        """

        joining = consecutive(rows)

        def grown(value: Tensor) -> Tensor:
            return torch.cat([value, value[joining]]) if value.ndim and len(value) == batch else value

        return map_arguments(
            block.module, args, kwargs, lambda name, value: map_tensors(name, value, self.row.unbatched, grown)
        )


def _generated_tokens() -> int | None:
    """How many image tokens are generated, in pipelines whose image stream holds reference images as well."""
    loop = loop_under_way()
    row = None if loop is None else row_of_class(loop.caller)
    return loop.tokens if loop is not None and row is not None and row.references else None


def dissect(target: Any, row: Transformer | None = None, *, transformer: str = "transformer") -> Anatomy:
    """The anatomy of a pipeline's transformer or of a bare transformer; of an anatomy, itself.

    Args:
        target: a pipeline, a transformer or an anatomy.
        row: what is needed to know of a class that dgkit does not know, see `Transformer`.
        transformer: which of a pipeline's transformers; Wan 2.2 also has "transformer_2".

    Raises:
        ModelError: `target` is none of these, or its transformer's class has no row in `TRANSFORMERS`, nor is it built
            as facebookresearch's DiT, and no `row` is given; or the transformer is compiled as a whole (a compiled
            module ignores hooks that are added later; compile its blocks instead), or runs on several devices at once.
    """
    if isinstance(target, Anatomy):
        return target
    model = target if isinstance(target, nn.Module) else getattr(target, transformer, None)
    if isinstance(model, nn.Module):
        refuse_parallel(model)
    # torch.compile(model) wraps the module as `_orig_mod`; model.compile() sets `_compiled_call_impl`
    if isinstance(model, nn.Module) and compiled(model):
        raise ModelError(
            "the transformer is compiled as a whole, which ignores hooks added later: use the uncompiled transformer, "
            "or compile block by block (`for block in transformer.transformer_blocks: block.compile()`)"
        )
    name = type(target if model is None else model).__name__
    row = row or TRANSFORMERS.get(name) or (research_row(model) if isinstance(model, nn.Module) else None)
    if row is None or not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a diffusers pipeline with a {transformer}, or a transformer of class {', '.join(TRANSFORMERS)}, "
            f"got {name} (of another class: give dgkit.dissect(transformer, row), see dgkit.anatomy.Transformer)"
        )
    layout = Layout()
    try:
        blocks = [(stack, module) for stack in row.stacks for module in model.get_submodule(stack.path).children()]
        channels = row.channels(model)
        anatomy = Anatomy(
            model=model,
            row=row,
            blocks=tuple(Block(i, stack, module, channels, layout) for i, (stack, module) in enumerate(blocks)),
            channels=channels,
            predicted_channels=row.predicted_channels(model),
            layout=layout,
        )
        gates = [block.gates for block in anatomy.blocks]
    except AttributeError as error:
        raise ModelError(f"the row does not fit {name}: {error}") from error
    if not gates:
        raise ModelError(f"the row does not fit {name}: it has no block at {[stack.path for stack in row.stacks]}")
    for field_name in ("latents", "timestep"):
        argument, known = getattr(row, field_name), parameters(model)
        if argument not in known:
            raise ModelError(f"{field_name}={argument!r} is not allowed: {name} takes {', '.join(known)}")
    return anatomy
