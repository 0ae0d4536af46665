"""What a pipeline's calls of its transformer mean: to add a pipeline class, add a row to `PIPELINES`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dgkit.anatomy.transformers import Call
from dgkit.errors import DgkitError, ModelError

COND, UNCOND, DEGRADED, UNKNOWN = "cond", "uncond", "degraded", "unknown"


@dataclass(frozen=True)
class Pipeline:
    """The row of one family of pipelines.

    Attributes:
        condition: the argument of `__call__` that holds the prompts or classes.
        rows: labels the batch rows of a transformer call, from the pipeline, the call and the latents of the call
            before.
        velocity: whether the transformer predicts the velocity of rectified flow; else the noise of a VP diffusion.
        guidance: arguments of `__call__` for s of u + s (c - u) and a number of images; s = 1 is no CFG.
        batched_cfg: whether CFG is one call on a doubled batch; else a second call, of which the first cannot know.
    """

    condition: str
    rows: Callable[[Any, Call, Tensor | None], tuple[str, ...]]
    velocity: bool
    guidance: Callable[[float, int], dict[str, Any]] = lambda s, count: {"guidance_scale": s}
    batched_cfg: bool = True


def _sd3_rows(pipe: Any, call: Call, previous: Tensor | None) -> tuple[str, ...]:
    if pipe.do_classifier_free_guidance and call.halves_equal:
        return (UNCOND,) * (call.batch // 2) + (COND,) * (call.batch // 2)
    return (COND,) * call.batch


def _flux_rows(pipe: Any, call: Call, previous: Tensor | None) -> tuple[str, ...]:
    # with true CFG the transformer is called twice per step on the same latents, first conditional, then unconditional
    return (UNCOND if call.hidden_states is previous else COND,) * call.batch


def _flux_guidance(s: float, count: int) -> dict[str, Any]:
    # `guidance_scale` is the distilled one; without a negative prompt `true_cfg_scale` is silently ignored
    return {"true_cfg_scale": s, "negative_prompt": [""] * count} if s > 1 else {}


def _dit_rows(pipe: Any, call: Call, previous: Tensor | None) -> tuple[str, ...]:
    half, null_class = call.batch // 2, 1000  # hard-coded in DiTPipeline
    labels = call.class_labels
    if labels is not None and call.halves_equal and bool((labels[half:] == null_class).all()):
        return (COND,) * half + (UNCOND,) * half
    return (COND,) * call.batch


# by the beginning of the class name, so that image-to-image and inpainting variants share a row
PIPELINES: dict[str, Pipeline] = {
    "StableDiffusion3": Pipeline("prompt", _sd3_rows, velocity=True),
    "Flux": Pipeline("prompt", _flux_rows, velocity=True, guidance=_flux_guidance, batched_cfg=False),
    "DiT": Pipeline("class_labels", _dit_rows, velocity=False),
}


def pipeline_row(pipe: Any) -> Pipeline:
    """The row of a pipeline's class.

    Raises:
        ModelError: the class has none.
    """
    name = type(pipe).__name__
    if "PAG" in name or "ControlNet" in name:
        raise ModelError(f"{name} is not supported: its batches have other rows than plain or classifier-free guidance")
    if "Kontext" in name or name.startswith("Flux2"):
        raise ModelError(
            f"{name} is not supported: its transformer sees the tokens of reference images as well, which would be "
            f"taken for the image"
        )
    row = next((row for prefix, row in PIPELINES.items() if name.startswith(prefix)), None)
    if row is None or isinstance(pipe, nn.Module):
        raise ModelError(f"expected a diffusers pipeline of the families {', '.join(PIPELINES)}, got {name}")
    return row


class RowLabels:
    """Tells which rows of each transformer call are conditional and which unconditional.

    Only the pipeline knows, so the rows of a bare transformer, and those of another pipeline that shares it, are all
    "unknown". One instance watches any number of runs.
    """

    def __init__(self, target: Any) -> None:
        self._pipe = target
        self._row = None if isinstance(target, nn.Module) else pipeline_row(target)
        self._previous: Tensor | None = None
        self._schedule: Tensor | None = None

    def __call__(self, call: Call) -> tuple[str, ...]:
        """The label of each row of `call`."""
        if self._row is None or calling_pipeline() not in (self._pipe, None):
            return (UNKNOWN,) * call.batch
        if self._schedule is not self._pipe.scheduler.timesteps:  # a new run: each makes a schedule of its own
            self._schedule, self._previous = self._pipe.scheduler.timesteps, None
        labels = self._row.rows(self._pipe, call, self._previous)
        self._previous = call.hidden_states
        return labels


def calling_pipeline() -> DiffusionPipeline | None:
    """The innermost pipeline whose `__call__` is under way; None when the transformer is called by hand."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


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


def step_of(pipe: Any, call: Call) -> Step:
    """The sampling step in which `pipe` makes the transformer call `call`.

    Raises:
        DgkitError: the scheduler does not tell.
    """
    scheduler, velocity = pipe.scheduler, pipeline_row(pipe).velocity
    begin = getattr(scheduler, "begin_index", None) or 0
    index = getattr(scheduler, "step_index", None)
    if index is None and hasattr(scheduler, "step_index"):
        index = begin
    elif index is None:  # DDIM: the timestep is an integer of the schedule
        places = (scheduler.timesteps == call.timesteps()[0]).nonzero()
        if not len(places):
            raise DgkitError(f"timestep {call.timesteps()[0]:g} is not in the schedule of {type(scheduler).__name__}")
        index = int(places[0])
    count, plain = len(scheduler.timesteps) - begin, type(scheduler).__name__
    if velocity:
        now, after = (float(s) for s in scheduler.sigmas[index : index + 2])
        deterministic = plain == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling
        return Step(index - begin, count, 1 - now, now, 1 - after, after, True, deterministic)
    t = int(scheduler.timesteps[index])
    left = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # as DDIMScheduler.step has it
    kept = float(scheduler.alphas_cumprod[t])
    kept_next = float(scheduler.alphas_cumprod[left] if left >= 0 else getattr(scheduler, "final_alpha_cumprod", 1.0))
    levels = (kept**0.5, (1 - kept) ** 0.5, kept_next**0.5, (1 - kept_next) ** 0.5)
    return Step(index - begin, count, *levels, False, plain == "DDIMScheduler")
