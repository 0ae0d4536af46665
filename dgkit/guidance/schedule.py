"""In which steps the directions of guidance are computed, and what the other steps take for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dgkit.checks import integer, number, one_of, refuse
from dgkit.errors import DgkitError

MISSING = ("reuse", "extrapolate", "drop")


@dataclass(frozen=True)
class Every:
    """A direction computed in some steps only: in the first and all early ones, then in every n-th.

    Attributes:
        n: 1 is every step; None: in none after the early ones.
        after: the part of the steps from which on steps are left out: those from int(after * steps) on.
        missing: what the others take: "reuse" the latest direction; "extrapolate" from the latest two, linearly in the
            number of the step (the latest as long as there is but one); "drop": none.
        cosine: compute it anew after one step more each time, up to n, as long as it has turned little: while the
            cosine to the direction before, in each image of the batch, is at least this. None: always after n.
    """

    n: int | None = 1
    after: float = 0.0
    missing: str = "reuse"
    cosine: float | None = None

    def __post_init__(self) -> None:
        if self.n is not None:
            integer("n", self.n, 1)
        number("after", self.after, 0, 1)
        one_of("missing", self.missing, MISSING)
        if self.cosine is not None:
            number("cosine", self.cosine, -1, 1, allowed="give a number from -1 to 1, or None")
            if self.n is None:
                refuse("cosine", self.cosine, "give n as well, the most steps from one direction to the next")


@dataclass(frozen=True)
class Schedule:
    """In which steps which predictions are computed; the conditional one c is in all.

    Attributes:
        branch: when c_branch is, for the direction c - c_branch of the method (DG's c_m).
        uncond: when u is, for CFG's direction c - u. Where it is not, u is c less the direction that stands for it, and
            the transformer runs without the unconditional rows. With `Every(None, after, "drop")` it is adaptive
            guidance (Castillo et al. 2023, arXiv 2312.12487).
    """

    branch: Every = field(default_factory=Every)
    uncond: Every = field(default_factory=Every)


SCHEDULES = {
    "full": Schedule(),
    "cheap": Schedule(Every(2, 0.0, "extrapolate"), Every(2, 0.45, "extrapolate")),
}
"""By name. "full": everything in every step. "cheap": CFG + DG for about the price of CFG, see chapter 5."""


def schedule_of(value: Any) -> Schedule:
    """A schedule as it is, by its name in `SCHEDULES`, or from what JSON makes of one.

    Raises:
        DgkitError: it is none of these.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return SCHEDULES[one_of("schedule", value, SCHEDULES)]
    parts = value if isinstance(value, Mapping) else {"": value}
    try:
        made = {name: part if isinstance(part, Every) else Every(**part) for name, part in parts.items()}
        return Schedule(**made)
    except TypeError as error:
        names = ", ".join(SCHEDULES)
        raise DgkitError(f"schedule={value!r} is not allowed: give a Schedule, or one of {names}") from error


class Kept:
    """What is kept of one direction from step to step of one run."""

    def __init__(self) -> None:
        self.step = -1  # of those that asked for the direction
        self.lasts = 1  # steps for which the latest one stands
        self.latest: list[tuple[int, Tensor]] = []  # at most two, with the step of each

    def due(self, every: Every, *, early: bool) -> bool:
        """Whether the direction is to be computed in this step, `early` if before `after`; each step asks once."""
        self.step += 1
        if early or not self.latest:
            return True
        return every.n is not None and self.step - self.latest[-1][0] >= self.lasts

    def take(self, every: Every, direction: Tensor) -> None:
        """Keep the direction that was computed in this step."""
        if every.cosine is None:
            self.lasts = every.n or 1
        elif self.latest:
            assert every.n is not None
            before = self.latest[-1][1]
            cosine = F.cosine_similarity(direction.flatten(1), before.flatten(1)).min()
            self.lasts = min(self.lasts + 1, every.n) if cosine >= every.cosine else 1
        self.latest = (
            [*self.latest[-1:], (self.step, direction)] if every.missing == "extrapolate" else [(self.step, direction)]
        )

    def direction(self, every: Every) -> Tensor | None:
        """The direction of this step, computed or not; None for none."""
        if not self.latest:
            return None
        step, latest = self.latest[-1]
        if step == self.step:
            return latest
        if every.missing == "drop":
            return None
        if len(self.latest) == 1:
            return latest
        before, earlier = self.latest[0]
        return latest + (self.step - step) / (step - before) * (latest - earlier)
