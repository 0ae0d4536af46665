"""The models that dgkit knows by name: where they come from, what they need, and the paper's settings for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dgkit import loading, memory
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
        weights_gb: size of all weights in 16 bits, text encoders included.
        preset: see `Preset`.
        data: what a model of this project was trained on: "fashion-mnist", "dungeon-tiles", or "".
        call: arguments that every call of the pipeline needs, where its own defaults are those of large models.
        largest_gb: size of the largest part in 16 bits.
        download_gb: size of the files that are downloaded.
        side: pixels of an image's side.
        tokens: image and text tokens of one image.
        revision: of the hub repository.
        single: "owner/name/path" of a single file on the hub that takes the place of the source's transformer.
        single_licence: its licence.
        dual: whether some of its blocks have a second attention, by which SD3.5-Medium differs from SD3.
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
    largest_gb: float = 0.0
    download_gb: float = 0.0
    side: int = 0
    tokens: int = 0
    revision: str = "main"
    single: str = ""
    single_licence: str = ""
    dual: bool = False


_FLUX = Preset(21, (154, 1446), 4.0, 2.0, 3.5, 50, "Tables 4 and 5")

MODELS: dict[str, Model] = {
    "tiny-dit": Model(
        None, "DiTPipeline", "DiTTransformer2DModel", 8, 128, "MIT", 0.01,
        Preset(2, (7, 83), 0.02, 0.2, 4.0, 20, "dims by detect_massive, w by the calibration in the model card"),
        data="fashion-mnist", side=28, tokens=49,
    ),
    "tiny-sd3": Model(
        None, "StableDiffusion3Pipeline", "SD3Transformer2DModel", 8, 96, "MIT", 0.01,
        Preset(2, (79, 72), 0.02, 0.02, 3.0, 20, "dims by detect_massive, w by the calibration in the model card"),
        data="dungeon-tiles", call={"max_sequence_length": 16}, side=32, tokens=64 + 32,
    ),
    "tiny-flux": Model(
        None, "FluxPipeline", "FluxTransformer2DModel", 8, 96, "MIT", 0.01,
        Preset(2, (79, 59), 0.02, 0.02, 2.0, 20, "dims by detect_massive, w by the calibration in the model card"),
        data="dungeon-tiles", call={"max_sequence_length": 16, "height": 32, "width": 32}, side=32, tokens=64 + 16,
    ),
    # text tokens that the pipelines make by default: 77 of CLIP and 256 of T5, in Flux 512 of T5
    "sd3": Model(
        "stabilityai/stable-diffusion-3-medium-diffusers", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        24, 1536, "Stability AI Community (gated)", 15.5,
        Preset(5, (810,), 1.0, 1.0, 4.0, 28, "Tables 4 and 5"),
        largest_gb=9.5, download_gb=15.5, side=1024, tokens=4096 + 333,
    ),
    "sd3.5-large": Model(
        "stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        38, 2432, "Stability AI Community (gated)", 27.6,
        Preset(19, (676,), 4.0, 2.0, 4.0, 28, "Tables 4 and 5"),
        largest_gb=16.3, download_gb=27.6, side=1024, tokens=4096 + 333,
    ),
    "flux-dev": Model(
        "black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel",
        57, 3072, "FLUX.1 [dev] Non-Commercial (gated)", 33.7, _FLUX,
        largest_gb=23.8, download_gb=33.7, side=1024, tokens=4096 + 512,
    ),
    # the paper does not say which de-distilled Flux it used: this is the one that most others build on
    "flux-dev-de-distill": Model(
        "black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel",
        57, 3072, "FLUX.1 [dev] Non-Commercial (gated)", 33.7, _FLUX,
        largest_gb=23.8, download_gb=33.7, side=1024, tokens=4096 + 512,
        single="nyanko7/flux-dev-de-distill/consolidated_s6700.safetensors",
        single_licence="FLUX.1 [dev] Non-Commercial",
    ),
    # the main branch has pickles only; this is their conversion by the hub's own service
    "dit-xl-2": Model(
        "facebook/DiT-XL-2-256", "DiTPipeline", "DiTTransformer2DModel",
        28, 1152, "CC-BY-NC 4.0", 1.7,
        Preset(6, None, None, None, 4.0, 250, "appendix H, which states neither the dims nor w"),
        largest_gb=1.5, download_gb=3.3, side=256, tokens=256, revision="refs/pr/1",
    ),
}  # fmt: skip


def load(name: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline, and move it to a GPU as a whole or part by part, as its free memory allows.

    A transformer of its own, such as `flux1-dev.safetensors` or a de-distilled Flux, is completed from the pipeline
    folder that it lies in, else from the hub's repository of the same architecture.

    Args:
        name: a name in `MODELS`; a pipeline folder; a transformer's folder or .safetensors file; a hub id "owner/name",
            or "owner/name/path.safetensors" for a transformer's file there.
        device: "cpu", "cuda", "cuda:1", ...; by default the GPU if there is one, and the CPU for shipped models.
        dtype: of the weights; float32 on the CPU and bfloat16 elsewhere by default.

    Raises:
        LoadError: unknown name, a folder that is not a complete pipeline, broken weights, no access to the hub, too
            little memory.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise LoadError(f"name={name!r} is not allowed: give a name ({', '.join(MODELS)}), a folder or a hub id")
    row = MODELS.get(str(name))
    where = _device(device, row)
    dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    if row is None:
        folder, single = _found(str(name))
    elif row.source is None:
        folder, single = DATA / "models" / str(name), None
    else:
        memory.check_memory(str(name), row.weights_gb, row.largest_gb, where, dtype)
        folder = _fetch(row, transformer=not row.single)
        single = loading.Single.of(loading.fetch_file(row.single, row.single_licence)) if row.single else None
    return memory.place(loading.read(folder, dtype, single), where, str(name))


def _device(device: str | None, row: Model | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() and (row is None or row.source) else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f'device={device!r} is not allowed: give "cpu", "cuda", "cuda:0", ...') from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise LoadError(f'device={device!r} is not available here: torch finds {count} GPU, use device="cpu"')
    return found


def _found(name: str) -> tuple[Path, loading.Single | None]:
    """The pipeline folder of a name without a row, and the transformer that takes the place of its own."""
    path, parts = Path(name), name.split("/")
    if path.is_dir() and (path / "model_index.json").is_file():
        return path, None
    if path.exists():
        single = loading.Single.of(path)
        return loading.pipeline_around(path) or _base(single), single
    hub = all(parts) and parts[0] not in (".", "..", "~")
    if hub and len(parts) == 2 and not name.endswith(".safetensors"):
        return loading.fetch(name), None
    if hub and len(parts) > 2 and name.endswith(".safetensors"):
        single = loading.Single.of(loading.fetch_file(name))
        return _base(single), single
    raise LoadError(f"model {name!r} is unknown: use {', '.join(MODELS)}, a pipeline folder or a hub id")


def _base(single: loading.Single) -> Path:
    """The other parts of the pipeline that a transformer belongs to, from the hub."""
    row = _row(single.transformer, single.blocks, single.channels, single.dual, hub=True)
    if row is None:
        dual = " and dual attention" if single.dual else ""
        raise LoadError(
            f"{single.path} is a {single.transformer} with {single.blocks} blocks of {single.channels} channels{dual}, "
            f"which is no model known here: put it into the folder of the pipeline that has its other parts"
        )
    return _fetch(row, transformer=False)


def _fetch(row: Model, transformer: bool) -> Path:
    assert row.source is not None
    return loading.fetch(row.source, row.revision, row.licence.removesuffix(" (gated)"), transformer=transformer)


def _row(*shape: Any, hub: bool = False) -> Model | None:
    """The first row of this transformer, blocks, channels and dual; with `hub` only of models there."""
    rows = (m for m in MODELS.values() if m.source or not hub)
    return next((m for m in rows if (m.transformer, m.blocks, m.channels, m.dual) == shape), None)


def row_of(target: Any) -> Model | None:
    """The row of the model that a pipeline, transformer or anatomy is, known by its class, depth, width and `dual`.

    None for any other, also for one that has no anatomy or is compiled as a whole.
    """
    try:
        anatomy = target if isinstance(target, Anatomy) else dissect(target)
    except ModelError:
        return None
    config = getattr(anatomy.model, "config", None)  # which modules outside diffusers lack
    dual = bool(getattr(config, "dual_attention_layers", ()))
    return _row(type(anatomy.model).__name__, len(anatomy.blocks), anatomy.channels, dual)


def preset_of(target: Any) -> Preset | None:
    """The preset of the model that a pipeline, transformer or anatomy is, if it has a row."""
    row = row_of(target)
    return row.preset if row else None


def settings_for(
    target: Any,
    *,
    block: Any = None,
    dims: Any = None,
    scale: Any = None,
    scale_with_cfg: Any = None,
    guidance_scale: float | None = None,
) -> Preset:
    """The settings for a pipeline, transformer or anatomy: what is given, else those of the model's preset.

    A `scale` that is given stands for `scale_with_cfg` as well. What is neither given nor stated by a preset is None;
    `guidance_scale` is then 4, the paper's for SD3.
    """
    given = {
        "block": block,
        "dims": dims,
        "scale": scale,
        "scale_with_cfg": scale if scale_with_cfg is None else scale_with_cfg,
        "guidance_scale": guidance_scale,
    }
    known = preset_of(target) or Preset(None, None, None, None, 4.0, 28, "no preset")
    return replace(known, **{name: value for name, value in given.items() if value is not None})
