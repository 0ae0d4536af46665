"""The models that dgkit knows by name: where they come from, what they need, and the paper's settings for them."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from dgkit.anatomy import Anatomy, dissect
from dgkit.errors import LoadError, ModelError
from dgkit.paths import DATA


@dataclass(frozen=True)
class Preset:
    """Detail Guidance settings of one model; None where no source states the value.

    Attributes:
        block: zero-based block, the paper's depth m - 1 (Table 4).
        dims: disrupted channels (Table 4).
        scale: w without CFG (Table 5).
        scale_with_cfg: w beside CFG (Table 5).
        guidance_scale: s of u + s (c - u) for plain CFG; the paper's lambda of Table 5's CFG rows.
        steps: sampling steps.
        source: where the values come from.
    """

    block: int | None
    dims: tuple[int, ...] | None
    scale: float | None
    scale_with_cfg: float | None
    guidance_scale: float
    steps: int
    source: str


@dataclass(frozen=True)
class Model:
    """One row of the zoo.

    Attributes:
        source: hub id, or None for a model shipped in `data/models`.
        pipeline, transformer: diffusers classes.
        blocks, channels: N and d, which also identify the model when a user brings a pipeline of their own.
        licence: licence of the weights.
        weights_gb: size of all weights in bfloat16, text encoders included.
        preset: see `Preset`.
        data: what a model of this project was trained on: "fashion-mnist", "dungeon-tiles", or "".
        call: arguments that every call of the pipeline needs, where its own defaults are those of large models.
    """

    source: str | None
    pipeline: str
    transformer: str
    blocks: int
    channels: int
    licence: str
    weights_gb: float
    preset: Preset
    data: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Model] = {
    "tiny-dit": Model(
        None, "DiTPipeline", "DiTTransformer2DModel", 8, 128, "MIT", 0.01,
        Preset(2, (7, 83), 0.1, 0.2, 4.0, 20, "dims by detect_massive, w by the calibration in the model card"),
        data="fashion-mnist",
    ),
    "tiny-sd3": Model(
        None, "StableDiffusion3Pipeline", "SD3Transformer2DModel", 8, 96, "MIT", 0.01,
        Preset(4, (8,), 1.0, 1.0, 3.0, 20, "first block with a massive channel; w as SD3's: none in its card helps"),
        data="dungeon-tiles", call={"max_sequence_length": 16},
    ),
    "tiny-flux": Model(
        None, "FluxPipeline", "FluxTransformer2DModel", 8, 96, "MIT", 0.01,
        Preset(2, (79, 59), 1.0, 1.0, 2.0, 20, "dims by detect_massive; w as SD3's: none in its card helps"),
        data="dungeon-tiles", call={"max_sequence_length": 16, "height": 32, "width": 32},
    ),
    "sd3": Model(
        "stabilityai/stable-diffusion-3-medium-diffusers", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        24, 1536, "Stability AI Community (gated)", 15.0,
        Preset(5, (810,), 1.0, 1.0, 4.0, 28, "Tables 4 and 5"),
    ),
    "sd3.5-large": Model(
        "stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        38, 2432, "Stability AI Community (gated)", 28.0,
        Preset(19, (676,), 4.0, 2.0, 4.0, 28, "Tables 4 and 5"),
    ),
    "flux-dev": Model(
        "black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel",
        57, 3072, "FLUX.1 [dev] Non-Commercial (gated)", 34.0,
        Preset(21, (154, 1446), 4.0, 2.0, 3.5, 50, "Tables 4 and 5"),
    ),
    "dit-xl-2": Model(
        "facebook/DiT-XL-2-256", "DiTPipeline", "DiTTransformer2DModel",
        28, 1152, "CC-BY-NC 4.0", 1.5,
        Preset(6, None, None, None, 4.0, 250, "appendix H, which states neither the dims nor w"),
    ),
}  # fmt: skip


def load(name: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline.

    Args:
        name: a name in `MODELS`, a pipeline folder, or a hub id "owner/name".
        device: "cpu", "cuda", "cuda:1", ...
        dtype: of the weights; float32 on the CPU and bfloat16 elsewhere by default.

    Raises:
        LoadError: unknown name, a folder that is not a complete pipeline, broken weights, no access to the hub.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise LoadError(f"name={name!r} is not allowed: give a name ({', '.join(MODELS)}), a folder or a hub id")
    row, folder = MODELS.get(str(name)), Path(name)
    source = str(name) if row is None else row.source or str(DATA / "models" / str(name))
    if row is None and not folder.is_dir() and (str(name).count("/") != 1 or str(name).startswith((".", "/"))):
        raise LoadError(f"model {str(name)!r} is unknown: use {', '.join(MODELS)}, a pipeline folder or a hub id")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise LoadError(f"{source} is not a diffusers pipeline folder: it has no model_index.json")
    try:
        torch_device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f'device={device!r} is not allowed: give "cpu", "cuda", "cuda:0", ...') from error
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f'device={device!r} is not available here: torch finds no GPU, use device="cpu"')
    dtype = dtype or (torch.float32 if torch_device.type == "cpu" else torch.bfloat16)
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        gated = f" (licence: {row.licence}; accept it on the hub and log in)" if row and row.source else ""
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise LoadError(f"{source} could not be loaded{gated}: {reason}") from error
    return pipe.to(torch_device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars only on a terminal; no warning about DiT's class names, whose keys JSON turns into strings."""

    def harmless(record: logging.LogRecord) -> bool:
        return "Expected types for id2label" not in record.getMessage()

    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(harmless)
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    if not sys.stderr.isatty():
        for library in shown:
            library.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(harmless)
        for library in shown:
            library.enable_progress_bar()


def row_of(target: Any) -> Model | None:
    """The row of the model that a pipeline, transformer or anatomy is, known by its class, depth and width.

    None for any other, also for one that has no anatomy or is compiled as a whole.
    """
    try:
        anatomy = target if isinstance(target, Anatomy) else dissect(target)
    except ModelError:
        return None
    shape = (type(anatomy.model).__name__, len(anatomy.blocks), anatomy.channels)
    return next((m for m in MODELS.values() if (m.transformer, m.blocks, m.channels) == shape), None)


def preset_of(target: Any) -> Preset | None:
    """The preset of the model that a pipeline, transformer or anatomy is, if it has a row."""
    row = row_of(target)
    return row.preset if row else None
