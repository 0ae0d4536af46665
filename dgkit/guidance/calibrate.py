"""Find a block and channels for Detail Guidance on a model that has no preset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgkit.errors import DgkitError
from dgkit.hooks import record
from dgkit.massive import channel_ratio, detect_massive
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

    Dims: those massive in most blocks (in `block`, if it is given), at most two as in Table 4, or without any the
    channel with the largest ratio. Block: the first, a quarter of the way in or later (the paper's m / N runs from 0.25
    to 0.53), in which all dims are massive, or without any the one where they are nearest to it.

    Args:
        pipe: a pipeline.
        block, dims: what is known already.
        num_samples, num_inference_steps, seed: of the run.
        call: further arguments of the pipeline's call.

    Raises:
        DgkitError: a bad block, dim or number.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise DgkitError(f"num_samples={num_samples!r} is not allowed: give an integer, 1 or above")
    seeds = [seed * 1_000_000 + i for i in range(num_samples)]
    with record(pipe) as trace:
        anatomy = trace.anatomy
        if block is not None:
            anatomy.block(block)
        known = None if dims is None else anatomy.dims(dims)
        conditions = own_conditions(pipe, num_samples)
        generate(pipe, conditions, seeds, num_inference_steps=num_inference_steps, batch_size=num_samples, **call)
    ratios = channel_ratio(trace.mean_abs())
    if known is None:
        massive = detect_massive(trace, ratio=RATIO)
        found = massive.in_block(block) if block is not None else massive.fixed_dims or massive.dims
        largest = ratios[block] if block is not None else ratios.amax(0)
        known = found[:2] or [int(largest.argmax())]
    weakest = ratios[:, known].amin(1)
    if block is None:
        first = len(anatomy.blocks) // 4
        late = range(first, len(anatomy.blocks))
        block = next((b for b in late if weakest[b] > RATIO), first + int(weakest[first:].argmax()))
    return Calibration(block, known, float(weakest[block]))
