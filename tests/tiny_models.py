"""Random-weight instances of the real classes: for tests of the machinery, never for results."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    LongCatImageTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    MochiTransformer3DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

CLASSES = ("sd3", "flux", "dit")  # those with a pipeline below
TEXT = 5  # text tokens
TEXT_WIDTH, POOLED_WIDTH = 16, 24
CHANNELS, PATCH = 4, 2  # of the latents, where the class does not want tokens


def _wide(heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "attention_head_dim": head_dim}


def _rope(head_dim: int) -> tuple[int, int, int]:
    return head_dim // 2, head_dim // 4, head_dim // 4


def _sd3(heads: int, head_dim: int, depth: int) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth,
        **_wide(heads, head_dim), joint_attention_dim=TEXT_WIDTH, caption_projection_dim=heads * head_dim,
        pooled_projection_dim=POOLED_WIDTH, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _flux(heads: int, head_dim: int, depth: int) -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=False,
        axes_dims_rope=_rope(head_dim),
    )  # fmt: skip


def _bria(heads: int, head_dim: int, depth: int) -> nn.Module:
    return BriaTransformer2DModel(
        in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=list(_rope(head_dim)),
    )  # fmt: skip


def _longcat_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return LongCatImageTransformer2DModel(
        in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=list(_rope(head_dim)),
    )  # fmt: skip


def _ovis_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=_rope(head_dim),
    )  # fmt: skip


def _dit(heads: int, head_dim: int, depth: int) -> nn.Module:
    return DiTTransformer2DModel(
        **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=depth, sample_size=8,
        patch_size=PATCH, num_embeds_ada_norm=1000,
    )  # fmt: skip


def _pixart(heads: int, head_dim: int, depth: int) -> nn.Module:
    return PixArtTransformer2DModel(
        **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=depth, sample_size=8,
        patch_size=PATCH, cross_attention_dim=heads * head_dim, caption_channels=TEXT_WIDTH,
    )  # fmt: skip


def _sana(heads: int, head_dim: int, depth: int) -> nn.Module:
    return SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth,
        num_cross_attention_heads=heads, cross_attention_head_dim=head_dim, cross_attention_dim=heads * head_dim,
        caption_channels=TEXT_WIDTH, sample_size=8, patch_size=PATCH,
    )  # fmt: skip


def _auraflow(heads: int, head_dim: int, depth: int) -> nn.Module:
    return AuraFlowTransformer2DModel(
        sample_size=8, patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_mmdit_layers=depth - 1,
        num_single_dit_layers=depth, **_wide(heads, head_dim), joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=heads * head_dim, pos_embed_max_size=16,
    )  # fmt: skip


def _lumina2(heads: int, head_dim: int, depth: int) -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=8, patch_size=PATCH, in_channels=CHANNELS, hidden_size=heads * head_dim, num_layers=depth,
        num_refiner_layers=1, num_attention_heads=heads, num_kv_heads=1, multiple_of=16, cap_feat_dim=TEXT_WIDTH,
        axes_dim_rope=_rope(head_dim), axes_lens=(32, 16, 16),
    )  # fmt: skip


def _z_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=heads * head_dim, n_layers=depth, n_refiner_layers=1, n_heads=heads,
        n_kv_heads=heads, cap_feat_dim=TEXT_WIDTH, axes_dims=list(_rope(head_dim)), axes_lens=[128, 16, 16],
    )  # fmt: skip


def _qwen_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=depth, **_wide(heads, head_dim), joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=_rope(head_dim),
    )  # fmt: skip


def _hunyuan_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return HunyuanImageTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth - 1,
        num_single_layers=depth, num_refiner_layers=1, patch_size=(PATCH, PATCH), text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(head_dim // 2, head_dim // 2),
    )  # fmt: skip


def _hidream(heads: int, head_dim: int, depth: int) -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=PATCH, in_channels=CHANNELS, num_layers=depth - 1, num_single_layers=depth,
        **_wide(heads, head_dim), caption_channels=[TEXT_WIDTH, TEXT_WIDTH], text_emb_dim=POOLED_WIDTH,
        axes_dims_rope=_rope(head_dim), max_resolution=(16, 16), llama_layers=[0, 1, 2, 3, 4, 5, 6][: 2 * depth - 1],
    )  # fmt: skip


def _chroma(heads: int, head_dim: int, depth: int) -> nn.Module:
    return ChromaTransformer2DModel(
        in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=_rope(head_dim), approximator_num_channels=16,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def _cogview3_plus(heads: int, head_dim: int, depth: int) -> nn.Module:
    return CogView3PlusTransformer2DModel(
        patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth, **_wide(heads, head_dim),
        text_embed_dim=TEXT_WIDTH, time_embed_dim=16, condition_dim=8, pos_embed_max_size=8,
    )  # fmt: skip


def _cogview4(heads: int, head_dim: int, depth: int) -> nn.Module:
    return CogView4Transformer2DModel(
        patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth, **_wide(heads, head_dim),
        text_embed_dim=TEXT_WIDTH, time_embed_dim=16, condition_dim=8, rope_axes_dim=(8, 8),
    )  # fmt: skip


def _cogvideox(heads: int, head_dim: int, depth: int) -> nn.Module:
    return CogVideoXTransformer3DModel(
        **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=CHANNELS, time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH, num_layers=depth, patch_size=PATCH, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _wan(heads: int, head_dim: int, depth: int) -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=depth, rope_max_seq_len=16,
    )  # fmt: skip


def _ltx(heads: int, head_dim: int, depth: int) -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, **_wide(heads, head_dim), cross_attention_dim=heads * head_dim,
        num_layers=depth, caption_channels=TEXT_WIDTH,
    )  # fmt: skip


def _flux2(heads: int, head_dim: int, depth: int) -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, timestep_guidance_channels=16, axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    )  # fmt: skip


def _mochi(heads: int, head_dim: int, depth: int) -> nn.Module:
    return MochiTransformer3DModel(
        patch_size=PATCH, **_wide(heads, head_dim), num_layers=depth, pooled_projection_dim=POOLED_WIDTH,
        in_channels=CHANNELS, text_embed_dim=TEXT_WIDTH, time_embed_dim=16, max_sequence_length=TEXT,
    )  # fmt: skip


_BUILD: dict[str, Callable[[int, int, int], nn.Module]] = {
    "sd3": _sd3,
    "flux": _flux,
    "dit": _dit,
    "bria": _bria,
    "longcat_image": _longcat_image,
    "ovis_image": _ovis_image,
    "pixart": _pixart,
    "sana": _sana,
    "auraflow": _auraflow,
    "lumina2": _lumina2,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "hunyuan_image": _hunyuan_image,
    "hidream": _hidream,
    "chroma": _chroma,
    "cogview3_plus": _cogview3_plus,
    "cogview4": _cogview4,
    "cogvideox": _cogvideox,
    "wan": _wan,
    "ltx": _ltx,
    "flux2": _flux2,
    "mochi": _mochi,
}
ALL_CLASSES = tuple(_BUILD)

# Where diffusers has the image tokens, for tests that must not ask dgkit: by list of blocks, the index in a block's
# output tuple (None: the output is the tensor) and which of that tensor's tokens they are
STREAMS: dict[str, dict[str, tuple[int | None, str]]] = {
    "sd3": {"transformer_blocks": (1, "all")},
    "flux": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (1, "all")},
    "dit": {"transformer_blocks": (None, "all")},
    "bria": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (1, "all")},
    "longcat_image": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (1, "all")},
    "ovis_image": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (1, "all")},
    "pixart": {"transformer_blocks": (None, "all")},
    "sana": {"transformer_blocks": (None, "all")},
    "auraflow": {"joint_transformer_blocks": (1, "all"), "single_transformer_blocks": (None, "last")},
    "lumina2": {"noise_refiner": (None, "all"), "layers": (None, "last")},
    "z_image": {"noise_refiner": (None, "first"), "layers": (None, "first")},
    "qwen_image": {"transformer_blocks": (1, "all")},
    "hunyuan_image": {"transformer_blocks": (0, "all"), "single_transformer_blocks": (0, "all")},
    "hidream": {"double_stream_blocks": (0, "all"), "single_stream_blocks": (None, "first")},
    "chroma": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (None, "last")},
    "cogview3_plus": {"transformer_blocks": (0, "all")},
    "cogview4": {"transformer_blocks": (0, "all")},
    "cogvideox": {"transformer_blocks": (0, "all")},
    "wan": {"blocks": (None, "all")},
    "ltx": {"transformer_blocks": (None, "all")},
    "flux2": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (None, "last")},
    "mochi": {"transformer_blocks": (0, "all")},
}


def streams(name: str, model: nn.Module) -> list[tuple[nn.Module, int | None, str]]:
    """All blocks in the order in which they run, each with its entry in `STREAMS`."""
    return [(block, *where) for path, where in STREAMS[name].items() for block in getattr(model, path)]


def image_slice(where: str, tokens: int) -> slice:
    """The `tokens` x `tokens` image tokens among those of a tensor."""
    return {"all": slice(None), "first": slice(None, tokens**2), "last": slice(-(tokens**2), None)}[where]


def build(name: str, *, heads: int = 2, head_dim: int = 8, depth: int = 3, seed: int = 0) -> nn.Module:
    """A small transformer of the real class, `head_dim` a multiple of 8.

    SD3 has dual attention in its first block; of two stacks the first has depth - 1 blocks and the second depth, or,
    where the first refines the noise alone, one and depth.
    """
    torch.manual_seed(seed)
    model = _BUILD[name](heads, head_dim, depth)
    if name not in CLASSES:
        with torch.no_grad():
            for parameter in model.parameters():  # what is made as zeros or left unset would hide mistakes
                if not parameter.isfinite().all() or (parameter == 0).all():
                    parameter.normal_(std=0.2)
    return model.eval()


def inputs(name: str, batch: int, seed: int = 0, *, tokens: int = 4) -> dict[str, Any]:
    """Arguments of one transformer call, as the pipeline of the class makes them, for `tokens` x `tokens` image tokens.

    Videos have one frame.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    side = PATCH * tokens
    if name == "dit":
        classes = torch.randint(10, (batch,), generator=g)
        return {
            "hidden_states": randn(batch, CHANNELS, side, side),
            "timestep": torch.full((batch,), 500),
            "class_labels": classes,
        }
    text, pooled = randn(batch, TEXT, TEXT_WIDTH), randn(batch, POOLED_WIDTH)
    if name in ("flux", "bria", "longcat_image", "ovis_image", "chroma", "flux2", "qwen_image", "ltx"):
        latents = randn(batch, tokens**2, 16)
    elif name == "cogvideox":
        latents = randn(batch, 1, CHANNELS, side, side)
    elif name in ("wan", "mochi"):
        latents = randn(batch, CHANNELS, 1, side, side)
    else:
        latents = randn(batch, CHANNELS, side, side)
    call = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.full((batch,), 500.0)}
    # the first row has a shorter prompt, where padding is masked
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[0, -1] = False
    positions = [[0, row, column] for row in range(tokens) for column in range(tokens)]
    share = torch.full((batch,), 0.5)
    ids = {"img_ids": torch.tensor(positions, dtype=torch.float32), "txt_ids": torch.zeros(TEXT, 3)}
    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.full((batch, 2), 64.0))
    extra: dict[str, dict[str, Any]] = {
        "sd3": {"pooled_projections": pooled},
        "flux": {"pooled_projections": pooled, "timestep": share} | ids,
        "bria": ids,
        "longcat_image": {"timestep": share} | ids,
        "ovis_image": {"timestep": share} | ids,
        "pixart": {"encoder_attention_mask": mask},
        "sana": {"encoder_attention_mask": mask},
        "auraflow": {"timestep": share},
        "lumina2": {"timestep": share, "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool)},
        "qwen_image": {
            "timestep": share,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, tokens, tokens)]] * batch,
        },
        "hunyuan_image": {"encoder_attention_mask": mask},
        "chroma": {
            "timestep": share,
            "attention_mask": torch.cat([mask, torch.ones(batch, tokens**2, dtype=torch.bool)], 1),
        }
        | ids,
        "cogview3_plus": sizes,
        "cogview4": sizes,
        "ltx": {"encoder_attention_mask": mask, "num_frames": 1, "height": tokens, "width": tokens},
        "flux2": {
            "timestep": share,
            "img_ids": torch.tensor([[*p, 0] for p in positions], dtype=torch.float32),
            "txt_ids": torch.tensor([[0, 0, 0, i] for i in range(TEXT)], dtype=torch.float32),
        },
        "mochi": {"encoder_attention_mask": mask},
    }
    if name == "z_image":
        captions = [caption[: TEXT - row % 2] for row, caption in enumerate(text)]
        return {"x": [x[:, None] for x in latents], "t": share, "cap_feats": captions}
    if name == "hidream":
        return {
            "hidden_states": latents,
            "timesteps": call["timestep"],
            "encoder_hidden_states_t5": text,
            "encoder_hidden_states_llama3": randn(7, batch, TEXT, TEXT_WIDTH),
            "pooled_embeds": pooled,
        }
    return call | extra.get(name, {})


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
