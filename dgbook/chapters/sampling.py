"""What a run samples, and on which block and dims it looks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgkit import checks
from dgkit.errors import DgkitError
from dgkit.guidance.calibrate import locate
from dgkit.recording import Trace, record
from dgkit.sampling import generate, own_conditions
from dgkit.zoo import settings_for

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Samples:
    """What one run samples: as many conditions as seeds, and how.

    Attributes:
        conditions: class ids or prompts.
        seeds: one per condition.
        steps: sampling steps.
        guidance_scale: s of u + s (c - u); 1 for no CFG.
        batch_size: images per call of the pipeline.
    """

    conditions: list[Any]
    seeds: list[int]
    steps: int
    guidance_scale: float = 1.0
    batch_size: int = 64

    def images(self, pipe: Any) -> Images:
        """Generate them, (N, H, W, 3)."""
        return generate(
            pipe,
            self.conditions,
            self.seeds,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
        )

    def first(self, count: int) -> "Samples":
        """The same run with its first `count` images only."""
        return replace(self, conditions=self.conditions[:count], seeds=self.seeds[:count])


def samples(
    pipe: Any,
    count: int,
    seed: int,
    steps: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    each: int = 1,
) -> Samples:
    """The first `count / each` of the model's own conditions (see `own_conditions`), as a whole `each` times over.

    Raises:
        DgkitError: `count` or `each` is not a positive integer, or `each` does not divide `count`.
    """
    checks.integer("num_samples", count, 1)
    checks.integer("images_per_condition", each, 1)
    if count % each:
        checks.refuse("images_per_condition", each, f"give a divisor of num_samples={count}")
    conditions = own_conditions(pipe, count // each) * each
    return Samples(conditions, [seed * 1_000_000 + i for i in range(count)], steps, guidance_scale, batch_size)


def condition_names(pipe: Any, conditions: Sequence[Any]) -> list[str]:
    """A short name for each condition."""
    by_id = {number: name for name, number in reversed(getattr(pipe, "labels", {}).items())}
    return [str(by_id.get(c, c)) for c in conditions]


def subject(trace: Trace, block: int | None, dims: Sequence[int] | None) -> tuple[int, list[int]]:
    """The block and dims to study: as given, else the model's preset, else what the trace shows (see `locate`)."""
    known = settings_for(trace.anatomy, block=block, dims=dims)
    found = locate(trace, known.block, known.dims)
    return found.block, found.dims


def observe(
    pipe: Any, run: Samples, *, ratio: float = 5.0, track: Sequence[int] = (), keep: Sequence[int] = ()
) -> Trace:
    """Sample `run` and return what `dgkit.record` saw; `ratio` is that of massive tokens."""
    with record(pipe, ratio=ratio, track=track, keep=keep) as trace:
        run.images(pipe)
    return trace


def side_of_square(tokens: int) -> int:
    """How many image tokens a square image of `tokens` has along each side.

    Raises:
        DgkitError: they do not form a square.
    """
    side = isqrt(tokens)
    if side * side != tokens:
        raise DgkitError(f"{tokens} image tokens do not form a square: sample square images")
    return side
