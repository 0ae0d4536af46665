"""Prompts or classes and seeds to images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dgkit.anatomy import pipeline_row
from dgkit.checks import integer, number
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from dgkit.zoo import row_of


def own_conditions(pipe: Any, count: int) -> list[Any]:
    """The first `count` of the model's own conditions, again from the start when they run out.

    Class-conditional pipelines go through their classes, text pipelines through the captions of their own training
    data, `data/prompts/DATA.txt`, or through `data/prompts/offline.txt`.
    """
    if pipeline_row(pipe).condition == "class_labels":
        known: list[Any] = sorted(set(pipe.labels.values())) or list(range(pipe.transformer.config.num_embeds_ada_norm))
    else:
        model = row_of(pipe)
        name = model.data if model and model.data else "offline"
        known = (DATA / "prompts" / f"{name}.txt").read_text().splitlines()
    return [known[i % len(known)] for i in range(count)]


def generate(
    pipe: Any,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    **call: Any,
) -> NDArray[np.uint8]:
    """Images (N, H, W, 3), one per (condition, seed) pair.

    Each image has a generator of its own, so its starting noise depends on its seed alone.

    Args:
        pipe: a pipeline.
        conditions: prompts, or class ids for `DiTPipeline`.
        seeds: one per condition.
        num_inference_steps: sampling steps.
        guidance_scale: s of u + s (c - u); 1 for no CFG. For Flux it is the `true_cfg_scale`.
        batch_size: images per call of the pipeline.
        call: further arguments of the pipeline's call; those that the model always needs (`zoo.Model.call`) are added.

    Raises:
        DgkitError: no conditions, as many seeds as conditions are not given, or a number out of range.
        ModelError: an unknown pipeline class.
        FloatingPointError: an image with values that are NaN, which would be black.
    """
    row, model = pipeline_row(pipe), row_of(pipe)
    call = dict(model.call if model else {}) | call
    if isinstance(conditions, str) or len(conditions) == 0 or len(conditions) != len(seeds):
        raise DgkitError(f"give one seed per condition, got {len(conditions)} conditions and {len(seeds)} seeds")
    integer("num_inference_steps", num_inference_steps, 1)
    integer("batch_size", batch_size, 1)
    number("guidance_scale", guidance_scale, 1, allowed="give a number from 1 (no CFG) up")
    parts = []
    for start in range(0, len(conditions), batch_size):
        batch = slice(start, start + batch_size)
        with no_progress_bar(pipe):
            output = pipe(
                **{row.condition: list(conditions[batch])},
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds[batch]],
                num_inference_steps=num_inference_steps,
                **row.guidance(guidance_scale, len(seeds[batch])),
                output_type="np",
                **call,
            )
        if bad := sum(not np.isfinite(image).all() for image in output.images):
            raise FloatingPointError(f"{bad} of {len(output.images)} images are not finite: use a wider dtype")
        parts.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


@contextmanager
def no_progress_bar(pipe: Any) -> Iterator[None]:
    """Per batch it would be noise; the pipeline's own setting comes back."""
    own = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(own or {}))
