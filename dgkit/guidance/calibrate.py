"""Find a block and channels for Detail Guidance on a model that has no preset, and say why these."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from textwrap import fill
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from dgkit.anatomy import NO_CFG, pipeline_row
from dgkit.checks import integer, refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.massive import channel_ratio, detect_massive
from dgkit.recording import Trace, record
from dgkit.sampling import no_progress_bar, own_conditions
from dgkit.zoo import MODELS, row_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO = 5.0  # a channel above this many medians of its block is called massive, as in `detect_massive`
SAMPLES = 4
LISTED = 3  # at most so many of a block's largest channels are listed


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found; printed, it says why, and what is left to find.

    Attributes:
        block: zero-based block.
        dims: channels, the most massive first.
        ratio: the weakest of the dims' mean |z| over the block's median channel.
        trace: what was recorded, conditional passes alone of which count.
        given: which of "block" and "dims" were given, not found.
        num_samples: images; None if not known.
        halves: the block and the dims that either half of the images alone would have given; None where they were
            not recorded apart.
    """

    block: int
    dims: list[int]
    ratio: float
    trace: Trace = field(repr=False, compare=False)
    given: tuple[str, ...] = field(default=(), repr=False, compare=False)
    num_samples: int | None = field(default=None, repr=False, compare=False)
    halves: tuple[tuple[int, list[int]], ...] | None = field(default=None, repr=False, compare=False)

    @property
    def massive(self) -> bool:
        """Whether the dims are massive in the block at all; if not, DG has nothing to take away there."""
        return self.ratio > RATIO

    @property
    def agrees(self) -> bool | None:
        """Whether both halves of the images give this block and these dims; None where they were not recorded apart."""
        if self.halves is None:
            return None
        return all(block == self.block and sorted(dims) == sorted(self.dims) for block, dims in self.halves)

    @property
    def candidates(self) -> list[int]:
        """The blocks, a quarter of the way in or later, in which all dims are massive; the rule takes the first."""
        weakest = self._weakest()
        return [block for block in range(len(weakest) // 4, len(weakest)) if weakest[block] > RATIO]

    def table(self) -> pd.DataFrame:
        """One row per block.

        Columns:
            block: zero-based.
            channels: the block's largest by mean |z|, as many as `dims` but three at most.
            ratio: of each of them, mean |z| over that of the block's median channel.
            energy: of each of them, the share of the image tokens' energy, see `Trace.energy_share`.
            fixed: of each of them, the share of timesteps in which it is among as many largest.
            dims_ratio: the smallest ratio of the `dims`, by which the block is chosen.
            dims_energy: the share of the energy that the `dims` carry together.
            role: whether the block is chosen, was a candidate, or why it was not.
        """
        mean, energy = self.trace.mean_abs().cpu(), self.trace.energy_share().cpu()
        count = min(len(self.dims), LISTED)
        channels = mean.topk(count, dim=1).indices
        steps = [self.trace.mean_abs(timestep=t).cpu().topk(count, dim=1).indices for t in self.trace.timesteps()]
        among = torch.stack([(channels[:, :, None] == step[:, None]).any(2) for step in steps])
        columns = {
            "channels": channels,
            "ratio": channel_ratio(mean).gather(1, channels),
            "energy": energy.gather(1, channels),
            "fixed": among.double().mean(0),
            "dims_ratio": self._weakest(),
            "dims_energy": energy[:, self.dims].sum(1),
        }
        rows = {"block": list(range(len(mean)))} | {name: values.tolist() for name, values in columns.items()}
        return pd.DataFrame(rows | {"role": self._roles()})

    def figure(self) -> "Figure":
        """The ratio of every channel in every block, and ratio and energy of the dims by block and by timestep.

        Raises:
            DgkitError: matplotlib is missing, which dgkit itself does not need.
        """
        from dgkit.guidance.calibration_figure import draw

        return draw(self)

    def __str__(self) -> str:
        anatomy, table = self.trace.anatomy, self.table()
        images = "" if self.num_samples is None else f"{self.num_samples} images, "
        share = table["dims_energy"][self.block]
        lines = [
            f"{type(anatomy.model).__name__}, {len(anatomy.blocks)} blocks of {anatomy.channels} channels; {images}"
            f"{len(self.trace.timesteps())} timesteps",
            f"block={self.block}, dims={self.dims}, with {_share(share)} of the energy of the image tokens",
            "",
            _printed(table),
            "",
        ]
        count = len(table["channels"][0])
        notes = [
            "ratio: mean |z| over that of the block's median channel; energy: share of the sum of z^2; fixed: share of "
            f"timesteps in which the channel is {'the largest' if count == 1 else f'among the {count} largest'}",
            f"dims: {self._why_dims()}",
            f"block: {self._why_block()}",
            f"halves of the images: {self._agreement()}",
        ]
        if not self.massive:
            notes.append(f"not massive: at a ratio of {self.ratio:.1f} there is nothing for DG to take away")
        return "\n".join([*lines, *(fill(note, 100, subsequent_indent="  ") for note in [*notes, *_about_scale()])])

    def _weakest(self) -> Tensor:
        """The smallest ratio of the dims in each block, (L,)."""
        return channel_ratio(self.trace.mean_abs())[:, self.dims].amin(1).cpu()

    def _roles(self) -> list[str]:
        blocks, candidates = len(self.trace.anatomy.blocks), self.candidates
        roles = []
        for block in range(blocks):
            if "block" in self.given:
                role = ""
            elif block < blocks // 4:
                role = "too early"
            else:
                role = "candidate" if block in candidates else f"below {RATIO:g}"
            roles.append(role if block != self.block else "given" if "block" in self.given else "chosen")
        return roles

    def _why_dims(self) -> str:
        if "dims" in self.given:
            return "given"
        found = detect_massive(self.trace, ratio=RATIO)
        here = "block" in self.given
        if not (found.in_block(self.block) if here else found.dims):
            return f"no channel is massive; {self.dims[0]} has the largest ratio of {'this' if here else 'any'} block"
        counts = " and ".join(str(int((found.rows["dim"] == dim).sum())) for dim in self.dims)
        words = f"massive in {counts} of {found.blocks} blocks ({found.criterion})"
        if here:
            return f"the largest that are massive in block {self.block}, two at most; {words}"
        if found.fixed_dims:
            return f"those massive in more than half of the blocks, two at most; {words}"
        return f"no channel is massive in more than half of the blocks; the two that are in most; {words}"

    def _why_block(self) -> str:
        if "block" in self.given:
            return "given"
        start = f"a quarter of the way in (block {len(self.trace.anatomy.blocks) // 4}) or later"
        if not self.candidates:
            return f"none, {start}, has all dims above {RATIO:g}; {self.block} is nearest to it"
        others = ", ".join(map(str, self.candidates[1:])) or "none"
        return f"the first, {start}, with all dims above {RATIO:g}; other candidates: {others}{self._alone()}"

    def _alone(self) -> str:
        """From which block on each of several dims is massive by itself."""
        if len(self.dims) == 1:
            return ""
        alone = [(dim, locate(self.trace, dims=[dim])) for dim in self.dims]
        return "; " + ", ".join(f"{dim} alone from {one.block}" for dim, one in alone if one.massive)

    def _agreement(self) -> str:
        if self.halves is None:
            return "not recorded apart"
        if self.agrees:
            return "both give the same block and dims"
        words = "; ".join(f"block {block}, dims {dims}" for block, dims in self.halves)
        return f"they differ, so take more samples ({words})"


def calibrate(
    pipe: Any,
    *,
    block: int | None = None,
    dims: Sequence[int] | None = None,
    prompts: Sequence[Any] | None = None,
    num_samples: int | None = None,
    num_inference_steps: int = 10,
    seed: int = 0,
    cfg: str | None = None,
    transformer: str = "transformer",
    **call: Any,
) -> Calibration:
    """Look for the block and the dims in a short run of the model on its own classes, or on the offline prompts.

    It runs without CFG, one image at a time and without decoding where the pipeline can leave that out. The scale w is
    not found: what it does to images has to be seen or measured. Try 0.25, 0.5, 1, 2 and so on; the result names what
    is known of other models.

    Args:
        pipe: a pipeline.
        block, dims: what is known already; the rest is found as in `locate`.
        prompts: prompts or classes to go through in place of those, again from the start when they run out.
        num_samples: images; by default 4, or one for each of the `prompts`.
        num_inference_steps, seed: of the run.
        cfg, transformer: see `dgkit.guide`.
        call: further arguments of the pipeline's call. With `prompt_embeds` (or another name that begins so) the run is
            one call with as many images as there are embeddings, and no prompts.

    Raises:
        DgkitError: a bad block, dim, number or list of prompts.
        ModelError: the pipeline does not run with these arguments, for instance because it has no text encoder; the
            transformer is not called in the run; or what was recorded is not finite.
    """
    row = pipeline_row(pipe, cfg)
    embeddings = next((name for name in call if name.startswith("prompt_embeds") and call[name] is not None), None)
    if row.condition in call:
        refuse(row.condition, call[row.condition], "give them as prompts=[...]")
    if prompts is not None and (isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts):
        refuse("prompts", prompts, "give a list with at least one")
    if embeddings and (prompts is not None or num_samples is not None):
        raise DgkitError(f"{embeddings} decides on prompts and their number: leave prompts and num_samples out")
    count = num_samples
    if count is None:
        count = len(call[embeddings]) if embeddings else SAMPLES if prompts is None else len(prompts)
    integer("num_samples", count, 1)
    integer("num_inference_steps", num_inference_steps, 1)
    integer("seed", seed)
    seeds = [seed * 1_000_000 + i for i in range(count)]

    model = row_of(pipe)
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent"} | dict(model.call if model else {})
    if row.cfg != NO_CFG:  # where there is none, the scale is one that the transformer is told
        options |= row.guidance(1.0, 1)

    def run(seeds: list[int], **given: Any) -> None:
        _run(pipe, options | {"generator": [torch.Generator().manual_seed(s) for s in seeds]} | given | call)

    halves: list[Trace] = []
    with record(pipe, cfg=cfg, transformer=transformer) as trace:
        _check(trace, block, dims)
        if embeddings:
            run(seeds)
        else:
            known = own_conditions(pipe, count) if prompts is None else list(prompts)
            jobs = [(s, known[i % len(known)]) for i, s in enumerate(seeds)]
            for half in (jobs[: count // 2], jobs[count // 2 :]) if count > 1 else (jobs,):
                with record(pipe, cfg=cfg, transformer=transformer) as part:
                    for one, condition in half:
                        run([one], **{row.condition: [condition]})
                halves.append(part)
    if not trace.labels:
        raise ModelError(
            f"{type(pipe).__name__} did not call its {transformer} in {num_inference_steps} steps: give more "
            f"num_inference_steps, or another transformer"
        )
    found = replace(locate(trace, block, dims), num_samples=count)
    if len(halves) < 2 or not all(part.labels for part in halves):
        return found
    alone = [locate(part, block, dims) for part in halves]
    return replace(found, halves=tuple((half.block, half.dims) for half in alone))


def locate(trace: Trace, block: int | None = None, dims: Sequence[int] | None = None) -> Calibration:
    """The block and the dims for Detail Guidance that a trace shows, apart from what is known already.

    Dims: those massive in most blocks (in `block`, if it is given), at most two as in Table 4, or without any the
    channel with the largest ratio. Block: the first, a quarter of the way in or later (the paper's m / N runs from 0.25
    to 0.53), in which all dims are massive, or without any the one where they are nearest to it.

    Raises:
        DgkitError: a bad block or dim, or an empty trace.
        ModelError: an infinity or NaN was recorded.
    """
    _check(trace, block, dims)
    given = tuple(name for name, value in (("block", block), ("dims", dims)) if value is not None)
    ratios = channel_ratio(trace.mean_abs())
    if dims is None:
        massive = detect_massive(trace, ratio=RATIO)
        found = massive.in_block(block) if block is not None else massive.fixed_dims or massive.dims
        largest = ratios[block] if block is not None else ratios.amax(0)
        dims = found[:2] or [int(largest.argmax())]
    weakest = ratios[:, list(dims)].amin(1)
    if block is None:
        first = len(weakest) // 4
        block = next((b for b in range(first, len(weakest)) if weakest[b] > RATIO), None)
        block = first + int(weakest[first:].argmax()) if block is None else block
    return Calibration(block, list(dims), float(weakest[block]), trace, given)


def _run(pipe: Any, arguments: dict[str, Any]) -> None:
    try:
        with no_progress_bar(pipe):
            pipe(**arguments)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, DgkitError):
            raise
        wanted = [
            name
            for name in signature(type(pipe).__call__).parameters
            if ("embeds" in name or name.endswith(("image", "video"))) and "negative" not in name
            if name not in arguments
        ]
        also = f" (its call also takes {', '.join(wanted)})" if wanted else ""
        raise ModelError(
            f"{type(pipe).__name__} does not run with {', '.join(arguments)}: {type(error).__name__}: {error}; "
            f"{_without_encoder(pipe)}give dgkit.calibrate what it needs besides or in place of prompts{also}"
        ) from error


def _without_encoder(pipe: Any) -> str:
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    return "" if any(part is not None for part in encoders) else "it has no text encoder: "


def _check(trace: Trace, block: int | None, dims: Sequence[int] | None) -> None:
    if block is not None:
        trace.anatomy.block(block)
    if dims is not None:
        trace.anatomy.dims(dims)


# ------------------------------------------------------------------------------------------------------------ in words


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _printed(table: pd.DataFrame) -> str:
    """The table with numbers rounded and columns aligned."""

    def each(column: str, words: Any) -> list[str]:
        return [", ".join(words(value) for value in values) for values in table[column]]

    cells = {
        "block": [str(block) for block in table["block"]],
        "largest": each("channels", str),
        "ratio": each("ratio", "{:.1f}".format),
        "energy": each("energy", _share),
        "fixed": each("fixed", "{:.0%}".format),
        "dims' ratio": [f"{value:.1f}" for value in table["dims_ratio"]],
        "dims' energy": [_share(value) for value in table["dims_energy"]],
        "role": table["role"].tolist(),
    }
    return pd.DataFrame(cells).to_string(index=False)


def _about_scale() -> list[str]:
    """What is known of w: the presets, in the words of their sources."""
    known: dict[str, list[str]] = {}
    for name, model in MODELS.items():
        preset = model.preset
        if preset.scale is not None:
            known.setdefault(f"{preset.scale:g} / {preset.scale_with_cfg:g} ({preset.source})", []).append(name)
    return [
        "scale: w is not found by this; try 0.25, 0.5, 1, 2, ... and smaller ones, by eye or with a metric. The "
        "presets, without / beside CFG (tables: of arXiv 2510.11538):",
        *(f"  {', '.join(names)}: {words}" for words, names in known.items()),
    ]
