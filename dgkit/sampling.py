"""Prompts or classes and seeds to images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dgkit.anatomy import pipeline_row
from dgkit.checks import integer, number, refuse, text
from dgkit.errors import DgkitError
from dgkit.files import read_lines
from dgkit.paths import DATA
from dgkit.zoo import row_of


def own_conditions(pipe: Any, count: int) -> list[Any]:
    """The first `count` of the model's own conditions, again from the start when they run out.

    Class-conditional pipelines go through their classes, text pipelines through the captions of their own training
    data, `data/prompts/DATA.txt`, or through `data/prompts/offline.txt`.
    """
    known: Sequence[Any]
    if pipeline_row(pipe).condition == "class_labels":
        known = range(_classes(pipe))
    else:
        model = row_of(pipe)
        name = model.data if model and model.data else "offline"
        known = read_lines(DATA / "prompts" / f"{name}.txt")
    return [known[i % len(known)] for i in range(count)]


def check_arguments(pipe: Any, conditions: Sequence[Any], guidance_scale: float, call: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that are wrong for every image, before there is one.

    Raises:
        DgkitError: conditions of another kind than the pipeline's, a class that the model was not trained on and
            that is not its null class, an
            argument in `call` that `generate` sets or the pipeline does not take, or a negative prompt without CFG.
        ModelError: an unknown pipeline class.
    """
    row, taken = pipeline_row(pipe), signature(type(pipe).__call__).parameters
    if row.condition == "class_labels":
        null = pipe.transformer.config.num_embeds_ada_norm  # the class of unconditional sampling
        for condition in map(_plain, conditions):
            if condition != null:
                integer("class", condition, 0, _classes(pipe) - 1)
    else:
        for condition in conditions:
            text("prompt", condition)
    for name, value in call.items():
        if name in (row.condition, row.scale, *_SET) or (name in _ONE and value != _ONE[name]):
            refuse(name, value, "leave it out: prompts or classes, seeds, steps and guidance_scale set it")
        if name not in taken and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values()):
            raise DgkitError(f"{type(pipe).__name__} has no argument {name!r}: it takes {', '.join([*taken][1:])}")
        empty = value is None or isinstance(value, str | list) and not any(value)
        if name.startswith("negative_prompt") and guidance_scale == 1 and not empty:
            refuse(name, value, "it has no effect without CFG: give a guidance_scale above 1")


# what `generate` sets, besides the row's own arguments, and what has to be as it is by default
_SET = ("generator", "guidance_scale", "num_inference_steps", "output_type")
_ONE = {"num_images_per_prompt": 1, "num_videos_per_prompt": 1, "return_dict": True}


def _plain(value: Any) -> Any:
    """NumPy's integers as Python's."""
    return int(value) if isinstance(value, np.integer) else value


def _classes(pipe: Any) -> int:
    """How many classes the model was trained on: up to the last that has a name, or all that it has rows for."""
    return max(pipe.labels.values(), default=pipe.transformer.config.num_embeds_ada_norm - 1) + 1


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
        call: further arguments of the pipeline's call, such as a `negative_prompt`; those that the model always needs
            (`zoo.Model.call`) are added.

    Raises:
        DgkitError: no conditions, as many seeds as conditions are not given, a number out of range, and as for
            `check_arguments`.
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
    check_arguments(pipe, conditions, guidance_scale, call)
    seeds = [integer("seed", _plain(seed), -(2**63), 2**64 - 1) for seed in seeds]
    parts = []
    for start in range(0, len(conditions), batch_size):
        batch = slice(start, start + batch_size)
        given = row.guidance(guidance_scale, count := len(seeds[batch])) | call
        if "negative_prompt_embeds" in call:
            given.pop("negative_prompt", None)
        elif isinstance(given.get("negative_prompt"), str):  # which Flux does not repeat for each image by itself
            given["negative_prompt"] = [given["negative_prompt"]] * count
        with no_progress_bar(pipe):
            output = pipe(
                **{row.condition: list(conditions[batch])},
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                num_inference_steps=num_inference_steps,
                output_type="np",
                **given,
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
