"""Small random-weight pipelines of every family with a diffusion transformer, and by hand where what is in their calls.

`FAMILIES` says for each which rows of a call are conditional and which tokens of which block output are the generated
image, as diffusers has it, so that tests need not ask dgkit. All run from embeddings of prompts and put out latents.
"""

import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from PIL import Image
from torch import Tensor, nn

from tests import tiny_models
from tests.tiny_models import CHANNELS, POOLED_WIDTH, TEXT, TEXT_WIDTH, autoencoder

STEPS, S = 3, 4.0
SIDE = 64  # of images: 8 x 8 latents, or 4 x 4 tokens, where there is no autoencoder or one of `_vae`
TOKENS = 16  # of one frame
WIDTH, HEADS, DEPTH = 16, 2, 3  # of the transformers
HEAD = WIDTH // HEADS
ROPE = (4, 2, 2)  # of one head, for time (or text), height and width

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """The blocks of a `ModuleList`.

    Attributes:
        path: the transformer's attribute.
        index: of the tensor with the image in a block's output tuple; None where the output is that tensor.
        tokens: which of its tokens are the generated image's.
        axis: of the tokens; the batch is the other one of the first two.
    """

    path: str
    index: int | None = None
    tokens: slice = field(default_factory=lambda: slice(None))
    axis: int = 1


FIRST, LAST = slice(None, TOKENS), slice(-TOKENS, None)


@dataclass(frozen=True)
class Family:
    """A pipeline class, a small instance of it, and what its calls of the transformer are.

    Attributes:
        name: of the class, with a word more where it has two entries.
        build: makes the instance.
        arguments: of its `__call__`, from whether CFG is on and the batch size.
        order: of conditional and unconditional rows where CFG is on: "uncond, cond" or "cond, uncond" in a doubled
            batch, "two calls", conditional first, or "no CFG".
        stacks: the transformer's blocks, in the order in which they run unless `interleaved`.
        block: the one that tests edit, counted over all stacks.
        interleaved: whether the stacks' blocks take turns.
        predicted: the channels (axis 1) of the transformer's output that are no sigma; None for all.
        batch: images of one run.
        transformers: the attributes of the pipeline.
        switch: switches CFG where that is no argument of the call.
        around: what is changed of diffusers' modules while it runs.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[bool, int], Arguments]
    order: str
    stacks: tuple[Stack, ...]
    block: int = 1
    interleaved: bool = False
    predicted: int | None = None
    batch: int = 2
    transformers: tuple[str, ...] = ("transformer",)
    switch: Callable[[Any, bool], None] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def stacks_hold_more(self) -> bool:
        """Whether the tensor that the edited block puts out holds other tokens than the generated image's."""
        return any(stack.tokens != slice(None) for stack in self.stacks)

    def models(self, pipe: Any) -> list[nn.Module]:
        """The transformers of an instance."""
        return [getattr(pipe, name) for name in self.transformers]

    def blocks(self, model: nn.Module) -> list[tuple[nn.Module, Stack]]:
        """The blocks of one of them in the order in which they run."""
        stacks = [[(block, stack) for block in getattr(model, stack.path)] for stack in self.stacks]
        if self.interleaved:
            return [pair for pairs in zip(*stacks, strict=True) for pair in pairs]
        return [pair for pairs in stacks for pair in pairs]

    def run(self, pipe: Any, with_cfg: bool, steps: int = STEPS) -> Tensor:
        """The final latents of one run, always the same."""
        if self.switch is not None:
            self.switch(pipe, with_cfg)
        with self.around(), torch.random.fork_rng():
            torch.manual_seed(0)  # some encode images with noise that no argument controls
            arguments = self.arguments(with_cfg, self.batch) | {"num_inference_steps": steps}
            return pipe(**arguments, return_dict=False)[0]


# --------------------------------------------------------------------------------------------------------- their parts


def filled(model: nn.Module) -> nn.Module:
    """Its parameters that are made as zeros or left unset would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or (parameter == 0).all():
                parameter.normal_(std=0.2)
    return model.eval()


def _model(cls: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return filled(getattr(diffusers, cls)(**config))


def _changed(name: str, **config: Any) -> nn.Module:
    """`tiny_models.build(name)` with some of its configuration changed."""
    model: Any = tiny_models.build(name)
    torch.manual_seed(0)
    return filled(type(model).from_config({**model.config, "_use_default_values": [], **config}))


def _pipe(cls: str, transformer: nn.Module, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline of that class with these parts, and none of the others."""
    pipeline_class = getattr(diffusers, cls)
    scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
    required, optional = pipeline_class._get_signature_keys(pipeline_class)
    given = dict.fromkeys(required) | {"transformer": transformer, "scheduler": scheduler} | parts
    pipe = pipeline_class(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _rand(key: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def _both(with_cfg: bool, **given: Any) -> Arguments:
    """These arguments and, with CFG, their namesakes for the negative prompt."""
    negative = {f"negative_{name}": _negative(value) for name, value in given.items()}
    return given | (negative if with_cfg else {})


def _negative(value: Any) -> Any:
    if isinstance(value, list):
        return [_negative(part) for part in value]
    return value.roll(1, -1).flip(-1) if value.is_floating_point() else value.clone()


def _text(batch: int, width: int = TEXT_WIDTH) -> Tensor:
    return _rand("text", batch, TEXT, width)


def _pooled(batch: int) -> Tensor:
    return _rand("pooled", batch, POOLED_WIDTH)


def _mask(batch: int, dtype: torch.dtype = torch.long) -> Tensor:
    """The first prompt is shorter."""
    mask = torch.ones(batch, TEXT, dtype=dtype)
    mask[0, -1] = 0
    return mask


def _prompt(with_cfg: bool, batch: int, *, pooled: bool = False, mask: str = "") -> Arguments:
    given = {"prompt_embeds": _text(batch)}
    if pooled:
        given["pooled_prompt_embeds"] = _pooled(batch)
    if mask:
        given[mask] = _mask(batch)
    return _both(with_cfg, **given)


def _call(batch: int, *latents: int, **other: Any) -> Arguments:
    """Arguments that all pipelines have, with latents of that shape."""
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
    return size | {"latents": _rand("latents", batch, *latents)} | other


def _scale(with_cfg: bool, name: str = "guidance_scale") -> Arguments:
    return {name: S if with_cfg else 1.0}


def _true_cfg(with_cfg: bool) -> Arguments:
    return _scale(with_cfg, "true_cfg_scale")


def _beyond(with_cfg: bool) -> Arguments:
    """Where the formula is c + g (c - u), and g = 0 is no CFG."""
    return {"guidance_scale": S - 1 if with_cfg else 0.0}


SPATIAL = (CHANNELS, 8, 8)
PACKED = (TOKENS, 16)
VIDEO = (CHANNELS, 2, 8, 8)


def _image(batch: int, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(9))


def _picture(side: int = 64) -> Image.Image:
    return Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 20).convert("RGB")


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def _qwen_vae() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def _wan_vae() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def _cogvideox_vae() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS // 2, layers_per_block=1, norm_num_groups=2,
    ).eval()  # fmt: skip


def _flux2_vae() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip


# ---------------------------------------------------------------------------------------------------- image pipelines

FLUX = (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", 1))
FLUX_EDIT = (Stack("transformer_blocks", 1, FIRST), Stack("single_transformer_blocks", 1, FIRST))
ALONE = (Stack("transformer_blocks"),)

SIXTEEN = {"height": 16, "width": 16}  # with the autoencoder of `tiny_models`


def _sd3(with_cfg: bool, batch: int) -> Arguments:
    return _call(batch, *SPATIAL, **_prompt(with_cfg, batch, pooled=True), **_scale(with_cfg))


def _sd3_controlnet() -> nn.Module:
    torch.manual_seed(2)
    return filled(
        diffusers.SD3ControlNetModel(
            sample_size=8, patch_size=2, in_channels=CHANNELS, num_layers=2, attention_head_dim=HEAD,
            num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=POOLED_WIDTH, out_channels=CHANNELS, pos_embed_max_size=16,
        )
    )  # fmt: skip


def _flux_controlnet() -> nn.Module:
    torch.manual_seed(2)
    return filled(
        diffusers.FluxControlNetModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=HEAD,
            num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
            axes_dims_rope=ROPE,
        )
    )  # fmt: skip


def _flux(with_cfg: bool, batch: int) -> Arguments:
    return _call(batch, *PACKED, **_prompt(with_cfg, batch, pooled=True), **_true_cfg(with_cfg))


def _flux_channels(batch: int) -> Arguments:
    """For those with a control image in further channels, none of which has CFG."""
    return _call(batch, *PACKED, **_prompt(False, batch, pooled=True)) | SIXTEEN


def _pixart(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg), use_resolution_binning=False) | _no_negative_prompt()


def _no_negative_prompt() -> Arguments:
    return {"negative_prompt": None}


def _masked(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg))


def _packed(with_cfg: bool, batch: int) -> Arguments:
    return _call(batch, *PACKED, **_prompt(with_cfg, batch), **_scale(with_cfg))


def _spatial(with_cfg: bool, batch: int) -> Arguments:
    return _call(batch, *SPATIAL, **_prompt(with_cfg, batch), **_scale(with_cfg))


def _qwen_image(with_cfg: bool, batch: int) -> Arguments:
    return _call(batch, *PACKED, **_prompt(with_cfg, batch, mask="prompt_embeds_mask"), **_true_cfg(with_cfg))


@contextmanager
def _small_references(name: str) -> Iterator[None]:
    """Qwen-Image and LongCat bring reference images to 1024 x 1024 pixels."""
    size = (16, 16, None) if name.endswith("edit") and name.startswith("qwen") else (16, 16)
    module = importlib.import_module(f"diffusers.pipelines.{name}")
    with patch.object(module, "calculate_dimensions", lambda area, ratio: size):
        yield


def _z_image(with_cfg: bool, batch: int) -> Arguments:
    """Prompts of different length, in lists."""
    prompts = [caption[: TEXT - row % 2] for row, caption in enumerate(_text(batch))]
    return _call(batch, *SPATIAL, **_both(with_cfg, prompt_embeds=prompts), **_beyond(with_cfg))


def _hunyuan_image_guider(pipe: Any, with_cfg: bool) -> None:
    pipe.guider = AdaptiveProjectedMixGuidance(guidance_scale=S) if with_cfg else None


def _guider(pipe: Any, with_cfg: bool) -> None:
    pipe.guider = ClassifierFreeGuidance(guidance_scale=S, enabled=with_cfg)


def _hunyuan_image(with_cfg: bool, batch: int) -> Arguments:
    second = {"prompt_embeds_2": _rand("byt5", batch, TEXT, TEXT_WIDTH), "prompt_embeds_mask_2": _mask(batch)}
    prompt = _both(with_cfg, prompt_embeds=_text(batch), prompt_embeds_mask=_mask(batch), **second)
    return _call(batch, *SPATIAL, **prompt) | {"height": 256, "width": 256}


def _hunyuan_dit(with_cfg: bool, batch: int) -> Arguments:
    second = {"prompt_embeds_2": _rand("t5", batch, TEXT, TEXT_WIDTH), "prompt_attention_mask_2": _mask(batch)}
    prompt = _both(with_cfg, prompt_embeds=_text(batch), prompt_attention_mask=_mask(batch), **second)
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg), use_resolution_binning=False)


def _build_hunyuan_dit(cls: str = "HunyuanDiTPipeline", **parts: Any) -> Any:
    """Six blocks: the outputs of the first two go to the last two as well, as in a U-Net."""
    model = _model(
        "HunyuanDiT2DModel", num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=CHANNELS, patch_size=2,
        sample_size=8, hidden_size=WIDTH, num_layers=6, cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH, pooled_projection_dim=8, text_len=TEXT, text_len_t5=TEXT,
    )  # fmt: skip
    return _pipe(cls, model, _ddim(), requires_safety_checker=False, **parts)


def _hidream(with_cfg: bool, batch: int) -> Arguments:
    llama = _rand("llama", 5, batch, TEXT, TEXT_WIDTH)
    prompt = _both(
        with_cfg, prompt_embeds_t5=_text(batch), prompt_embeds_llama3=llama, pooled_prompt_embeds=_pooled(batch)
    )
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg))


def _build_hidream() -> Any:
    pipe = _pipe("HiDreamImagePipeline", tiny_models.build("hidream"))
    pipe.default_sample_size = SIDE // 8
    return pipe


def _krea2(with_cfg: bool, batch: int) -> Arguments:
    given = {"prompt_embeds": _rand("text", batch, TEXT, 3, TEXT_WIDTH), "prompt_embeds_mask": _mask(batch).bool()}
    return _call(batch, *PACKED, **_both(with_cfg, **given), **_beyond(with_cfg))


def _build_krea2() -> Any:
    return _pipe("Krea2Pipeline", tiny_models.build("krea2"), text_encoder_select_layers=(0, 1, 2))


def _glm_image(with_cfg: bool, batch: int) -> Arguments:
    prior = torch.arange(TOKENS * batch).reshape(batch, TOKENS) % 11
    return _call(batch, *SPATIAL, **_prompt(with_cfg, batch), **_scale(with_cfg), prior_token_ids=prior)


def _prx(with_cfg: bool, batch: int) -> Arguments:
    prompt = _both(with_cfg, prompt_embeds=_text(batch), prompt_attention_mask=torch.ones(batch, TEXT).bool())
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg), use_resolution_binning=False)


def _ernie(with_cfg: bool, batch: int) -> Arguments:
    prompts = [caption[: TEXT - row % 2] for row, caption in enumerate(_text(batch))]
    return _call(batch, 16, 4, 4, **_both(with_cfg, prompt_embeds=prompts), **_scale(with_cfg))


def _build_ernie() -> Any:
    model = _model(
        "ErnieImageTransformer2DModel", hidden_size=WIDTH, num_attention_heads=HEADS, num_layers=DEPTH,
        ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=TEXT_WIDTH, rope_axes_dim=ROPE,
    )  # fmt: skip
    return _pipe("ErnieImagePipeline", model)


def _attentive(name: str) -> nn.Module:
    """One that is made with weights so small that the image would hardly look at the text."""
    model = tiny_models.build(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "attn" in path or "context" in path:
                parameter.mul_(4)
    return model


def _lumina2(with_cfg: bool, batch: int) -> Arguments:
    whole = torch.ones(batch, TEXT, dtype=torch.bool)
    prompt = _both(with_cfg, prompt_embeds=_text(batch), prompt_attention_mask=whole)
    return _call(batch, *SPATIAL, **prompt, **_scale(with_cfg))


class _Processor:
    """What pipelines ask of their processor when they are made."""

    def __init__(self) -> None:
        self.tokenizer = self.image_processor = self

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def _longcat(with_cfg: bool, batch: int) -> Arguments:
    """It does not run from embeddings, so that `_build_longcat` replaces what makes them."""
    prompts = {"prompt": ["a"] * batch} | ({"negative_prompt": ["b"] * batch} if with_cfg else {})
    return _call(batch, TOKENS, 64, **prompts, **_scale(with_cfg))


def _build_longcat(cls: str, **parts: Any) -> Any:
    def encode(prompt: list[str], image: Any = None) -> Tensor:
        return _text(len(prompt)) if prompt[0] == "a" else _negative(_text(len(prompt)))

    pipe = _pipe(cls, _changed("longcat_image", in_channels=64), **parts)  # the channels are hard-coded
    pipe._encode_prompt = encode
    return pipe


def _qwen_image_21(with_cfg: bool, batch: int) -> Arguments:
    size = {"height": 64, "width": 64}
    return _qwen_image(with_cfg, batch) | size


def _build_qwen_image_21() -> Any:
    model = _model(
        "QwenImage21Transformer2DModel", in_channels=16, out_channels=16, num_layers=DEPTH, attention_head_dim=HEAD,
        num_attention_heads=HEADS, context_in_dim=TEXT_WIDTH, axes_dims_rope=ROPE,
    )  # fmt: skip
    return _pipe("QwenImage21Pipeline", model, processor=_Processor())


class _NothingToCheck:
    """Stands in for the guardrails, which are another package; without prompts nothing is asked of them."""

    def to(self, device: Any) -> "_NothingToCheck":
        return self


def _build_cosmos(cls: str) -> Any:
    model = tiny_models.build("cosmos")
    flow = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler = EDMEulerScheduler() if cls == "CosmosTextToWorldPipeline" else flow
    return _pipe(cls, model, scheduler, safety_checker=_NothingToCheck())


def _kandinsky5(with_cfg: bool, batch: int, *latents: int, **other: Any) -> Arguments:
    ends = torch.arange(batch + 1, dtype=torch.int32) * TEXT
    prompt = _both(with_cfg, prompt_embeds_qwen=_text(batch), prompt_embeds_clip=_pooled(batch))
    ends_of = {"prompt_cu_seqlens": ends} | ({"negative_prompt_cu_seqlens": ends} if with_cfg else {})
    return _call(batch, *latents, **prompt, **ends_of, **_scale(with_cfg), **other)


def _build_kandinsky5(cls: str) -> Any:
    model = _changed("kandinsky5", visual_cond="T2I" not in cls)
    pipe = _pipe(cls, model)
    pipe.resolutions = [(SIDE, SIDE)]
    return pipe


def _build_hunyuan_dit_controlnet() -> Any:
    torch.manual_seed(2)
    controlnet = diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=CHANNELS, patch_size=2, sample_size=8,
        hidden_size=WIDTH, transformer_num_layers=6, cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH, pooled_projection_dim=8, text_len=TEXT, text_len_t5=TEXT,
    )  # fmt: skip
    return _build_hunyuan_dit("HunyuanDiTControlNetPipeline", vae=_vae(), controlnet=filled(controlnet))


def _vae() -> nn.Module:
    """Makes 8 x 8 latents of 64 x 64 pixels."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=CHANNELS, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False,
    ).eval()  # fmt: skip


def _build_sana_controlnet() -> Any:
    """Its controlnet encodes by an `AutoencoderDC`."""
    torch.manual_seed(2)
    controlnet = diffusers.SanaControlNetModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH, sample_size=8, patch_size=2,
    )  # fmt: skip
    blocks = ("ResBlock",) * 4
    vae = diffusers.AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        downsample_block_type="Conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=1.0,
    ).eval()  # fmt: skip
    return _pipe("SanaControlNetPipeline", tiny_models.build("sana"), vae=vae, controlnet=filled(controlnet))


def _build_qwen_image_controlnet() -> Any:
    torch.manual_seed(2)
    controlnet = diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=ROPE,
    )  # fmt: skip
    transformer = tiny_models.build("qwen_image")
    return _pipe("QwenImageControlNetPipeline", transformer, vae=_qwen_vae(), controlnet=filled(controlnet))


def _build_z_image_controlnet() -> Any:
    torch.manual_seed(2)
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=CHANNELS, dim=WIDTH,
        n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
    )  # fmt: skip
    transformer = tiny_models.build("z_image")
    return _pipe("ZImageControlNetPipeline", transformer, vae=autoencoder(), controlnet=filled(controlnet))


def _bria_fibo(with_cfg: bool, batch: int) -> Arguments:
    """It does not run from embeddings, so that `_build_bria_fibo` replaces what makes them."""
    return _call(batch, *PACKED, prompt=["a"] * batch, **_scale(with_cfg))


def _build_bria_fibo() -> Any:
    model = tiny_models.build("bria_fibo")

    def encode(prompt: list[str], **other: Any) -> tuple[Any, ...]:
        batch = len(prompt)
        layers = [_rand(f"layer {i}", batch, TEXT, 8) for i in range(2)]
        ids, mask = torch.zeros(batch, TEXT, 3), _mask(batch).float()
        return _text(batch), _negative(_text(batch)), ids, mask, mask, layers, _negative(layers)

    pipe = _pipe("BriaFiboPipeline", model)
    pipe.encode_prompt = encode
    return pipe


# ---------------------------------------------------------------------------------------------------- video pipelines


def _build_cogvideox(out_channels: int) -> nn.Module:
    return _changed("cogvideox", num_attention_heads=1, attention_head_dim=16, out_channels=out_channels)


def _cogvideox(with_cfg: bool, batch: int, **other: Any) -> Arguments:
    return _call(batch, 2, CHANNELS, 8, 8, **_prompt(with_cfg, batch), **_scale(with_cfg), num_frames=5, **other)


def _cogvideox_image(with_cfg: bool, batch: int) -> Arguments:
    given = _cogvideox(with_cfg, batch, image=_image(batch, SIDE))
    return given | {"latents": _rand("latents", batch, 2, CHANNELS // 2, 8, 8)}


def _video(with_cfg: bool, batch: int, **other: Any) -> Arguments:
    return _call(batch, *VIDEO, **_prompt(with_cfg, batch), **_scale(with_cfg), num_frames=5, **other)


def _build_wan(two: bool = False) -> Any:
    """Of three timesteps, 1000, 667 and 334, or two, 1000 and 500, the last one is below the boundary."""
    if not two:
        return _pipe("WanPipeline", tiny_models.build("wan"))
    other = tiny_models.build("wan", seed=1)
    return _pipe("WanPipeline", tiny_models.build("wan"), transformer_2=other, boundary_ratio=0.6)


def _wan_image(with_cfg: bool, batch: int) -> Arguments:
    return _video(with_cfg, batch, image=_image(1, SIDE))


def _build_skyreels() -> Any:
    model = tiny_models.build("skyreels_v2")
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return _pipe("SkyReelsV2Pipeline", model, scheduler)


def _build_skyreels_image() -> Any:
    """The first frame is in further channels, as for Wan; what the image encoder would make of it is made up."""
    transformer = _changed("skyreels_v2", in_channels=3 * CHANNELS, out_channels=CHANNELS, image_dim=8)
    pipe = _pipe("SkyReelsV2ImageToVideoPipeline", transformer, vae=_wan_vae())
    pipe.encode_image = lambda image, device: _rand("clip", 1, 3, 8)
    return pipe


def _ltx(with_cfg: bool, batch: int, **other: Any) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    size = {"height": 128, "width": 128, "num_frames": 9}  # one token is 32 x 32 pixels and 8 frames
    return _call(batch, 2 * TOKENS, 16, **prompt, **_scale(with_cfg)) | size | other


def _mochi(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    prompt = {name: value.bool() if "mask" in name else value for name, value in prompt.items()}
    return _call(batch, *VIDEO, **prompt, **_scale(with_cfg), num_frames=7)


def _hunyuan_video(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, pooled=True, mask="prompt_attention_mask")
    return _call(batch, *VIDEO, **prompt, **_true_cfg(with_cfg), num_frames=5)


def _hunyuan_video_15(with_cfg: bool, batch: int) -> Arguments:
    given = _hunyuan_image(with_cfg, batch)
    return given | {"latents": _rand("latents", batch, CHANNELS, 2, 4, 4), "num_frames": 5, "height": 64, "width": 64}


def _build_hunyuan_video_15() -> Any:
    model = tiny_models.build("hunyuan_video_15")
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(8,) * 5, layers_per_block=1, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    pipe = _pipe("HunyuanVideo15Pipeline", model, vae=vae, guider=ClassifierFreeGuidance())
    pipe.vision_num_semantic_tokens = 3
    return pipe


def _allegro(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    return _call(batch, *VIDEO, **prompt, **_scale(with_cfg), num_frames=5) | _no_negative_prompt()


def _latte(with_cfg: bool, batch: int) -> Arguments:
    return (
        _call(batch, *VIDEO, **_prompt(with_cfg, batch), **_scale(with_cfg), video_length=2, mask_feature=False)
        | _no_negative_prompt()
    )


def _build_latte() -> Any:
    model = _model(
        "LatteTransformer3DModel", num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_layers=DEPTH, cross_attention_dim=WIDTH, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH, video_length=2,
    )  # fmt: skip
    return _pipe("LattePipeline", model, _ddim())


def _easyanimate(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    return _call(batch, *VIDEO, **prompt, **_scale(with_cfg), num_frames=5)


def _build_easyanimate() -> Any:
    model = tiny_models.build("easyanimate")
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=CHANNELS, block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=2
    )
    return _pipe("EasyAnimatePipeline", model, vae=vae)


def _sana_video(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    call = _call(batch, *VIDEO, **prompt, **_scale(with_cfg), use_resolution_binning=False, frames=5)
    return call | _no_negative_prompt()


def _build_wan_image() -> Any:
    """The first frame and the mask that says which it is are in further channels: 4 + 4 + 4."""
    transformer = _changed("wan", in_channels=3 * CHANNELS, out_channels=CHANNELS)
    return _pipe("WanImageToVideoPipeline", transformer, vae=_wan_vae())


def _ltx_image(with_cfg: bool, batch: int) -> Arguments:
    return _ltx(with_cfg, batch, image=None)


def _motif(with_cfg: bool, batch: int) -> Arguments:
    prompt = _prompt(with_cfg, batch, mask="prompt_attention_mask")
    return _call(batch, *VIDEO, **prompt, num_frames=5)


def _build_motif() -> Any:
    model = _attentive("motif_video")
    return _pipe("MotifVideoPipeline", model, vae=_wan_vae(), guider=ClassifierFreeGuidance())


# ----------------------------------------------------------------------------------------------------------- the table

U_C, C_U, TWO, NONE = "uncond, cond", "cond, uncond", "two calls", "no CFG"

FAMILIES: tuple[Family, ...] = (
    Family(
        "StableDiffusion3Pipeline",
        lambda: tiny_models.pipeline("sd3"),
        lambda cfg, n: _sd3(cfg, n) | SIXTEEN,
        U_C,
        (Stack("transformer_blocks", 1),),
    ),
    Family(
        "StableDiffusion3ControlNetPipeline",
        lambda: _pipe(
            "StableDiffusion3ControlNetPipeline",
            tiny_models.build("sd3"),
            vae=autoencoder(),
            controlnet=_sd3_controlnet(),
        ),
        lambda cfg, n: _sd3(cfg, n) | SIXTEEN | {"control_image": _image(n)},
        U_C,
        (Stack("transformer_blocks", 1),),
    ),
    Family("FluxPipeline", lambda: _pipe("FluxPipeline", tiny_models.build("flux")), _flux, TWO, FLUX, block=3),
    Family(
        "FluxControlNetPipeline",
        lambda: _pipe(
            "FluxControlNetPipeline", tiny_models.build("flux"), vae=autoencoder(), controlnet=_flux_controlnet()
        ),
        lambda cfg, n: _flux(cfg, n) | SIXTEEN | {"control_image": _image(n)},
        TWO,
        FLUX,
        block=3,
    ),
    Family(
        "FluxControlPipeline",
        lambda: _pipe("FluxControlPipeline", _changed("flux", in_channels=32, out_channels=16), vae=autoencoder()),
        lambda cfg, n: _flux_channels(n) | {"control_image": _image(n)},
        NONE,
        FLUX,
    ),
    Family(
        "FluxFillPipeline",
        lambda: _pipe("FluxFillPipeline", _changed("flux", in_channels=48, out_channels=16), vae=autoencoder()),
        lambda cfg, n: _flux_channels(n) | {"image": _image(n), "mask_image": torch.ones(n, 1, 16, 16)},
        NONE,
        FLUX,
    ),
    Family(
        "FluxKontextPipeline",
        lambda: _pipe("FluxKontextPipeline", tiny_models.build("flux"), vae=autoencoder()),
        lambda cfg, n: _flux(cfg, n) | SIXTEEN | {"image": _image(n), "max_area": 256, "_auto_resize": False},
        TWO,
        FLUX_EDIT,
        block=3,
    ),
    Family(
        "Flux2Pipeline",
        lambda: _pipe("Flux2Pipeline", tiny_models.build("flux2")),
        lambda cfg, n: _call(n, 16, 4, 4, prompt_embeds=_text(n)),
        NONE,
        (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", None, LAST)),
        block=3,
    ),
    Family(
        "Flux2KleinPipeline",
        lambda: _pipe("Flux2KleinPipeline", tiny_models.build("flux2"), vae=_flux2_vae()),
        lambda cfg, n: _call(n, 16, 4, 4, **_prompt(cfg, n), **_scale(cfg)),
        TWO,
        (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", None, LAST)),
        block=3,
    ),
    Family(
        "Flux2KleinPipeline editing",
        lambda: _pipe("Flux2KleinPipeline", tiny_models.build("flux2"), vae=_flux2_vae()),
        lambda cfg, n: _call(n, 16, 4, 4, **_prompt(cfg, n), **_scale(cfg), image=_picture()),
        TWO,
        # text, generated image, reference image
        (Stack("transformer_blocks", 1, FIRST), Stack("single_transformer_blocks", None, slice(TEXT, TEXT + TOKENS))),
        block=3,
    ),
    Family(
        "DiTPipeline",
        lambda: tiny_models.pipeline("dit"),
        lambda cfg, n: {
            "class_labels": list(range(3, 3 + n)),
            "num_inference_steps": STEPS,
            "output_type": "pt",
            "generator": [torch.Generator().manual_seed(i) for i in range(n)],
            **_scale(cfg),
        },
        C_U,
        ALONE,
        predicted=CHANNELS,
    ),
    Family(
        "PixArtAlphaPipeline",
        lambda: _pipe("PixArtAlphaPipeline", tiny_models.build("pixart"), _ddim()),
        _pixart,
        U_C,
        ALONE,
        predicted=CHANNELS,
    ),
    Family(
        "PixArtSigmaPipeline",
        lambda: _pipe("PixArtSigmaPipeline", tiny_models.build("pixart"), _ddim()),
        _pixart,
        U_C,
        ALONE,
        predicted=CHANNELS,
    ),
    Family("SanaPipeline", lambda: _pipe("SanaPipeline", tiny_models.build("sana")), _pixart, U_C, ALONE),
    Family(
        "SanaSprintPipeline",
        lambda: _pipe(
            "SanaSprintPipeline",
            _changed("sana", guidance_embeds=True),
            SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
        ),
        lambda cfg, n: (
            _call(n, *SPATIAL, **_prompt(False, n, mask="prompt_attention_mask"), use_resolution_binning=False)
            | {"intermediate_timesteps": None}
        ),
        NONE,
        ALONE,
    ),
    Family(
        "AuraFlowPipeline",
        lambda: _pipe("AuraFlowPipeline", _attentive("auraflow")),
        _masked,
        U_C,
        (Stack("joint_transformer_blocks", 1), Stack("single_transformer_blocks", None, LAST)),
        block=3,
    ),
    Family(
        "LuminaPipeline",
        lambda: _pipe("LuminaPipeline", tiny_models.build("lumina")),
        _masked,
        C_U,
        (Stack("layers"),),
        predicted=CHANNELS,
    ),
    Family(
        "Lumina2Pipeline",
        lambda: _pipe("Lumina2Pipeline", tiny_models.build("lumina2")),
        _lumina2,
        TWO,
        (Stack("noise_refiner"), Stack("layers", None, LAST)),
        block=2,
    ),
    Family(
        "ZImagePipeline",
        lambda: _pipe("ZImagePipeline", tiny_models.build("z_image")),
        _z_image,
        C_U,
        (Stack("noise_refiner", None, FIRST), Stack("layers", None, FIRST)),
        block=2,
    ),
    Family(
        "QwenImagePipeline",
        lambda: _pipe("QwenImagePipeline", tiny_models.build("qwen_image")),
        _qwen_image,
        TWO,
        (Stack("transformer_blocks", 1),),
    ),
    Family(
        "QwenImageEditPipeline",
        lambda: _pipe("QwenImageEditPipeline", tiny_models.build("qwen_image"), vae=_qwen_vae()),
        lambda cfg, n: _qwen_image(cfg, n) | SIXTEEN | {"image": _picture()},
        TWO,
        (Stack("transformer_blocks", 1, FIRST),),
        around=lambda: _small_references("qwenimage.pipeline_qwenimage_edit"),
    ),
    Family(
        "QwenImageEditPlusPipeline",
        lambda: _pipe("QwenImageEditPlusPipeline", _changed("qwen_image", zero_cond_t=True), vae=_qwen_vae()),
        lambda cfg, n: _qwen_image(cfg, n) | SIXTEEN | {"image": [_picture(), _picture(32)]},
        TWO,
        (Stack("transformer_blocks", 1, FIRST),),
        batch=1,
        around=lambda: _small_references("qwenimage.pipeline_qwenimage_edit_plus"),
    ),
    Family(
        "HunyuanImagePipeline",
        lambda: _pipe("HunyuanImagePipeline", _changed("hunyuan_image", text_embed_2_dim=TEXT_WIDTH)),
        _hunyuan_image,
        TWO,
        (Stack("transformer_blocks", 0), Stack("single_transformer_blocks", 0)),
        block=3,
        switch=_hunyuan_image_guider,
    ),
    Family("HunyuanDiTPipeline", _build_hunyuan_dit, _hunyuan_dit, U_C, (Stack("blocks"),), predicted=CHANNELS),
    Family(
        "HiDreamImagePipeline",
        _build_hidream,
        _hidream,
        U_C,
        (Stack("double_stream_blocks", 0), Stack("single_stream_blocks", None, FIRST)),
        block=3,
    ),
    Family(
        "ChromaPipeline",
        lambda: _pipe("ChromaPipeline", tiny_models.build("chroma")),
        lambda cfg, n: _packed(cfg, n) | _both(cfg, prompt_embeds=_text(n), prompt_attention_mask=_mask(n).float()),
        TWO,
        (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", None, LAST)),
        block=3,
    ),
    Family(
        "CogView3PlusPipeline",
        lambda: _pipe("CogView3PlusPipeline", tiny_models.build("cogview3_plus"), CogVideoXDDIMScheduler()),
        _spatial,
        U_C,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "CogView4Pipeline",
        lambda: _pipe("CogView4Pipeline", tiny_models.build("cogview4")),
        _spatial,
        TWO,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "BriaPipeline",
        lambda: _pipe("BriaPipeline", tiny_models.build("bria"), vae=autoencoder()),
        lambda cfg, n: _packed(cfg, n) | SIXTEEN,
        U_C,
        FLUX,
        block=3,
    ),
    Family(
        "LongCatImagePipeline",
        lambda: _build_longcat("LongCatImagePipeline"),
        lambda cfg, n: _longcat(cfg, n) | {"enable_prompt_rewrite": False},
        TWO,
        FLUX,
        block=3,
    ),
    Family(
        "LongCatImageEditPipeline",
        lambda: _build_longcat("LongCatImageEditPipeline", vae=autoencoder(16), text_processor=_Processor()),
        lambda cfg, n: {k: v for k, v in _longcat(cfg, n).items() if k not in SIXTEEN} | {"image": _picture()},
        TWO,
        FLUX_EDIT,
        block=3,
        batch=1,
        around=lambda: _small_references("longcat_image.pipeline_longcat_image_edit"),
    ),
    Family(
        "OvisImagePipeline",
        lambda: _pipe("OvisImagePipeline", tiny_models.build("ovis_image")),
        lambda cfg, n: _packed(cfg, n) | _no_negative_prompt(),
        TWO,
        FLUX,
        block=3,
    ),
    Family("Krea2Pipeline", _build_krea2, _krea2, TWO, (Stack("transformer_blocks", None, LAST),)),
    Family(
        "GlmImagePipeline",
        lambda: _pipe("GlmImagePipeline", tiny_models.build("glm_image")),
        _glm_image,
        TWO,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "PRXPipeline", lambda: _pipe("PRXPipeline", tiny_models.build("prx")), _prx, U_C, (Stack("blocks"),), batch=1
    ),
    Family(
        "Cosmos2TextToImagePipeline",
        lambda: _build_cosmos("Cosmos2TextToImagePipeline"),
        lambda cfg, n: _call(n, CHANNELS, 1, 8, 8, **_prompt(cfg, n), **_scale(cfg)),
        TWO,
        ALONE,
    ),
    Family(
        "Kandinsky5T2IPipeline",
        lambda: _build_kandinsky5("Kandinsky5T2IPipeline"),
        lambda cfg, n: _kandinsky5(cfg, n, 1, 8, 8, CHANNELS),
        TWO,
        (Stack("visual_transformer_blocks"),),
    ),
    Family(
        "CogVideoXPipeline",
        lambda: _pipe("CogVideoXPipeline", _build_cogvideox(CHANNELS), CogVideoXDDIMScheduler()),
        _cogvideox,
        U_C,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "CogVideoXImageToVideoPipeline",
        lambda: _pipe(
            "CogVideoXImageToVideoPipeline",
            _build_cogvideox(CHANNELS // 2),
            CogVideoXDDIMScheduler(),
            vae=_cogvideox_vae(),
        ),
        _cogvideox_image,
        U_C,
        (Stack("transformer_blocks", 0),),
    ),
    Family("WanPipeline", _build_wan, _video, TWO, (Stack("blocks"),)),
    Family(
        "WanPipeline with two transformers",
        lambda: _build_wan(two=True),
        _video,
        TWO,
        (Stack("blocks"),),
        transformers=("transformer", "transformer_2"),
    ),
    Family(
        "WanVACEPipeline",
        lambda: _pipe("WanVACEPipeline", tiny_models.build("wan_vace"), vae=_wan_vae()),
        lambda cfg, n: _video(cfg, n, generator=torch.Generator().manual_seed(0)),  # it takes no list of them
        TWO,
        (Stack("blocks"),),
        batch=1,
    ),
    Family("SkyReelsV2Pipeline", _build_skyreels, _video, TWO, (Stack("blocks"),)),
    Family("LTXPipeline", lambda: _pipe("LTXPipeline", tiny_models.build("ltx")), _ltx, U_C, ALONE),
    Family(
        "MochiPipeline",
        lambda: _pipe("MochiPipeline", tiny_models.build("mochi")),
        _mochi,
        U_C,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "HunyuanVideoPipeline",
        lambda: _pipe("HunyuanVideoPipeline", tiny_models.build("hunyuan_video")),
        _hunyuan_video,
        TWO,
        (Stack("transformer_blocks", 0), Stack("single_transformer_blocks", 0)),
        block=3,
    ),
    Family(
        "HunyuanVideo15Pipeline",
        _build_hunyuan_video_15,
        _hunyuan_video_15,
        TWO,
        (Stack("transformer_blocks", 0),),
        switch=_guider,
    ),
    Family(
        "AllegroPipeline", lambda: _pipe("AllegroPipeline", tiny_models.build("allegro"), _ddim()), _allegro, U_C, ALONE
    ),
    Family("EasyAnimatePipeline", _build_easyanimate, _easyanimate, U_C, (Stack("transformer_blocks", 0),)),
    Family(
        "SanaVideoPipeline",
        lambda: _pipe("SanaVideoPipeline", tiny_models.build("sana_video")),
        _sana_video,
        U_C,
        ALONE,
    ),
    Family(
        "HunyuanDiTControlNetPipeline",
        _build_hunyuan_dit_controlnet,
        lambda cfg, n: _hunyuan_dit(cfg, n) | {"control_image": _image(n, SIDE)},
        U_C,
        (Stack("blocks"),),
        predicted=CHANNELS,
    ),
    Family(
        "SanaControlNetPipeline",
        _build_sana_controlnet,
        lambda cfg, n: _pixart(cfg, n) | {"control_image": _image(n, SIDE)},
        U_C,
        ALONE,
    ),
    Family(
        "QwenImageControlNetPipeline",
        _build_qwen_image_controlnet,
        lambda cfg, n: _qwen_image(cfg, n) | SIXTEEN | {"control_image": _image(n)},
        TWO,
        (Stack("transformer_blocks", 1),),
    ),
    Family(
        "ZImageControlNetPipeline",
        _build_z_image_controlnet,
        lambda cfg, n: _z_image(cfg, n) | SIXTEEN | {"control_image": _image(n)},
        C_U,
        (Stack("noise_refiner", None, FIRST), Stack("layers", None, FIRST)),
        block=2,
    ),
    Family(
        "NucleusMoEImagePipeline",
        lambda: _pipe("NucleusMoEImagePipeline", tiny_models.build("nucleus_moe")),
        lambda cfg, n: _packed(cfg, n) | _prompt(cfg, n, mask="prompt_embeds_mask"),
        TWO,
        ALONE,
    ),
    Family("WanImageToVideoPipeline", _build_wan_image, _wan_image, TWO, (Stack("blocks"),)),
    Family(
        "WanPipeline with a timestep per token",
        lambda: _pipe("WanPipeline", tiny_models.build("wan"), expand_timesteps=True),
        _video,
        TWO,
        (Stack("blocks"),),
    ),
    Family(
        "LTXImageToVideoPipeline",
        lambda: _pipe("LTXImageToVideoPipeline", tiny_models.build("ltx")),
        _ltx_image,
        U_C,
        ALONE,
    ),
    Family(
        "Kandinsky5T2VPipeline",
        lambda: _build_kandinsky5("Kandinsky5T2VPipeline"),
        lambda cfg, n: _kandinsky5(cfg, n, 2, 8, 8, 2 * CHANNELS + 1, num_frames=5),
        TWO,
        (Stack("visual_transformer_blocks"),),
    ),
    Family(
        "MotifVideoPipeline",
        _build_motif,
        _motif,
        TWO,
        (Stack("transformer_blocks", 0), Stack("single_transformer_blocks", 0)),
        block=3,
        switch=_guider,
    ),
    Family(
        "BriaFiboPipeline",
        _build_bria_fibo,
        _bria_fibo,
        U_C,
        (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", None, LAST)),
        block=3,
    ),
    Family(
        "CogView4ControlPipeline",
        lambda: _pipe("CogView4ControlPipeline", _changed("cogview4", in_channels=2 * CHANNELS), vae=autoencoder()),
        lambda cfg, n: _spatial(cfg, n) | SIXTEEN | {"control_image": _image(n)},
        TWO,
        (Stack("transformer_blocks", 0),),
    ),
    Family(
        "CosmosTextToWorldPipeline",
        lambda: _build_cosmos("CosmosTextToWorldPipeline"),
        lambda cfg, n: _call(n, *VIDEO, **_prompt(cfg, n), **_scale(cfg), num_frames=9),
        TWO,
        ALONE,
    ),
    Family(
        "AnyFlowPipeline",
        lambda: _pipe("AnyFlowPipeline", tiny_models.build("anyflow"), FlowMapEulerDiscreteScheduler()),
        _video,
        U_C,
        (Stack("blocks"),),
    ),
    Family(
        "Kandinsky5I2IPipeline",
        lambda: _build_kandinsky5("Kandinsky5I2IPipeline"),
        lambda cfg, n: _kandinsky5(cfg, n, 1, 8, 8, 2 * CHANNELS + 1, image=_picture()),
        TWO,
        (Stack("visual_transformer_blocks"),),
    ),
    Family(
        "Kandinsky5I2VPipeline",
        lambda: _build_kandinsky5("Kandinsky5I2VPipeline"),
        lambda cfg, n: _kandinsky5(cfg, n, 6, 8, 8, 2 * CHANNELS + 1, image=_picture(), num_frames=21),
        TWO,
        (Stack("visual_transformer_blocks"),),
    ),
    Family("SkyReelsV2ImageToVideoPipeline", _build_skyreels_image, _wan_image, TWO, (Stack("blocks"),)),
    Family(
        "SanaImageToVideoPipeline",
        lambda: _pipe("SanaImageToVideoPipeline", tiny_models.build("sana_video"), vae=_wan_vae()),
        lambda cfg, n: _sana_video(cfg, n) | {"image": _image(1, SIDE)},
        U_C,
        ALONE,
    ),
)
# what their blocks put out is more than a row of dgkit's can say
LEFT_OUT: tuple[Family, ...] = (
    Family("ErnieImagePipeline", _build_ernie, _ernie, U_C, (Stack("layers", None, FIRST, axis=0),)),
    Family(
        "LattePipeline",
        _build_latte,
        _latte,
        U_C,
        (Stack("transformer_blocks"), Stack("temporal_transformer_blocks")),
        block=2,
        interleaved=True,
        predicted=CHANNELS,
    ),
    Family(
        "QwenImage21Pipeline",
        _build_qwen_image_21,
        _qwen_image_21,
        TWO,
        (Stack("transformer_blocks", None, LAST),),
    ),
)
BY_NAME = {family.name: family for family in (*FAMILIES, *LEFT_OUT)}
