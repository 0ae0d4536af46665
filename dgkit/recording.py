"""Look at what flows between the blocks of a diffusion transformer: `record`."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy import COND, Anatomy, Block, CallReader, Gate, Grid, Pass, degraded_pass, dissect
from dgkit.checks import number, refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.taps import compiled, hook, tap


@dataclass
class Cell:
    """Running sums for one (label, timestep): L blocks, G gates, C channels, D tracked dims, M mapped dims, T tokens.

    `images` and `gate_images` count images per block and per gate, because a degraded pass computes only the last ones.
    """

    images: Tensor
    sum_mean_abs: Tensor
    max_abs: Tensor
    sum_token_share: Tensor
    sum_square: Tensor
    gate_images: Tensor
    sum_gate: Tensor
    sum_abs_gate: Tensor
    sum_maps: Tensor  # (L, M, T)
    tracked: list[list[Tensor]]
    tensors: dict[int, list[Tensor]]


class Trace:
    """Streaming statistics of the block outputs z^k and residual gates alpha_k seen by `record`.

    Size: 4 L C + 2 G C numbers per (label, timestep), however many images pass; plus, only where asked for, L T of them
    for each mapped dim (T image tokens), one number per image, timestep, block and tracked dim, and the full tensors of
    kept blocks.

    Reading raises a ModelError that names block and channel where an infinity or NaN was put out; only `max_abs`
    and `tensors` show it.

    Attributes:
        anatomy: the recorded transformer.
        ratio: r of the token condition: a token is massive in a channel when |z| exceeds r times the median over
            channels of that image's mean |z|.
        track: the dims whose mean |z| is kept per image.
        maps: the dims whose mean |z| is kept per image token.
        grid: (frames, height, width) of the image tokens, known with `maps` from the first call on.
        gate_rows: (block, branch) of each of the G residual gates.
    """

    def __init__(self, anatomy: Anatomy, ratio: float, track: list[int], keep: list[int], maps: list[int]) -> None:
        self.anatomy = anatomy
        self.ratio = ratio
        self.track = track
        self.keep = keep
        self.maps = maps
        self.grid: Grid | None = None
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

    def mean_abs(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Mean |z| over images and image tokens, (L, C); over all timesteps if `timestep` is None."""
        cells = self._select(label, timestep)
        return sum(c.sum_mean_abs for c in cells) / sum(c.images for c in cells)[:, None]  # type: ignore[return-value, index]

    def max_abs(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Largest |z| over images and image tokens, (L, C); infinity or NaN where the model put one out."""
        return torch.stack([c.max_abs for c in self._select(label, timestep, finite=False)]).amax(0)

    def token_share(self, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Share of the image tokens in which a channel is massive (see `ratio`), (L, C)."""
        cells = self._select(label, timestep)
        return sum(c.sum_token_share for c in cells) / sum(c.images for c in cells)[:, None]  # type: ignore[return-value, index]

    def energy_share(
        self, dims: Sequence[int] | None = None, label: str | None = None, timestep: float | None = None
    ) -> Tensor:
        """Share of the image tokens' energy that `dims` carry together, (L,); of each channel, (L, C), without `dims`.

        That is the sum of z^2 in `dims` over the sum of z^2 in all channels, each summed over images and image tokens
        (and timesteps, if `timestep` is None) first: the mean of the tokens' own shares weighted by their energy. Sums
        over tokens are taken in float32, the rest in float64.
        """
        square = torch.stack([c.sum_square for c in self._select(label, timestep)]).sum(0)
        share = square / square.sum(1, keepdim=True)
        return share if dims is None else share[:, self.anatomy.dims(dims)].sum(1)

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
        self._select(label, None)
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
        return torch.cat([z for cell in self._select(label, timestep, finite=False) for z in cell.tensors[block]])

    def map(self, block: int, dim: int, label: str | None = None, timestep: float | None = None) -> Tensor:
        """Mean |z| over images of each image token in a mapped dim, (frames, height, width) in tokens.

        Over all timesteps if `timestep` is None.
        """
        index = self.anatomy.block(block).index
        if dim not in self.maps:
            raise DgkitError(f"dim={dim!r} was not mapped: record(..., maps={self.maps!r}) decides")
        cells = self._select(label, timestep)
        assert self.grid is not None, "known before anything is taken in"
        total = torch.stack([c.sum_maps[index, self.maps.index(dim)] for c in cells]).sum(0)
        return (total / sum(c.images[index] for c in cells)).reshape(self.grid)

    def _label(self, label: str | None) -> str:
        if not self._cells:
            raise DgkitError("the trace is empty: run the pipeline inside `with record(...)`")
        if label is None:
            return COND if COND in self.labels else self.labels[0]
        if label not in self.labels:
            raise DgkitError(f"label={label!r} was not recorded: use one of {self.labels}")
        return label

    def _select(self, label: str | None, timestep: float | None, *, finite: bool = True) -> list[Cell]:
        label = self._label(label)
        if timestep is None:
            cells = {t: cell for (name, t), cell in self._cells.items() if name == label}
        elif (label, float(timestep)) in self._cells:
            cells = {timestep: self._cells[label, float(timestep)]}
        else:
            raise DgkitError(f"timestep={timestep!r} was not recorded: use one of {self.timesteps(label)}")
        if finite:
            _require_finite(cells, self.timesteps(label))
        return list(cells.values())

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
                sum_square=zeros(blocks, channels),
                gate_images=zeros(gates),
                sum_gate=zeros(gates, channels),
                sum_abs_gate=zeros(gates, channels),
                sum_maps=zeros(blocks, len(self.maps), prod(self.grid or ())),
                tracked=[[] for _ in range(blocks)],
                tensors={block: [] for block in self.keep},
            )
        return self._cells[key]

    def lay_out(self, grid: Grid) -> None:
        """Take in the grid of the image tokens of a call, for `maps`.

        Raises:
            DgkitError: it is another than that of the calls before.
        """
        if self.grid not in (None, grid):
            before, now = (" x ".join(map(str, sides)) for sides in (self.grid or (), grid))
            raise DgkitError(f"maps={self.maps!r} are of {before} tokens, not of {now}: record images of one size")
        self.grid = grid

    def add_block(self, index: int, image: Tensor, current: Pass) -> None:
        """Take in the image tokens (B, T, C) of block `index`."""
        if self.grid is not None:
            self.grid.fit(image)
        # float32 is faster than half precision here, in which squares would overflow; one copy, changed in place
        wide = torch.promote_types(image.dtype, torch.float32)
        magnitude = image.abs() if image.dtype == wide else image.to(wide).abs_()
        mapped = magnitude[..., self.maps].mT if self.maps else None  # (B, M, T), before it is overwritten
        mean = magnitude.mean(1)  # (B, C)
        largest = magnitude.amax(1)
        threshold = self.ratio * _median(mean)  # (B,)
        square = magnitude.square_().sum(1)
        share = magnitude.gt_(threshold[:, None, None].square()).mean(1)
        for key, (count, rows) in current.groups.items():
            cell = self._cell(key, image.device)
            cell.images[index] += count
            cell.sum_mean_abs[index] += mean[rows].sum(0)
            cell.sum_token_share[index] += share[rows].sum(0)
            cell.sum_square[index] += square[rows].sum(0)
            cell.max_abs[index] = torch.maximum(cell.max_abs[index], largest[rows].amax(0))
            if mapped is not None:
                cell.sum_maps[index] += mapped[rows].sum(0, dtype=torch.float64)
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


def _require_finite(cells: dict[float, Cell], timesteps: list[float]) -> None:
    """Raise an error that names the first block and channel with an infinity or NaN, in the order of `timesteps`."""
    for timestep in (t for t in timesteps if t in cells):
        bad = (~cells[timestep].max_abs.isfinite()).nonzero()
        if len(bad):
            block, channel = bad[0].tolist()
            raise ModelError(
                f"block {block} put out an infinity or NaN in channel {channel} at timestep {timestep:g}: where "
                f"massive channels are large, half precision (float16) overflows; load the model in bfloat16 or float32"
            )


def _median(values: Tensor) -> Tensor:
    """The median of each row of (B, C), halfway between the middle two where C is even; faster than `quantile`."""
    ordered, count = values.sort(1).values, values.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


@contextmanager
def record(
    target: Any,
    *,
    ratio: float = 5.0,
    track: Sequence[int] = (),
    keep: Sequence[int] = (),
    maps: Sequence[int] = (),
    cfg: str | None = None,
    transformer: str = "transformer",
) -> Iterator[Trace]:
    """Record the block outputs and residual gates of every pass inside the `with`.

    Args:
        target: a pipeline; or a bare transformer or its anatomy (whose rows are labelled "unknown" without `cfg`).
        ratio: r of the token condition, see `Trace.ratio`.
        track: dims whose mean |z| is kept per image, timestep and block.
        keep: blocks whose full image tokens are kept (memory grows with every pass).
        maps: dims whose mean |z| over images is kept per image token, see `Trace.map`; all images of one size.
        cfg: how the rows of a call are to be labelled, where dgkit does not know: see `guide`.
        transformer: which of the pipeline's transformers, see `dgkit.anatomy.dissect`.

    Yields:
        The trace, filled while the pipeline runs.

    Raises:
        DgkitError: `ratio` is not above 1, or a dim or block does not exist.
        ModelError: see `dgkit.anatomy.dissect` and `guide`; `maps` where the grid of the tokens is not known.
    """
    anatomy = dissect(target, transformer=transformer)
    number("ratio", ratio, above=1, allowed="a token is massive above ratio x the median, ratio > 1")
    if not isinstance(keep, Sequence):
        refuse("keep", keep, "give a list of blocks")
    trace = Trace(
        anatomy,
        float(ratio),
        _dims(anatomy, "track", track),
        [anatomy.block(index).index for index in keep],
        _dims(anatomy, "maps", maps),
    )
    grid = anatomy.grid() if trace.maps else None
    read = CallReader(target, anatomy, cfg)
    now, lock = _UnderWay(), threading.Lock()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read(args, kwargs)
        if grid is not None:
            with lock:
                trace.lay_out(grid(call.arguments))
        now.current = Pass(call.labels, call.timesteps)

    def under_way() -> Pass | None:
        return degraded_pass.get() or (now.current if anatomy.layout.inside else None)

    def watch_block(block: Block) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            current = under_way()
            if current is not None and block.index >= current.edited_block:
                image = block.image(output).detach()
                with lock:
                    trace.add_block(block.index, image, current)

        return after

    def watch_gate(row: int, gate: Gate) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            current = under_way()
            if current is not None and trace.gate_rows[row][0] > current.edited_block:
                alpha = gate.read(module, args, kwargs, output).detach()
                with lock:
                    trace.add_gate(row, alpha, current)

        return after

    with anatomy.follow(), ExitStack() as taps:
        taps.enter_context(anatomy.watched(before=begin))
        row = 0
        for block in anatomy.blocks:
            taps.callback(tap(block.module, watch_block(block)))
            for gate, module in block.gates:
                if not compiled(block.module):  # its graph would take the hook in, and be compiled anew for each batch
                    taps.callback(hook(module, "register_forward_hook", watch_gate(row, gate), with_kwargs=True))
                row += 1
        yield trace


def _dims(anatomy: Anatomy, name: str, dims: Sequence[int]) -> list[int]:
    return [] if isinstance(dims, Sequence) and not dims else anatomy.dims(dims, name)


class _UnderWay(threading.local):
    """The pass under way in each thread, announced before the transformer's call."""

    current: Pass
