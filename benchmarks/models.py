"""The paper's four models with random weights: the public configs of their transformers, whole or at reduced width."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel
from torch import Tensor

from dgkit.zoo import MODELS

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is reduced on a CPU.

    Attributes:
        heads, head_dim: their product is the width.
        side: the image has side x side tokens.
        text: number of text tokens.
        embedding: width of the text embeddings.
    """

    heads: int
    head_dim: int
    side: int
    text: int
    embedding: int = 4096


@dataclass(frozen=True)
class Architecture:
    """One transformer: its class, the part of its public config that is never reduced, and its real size.

    Attributes:
        batched_cfg: whether its pipeline runs CFG as one call with two rows; else as two calls.
        cond: the conditional row of that one call.
    """

    transformer: type[ModelMixin]
    config: Mapping[str, Any]
    size: Size
    batched_cfg: bool = True
    cond: int = 1


# by their names in `dgkit.zoo.MODELS`; for 1024 x 1024 pixels (DiT 256 x 256) and the text tokens that the pipelines
# make by default: 77 of CLIP and 256 of T5, in Flux 512 of T5
_SD3 = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "pooled_projection_dim": 2048}
ARCHITECTURES: dict[str, Architecture] = {
    "sd3": Architecture(
        SD3Transformer2DModel,
        _SD3 | {"num_layers": 24, "pos_embed_max_size": 192},
        Size(heads=24, head_dim=64, side=64, text=333),
    ),
    "sd3.5-large": Architecture(
        SD3Transformer2DModel,
        _SD3 | {"num_layers": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        Size(heads=38, head_dim=64, side=64, text=333),
    ),
    "flux-dev": Architecture(
        FluxTransformer2DModel,
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "pooled_projection_dim": 768, "guidance_embeds": True,
        },
        Size(heads=24, head_dim=128, side=64, text=512),
        batched_cfg=False,
        cond=0,
    ),
    "dit-xl-2": Architecture(
        DiTTransformer2DModel,
        {"patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 28, "num_embeds_ada_norm": 1000},
        Size(heads=16, head_dim=72, side=16, text=0),
        cond=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A built model with the calls that its pipeline makes in one sampling step, for one image.

    Attributes:
        name: its name in `dgkit.zoo.MODELS`.
        model: the transformer.
        cond, uncond: the calls with the prompt and without.
        both: the one call of batched CFG; None where CFG is two calls.
        cond_row: the conditional row of `both`.
        block: whose output DG edits, from the preset; the depth m is block + 1.
        dims: which channels it edits there.
    """

    name: str
    model: ModelMixin
    cond: Arguments = field(repr=False)
    uncond: Arguments = field(repr=False)
    both: Arguments | None = field(repr=False)
    cond_row: int
    block: int
    dims: tuple[int, ...]


def subject(name: str, size: Size | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """Build `name` at `size`, by default its real one, directly on `device` in `dtype`; random weights of seed 0."""
    architecture, preset = ARCHITECTURES[name], MODELS[name].preset
    assert preset.block is not None
    if size is not None:
        architecture = replace(architecture, size=size)
    size = architecture.size
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = architecture.transformer(**_config(architecture)).eval().requires_grad_(False)
            both = _call(architecture)
    finally:
        torch.set_default_dtype(before)
    rows = {architecture.cond: "cond", 1 - architecture.cond: "uncond"}
    single = {rows[row]: {key: _row(key, value, row) for key, value in both.items()} for row in rows}
    return Subject(
        name,
        model,
        **single,
        both=both if architecture.batched_cfg else None,
        cond_row=architecture.cond,
        block=preset.block,
        # where they are matters for images only
        dims=tuple(dim for dim in preset.dims or () if dim < size.heads * size.head_dim) or (0,),
    )


def _config(architecture: Architecture) -> dict[str, Any]:
    size = architecture.size
    config = {**architecture.config, "num_attention_heads": size.heads, "attention_head_dim": size.head_dim}
    if architecture.transformer is SD3Transformer2DModel:
        return config | {
            "sample_size": 2 * size.side,
            "joint_attention_dim": size.embedding,
            "caption_projection_dim": size.heads * size.head_dim,
        }
    if architecture.transformer is FluxTransformer2DModel:
        rotary = size.head_dim // 8, 7 * size.head_dim // 16, 7 * size.head_dim // 16  # 16, 56, 56 of 128
        return config | {"joint_attention_dim": size.embedding, "axes_dims_rope": rotary}
    return config | {"sample_size": 2 * size.side}


def _call(architecture: Architecture) -> Arguments:
    """Two rows, conditional and unconditional; made in the default dtype on the default device."""
    size, config = architecture.size, architecture.config
    if architecture.transformer is DiTTransformer2DModel:
        null_class = config["num_embeds_ada_norm"]
        return {
            "hidden_states": torch.randn(2, config["in_channels"], 2 * size.side, 2 * size.side),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([7, null_class] if architecture.cond == 0 else [null_class, 7]),
        }
    text = {
        "encoder_hidden_states": torch.randn(2, size.text, size.embedding),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
    }
    if architecture.transformer is SD3Transformer2DModel:
        latents = torch.randn(2, config["in_channels"], 2 * size.side, 2 * size.side)
        return text | {"hidden_states": latents, "timestep": torch.tensor([500.0, 500.0])}
    rows, columns = torch.meshgrid(torch.arange(size.side), torch.arange(size.side), indexing="ij")
    return text | {
        "hidden_states": torch.randn(2, size.side**2, config["in_channels"]),
        "timestep": torch.tensor([0.5, 0.5]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1)
        .reshape(-1, 3)
        .to(torch.get_default_dtype()),
        "txt_ids": torch.zeros(size.text, 3),
    }


def _row(name: str, value: Tensor, row: int) -> Tensor:
    return value if name in ("img_ids", "txt_ids") else value[row : row + 1]
