"""What goes on when a transformer is called.

Three things have a name. A `Call` is one call of the transformer: its arguments, and which of its rows are what. A
`Pass` is what runs through the blocks: the rows of a call, or those of a branch of it. A `Step` is the sampling step in
which the call is made.
"""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dgkit.anatomy.arguments import consecutive, named
from dgkit.anatomy.dissection import Anatomy
from dgkit.anatomy.pipelines import UNKNOWN, pipeline_row
from dgkit.errors import DgkitError


@dataclass(frozen=True)
class Pass:
    """One pass through the blocks.

    Attributes:
        labels: of each batch row: "cond", "uncond", "degraded" or "unknown".
        timesteps: of each batch row.
        edited_block: the block whose output a degraded pass edits; before it, the pass equals the conditional one.
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


@dataclass(frozen=True)
class Step:
    """Where a sampling step is in its schedule, with x = signal * x0 + noise * eps before and after it.

    Attributes:
        index, count: which step, zero-based, of how many.
        signal, noise: before the step.
        next_signal, next_noise: after it.
        velocity: whether the prediction is v = eps - x0 (rectified flow), else eps.
        deterministic: whether the scheduler takes Euler / DDIM steps without fresh noise.
    """

    index: int
    count: int
    signal: float
    noise: float
    next_signal: float
    next_noise: float
    velocity: bool
    deterministic: bool

    def within(self, start: float, stop: float) -> bool:
        """Whether it is one of the steps from int(start * count) to before int(stop * count), as in diffusers."""
        return int(start * self.count) <= self.index < int(stop * self.count)

    @property
    def sigma(self) -> float:
        """The noise level as schedulers name it: from 1 to 0 in rectified flow, noise over signal in a VP diffusion."""
        return self.noise if self.velocity else self.noise / self.signal

    def denoised(self, x: Tensor, prediction: Tensor) -> Tensor:
        """x0 from x and the prediction."""
        return x - self.noise * prediction if self.velocity else (x - self.noise * prediction) / self.signal

    def prediction(self, x: Tensor, denoised: Tensor) -> Tensor:
        """The inverse of `denoised`."""
        return (x - denoised) / self.noise if self.velocity else (x - self.signal * denoised) / self.noise


@dataclass
class Call:
    """One call of a transformer.

    Attributes:
        anatomy: of the transformer.
        arguments: of the call, by name.
        pipe: the pipeline that samples; None where there is none.
        labels: "cond", "uncond" or "unknown" for each row of the batch; filled in by a `CallReader`.
    """

    anatomy: Anatomy
    arguments: dict[str, Any]
    pipe: Any = None
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any], pipe: Any = None) -> "Call":
        """The call of `anatomy.model` with (args, kwargs), its rows not labelled."""
        return cls(anatomy, named(anatomy.model, args, kwargs), pipe)

    @property
    def latents(self) -> Any:
        """The latents, with the batch first; in Z-Image a list with one tensor per row."""
        return self.arguments[self.anatomy.row.latents]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.latents)

    def rows(self, label: str) -> list[int]:
        """The rows with this label."""
        return [row for row, other in enumerate(self.labels) if other == label]

    @property
    def halves_equal(self) -> bool:
        """Whether the batch is one batch of latents twice, which is how pipelines batch CFG."""
        half = self.batch // 2
        first, second = self.latents[:half], self.latents[half:]
        if isinstance(first, Tensor):
            return torch.equal(first, second)
        return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @cached_property
    def timesteps(self) -> list[float]:
        """The timestep of each row, as the transformer receives it (Flux: from 1 to 0).

        With a timestep per token it is the largest: tokens of a given first frame have a smaller one.
        """
        values = torch.as_tensor(self.arguments[self.anatomy.row.timestep])
        if values.numel() == 1:
            return [float(values)] * self.batch
        return [float(v) for v in values.reshape(self.batch, -1).amax(1).tolist()]

    @cached_property
    def step(self) -> Step:
        """The sampling step in which `pipe` makes the call; worked out only where somebody asks.

        Raises:
            DgkitError: the scheduler does not tell.
        """
        return _step(self.pipe, self.timesteps[0])


def _step(pipe: Any, timestep: float) -> Step:
    scheduler = pipe.scheduler
    begin = getattr(scheduler, "begin_index", None) or 0
    index = getattr(scheduler, "step_index", None)
    if index is None and hasattr(scheduler, "step_index"):
        index = begin
    elif index is None:  # DDIM: the timestep is an integer of the schedule
        places = (scheduler.timesteps == timestep).nonzero()
        if not len(places):
            raise DgkitError(f"timestep {timestep:g} is not in the schedule of {type(scheduler).__name__}")
        index = int(places[0])
    count, plain = len(scheduler.timesteps) - begin, type(scheduler).__name__
    if pipeline_row(pipe).velocity:
        now, after = (float(s) for s in scheduler.sigmas[index : index + 2])
        deterministic = plain == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling
        return Step(index - begin, count, 1 - now, now, 1 - after, after, True, deterministic)
    t = int(scheduler.timesteps[index])
    left = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # as DDIMScheduler.step has it
    kept = float(scheduler.alphas_cumprod[t])
    kept_next = float(scheduler.alphas_cumprod[left] if left >= 0 else getattr(scheduler, "final_alpha_cumprod", 1.0))
    levels = (kept**0.5, (1 - kept) ** 0.5, kept_next**0.5, (1 - kept_next) ** 0.5)
    return Step(index - begin, count, *levels, False, plain == "DDIMScheduler")


class CallReader:
    """Reads the calls of a transformer, and tells which rows are conditional and which unconditional.

    Only the pipeline knows, so the rows of a bare transformer, and those of another pipeline that shares it, are all
    "unknown". One reader watches any number of runs, because what a row is can depend on the call before.
    """

    def __init__(self, target: Any, anatomy: Anatomy) -> None:
        self._pipe = None if isinstance(target, nn.Module) else target
        self._row = None if self._pipe is None else pipeline_row(self._pipe)
        self._anatomy = anatomy
        self._previous: Tensor | None = None
        self._schedule: Tensor | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with (args, kwargs)."""
        call = Call.of(self._anatomy, args, kwargs, self._pipe)
        if self._row is None or calling_pipeline() not in (self._pipe, None):
            call.labels = (UNKNOWN,) * call.batch
            return call
        if self._schedule is not call.pipe.scheduler.timesteps:  # a new run: each makes a schedule of its own
            self._schedule, self._previous = call.pipe.scheduler.timesteps, None
        call.labels = self._row.rows(call, self._previous)
        self._previous = call.latents
        return call


def calling_pipeline() -> DiffusionPipeline | None:
    """The innermost pipeline whose `__call__` is under way; None when the transformer is called by hand."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
