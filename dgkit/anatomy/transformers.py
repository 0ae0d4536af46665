"""The rows of dgkit's transformer classes, their stacks of blocks: to add a class, add a row to `TRANSFORMERS`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from dgkit.anatomy import grids
from dgkit.anatomy.gates import Gate, argument, at, chunk, table
from dgkit.anatomy.grids import ReadGrid
from dgkit.errors import ModelError


@dataclass(frozen=True)
class Stack:
    """A `ModuleList` of blocks with the same output.

    Attributes:
        path: the attribute of the transformer.
        image: index of the tensor with the image tokens in the output tuple; None when the output is that tensor.
        gates: the residual gates of the image tokens.
        text: None when that tensor (B, T, C) holds the image tokens alone; "before" or "after" when other tokens (text,
            padding) stand before or after them.
        text_first: whether those other tokens, or the text of a tensor of its own, precede the image in the sequence
            that the blocks hand to `scaled_dot_product_attention`; None where the image is alone there.
        fork: whether the batch may grow at these blocks (see `Anatomy.grow`); False where the transformer, after them,
            mixes their outputs with tensors of the batch that it was called with.
        skips: whether blocks' outputs are used again by later blocks (as in a U-Net).
        norms: the LayerNorms of each block that read the image tokens, which stand last where they read text as well;
            for `disrupt(..., keep_norm=True)`, unknown where it is empty.
    """

    path: str
    image: int | None
    gates: tuple[Gate, ...]
    text: str | None = None
    text_first: bool | None = None
    fork: bool = True
    skips: bool = False
    norms: tuple[str, ...] = ()


UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis")


@dataclass(frozen=True)
class Transformer:
    """The row of one transformer class.

    Attributes:
        stacks: its stacks of blocks, in the order in which they run.
        tokens: number of image tokens, from the model and the arguments of a call; for stacks with `text`.
        grid: the grid of the generated image tokens, likewise; None where it is not known.
        text_lengths: number of text tokens of each batch row, where the joint sequence is as long as the longest needs.
        channels: width C of the image stream.
        predicted_channels: see `Anatomy`.
        latents, timestep: what the class calls these arguments.
        ascending: whether that timestep grows from noise to image.
        unbatched: arguments of the transformer and of its blocks whose first axis is not the batch.
        listed: arguments that are lists with one entry per batch row.
        second_axis: arguments whose second axis is the batch.
        last_norm: the LayerNorm after the last block.
        direct: whether calls are watched at `forward` itself, which code outside diffusers calls past the hooks. Not
            for models that are offloaded.
    """

    stacks: tuple[Stack, ...]
    tokens: Callable[[Any, dict[str, Any]], int] | None = None
    grid: ReadGrid | None = None
    text_lengths: Callable[[dict[str, Any]], list[int]] | None = None
    channels: Callable[[Any], int] = lambda model: model.config.num_attention_heads * model.config.attention_head_dim
    predicted_channels: Callable[[Any], int | None] = lambda model: None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    ascending: bool = False
    unbatched: tuple[str, ...] = UNBATCHED
    listed: tuple[str, ...] = ()
    second_axis: tuple[str, ...] = ()
    last_norm: str = ""
    direct: bool = False


def _noise_channels(model: Any) -> int | None:
    """DiT and PixArt (Sana, if asked to) predict noise in the first `in_channels` channels and sigma in the rest."""
    return model.config.in_channels if model.config.out_channels == 2 * model.config.in_channels else None


def _noise_if_sigma_is_learned(model: Any) -> int | None:
    """Lumina and HunyuanDiT say by `learn_sigma` whether sigma is in the channels after the first `in_channels`."""
    return model.config.in_channels if model.config.learn_sigma else None


def _sequence(model: Any, arguments: dict[str, Any]) -> int:
    """Image tokens of latents (B, T, C)."""
    return arguments["hidden_states"].shape[1]


def _patches(model: Any, arguments: dict[str, Any]) -> int:
    """Image tokens of latents (B, C, H, W) that are cut into square patches."""
    return prod(side // model.config.patch_size for side in arguments["hidden_states"].shape[-2:])


def _glm_image_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """Latents (B, C, H, W); calls that write the keys and values of reference images must not be made twice."""
    caches = getattr(arguments.get("kv_caches"), "caches", [])
    if any(cache.mode == "write" for cache in caches):
        raise ModelError("the reference images of GlmImageTransformer2DModel are not supported: leave out image")
    return _patches(model, arguments)


def _hidream_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """Latents (B, C, H, W), or tokens (B, T, C) padded to the longest, then with each row's grid in `img_sizes`."""
    if arguments.get("hidden_states_masks") is None:
        return _patches(model, arguments)
    return _equal([int(height) * int(width) for height, width in arguments["img_sizes"]])


def _z_image_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """A list of latents (C, F, H, W)."""
    if isinstance(arguments["x"][0], list):
        raise ModelError("the omni mode of ZImageTransformer2DModel (a list of images per row) is not supported")
    spatial, temporal = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return _equal([f // temporal * (h // spatial) * (w // spatial) for _, f, h, w in (x.shape for x in arguments["x"])])


def _equal(counts: list[int]) -> int:
    if len(set(counts)) > 1:
        raise ModelError(f"the images of one batch have {counts} tokens: use images of equal size")
    return counts[0]


def _lumina2_text_lengths(arguments: dict[str, Any]) -> list[int]:
    return arguments["encoder_attention_mask"].sum(1).tolist()


def _z_image_text_lengths(arguments: dict[str, Any]) -> list[int]:
    return [-(-len(text) // 32) * 32 for text in arguments["cap_feats"]]  # padded to a multiple of SEQ_MULTI_OF


NORM1 = (at("msa", "norm1", 1), at("mlp", "norm1", 4))
MSA2 = at("msa2", "norm1", 6)
NORM2 = (at("msa", "norm1", 2), at("mlp", "norm2", 2))
NORM = (at("msa+mlp", "norm", 1),)
TABLE = (table("msa", 2, "temb"), table("mlp", 5, "temb"))
TABLE_OF_TIMESTEP = (table("msa", 2, "timestep"), table("mlp", 5, "timestep"))
LAYER_NORMS = ("norm1.norm", "norm2")
TANH_NORM1 = (at("msa", "norm1", 1, tanh=True), at("mlp", "norm1", 3, tanh=True))

FLUX = Transformer(
    (
        Stack("transformer_blocks", 1, NORM1, text_first=True, norms=LAYER_NORMS),
        Stack("single_transformer_blocks", 1, NORM, text_first=True, norms=("norm.norm",)),
    ),
    last_norm="norm_out.norm",
    grid=grids.image_ids,
)

HUNYUAN = Transformer(
    (
        Stack("transformer_blocks", 0, NORM1, text_first=False),
        Stack("single_transformer_blocks", 0, NORM, text_first=False),
    ),
    grid=grids.patches,
)

# Blocks of text alone (the context refiners of Lumina 2, Z-Image and HunyuanImage) are no part of the image stream.
TRANSFORMERS: dict[str, Transformer] = {
    "SD3Transformer2DModel": Transformer(
        (Stack("transformer_blocks", 1, (NORM1[0], MSA2, NORM1[1]), text_first=False, norms=LAYER_NORMS),),
        last_norm="norm_out.norm",
        grid=grids.patches,
    ),
    "FluxTransformer2DModel": FLUX,
    "BriaTransformer2DModel": FLUX,
    "LongCatImageTransformer2DModel": FLUX,
    "OvisImageTransformer2DModel": FLUX,
    "DiTTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, NORM1, norms=("norm1.norm", "norm3")),),
        predicted_channels=_noise_channels,
        last_norm="norm_out",
        grid=grids.patches,
    ),
    "PixArtTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, TABLE_OF_TIMESTEP),),
        predicted_channels=_noise_channels,
        grid=grids.patches,
    ),
    "SanaTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, TABLE_OF_TIMESTEP),),
        predicted_channels=_noise_channels,
        grid=grids.patches,
    ),
    # z + gate_mlp ff(norm2(z + gate_msa attention)): what gate_msa scales is the input of ff only, so that it is no
    # residual gate
    "AuraFlowTransformer2DModel": Transformer(
        (
            Stack("joint_transformer_blocks", 1, NORM1[1:], text_first=True),
            Stack("single_transformer_blocks", None, NORM1[1:], text="before", text_first=True),
        ),
        tokens=_patches,
        grid=grids.patches,
    ),
    "Lumina2Transformer2DModel": Transformer(
        (
            Stack("noise_refiner", None, TANH_NORM1, fork=False),
            Stack("layers", None, TANH_NORM1, text="before", text_first=True),
        ),
        tokens=_patches,
        text_lengths=_lumina2_text_lengths,
        channels=lambda model: model.config.hidden_size,
        ascending=True,
        unbatched=(),
        grid=grids.patches,
    ),
    "ZImageTransformer2DModel": Transformer(
        tuple(
            Stack(
                path,
                None,
                tuple(
                    chunk(branch, "adaLN_modulation", index, 4, tanh=True) for branch, index in (("msa", 1), ("mlp", 3))
                ),
                text="after",  # padding in the refiner, padding and text in the layers
                text_first=False,
                fork=path == "layers",
            )
            for path in ("noise_refiner", "layers")
        ),
        tokens=_z_image_tokens,
        text_lengths=_z_image_text_lengths,
        channels=lambda model: model.config.dim,
        latents="x",
        timestep="t",
        ascending=True,
        unbatched=(),
        listed=("x", "cap_feats", "siglip_feats", "image_noise_mask"),
        grid=grids.z_image,
    ),
    # with `zero_cond_t` (editing) `img_mod` gives 2B rows, the first B of them for the tokens that are generated
    "QwenImageTransformer2DModel": Transformer(
        (
            Stack(
                "transformer_blocks", 1, (chunk("msa", "img_mod", 2, 6), chunk("mlp", "img_mod", 5, 6)), text_first=True
            ),
        ),
        listed=("img_shapes",),
        grid=grids.image_shapes,
    ),
    "HunyuanImageTransformer2DModel": HUNYUAN,
    "HiDreamImageTransformer2DModel": Transformer(
        tuple(
            Stack(
                path,
                image,
                (
                    chunk("msa", "block.adaLN_modulation", 2, parts),
                    chunk("mlp", "block.adaLN_modulation", 5, parts),
                ),
                text="after",  # padding where the image is not square, and in single blocks text
                text_first=False,
                fork=False,  # each block is handed its own text
            )
            for path, image, parts in (("double_stream_blocks", 0, 12), ("single_stream_blocks", None, 6))
        ),
        tokens=_hidream_tokens,
        timestep="timesteps",
        unbatched=(),
        listed=("img_sizes",),
        second_axis=("encoder_hidden_states_llama3",),
        grid=grids.hidream,
    ),
    "ChromaTransformer2DModel": Transformer(
        (
            Stack("transformer_blocks", 1, NORM1, text_first=True),
            Stack("single_transformer_blocks", None, NORM, text="before", text_first=True),
        ),
        tokens=_sequence,
        grid=grids.image_ids,
    ),
    # no residual gates: adaLN shifts only
    "HunyuanDiT2DModel": Transformer(
        (Stack("blocks", None, (), fork=False, skips=True),),
        predicted_channels=_noise_if_sigma_is_learned,
        unbatched=("image_rotary_emb",),
        grid=grids.patches,
    ),
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    # with `num_decoder_layers` the last blocks begin again with the embedded latents, and read the image tokens of the
    # blocks before them as if they were text
    "MotifVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideo15Transformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM1, text_first=False),),
        grid=grids.patches,
    ),
    "CogView3PlusTransformer2DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM1, text_first=True),),
        grid=grids.patches,
    ),
    "CogView4Transformer2DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM1, text_first=True),),
        grid=grids.patches,
    ),
    "CogVideoXTransformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM2, text_first=True),),
        grid=grids.patches_of_frames,
    ),
    "EasyAnimateTransformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM2, text_first=True),), grid=grids.patches
    ),
    "WanTransformer3DModel": Transformer((Stack("blocks", None, TABLE),), grid=grids.patches),
    # what its own `vace_blocks` make of the control video is added between blocks
    "WanVACETransformer3DModel": Transformer(
        (Stack("blocks", None, TABLE, fork=False),),
        unbatched=(*UNBATCHED, "control_hidden_states_scale"),
        grid=grids.patches,
    ),
    "SkyReelsV2Transformer3DModel": Transformer(
        (Stack("blocks", None, tuple(table(b, i, "temb", rows_first=True) for b, i in (("msa", 2), ("mlp", 5)))),),
        grid=grids.patches,
    ),
    "AnyFlowTransformer3DModel": Transformer((Stack("blocks", None, TABLE),), grid=grids.patches_of_frames),
    "AllegroTransformer3DModel": Transformer((Stack("transformer_blocks", None, TABLE),), grid=grids.patches),
    "SanaVideoTransformer3DModel": Transformer(
        (Stack("transformer_blocks", None, TABLE_OF_TIMESTEP),),
        predicted_channels=_noise_channels,
        grid=grids.patches,
    ),
    "LTXVideoTransformer3DModel": Transformer(
        (Stack("transformer_blocks", None, TABLE),),
        unbatched=("rope_interpolation_scale",),
        grid=grids.stated,
    ),
    # one modulation for all blocks of a stack, so that alpha cannot vary with depth: a natural control
    "Flux2Transformer2DModel": Transformer(
        (
            Stack(
                "transformer_blocks",
                1,
                (argument("msa", "temb_mod_img", 2, 6), argument("mlp", "temb_mod_img", 5, 6)),
                text_first=True,
            ),
            Stack(
                "single_transformer_blocks",
                None,
                (argument("msa+mlp", "temb_mod", 2, 3),),
                text="before",
                text_first=True,
            ),
        ),
        tokens=_sequence,
        grid=grids.image_ids,
    ),
    "MochiTransformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, TANH_NORM1, text_first=False),),
        ascending=True,
        grid=grids.patches,
    ),
    "LuminaNextDiT2DModel": Transformer(
        (Stack("layers", None, TANH_NORM1),),
        channels=lambda model: model.config.hidden_size,
        predicted_channels=_noise_if_sigma_is_learned,
        ascending=True,
        grid=grids.patches,
    ),
    "GlmImageTransformer2DModel": Transformer(
        (Stack("transformer_blocks", 0, NORM1, text_first=True),), tokens=_glm_image_tokens, grid=grids.patches
    ),
    "Krea2Transformer2DModel": Transformer(
        (Stack("transformer_blocks", None, TABLE, text="before", text_first=True),),
        tokens=_sequence,
        unbatched=(*UNBATCHED, "position_ids"),
    ),
    "PRXTransformer2DModel": Transformer(
        (Stack("blocks", None, (chunk("msa", "modulation.lin", 2, 6), chunk("mlp", "modulation.lin", 5, 6))),),
        channels=lambda model: model.config.hidden_size,
        unbatched=(),
        grid=grids.patches,
    ),
    # each block is handed its own half of the text
    "BriaFiboTransformer2DModel": Transformer(
        (
            Stack("transformer_blocks", 1, NORM1, text_first=True, fork=False),
            Stack("single_transformer_blocks", None, NORM, text="before", text_first=True, fork=False),
        ),
        tokens=_sequence,
        grid=grids.image_ids,
    ),
    "NucleusMoEImageTransformer2DModel": Transformer(
        (
            Stack(
                "transformer_blocks",
                None,
                tuple(chunk(b, "img_mod", i, 4, tanh=True, limit=2.0) for b, i in (("msa", 1), ("mlp", 3))),
            ),
        ),
        listed=("img_shapes",),
        grid=grids.image_shapes,
    ),
    "CosmosTransformer3DModel": Transformer(
        (Stack("transformer_blocks", None, (at("msa", "norm1", 1), at("cross", "norm2", 1), at("mlp", "norm3", 1))),),
        unbatched=(*UNBATCHED, "padding_mask"),
        grid=grids.patches,
    ),
    "Kandinsky5Transformer3DModel": Transformer(
        (
            Stack(
                "visual_transformer_blocks",
                None,
                tuple(chunk(b, "visual_modulation", i, 9) for b, i in (("msa", 2), ("cross", 5), ("mlp", 8))),
            ),
        ),
        channels=lambda model: model.config.model_dim,
        unbatched=("visual_rope_pos", "text_rope_pos", "sparse_params"),
    ),
}


def research_row(model: nn.Module) -> Transformer | None:
    """The row of a model that is built as facebookresearch's DiT, as SiT, REPA and LightningDiT are; else None.

    That is: `blocks` that put out the image tokens (B, T, C), each with an `adaLN_modulation` whose last layer puts out
    six parts of C channels, of which the third and the sixth are residual gates; latents and timestep as the first two
    arguments.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    modulations = [getattr(block, "adaLN_modulation", None) for block in blocks]
    lasts = [modulation[-1] for modulation in modulations if isinstance(modulation, nn.Sequential) and len(modulation)]
    known = [last for last in lasts if isinstance(last, nn.Linear) and last.out_features % 6 == 0]
    if len(known) < len(blocks):
        return None
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    if len(names) < 2:
        return None
    return Transformer(
        (Stack("blocks", None, (chunk("msa", "adaLN_modulation", 2, 6), chunk("mlp", "adaLN_modulation", 5, 6))),),
        channels=lambda model: known[0].out_features // 6,
        predicted_channels=lambda model: getattr(model, "in_channels", None),
        latents=names[0],
        timestep=names[1],
        direct=True,
    )
