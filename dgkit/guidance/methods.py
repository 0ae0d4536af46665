"""What all guidance methods have in common.

c and u are the conditional and unconditional predictions of a step (velocity, or noise), s is CFG's scale in
u + s (c - u). Methods with a branch add w (c - c_branch) to the prediction, whatever CFG does beside them; the others
take CFG's place. All can be limited to a part of the steps. A method is data, a frozen dataclass that keeps nothing of
a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from dgkit.anatomy import Anatomy, Call
from dgkit.checks import number, part_of_steps, refuse
from dgkit.guidance.engine import Perturbation
from dgkit.guidance.schedule import SCHEDULES, Every, Schedule, schedule_of

Scale = float | Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods have.

    Attributes:
        scale: w (methods with a branch) or s (the others), or a function of the noise level sigma, which runs from 1 to
            0 in rectified flow and is noise over signal in DiT's diffusion.
        start, stop: the part of the steps that is guided, as in diffusers: from int(start * steps) to before int(stop *
            steps). Outside, methods that take CFG's place leave c.
        schedule: in which of these steps what is computed: a `Schedule` or its name in `SCHEDULES`. Of the methods
            given to one `guide`, one at most leaves out u in some.
    """

    scale: Scale
    start: float = 0.0
    stop: float = 1.0
    schedule: Schedule | str = SCHEDULES["full"]
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)
        part_of_steps(self.start, self.stop)
        object.__setattr__(self, "schedule", schedule_of(self.schedule))

    @property
    def when(self) -> Schedule:
        """The schedule, also where it was given by name."""
        return schedule_of(self.schedule)

    def bound(self, pipe: Any, anatomy: Anatomy, cfg: str | None = None) -> Self:
        """The method with everything left out filled in and checked for this pipeline; `cfg` as in `dgkit.guide`."""
        return self

    def active(self, call: Call) -> bool:
        """Whether this step is guided."""
        return call.within(self.start, self.stop)

    def weight(self, call: Call, with_cfg: bool) -> float:
        """The scale of this step."""
        return scale_at(self.scale, call)


@dataclass(frozen=True, kw_only=True)
class Branching(Method):
    """c + w (c - c_branch), or beside CFG u + s (c - u) + w (c - c_branch) with the pipeline's own s."""

    scale: Scale = 1.0

    def perturbation(self, call: Call) -> Perturbation | None:
        """What the branch does differently in this step; None: it is the step before's c, which costs nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Combining(Method):
    """Methods that take the place of CFG; the pipeline's own CFG has to be on, its scale is not used."""

    scale: Scale = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when.branch != Every():
            refuse("schedule", self.schedule, f"{self.name} has no branch, give a Schedule of uncond alone")

    def combine(self, c: Tensor, u: Tensor, call: Call, memory: dict[str, Any]) -> Tensor:
        """The guided prediction; `memory` lasts for one run of the pipeline."""
        raise NotImplementedError


def check_scale(name: str, scale: Any) -> None:
    """Check that a scale is finite and 0 or above; None and functions of sigma pass."""
    if scale is not None and not callable(scale):
        number(name, scale, 0, allowed="give a finite number, 0 or above, or a function of sigma")


def scale_at(scale: Any, call: Call) -> float:
    """The scale in the step of `call`."""
    value = scale(call.step.sigma) if callable(scale) else scale
    check_scale("scale(sigma)", value)
    return float(value)
