"""What a pipeline's calls of its transformer mean: to add a pipeline class, add a row to `PIPELINES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dgkit.errors import ModelError

if TYPE_CHECKING:
    from dgkit.anatomy.calls import Call

COND, UNCOND, DEGRADED, UNKNOWN = "cond", "uncond", "degraded", "unknown"


@dataclass(frozen=True)
class Pipeline:
    """The row of one family of pipelines.

    Attributes:
        condition: the argument of `__call__` that holds the prompts or classes.
        rows: labels the batch rows of a transformer call, from that and the latents of the call before.
        velocity: whether the transformer predicts the velocity of rectified flow; else the noise of a VP diffusion.
        guidance: arguments of `__call__` for s of u + s (c - u) and a number of images; s = 1 is no CFG.
        batched_cfg: whether CFG is one call on a doubled batch; else a second call, of which the first cannot know.
    """

    condition: str
    rows: Callable[["Call", Tensor | None], tuple[str, ...]]
    velocity: bool
    guidance: Callable[[float, int], dict[str, Any]] = lambda s, count: {"guidance_scale": s}
    batched_cfg: bool = True


def _sd3_rows(call: "Call", previous: Tensor | None) -> tuple[str, ...]:
    if call.pipe.do_classifier_free_guidance and call.halves_equal:
        return (UNCOND,) * (call.batch // 2) + (COND,) * (call.batch // 2)
    return (COND,) * call.batch


def _flux_rows(call: "Call", previous: Tensor | None) -> tuple[str, ...]:
    # with true CFG the transformer is called twice per step on the same latents, first conditional, then unconditional
    return (UNCOND if call.latents is previous else COND,) * call.batch


def _flux_guidance(s: float, count: int) -> dict[str, Any]:
    # `guidance_scale` is the distilled one; without a negative prompt `true_cfg_scale` is silently ignored
    return {"true_cfg_scale": s, "negative_prompt": [""] * count} if s > 1 else {}


def _dit_rows(call: "Call", previous: Tensor | None) -> tuple[str, ...]:
    half, null_class = call.batch // 2, 1000  # hard-coded in DiTPipeline
    labels = call.arguments.get("class_labels")
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
