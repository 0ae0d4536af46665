"""Look at (`record`) and change (`disrupt`) what flows between the blocks of a diffusion transformer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from dgkit.anatomy import COND, Anatomy, Block, Call, Gate, RowLabels, dissect, step_of
from dgkit.anatomy.transformers import consecutive
from dgkit.errors import DgkitError, ModelError
from dgkit.taps import compiled, tap

# ---------------------------------------------------------------------------------------------------- which pass is it


@dataclass(frozen=True)
class Pass:
    """One pass through the blocks: the label and timestep of each batch row.

    `edited_block` is the block whose output a degraded pass edits: before it, the pass equals the conditional one.
    """

    labels: tuple[str, ...]
    timesteps: list[float]
    edited_block: int = -1

    @cached_property
    def groups(self) -> dict[tuple[str, float], tuple[int, slice | list[int]]]:
        """The rows of each (label, timestep): how many, and as an index."""
        rows: dict[tuple[str, float], list[int]] = {}
        for row, key in enumerate(zip(self.labels, self.timesteps, strict=True)):
            rows.setdefault(key, []).append(row)
        return {key: (len(indices), consecutive(indices)) for key, indices in rows.items()}


# The guidance engine announces its degraded pass here, because it calls `transformer.forward`, past the module's hooks.
degraded_pass: ContextVar[Pass | None] = ContextVar("degraded_pass", default=None)

# -------------------------------------------------------------------------------------------------------------- record


@dataclass
class Cell:
    """Running sums for one (label, timestep): L blocks, G gates, C channels, D tracked dims.

    `images` and `gate_images` count images per block and per gate, because a degraded pass computes only the last ones.
    """

    images: Tensor
    sum_mean_abs: Tensor
    max_abs: Tensor
    sum_token_share: Tensor
    gate_images: Tensor
    sum_gate: Tensor
    sum_abs_gate: Tensor
    tracked: list[list[Tensor]]
    tensors: dict[int, list[Tensor]]


class Trace:
    """Streaming statistics of the block outputs z^k and residual gates alpha_k seen by `record`.

    Size: 3 L C + 2 G C numbers per (label, timestep), however many images pass; plus, only where asked for, one number
    per image, timestep, block and tracked dim, and the full tensors of kept blocks.

    Attributes:
        anatomy: the recorded transformer.
        ratio: r of the token condition: a token is massive in a channel when |z| exceeds r times the median over
            channels of that image's mean |z|.
        track: the dims whose mean |z| is kept per image.
        gate_rows: (block, branch) of each of the G residual gates.
    """

    def __init__(self, anatomy: Anatomy, ratio: float, track: list[int], keep: list[int]) -> None:
        self.anatomy = anatomy
        self.ratio = ratio
        self.track = track
        self.keep = keep
        self.gate_rows = [(block.index, gate.branch) for block in anatomy.blocks for gate, _ in block.gates]
        self._cells: dict[tuple[str, float], Cell] = {}

    # ---- reading

    @property
    def labels(self) -> list[str]:
        """The branches seen: "cond", "uncond", "degraded" or "unknown"."""
        return list(dict.fromkeys(label for label, _ in self._cells))

    def timesteps(self, label: str | None = None) -> list[float]:
        """Timesteps recorded for `label`, in sampling order (from noise to image)."""
        label = self._label(label)
        return sorted((t for name, t in self._cells if name == label), reverse=not self.anatomy.row.ascending)

    def num_images(self, label: str | None = None, timestep: float | None = None) -> int:
        """How many image passes `mean_abs` with the same arguments averages over."""
        return sum(int(cell.images.max()) for cell in self._select(label, timestep))

    def mean_abs(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Mean |z| over images and image tokens, (L, C); over all timesteps if `timestep` is None."""
        cells = self._select(label, timestep)
        return sum(c.sum_mean_abs for c in cells) / sum(c.images for c in cells)[:, None]  # type: ignore[return-value, index]

    def max_abs(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Largest |z| over images and image tokens, (L, C)."""
        return torch.stack([c.max_abs for c in self._select(label, timestep)]).amax(0)

    def token_share(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Share of the image tokens in which a channel is massive (see `ratio`), (L, C)."""
        cells = self._select(label, timestep)
        return sum(c.sum_token_share for c in cells) / sum(c.images for c in cells)[:, None]  # type: ignore[return-value, index]

    def gates(self, label: str | None = None, timestep: float | None = None, *, absolute: bool = True) -> Tensor:
        """Mean |alpha| (or mean alpha) over images, (G, C), rows as in `gate_rows`."""
        cells = self._select(label, timestep)
        total = sum(c.sum_abs_gate if absolute else c.sum_gate for c in cells)
        return total / sum(c.gate_images for c in cells)[:, None]  # type: ignore[return-value, index]

    def num_gates_seen(self, label: str | None = None, timestep: float | None = None) -> int:
        """How many of the G gates were recorded at all."""
        return int((sum(c.gate_images for c in self._select(label, timestep)) > 0).sum())  # type: ignore[operator, union-attr]

    def tracked(self, label: str | None = None) -> Tensor:
        """Mean |z| over image tokens of each tracked dim, (timesteps, images, L, D), images as sampled."""
        label = self._label(label)
        if not self.track:
            raise DgkitError("no dim was tracked: name them in record(..., track=[...])")
        steps = [
            torch.stack([torch.cat(block) for block in self._cells[label, t].tracked], 1) for t in self.timesteps(label)
        ]
        if len({len(step) for step in steps}) > 1:
            raise DgkitError("tracked images differ between timesteps: record runs with equal num_inference_steps")
        return torch.stack(steps)

    def tensors(self, block: int, label: str | None = None, timestep: float | None = None) -> Tensor:
        """The recorded image tokens of a kept block, (images, T, C), over all timesteps if `timestep` is None."""
        if block not in self.keep:
            raise DgkitError(f"block={block!r} was not kept: record(..., keep={self.keep!r}) decides")
        return torch.cat([z for cell in self._select(label, timestep) for z in cell.tensors[block]])

    def table(self, label: str | None = None, timestep: float | None = None) -> pd.DataFrame:
        """One row per (block, channel): mean_abs, max_abs, token_share."""
        blocks, channels = len(self.anatomy.blocks), self.anatomy.channels
        columns = {
            "mean_abs": self.mean_abs(label, timestep),
            "max_abs": self.max_abs(label, timestep),
            "token_share": self.token_share(label, timestep),
        }
        index = pd.MultiIndex.from_product([range(blocks), range(channels)], names=["block", "channel"])
        return pd.DataFrame({name: t.flatten().cpu().numpy() for name, t in columns.items()}, index).reset_index()

    def _label(self, label: str | None) -> str:
        if not self._cells:
            raise DgkitError("the trace is empty: run the pipeline inside `with record(...)`")
        if label is None:
            return COND if COND in self.labels else self.labels[0]
        if label not in self.labels:
            raise DgkitError(f"label={label!r} was not recorded: use one of {self.labels}")
        return label

    def _select(self, label: str | None, timestep: float | None) -> list[Cell]:
        label = self._label(label)
        if timestep is None:
            return [cell for (name, _), cell in self._cells.items() if name == label]
        if (label, float(timestep)) not in self._cells:
            raise DgkitError(f"timestep={timestep!r} was not recorded: use one of {self.timesteps(label)}")
        return [self._cells[label, float(timestep)]]

    # ---- writing

    def _cell(self, key: tuple[str, float], device: torch.device) -> Cell:
        if key not in self._cells:
            blocks, gates, channels = len(self.anatomy.blocks), len(self.gate_rows), self.anatomy.channels

            def zeros(*shape: int) -> Tensor:
                return torch.zeros(shape, dtype=torch.float64, device=device)

            self._cells[key] = Cell(
                images=zeros(blocks),
                sum_mean_abs=zeros(blocks, channels),
                max_abs=zeros(blocks, channels),
                sum_token_share=zeros(blocks, channels),
                gate_images=zeros(gates),
                sum_gate=zeros(gates, channels),
                sum_abs_gate=zeros(gates, channels),
                tracked=[[] for _ in range(blocks)],
                tensors={block: [] for block in self.keep},
            )
        return self._cells[key]

    def add_block(self, index: int, image: Tensor, current: Pass) -> None:
        """Take in the image tokens (B, T, C) of block `index`."""
        magnitude = image.abs()
        mean = magnitude.mean(1, dtype=torch.float32)  # (B, C)
        largest = magnitude.amax(1)
        threshold = self.ratio * _median(mean)  # (B,)
        # in place the comparison keeps the floating dtype, whose mean is several times faster than that of bool
        share = magnitude.gt_(threshold[:, None, None]).mean(1, dtype=torch.float32)
        for key, (count, rows) in current.groups.items():
            cell = self._cell(key, image.device)
            cell.images[index] += count
            cell.sum_mean_abs[index] += mean[rows].sum(0)
            cell.sum_token_share[index] += share[rows].sum(0)
            cell.max_abs[index] = torch.maximum(cell.max_abs[index], largest[rows].amax(0))
            if self.track:
                cell.tracked[index].append(mean[rows][:, self.track].cpu())
            if index in self.keep:
                cell.tensors[index].append(image[rows].to("cpu", copy=True))

    def add_gate(self, row: int, gate: Tensor, current: Pass) -> None:
        """Take in the residual gate (B, C) of gate row `row`."""
        for key, (count, rows) in current.groups.items():
            cell = self._cell(key, gate.device)
            cell.gate_images[row] += count
            cell.sum_gate[row] += gate[rows].sum(0)
            cell.sum_abs_gate[row] += gate[rows].abs().sum(0)


def _median(values: Tensor) -> Tensor:
    """The median of each row of (B, C), halfway between the middle two where C is even; faster than `quantile`."""
    ordered, count = values.sort(1).values, values.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


@contextmanager
def record(target: Any, *, ratio: float = 5.0, track: Sequence[int] = (), keep: Sequence[int] = ()) -> Iterator[Trace]:
    """Record the block outputs and residual gates of every pass inside the `with`.

    Args:
        target: a pipeline, or a bare transformer (whose rows are then labelled "unknown").
        ratio: r of the token condition, see `Trace.ratio`.
        track: dims whose mean |z| is kept per image, timestep and block.
        keep: blocks whose full image tokens are kept (memory grows with every pass).

    Yields:
        The trace, filled while the pipeline runs.

    Raises:
        DgkitError: `ratio` is not above 1, or a dim or block does not exist.
        ModelError: see `dgkit.anatomy.dissect`.
    """
    anatomy = dissect(target)
    if not isinstance(ratio, int | float) or not ratio > 1:
        raise DgkitError(f"ratio={ratio!r} is not allowed: a token is massive above ratio x the median, ratio > 1")
    if not isinstance(keep, Sequence):
        raise DgkitError(f"keep={keep!r} is not allowed: give a list of blocks")
    trace = Trace(
        anatomy,
        float(ratio),
        [] if isinstance(track, Sequence) and not track else anatomy.dims(track),
        [anatomy.block(index).index for index in keep],
    )
    row_labels = RowLabels(target)
    current: list[Pass] = []  # the pass under way, announced by the transformer's pre-hook

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call.of(anatomy, args, kwargs)
        current[:] = [Pass(row_labels(call), call.timesteps())]

    def watch_block(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            now = degraded_pass.get() or current[0]
            if block.index >= now.edited_block:
                trace.add_block(block.index, block.image(output).detach(), now)

        return hook

    def watch_gate(row: int, gate: Gate) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            now = degraded_pass.get() or current[0]
            if trace.gate_rows[row][0] > now.edited_block:
                trace.add_gate(row, gate.read(module, args, kwargs, output).detach(), now)

        return hook

    with anatomy.follow(), ExitStack() as handles:
        handles.callback(anatomy.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        row = 0
        for block in anatomy.blocks:
            handles.callback(tap(block.module, watch_block(block)))
            for gate, module in block.gates:
                if not compiled(block.module):  # its graph would take the hook in, and be compiled anew for each batch
                    handles.callback(module.register_forward_hook(watch_gate(row, gate), with_kwargs=True).remove)
                row += 1
        yield trace


# ------------------------------------------------------------------------------------------------------------- disrupt


@dataclass(frozen=True)
class Edit:
    """A change of some channels of a block's output; the other channels and tokens pass unchanged.

    Attributes:
        kind: "zero" (the paper's masking, section 4.2), "mean" (each channel becomes its mean over the image's tokens,
            after Sun et al. 2024) or "random" (as many other channels, drawn at random, are zeroed: the paper's
            control, appendix D).
        dims: the channels that are changed.
        tokens: the image tokens that are changed, counted row by row from the upper left; None for all.
    """

    kind: str
    dims: list[int]
    tokens: list[int] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """The edited copy of image tokens (B, T, C).

        Raises:
            DgkitError: there are fewer tokens than `tokens` names.
        """
        edited = image.clone()
        value = image[..., self.dims].mean(1, keepdim=True) if self.kind == "mean" else 0
        if self.tokens is None:
            edited[..., self.dims] = value
        elif max(self.tokens) >= image.shape[1]:
            raise DgkitError(
                f"tokens={max(self.tokens)!r} is not allowed: the image has tokens 0 to {image.shape[1] - 1}"
            )
        else:
            edited[:, torch.tensor(self.tokens)[:, None], self.dims] = value
        return edited


EDIT_KINDS = ("zero", "mean", "random")


def make_edit(
    anatomy: Anatomy, dims: Sequence[int], kind: str = "zero", seed: int = 0, tokens: Sequence[int] | None = None
) -> Edit:
    """The checked edit of `dims`; for kind "random" the drawn channels exclude `dims`.

    Raises:
        DgkitError: a dim does not exist, `kind` is unknown, `seed` is no integer, too few other channels are left, or
            `tokens` is not a list of distinct integers from 0.
    """
    checked = anatomy.dims(dims)
    if kind not in EDIT_KINDS:
        raise DgkitError(f"kind={kind!r} is not allowed: use one of {', '.join(EDIT_KINDS)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DgkitError(f"seed={seed!r} is not allowed: give an integer")
    if tokens is not None and not _distinct(tokens):
        raise DgkitError(
            f"tokens={tokens!r} is not allowed: give a non-empty list of distinct integers from 0, or None"
        )
    if kind == "random":
        others = [c for c in range(anatomy.channels) if c not in checked]
        if len(others) < len(checked):
            raise DgkitError(f"dims={checked!r}: only {len(others)} other channels are left to draw from")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        checked = sorted(others[i] for i in order[: len(checked)].tolist())
    return Edit(kind, checked, None if tokens is None else list(tokens))


def _distinct(tokens: Any) -> bool:
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence) or not tokens:
        return False
    integers = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)
    return integers and len(set(tokens)) == len(tokens)


def checked_steps(start: Any, stop: Any) -> None:
    """Check that `start` and `stop` are a part of the steps.

    Raises:
        DgkitError: they are not numbers with 0 <= start < stop <= 1.
    """
    for argument, value in (("start", start), ("stop", stop)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DgkitError(f"{argument}={value!r} is not allowed: give a number from 0 to 1")
    if start >= stop:
        raise DgkitError(f"start={start!r} is not allowed: give a number below stop={stop!r}")


@contextmanager
def disrupt(
    target: Any,
    *,
    block: int,
    dims: Sequence[int],
    kind: str = "zero",
    seed: int = 0,
    tokens: Sequence[int] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    keep_norm: bool = False,
) -> Iterator[Edit]:
    """Edit channels of one block's output in every pass inside the `with` (paper section 4.2 and appendix D).

    Args:
        target: a pipeline or a bare transformer.
        block: zero-based block whose output is edited (the paper's depth m is `block + 1`).
        dims: the channels; for kind "random" the ones to leave alone.
        kind: "zero", "mean" or "random", see `Edit`.
        seed: decides the draw of kind "random".
        tokens: the image tokens that are edited, counted row by row; None for all.
        start, stop: the part of the steps with the edit, from int(start * steps) to before int(stop * steps); anything
            but all steps needs a pipeline.
        keep_norm: let the later LayerNorms of the image tokens normalise with the mean and variance that the tokens
            would have with the removed values still there. Without it, zeroing a massive channel also makes all other
            channels larger in every later block. For the classes of SD3, Flux and DiT.

    Yields:
        The edit, whose `dims` are the channels really changed.

    Raises:
        DgkitError: bad `block`, `dims`, `kind`, `seed`, `tokens`, `start` or `stop`.
        ModelError: see `dgkit.anatomy.dissect`; or `keep_norm` with another class or with compiled blocks.
    """
    anatomy = dissect(target)
    edited = anatomy.block(block)
    edit = make_edit(anatomy, dims, kind, seed, tokens)
    checked_steps(start, stop)
    part = (start, stop) != (0, 1)
    if part and isinstance(target, nn.Module):
        raise DgkitError(
            f"start={start!r}, stop={stop!r} is not allowed: a bare transformer has no steps, give a pipeline"
        )
    norms = anatomy.norms_after(block) if keep_norm else []
    if keep_norm and any(compiled(later.module) for later in anatomy.blocks[block + 1 :]):
        raise ModelError("keep_norm=True does not work with compiled blocks, whose LayerNorms cannot be reached")
    active = [True]
    removed: list[Tensor] = []  # z - edited z of this pass, (B, T, D), in the edited channels

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        removed.clear()
        if part:
            active[0] = step_of(target, Call.of(anatomy, args, kwargs)).within(start, stop)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not active[0]:
            return None
        image = edited.image(output)
        changed = edit(image)
        if keep_norm:
            removed[:] = [(image - changed)[..., edit.dims]]
        return edited.with_image(output, changed)

    def keep(norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if removed and (degraded_pass.get() is not None or len(args[0]) != len(removed[0])):
            raise ModelError("keep_norm=True does not work inside guidance, which runs blocks on a part of the batch")
        return _normalised_as_before(norm, args[0], removed[0], edit.dims).to(output.dtype) if removed else None

    # before all other hooks, so that `record` sees what the later blocks see, in whatever order the two were entered
    with anatomy.follow(), ExitStack() as taps:
        taps.callback(anatomy.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        taps.callback(tap(edited.module, hook, first=True))
        for norm in norms:
            taps.callback(tap(norm, keep))
        yield edit


def _normalised_as_before(norm: Any, tokens: Tensor, removed: Tensor, dims: list[int]) -> Tensor:
    """LayerNorm of `tokens` (B, T', C) with the statistics of tokens to whose last T `removed` (B, T, D) is added."""
    tokens = tokens.float()
    before = tokens.clone()
    before[:, -removed.shape[1] :, dims] += removed
    variance, mean = torch.var_mean(before, -1, correction=0, keepdim=True)
    normalised = (tokens - mean) * (variance + norm.eps).rsqrt()
    return normalised if norm.weight is None else normalised * norm.weight + (0 if norm.bias is None else norm.bias)
