"""Random-weight instances of the real classes: for tests of the machinery, never for results."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowTransformer3DModel,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    CosmosTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    NucleusMoEImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SD3Transformer2DModel,
    SkyReelsV2Transformer3DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

CLASSES = ("sd3", "flux", "dit")  # those with a pipeline below
TEXT = 5  # text tokens
TEXT_WIDTH, POOLED_WIDTH = 16, 24
VACE_CHANNELS = 72  # of WanVACE's control video
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


def _lumina(heads: int, head_dim: int, depth: int) -> nn.Module:
    return LuminaNextDiT2DModel(
        sample_size=8, patch_size=PATCH, in_channels=CHANNELS, hidden_size=heads * head_dim, num_layers=depth,
        num_attention_heads=heads, num_kv_heads=1, multiple_of=16, cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip


def _glm_image(heads: int, head_dim: int, depth: int) -> nn.Module:
    return GlmImageTransformer2DModel(
        patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth, **_wide(heads, head_dim),
        text_embed_dim=TEXT_WIDTH, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=11,
    )  # fmt: skip


def _krea2(heads: int, head_dim: int, depth: int) -> nn.Module:
    return Krea2Transformer2DModel(
        in_channels=16, num_layers=depth, **_wide(heads, head_dim), num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=16, text_hidden_dim=TEXT_WIDTH, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=_rope(head_dim),
    )  # fmt: skip


def _prx(heads: int, head_dim: int, depth: int) -> nn.Module:
    return PRXTransformer2DModel(
        in_channels=CHANNELS, patch_size=PATCH, context_in_dim=TEXT_WIDTH, hidden_size=heads * head_dim,
        mlp_ratio=2.0, num_heads=heads, depth=depth, axes_dim=[head_dim // 2, head_dim // 2],
    )  # fmt: skip


def _bria_fibo(heads: int, head_dim: int, depth: int) -> nn.Module:
    """It can be handed the text of seven blocks, however many it has."""
    model = BriaFiboTransformer2DModel(
        in_channels=16, num_layers=depth - 1, num_single_layers=depth, **_wide(heads, head_dim),
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=list(_rope(head_dim)), text_encoder_dim=8,
    )  # fmt: skip
    model.caption_projection.extend(copy.deepcopy(model.caption_projection[0]) for _ in range(7 - (2 * depth - 1)))
    return model


def _nucleus_moe(heads: int, head_dim: int, depth: int) -> nn.Module:
    """The first block has no experts; the others' take all tokens."""
    model = NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=depth, **_wide(heads, head_dim), joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=_rope(head_dim), mlp_ratio=12.0, num_experts=2, moe_intermediate_dim=8,
        capacity_factors=[2.0] * depth, dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "experts" in name:  # left unset
            nn.init.normal_(parameter, std=0.2)
    for block in model.transformer_blocks:
        nn.init.normal_(block.img_mod[1].bias, std=2.0)  # its gates are cut off at 2
    return model


def _cosmos(heads: int, head_dim: int, depth: int) -> nn.Module:
    """One head: its RoPE needs wide ones."""
    return CosmosTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, **_wide(1, heads * head_dim), num_layers=depth, mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH, adaln_lora_dim=8, max_size=(4, 8, 8), extra_pos_embed_type=None,
    )  # fmt: skip


def _kandinsky5(heads: int, head_dim: int, depth: int) -> nn.Module:
    return Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS, in_text_dim=TEXT_WIDTH, in_text_dim2=POOLED_WIDTH, time_dim=16,
        out_visual_dim=CHANNELS, model_dim=heads * head_dim, ff_dim=32, num_text_blocks=1, num_visual_blocks=depth,
        axes_dims=_rope(head_dim),
    )  # fmt: skip


def _allegro(heads: int, head_dim: int, depth: int) -> nn.Module:
    """Heads of 12 channels for 8: they are cut into three for RoPE."""
    head_dim = 3 * head_dim // 2
    return AllegroTransformer3DModel(
        **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth,
        cross_attention_dim=heads * head_dim, sample_height=8, sample_width=8, sample_frames=2,
        caption_channels=TEXT_WIDTH,
    )  # fmt: skip


def _like_wan(cls: Any, heads: int, head_dim: int, depth: int, **other: Any) -> nn.Module:
    return cls(
        **_wide(heads, head_dim), in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=depth, rope_max_seq_len=16, **other,
    )  # fmt: skip


def _wan_vace(heads: int, head_dim: int, depth: int) -> nn.Module:
    places = [0, depth - 1]
    return _like_wan(
        WanVACETransformer3DModel, heads, head_dim, depth, vace_layers=places, vace_in_channels=VACE_CHANNELS
    )


def _skyreels_v2(heads: int, head_dim: int, depth: int) -> nn.Module:
    return _like_wan(SkyReelsV2Transformer3DModel, heads, head_dim, depth)


def _anyflow(heads: int, head_dim: int, depth: int) -> nn.Module:
    return _like_wan(AnyFlowTransformer3DModel, heads, head_dim, depth)


def _hunyuan_video(heads: int, head_dim: int, depth: int) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth - 1,
        num_single_layers=depth, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH, rope_axes_dim=_rope(head_dim),
    )  # fmt: skip


def _hunyuan_video_15(heads: int, head_dim: int, depth: int) -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_WIDTH, text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=8, rope_axes_dim=_rope(head_dim),
    )  # fmt: skip


def _easyanimate(heads: int, head_dim: int, depth: int) -> nn.Module:
    """One head: its RoPE needs wide ones. The last block has one set of weights for image and text."""
    return EasyAnimateTransformer3DModel(
        **_wide(1, heads * head_dim), in_channels=CHANNELS, out_channels=CHANNELS, patch_size=PATCH, sample_width=8,
        sample_height=8, num_layers=depth, mmdit_layers=depth - 1, time_embed_dim=16, text_embed_dim=TEXT_WIDTH,
    )  # fmt: skip


def _sana_video(heads: int, head_dim: int, depth: int) -> nn.Module:
    """With some positive channels in each query and key, whose linear attention would divide by zero otherwise."""
    model = SanaVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth,
        num_cross_attention_heads=heads, cross_attention_head_dim=head_dim, cross_attention_dim=heads * head_dim,
        caption_channels=TEXT_WIDTH, sample_size=8, rope_max_seq_len=16, attention_bias=True,
    )  # fmt: skip
    for block in model.transformer_blocks:
        nn.init.ones_(block.attn1.to_q.bias)
        nn.init.ones_(block.attn1.to_k.bias)
    return model


def _motif_video(heads: int, head_dim: int, depth: int) -> nn.Module:
    """The last block begins again with the embedded latents."""
    return MotifVideoTransformer3DModel(
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, **_wide(heads, head_dim), num_layers=depth - 1,
        num_single_layers=depth, num_decoder_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=_rope(head_dim),
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
    "lumina": _lumina,
    "glm_image": _glm_image,
    "krea2": _krea2,
    "prx": _prx,
    "bria_fibo": _bria_fibo,
    "nucleus_moe": _nucleus_moe,
    "cosmos": _cosmos,
    "kandinsky5": _kandinsky5,
    "allegro": _allegro,
    "wan_vace": _wan_vace,
    "skyreels_v2": _skyreels_v2,
    "anyflow": _anyflow,
    "hunyuan_video": _hunyuan_video,
    "hunyuan_video_15": _hunyuan_video_15,
    "easyanimate": _easyanimate,
    "sana_video": _sana_video,
    "motif_video": _motif_video,
}
ALL_CLASSES = tuple(_BUILD)
# tests that take long may leave out these: `small_pipelines` has a pipeline of each
WITH_PIPELINES = ALL_CLASSES[ALL_CLASSES.index("lumina") :]

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
    "lumina": {"layers": (None, "all")},
    "glm_image": {"transformer_blocks": (0, "all")},
    "krea2": {"transformer_blocks": (None, "last")},
    "prx": {"blocks": (None, "all")},
    "bria_fibo": {"transformer_blocks": (1, "all"), "single_transformer_blocks": (None, "last")},
    "nucleus_moe": {"transformer_blocks": (None, "all")},
    "cosmos": {"transformer_blocks": (None, "all")},
    "kandinsky5": {"visual_transformer_blocks": (None, "all")},
    "allegro": {"transformer_blocks": (None, "all")},
    "wan_vace": {"blocks": (None, "all")},
    "skyreels_v2": {"blocks": (None, "all")},
    "anyflow": {"blocks": (None, "all")},
    "hunyuan_video": {"transformer_blocks": (0, "all"), "single_transformer_blocks": (0, "all")},
    "hunyuan_video_15": {"transformer_blocks": (0, "all")},
    "easyanimate": {"transformer_blocks": (0, "all")},
    "sana_video": {"transformer_blocks": (None, "all")},
    "motif_video": {"transformer_blocks": (0, "all"), "single_transformer_blocks": (0, "all")},
}

PACKED = (
    "flux", "bria", "longcat_image", "ovis_image", "chroma", "flux2", "qwen_image", "ltx", "krea2", "bria_fibo",
    "nucleus_moe",
)  # fmt: skip
OF_VIDEOS = (
    "wan", "mochi", "cosmos", "allegro", "wan_vace", "skyreels_v2", "hunyuan_video", "easyanimate", "sana_video",
)  # fmt: skip


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
    if name in PACKED:
        latents = randn(batch, tokens**2, 16)
    elif name in ("cogvideox", "anyflow"):
        latents = randn(batch, 1, CHANNELS, side, side)
    elif name in OF_VIDEOS:
        latents = randn(batch, CHANNELS, 1, side, side)
    elif name == "kandinsky5":
        latents = randn(batch, 1, side, side, CHANNELS)
    elif name == "hunyuan_video_15":
        latents = randn(batch, 2 * CHANNELS + 1, 1, tokens, tokens)
    elif name == "motif_video":
        latents = randn(batch, 2 * CHANNELS + 1, 1, side, side)
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
        "lumina": {
            "timestep": share,
            "encoder_mask": mask,
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
            "cross_attention_kwargs": {},
        },
        "glm_image": {
            "prior_token_id": torch.randint(11, (batch, tokens**2), generator=g),
            "prior_token_drop": torch.zeros(batch, tokens**2, dtype=torch.bool),
            "target_size": torch.full((batch, 2), 64.0),
            "crop_coords": torch.zeros(batch, 2),
        },
        "prx": {"timestep": share, "attention_mask": mask},
        "bria_fibo": {"text_encoder_layers": list(randn(7, batch, TEXT, 8))} | ids,
        "nucleus_moe": {
            "timestep": share,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [(1, tokens, tokens)] * batch,
        },
        "cosmos": {"timestep": share, "padding_mask": torch.zeros(1, 1, side, side)},
        "kandinsky5": {
            "pooled_projections": pooled,
            "visual_rope_pos": [torch.arange(1), torch.arange(tokens), torch.arange(tokens)],
            "text_rope_pos": torch.arange(TEXT),
        },
        "wan_vace": {"control_hidden_states": randn(batch, VACE_CHANNELS, 1, side, side)},
        "anyflow": {"timestep": call["timestep"][:, None], "r_timestep": call["timestep"][:, None] / 2},
        "hunyuan_video": {
            "pooled_projections": pooled,
            "encoder_attention_mask": mask,
            "guidance": torch.full((batch,), 6000.0),
        },
        "easyanimate": {},
        "sana_video": {"encoder_attention_mask": mask},
        "motif_video": {"encoder_attention_mask": mask},
    }
    if name == "krea2":
        layers = randn(batch, TEXT, 3, TEXT_WIDTH)
        places = torch.tensor([[0, 0, 0]] * TEXT + positions)
        return call | {
            "timestep": share, "encoder_hidden_states": layers, "encoder_attention_mask": mask, "position_ids": places,
        }  # fmt: skip
    if name == "allegro":
        return call | {"encoder_attention_mask": mask, "image_rotary_emb": _allegro_rotary(tokens)}
    if name == "hunyuan_video_15":
        second = {"encoder_hidden_states_2": randn(batch, TEXT, TEXT_WIDTH), "encoder_attention_mask_2": mask}
        return call | second | {"encoder_attention_mask": mask, "image_embeds": torch.zeros(batch, 3, 8)}
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


def _allegro_rotary(tokens: int) -> Any:
    """As `AllegroPipeline` makes it for one frame."""
    places = (range(1), range(tokens), range(tokens))
    grid = torch.tensor([*product(*places)]).T[:, None]
    of_axes = (get_1d_rotary_pos_embed(4, torch.tensor([*place]), use_real=True) for place in places)
    return tuple(of_axes), tuple(grid)


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
