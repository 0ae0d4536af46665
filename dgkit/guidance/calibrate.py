"""Find a block and channels for Detail Guidance on a model that has no preset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgkit.checks import integer
from dgkit.massive import channel_ratio, detect_massive
from dgkit.recording import Trace, record
from dgkit.sampling import generate, own_conditions

RATIO = 5.0  # a channel above this many medians of its block is called massive, as in `detect_massive`


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        block: zero-based block.
        dims: channels, the most massive first.
        ratio: the weakest of the dims' mean |z| over the block's median channel.
    """

    block: int
    dims: list[int]
    ratio: float

    @property
    def massive(self) -> bool:
        """Whether the dims are massive in the block at all; if not, DG has nothing to take away there."""
        return self.ratio > RATIO


def calibrate(
    pipe: Any,
    *,
    block: int | None = None,
    dims: Sequence[int] | None = None,
    num_samples: int = 4,
    num_inference_steps: int = 10,
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Look for the block and the dims in a short run of the model on its own classes, or on the offline prompts.

    Args:
        pipe: a pipeline.
        block, dims: what is known already; the rest is found as in `locate`.
        num_samples, num_inference_steps, seed: of the run.
        call: further arguments of the pipeline's call.

    Raises:
        DgkitError: a bad block, dim or number.
    """
    integer("num_samples", num_samples, 1)
    seeds = [seed * 1_000_000 + i for i in range(num_samples)]
    with record(pipe) as trace:
        _check(trace, block, dims)
        conditions = own_conditions(pipe, num_samples)
        generate(pipe, conditions, seeds, num_inference_steps=num_inference_steps, batch_size=num_samples, **call)
    return locate(trace, block, dims)


def locate(trace: Trace, block: int | None = None, dims: Sequence[int] | None = None) -> Calibration:
    """The block and the dims for Detail Guidance that a trace shows, apart from what is known already.

    Dims: those massive in most blocks (in `block`, if it is given), at most two as in Table 4, or without any the
    channel with the largest ratio. Block: the first, a quarter of the way in or later (the paper's m / N runs from 0.25
    to 0.53), in which all dims are massive, or without any the one where they are nearest to it.

    Raises:
        DgkitError: a bad block or dim, or an empty trace.
    """
    _check(trace, block, dims)
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
    return Calibration(block, list(dims), float(weakest[block]))


def _check(trace: Trace, block: int | None, dims: Sequence[int] | None) -> None:
    if block is not None:
        trace.anatomy.block(block)
    if dims is not None:
        trace.anatomy.dims(dims)
