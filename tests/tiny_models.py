"""Random-weight instances of the real classes: for tests of the machinery, never for results."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

CLASSES = ("sd3", "flux", "dit")
TEXT = 5  # text tokens
TEXT_WIDTH, POOLED_WIDTH = 16, 24


def build(name: str, *, heads: int = 2, head_dim: int = 8, depth: int = 3, seed: int = 0) -> nn.Module:
    """A small transformer of the real class; SD3 has dual attention in its first block, Flux one more single block."""
    torch.manual_seed(seed)
    model: nn.Module
    if name == "sd3":
        model = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, num_attention_heads=heads,
            attention_head_dim=head_dim, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=heads * head_dim,
            pooled_projection_dim=POOLED_WIDTH, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
    elif name == "flux":
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=depth - 1, num_single_layers=depth, num_attention_heads=heads,
            attention_head_dim=head_dim, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=False, axes_dims_rope=(head_dim // 2, head_dim // 4, head_dim // 4),
        )  # fmt: skip
    else:
        model = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8, num_layers=depth,
            sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
    return model.eval()


def inputs(name: str, batch: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of one transformer call, as the pipeline of the class makes them."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if name == "dit":
        classes = torch.randint(10, (batch,), generator=g)
        return {
            "hidden_states": randn(batch, 4, 8, 8),
            "timestep": torch.full((batch,), 500),
            "class_labels": classes,
        }
    text = {"encoder_hidden_states": randn(batch, TEXT, TEXT_WIDTH), "pooled_projections": randn(batch, POOLED_WIDTH)}
    if name == "sd3":
        return text | {"hidden_states": randn(batch, 4, 8, 8), "timestep": torch.full((batch,), 500.0)}
    positions = torch.tensor([[0, i, j] for i in range(4) for j in range(4)], dtype=torch.float32)
    return text | {
        "hidden_states": randn(batch, 16, 16),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False,
    ).eval()  # fmt: skip


def pipeline(name: str) -> Any:
    """The real pipeline around `build(name)`; text pipelines take prompt embeddings (see `prompts`)."""
    model = build(name)
    if name == "dit":
        pipe = DiTPipeline(model, autoencoder(), DDIMScheduler(clip_sample=False))
    elif name == "sd3":
        nothing = dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        )
        pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), **nothing)
    else:
        nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipe = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), autoencoder(), transformer=model, **nothing
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(name: str, batch: int, seed: int = 0) -> dict[str, Any]:
    """Condition arguments of the pipeline's call, positive and negative, at the smallest image size."""
    if name == "dit":
        return {"class_labels": [(seed + i) % 10 for i in range(batch)]}
    kwargs = inputs(name, 2 * batch, seed)
    text, pooled = kwargs["encoder_hidden_states"], kwargs["pooled_projections"]
    given = {
        "prompt_embeds": text[:batch],
        "pooled_prompt_embeds": pooled[:batch],
        "negative_prompt_embeds": text[batch:],
        "negative_pooled_prompt_embeds": pooled[batch:],
    }
    return given | {"height": 16, "width": 16}


def sample(pipe: Any, name: str, batch: int = 2, guidance_scale: float = 1.0, steps: int = 3, seed: int = 0) -> Tensor:
    """Final latents of SD3 and Flux, decoded images of DiT (which has no latent output), (B, C, H, W)."""
    generator = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    scale = {"true_cfg_scale" if name == "flux" else "guidance_scale": guidance_scale}
    output = pipe(
        **prompts(name, batch, seed), **scale, num_inference_steps=steps, generator=generator,
        output_type="pt" if name == "dit" else "latent",
    )  # fmt: skip
    return output.images
