"""What the loop around a guider of diffusers says in the frames of its functions, and nowhere else."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dgkit.errors import ModelError


def _frames() -> Iterator[dict[str, Any]]:
    """The names in each function under way, from the innermost, with those of a modular pipeline's `block_state`."""
    frame = inspect.currentframe()
    while frame is not None:
        state = frame.f_locals.get("block_state")
        yield frame.f_locals | (getattr(state, "as_dict", dict)() if state is not None else {})
        frame = frame.f_back


def number_of_steps(step: int, timestep: Any) -> int | None:
    """How many timesteps the loop has of which this is the `step`-th, zero-based; None where no loop tells.

    Heun's scheduler and others have more than the `num_inference_steps` that loops tell their guiders.
    """
    for names in _frames():
        schedule = names.get("timesteps")
        if isinstance(schedule, Tensor) and schedule.ndim == 1 and step < len(schedule) and schedule[step] == timestep:
            return len(schedule)
    return None


def generated_tokens(latents: Any) -> int | None:
    """How many of the tokens (B, T, C) that a modular pipeline's loop gives its transformer are generated, if not all.

    The others, behind them, are of reference images.

    Raises:
        ModelError: the others stand elsewhere.
    """
    if not isinstance(latents, Tensor) or latents.ndim != 3:
        return None
    for names in _frames():
        own = names.get("latents")
        if "block_state" in names and isinstance(own, Tensor) and own.ndim == 3:
            count = own.shape[1]
            if count == latents.shape[1]:
                return None
            if not torch.equal(latents[:, :count], own.to(latents.dtype)):
                raise ModelError(
                    "the tokens of reference images do not stand behind those of the image that is generated, where "
                    "dgkit.DetailGuidance knows to leave them alone: leave out the reference images"
                )
            return count
    return None
