"""What goes on when a transformer is called.

Three things have a name. A `Call` is one call of the transformer: its arguments, and which of its rows are what. A
`Pass` is what runs through the blocks: the rows of a call, or those of a branch of it. A `Step` is the sampling step in
which the call is made.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy.arguments import consecutive, named
from dgkit.anatomy.dissection import Anatomy
from dgkit.anatomy.loops import Loop, Runs, context_name, loop_under_way
from dgkit.anatomy.pipelines import (
    CFG_WAYS,
    COND,
    NO_CFG,
    TWO_CALLS,
    UNCOND,
    UNCOND_FIRST,
    UNKNOWN,
    pipeline_row,
    require_known,
)
from dgkit.checks import one_of
from dgkit.errors import DgkitError, ModelError


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
        signal, noise: before the step.
        next_signal, next_noise: after it.
        predicts: "velocity", v = eps - x0 (rectified flow), "noise", eps, or another quantity by the scheduler's name.
        deterministic: whether the scheduler takes Euler / DDIM steps without fresh noise or clipping.
    """

    signal: float
    noise: float
    next_signal: float
    next_noise: float
    predicts: str
    deterministic: bool

    @property
    def sigma(self) -> float:
        """The noise level as schedulers name it: from 1 to 0 in rectified flow, noise over signal in a VP diffusion."""
        return self.noise if self.predicts.endswith("velocity") else self.noise / self.signal

    def denoised(self, x: Tensor, prediction: Tensor) -> Tensor:
        """x0 from x and the prediction.

        Raises:
            ModelError: the prediction is neither velocity nor noise.
        """
        return x - self.noise * prediction if self._velocity() else (x - self.noise * prediction) / self.signal

    def prediction(self, x: Tensor, denoised: Tensor) -> Tensor:
        """The inverse of `denoised`."""
        return (x - denoised) / self.noise if self._velocity() else (x - self.signal * denoised) / self.noise

    def _velocity(self) -> bool:
        if self.predicts not in ("velocity", "noise"):
            raise ModelError(f"x0 is known from a predicted velocity or noise, not from this model's {self.predicts}")
        return self.predicts == "velocity"


@dataclass
class Call:
    """One call of a transformer.

    Attributes:
        anatomy: of the transformer.
        arguments: of the call, by name.
        loop: of the pipeline that makes the call; None where there is none.
        ours: whether that is the pipeline that is watched, or a bare transformer is.
        made: how many calls of the same run came before.
        labels: "cond", "uncond" or "unknown" for each row of the batch; filled in by a `CallReader`.
    """

    anatomy: Anatomy
    arguments: dict[str, Any]
    loop: Loop | None = None
    ours: bool = True
    made: int = 0
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The call of `anatomy.model` with (args, kwargs), its rows not labelled."""
        return cls(anatomy, named(anatomy.model, args, kwargs), loop_under_way())

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

    def within(self, start: float, stop: float) -> bool:
        """Whether it is made in one of the steps from int(start * steps) to before int(stop * steps), as in diffusers.

        Raises:
            DgkitError: the step is not known.
        """
        if (start, stop) == (0, 1):
            return True
        index, count = self.place
        return int(start * count) <= index < int(stop * count)

    @cached_property
    def place(self) -> tuple[int, int]:
        """The step of the loop, zero-based, and how many there are; each timestep is a step, also with Heun's.

        Raises:
            DgkitError: there is no loop, or neither its pipeline nor the scheduler tells.
        """
        if self.loop is None:
            raise DgkitError(
                "the step is not known, because no pipeline makes the call: leave out start, stop and after"
            )
        if self.loop.index is not None and self.loop.count is not None:
            return self.loop.index, self.loop.count
        # DiTPipeline does not count, and makes one call in each step
        schedule, timestep = self.loop.pipe.scheduler.timesteps, self.timesteps[0]
        if self.made < len(schedule) and float(schedule[self.made]) == timestep:
            return self.made, len(schedule)
        places = (schedule == timestep).nonzero()
        if not len(places):
            raise DgkitError(
                f"timestep {timestep:g} is not in the schedule of {type(self.loop.pipe.scheduler).__name__}"
            )
        return int(places[0]), len(schedule)

    @cached_property
    def step(self) -> Step:
        """The sampling step in which the call is made; worked out only where somebody asks.

        Raises:
            DgkitError: there is no loop, or its scheduler does not tell.
        """
        index, _ = self.place
        assert self.loop is not None
        return _step(self.loop.pipe, index)


def predicted(pipe: Any) -> str:
    """What the transformer of a pipeline predicts, see `Step.predicts`: its scheduler and its row say."""
    config = pipe.scheduler.config
    kind = config.get("prediction_type", "epsilon")
    flow = config.get("use_flow_sigmas") or kind == "flow_prediction"
    if flow or type(pipe.scheduler).__name__.startswith("FlowMatch"):
        return "negative velocity" if pipeline_row(pipe).negated else "velocity"
    return "noise" if kind == "epsilon" else kind


def _step(pipe: Any, index: int) -> Step:
    scheduler, plain, predicts = pipe.scheduler, type(pipe.scheduler).__name__, predicted(pipe)
    config = scheduler.config
    if predicts.endswith("velocity"):
        place = getattr(scheduler, "step_index", None)
        place = (getattr(scheduler, "begin_index", None) or 0) + index if place is None else place
        now, after = (float(s) for s in scheduler.sigmas[place : place + 2])
        if now > 1:  # Cosmos: of latents that are scaled before the transformer sees them
            raise DgkitError(f"sigma={now:g} of {plain} is no noise level of x: leave out what depends on them")
        deterministic = plain == "FlowMatchEulerDiscreteScheduler" and not config.stochastic_sampling
        return Step(1 - now, now, 1 - after, after, predicts, deterministic)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise DgkitError(f"the noise levels of {plain} are not known to dgkit: leave out what depends on them")
    t = int(scheduler.timesteps[(getattr(scheduler, "begin_index", None) or 0) + index])
    left = t - config.num_train_timesteps // scheduler.num_inference_steps  # as DDIMScheduler.step has it
    kept = float(scheduler.alphas_cumprod[t])
    kept_next = float(scheduler.alphas_cumprod[left] if left >= 0 else getattr(scheduler, "final_alpha_cumprod", 1.0))
    levels = (kept**0.5, (1 - kept) ** 0.5, kept_next**0.5, (1 - kept_next) ** 0.5)
    clips = config.get("clip_sample") or config.get("thresholding")
    return Step(*levels, predicts, plain == "DDIMScheduler" and not clips and predicts == "noise")


@dataclass
class _Run:
    """What a `CallReader` keeps of a run: how many calls it made, and of the last its step and latents."""

    made: int = 0
    step: int | None = None
    latents: Any = None


class CallReader:
    """Reads the calls of a transformer, and tells which rows are conditional and which unconditional.

    Only the pipeline knows. The rows of calls that it does not make (another pipeline that shares the transformer, or
    somebody by hand) are "unknown", and so are all rows of a bare transformer unless `cfg` is given.

    Args:
        target: a pipeline, or a bare transformer or its anatomy.
        anatomy: of the transformer.
        cfg: how CFG is run, one of `CFG_WAYS`; by default what is known of the pipeline's class.

    Attributes:
        cfg: likewise, None where it is not known.
        scale: what the pipeline calls the scale of CFG.

    Raises:
        DgkitError: `cfg` is not one of them.
        ModelError: see `pipeline_row`.
    """

    def __init__(self, target: Any, anatomy: Anatomy, cfg: str | None = None) -> None:
        self._pipe = None if isinstance(target, nn.Module | Anatomy) else target
        self.cfg, self.scale = cfg if cfg is None else one_of("cfg", cfg, CFG_WAYS), "its CFG's scale"
        if self._pipe is not None:
            row = pipeline_row(self._pipe, cfg)
            self.cfg, self.scale = row.cfg, row.scale
        self._stated = cfg is not None
        self._anatomy = anatomy
        self._runs = Runs(_Run)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with (args, kwargs).

        Raises:
            ModelError: the pipeline's class has a `__call__` of its own, and `cfg` was left out.
        """
        call = Call.of(self._anatomy, args, kwargs)
        maker = None if call.loop is None else call.loop.pipe
        call.ours = self._pipe is None or maker is self._pipe
        if not call.ours or self.cfg is None:
            call.labels = (UNKNOWN,) * call.batch
            return call
        if call.loop is not None and self._pipe is not None and not self._stated:
            require_known(call.loop.caller)
        run = self._runs.of(call.loop)
        call.made, call.labels = run.made, self._labels(call, run)
        run.made, run.step, run.latents = run.made + 1, _index(call), call.latents
        return call

    def _labels(self, call: Call, run: _Run) -> tuple[str, ...]:
        if self.cfg == TWO_CALLS:
            return (self._label(call, run),) * call.batch
        if self.cfg == NO_CFG or not _doubled(call):
            return (COND,) * call.batch
        half = call.batch // 2
        return (UNCOND,) * half + (COND,) * half if self.cfg == UNCOND_FIRST else (COND,) * half + (UNCOND,) * half

    def _label(self, call: Call, run: _Run) -> str:
        if name := context_name():
            return {"cond": COND, "pred_cond": COND, "uncond": UNCOND, "pred_uncond": UNCOND}.get(name, UNKNOWN)
        step = _index(call)
        again = step == run.step if step is not None else call.latents is run.latents
        return UNCOND if run.made and again else COND


def _index(call: Call) -> int | None:
    return None if call.loop is None else call.loop.index


def _doubled(call: Call) -> bool:
    """Whether the batch holds the latents twice."""
    if call.loop is not None and call.loop.images is not None:
        return call.batch == 2 * call.loop.images
    return call.batch % 2 == 0 and call.halves_equal
