"""`DetailGuidance` in every pipeline of diffusers that takes a guider, against plain hooks under diffusers' own CFG."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState
from torch import Tensor, nn

from dgkit import DetailGuidance
from dgkit.anatomy import TRANSFORMERS
from dgkit.anatomy.guider_loops import generated_tokens
from dgkit.errors import DgkitError, ModelError
from tests import small_pipelines as small
from tests import tiny_models
from tests.dgkit.test_combinations import state
from tests.dgkit.test_modular import degraded, modular, prompts, run
from tests.naive_guidance import naive_detail_guidance
from tests.small_pipelines import BY_NAME, FIRST, STEPS, TEXT, TEXT_WIDTH, TOKENS, TWO, Arguments, Family, S, Stack

W, DIMS = 1.5, [2, 9]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One thread; and diffusers warns at each guider that its API is experimental."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("guiders", "modular_pipelines")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    built.cache_clear()


@dataclass(frozen=True)
class Guided(Family):
    """A pipeline that takes a guider: of the blocks of a modular one those from the embeddings to the latents.

    Attributes:
        guiders: the components.
        negative: whether a negative prompt is wanted without CFG as well.
        rescaled: whether the loop gives what the guider puts out the norm of the conditional prediction.
    """

    guiders: tuple[str, ...] = ("guider",)
    negative: bool = False
    rescaled: bool = False

    def run(self, pipe: Any, with_cfg: bool) -> Tensor:
        with self.around(), torch.random.fork_rng():
            torch.manual_seed(0)
            given = self.arguments(with_cfg or self.negative, self.batch)
            return pipe(**given, num_inference_steps=STEPS, output="latents")

    def guide_by(self, pipe: Any, guider: Any) -> None:
        """Exchange the pipeline's guider or guiders."""
        pipe.update_components(**dict.fromkeys(self.guiders, guider))


@dataclass(frozen=True)
class Ordinary(Guided):
    """One that is not modular, out of `small_pipelines`."""

    def run(self, pipe: Any, with_cfg: bool) -> Tensor:
        with self.around(), torch.random.fork_rng():
            torch.manual_seed(0)
            return pipe(**self.arguments(True, self.batch), return_dict=False)[0]

    def guide_by(self, pipe: Any, guider: Any) -> None:
        pipe.guider = guider


def ordinary(name: str) -> Ordinary:
    family = BY_NAME[name]
    return Ordinary(name, family.build, family.arguments, TWO, family.stacks, family.block, batch=family.batch)


def core(blocks: str, transformer: Callable[[], nn.Module], scheduler: Any = None, **parts: Any) -> Callable[[], Any]:
    """Builds the pipeline of these blocks."""
    module, name = blocks.rsplit(".", 1)

    def build() -> Any:
        steps = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
        for loop in quiet_loops(steps):
            loop.set_progress_bar_config(disable=True)
        pipe = steps.init_pipeline()
        made = {part: build_part() for part, build_part in parts.items()}
        plain = FlowMatchEulerDiscreteScheduler()
        pipe.update_components(transformer=transformer(), scheduler=scheduler() if scheduler else plain, **made)
        return pipe

    return build


def quiet_loops(blocks: Any) -> Iterator[Any]:
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            yield block
        yield from quiet_loops(block)


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def prompt(cfg: bool, n: int, **more: Any) -> Arguments:
    return small._both(cfg, prompt_embeds=small._text(n), **more)


def latents(n: int, *shape: int, **size: int) -> Arguments:
    return {"height": 64, "width": 64, "latents": small._rand("latents", n, *shape)} | size


def masks(n: int) -> Arguments:
    return {"prompt_embeds_mask": small._mask(n)}


def second(n: int) -> Arguments:
    return {"prompt_embeds_2": small._rand("byt5", n, TEXT, TEXT_WIDTH), "prompt_embeds_mask_2": small._mask(n)}


def ltx(cfg: bool, n: int) -> Arguments:
    text = prompt(cfg, n, prompt_attention_mask=small._mask(n))
    return latents(n, 2 * TOKENS, 16, height=128, width=128, num_frames=9) | text


def qwen_image(cfg: bool, n: int, *references: Tensor) -> Arguments:
    given = latents(n, TOKENS, 16) | prompt(cfg, n, **masks(n))
    return given | (
        {"image_latents": references[0] if len(references) == 1 else list(references)} if references else {}
    )


def anima(cfg: bool, n: int) -> Arguments:
    text = {"qwen_prompt_embeds": small._text(n), "qwen_attention_mask": small._mask(n)}
    return latents(n, 4, 1, 8, 8) | small._both(
        cfg, **text, t5_input_ids=small._mask(n), t5_attention_mask=small._mask(n)
    )


class Conditioner(nn.Module):
    """Instead of Anima's, which is a language model."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, source_hidden_states: Tensor, **other: Any) -> Tensor:
        return source_hidden_states


def video_15(cfg: bool, n: int) -> Arguments:
    return latents(n, 4, 2, 4, 4, num_frames=5) | prompt(cfg, n, **masks(n), **second(n))


def refiner() -> nn.Module:
    return small._changed(
        "hunyuan_image",
        patch_size=(1, 1, 1),
        in_channels=8,
        out_channels=4,
        rope_axes_dim=(4, 2, 2),
        guidance_embeds=True,
    )


def control(n: int) -> Arguments:
    return {
        "control_hidden_states": small._rand("control", n, 72, 2, 8, 8),
        "control_hidden_states_scale": torch.ones(2),
    }


def vace() -> nn.Module:
    return tiny_models.build("wan_vace")


WAN = (Stack("blocks"),)
FLUX2 = (Stack("transformer_blocks", 1), Stack("single_transformer_blocks", None, small.LAST))
FLUX2_EDIT = (
    Stack("transformer_blocks", 1, FIRST),
    Stack("single_transformer_blocks", None, slice(TEXT, TEXT + TOKENS)),
)
QWEN, QWEN_EDIT = (Stack("transformer_blocks", 1),), (Stack("transformer_blocks", 1, FIRST),)
KLEIN = "flux2.modular_blocks_flux2_klein_base.Flux2KleinBaseAutoCoreDenoiseStep"
HUNYUAN = "hunyuan_video1_5.modular_blocks_hunyuan_video1_5.HunyuanVideo15"

FAMILIES = (
    Guided(
        "wan",
        core("wan.modular_blocks_wan.WanCoreDenoiseStep", lambda: tiny_models.build("wan"), unipc),
        lambda cfg, n: latents(n, 4, 2, 8, 8, num_frames=5) | prompt(cfg, n),
        TWO,
        WAN,
        negative=True,
    ),
    Guided(
        "wan 2.2",
        core(
            "wan.modular_blocks_wan22.Wan22CoreDenoiseStep",
            lambda: tiny_models.build("wan"),
            unipc,
            transformer_2=lambda: tiny_models.build("wan", seed=1),
        ),
        lambda cfg, n: latents(n, 4, 2, 8, 8, num_frames=5) | prompt(cfg, n),
        TWO,
        WAN,
        transformers=("transformer", "transformer_2"),
        guiders=("guider", "guider_2"),
        negative=True,
    ),
    Guided(
        "wan image to video",
        core(
            "wan.modular_blocks_wan22_i2v.Wan22Image2VideoCoreDenoiseStep",
            lambda: small._changed("wan", in_channels=12, out_channels=4),
            unipc,
            transformer_2=lambda: small._changed("wan", in_channels=12, out_channels=4),
        ),
        lambda cfg, n: (
            latents(n, 4, 2, 8, 8, num_frames=5)
            | prompt(cfg, n)
            | {"image_condition_latents": small._rand("image", 1, 8, 2, 8, 8)}
        ),
        TWO,
        WAN,
        batch=1,
        transformers=("transformer", "transformer_2"),
        guiders=("guider", "guider_2"),
        negative=True,
    ),
    Guided(
        "wan vace",
        core("wan.modular_blocks_wan_vace.Wan22VaceCoreDenoiseStep", vace, unipc, transformer_2=vace),
        lambda cfg, n: latents(n, 4, 2, 8, 8, num_frames=5) | prompt(cfg, n) | {"denoiser_input_fields": control(n)},
        TWO,
        WAN,
        batch=1,
        transformers=("transformer", "transformer_2"),
        guiders=("guider", "guider_2"),
        negative=True,
    ),
    Guided(
        "flux 2 klein base",
        core(KLEIN, lambda: tiny_models.build("flux2")),
        lambda cfg, n: latents(n, 16, 4, 4) | prompt(cfg, n),
        TWO,
        FLUX2,
        block=3,
    ),
    Guided(
        "flux 2 klein base, editing",
        core(KLEIN, lambda: tiny_models.build("flux2")),
        lambda cfg, n: latents(n, 16, 4, 4) | prompt(cfg, n) | {"image_latents": [small._rand("image", 1, 16, 4, 2)]},
        TWO,
        FLUX2_EDIT,
        block=3,
        batch=1,
    ),
    Guided(
        "ltx",
        core("ltx.modular_blocks_ltx.LTXCoreDenoiseStep", lambda: tiny_models.build("ltx")),
        ltx,
        TWO,
        small.ALONE,
        negative=True,
    ),
    Guided(
        "ltx image to video",
        core("ltx.modular_blocks_ltx.LTXImage2VideoCoreDenoiseStep", lambda: tiny_models.build("ltx")),
        lambda cfg, n: ltx(cfg, n) | {"image_latents": small._rand("image", n, 16, 1, 4, 4), "latents": None},
        TWO,
        small.ALONE,
        negative=True,
    ),
    Guided(
        "z-image",
        core("z_image.modular_blocks_z_image.ZImageCoreDenoiseStep", lambda: tiny_models.build("z_image")),
        lambda cfg, n: (
            latents(n, 4, 8, 8)
            | small._both(cfg, prompt_embeds=[text[: TEXT - i] for i, text in enumerate(small._text(n))])
        ),
        TWO,
        (Stack("noise_refiner", None, FIRST), Stack("layers", None, FIRST)),
        block=2,
    ),
    Guided(
        "qwen-image",
        core("qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep", lambda: tiny_models.build("qwen_image")),
        qwen_image,
        TWO,
        QWEN,
        rescaled=True,
    ),
    Guided(
        "qwen-image edit",
        core(
            "qwenimage.modular_blocks_qwenimage_edit.QwenImageEditCoreDenoiseStep",
            lambda: tiny_models.build("qwen_image"),
        ),
        lambda cfg, n: qwen_image(cfg, n, small._rand("image", n, 4, 1, 8, 4)),
        TWO,
        QWEN_EDIT,
        rescaled=True,
    ),
    Guided(
        "qwen-image edit plus",
        core(
            "qwenimage.modular_blocks_qwenimage_edit_plus.QwenImageEditPlusCoreDenoiseStep",
            lambda: small._changed("qwen_image", zero_cond_t=True),
        ),
        lambda cfg, n: qwen_image(cfg, n, small._rand("image", n, 4, 1, 8, 4), small._rand("other", n, 4, 1, 4, 4)),
        TWO,
        QWEN_EDIT,
        batch=1,
        rescaled=True,
    ),
    Guided(
        "qwen-image layered",
        core(
            "qwenimage.modular_blocks_qwenimage_layered.QwenImageLayeredCoreDenoiseStep",
            lambda: small._changed("qwen_image", use_layer3d_rope=True),
        ),
        lambda cfg, n: prompt(cfg, n, **masks(n)) | {"image_latents": small._rand("image", n, 1, 4, 4, 4), "layers": 3},
        TWO,
        QWEN_EDIT,  # four layers of four tokens
        rescaled=True,
    ),
    Guided(
        "krea 2",
        core("krea2.modular_blocks_krea2.Krea2CoreDenoiseStep", lambda: tiny_models.build("krea2")),
        lambda cfg, n: (
            latents(n, *small.PACKED)
            | small._both(
                cfg,
                prompt_embeds=small._rand("text", n, TEXT, 3, TEXT_WIDTH),
                prompt_embeds_mask=small._mask(n).bool(),
            )
        ),
        TWO,
        (Stack("transformer_blocks", None, small.LAST),),
    ),
    Guided(
        "qwen-image 2.1",
        core(
            "qwenimage21.modular_blocks_qwenimage21.QwenImage21CoreDenoiseStep",
            lambda: small._build_qwen_image_21().transformer,
        ),
        lambda cfg, n: (
            latents(n, TOKENS, 16)
            | prompt(cfg, n, **masks(n), image_pad_mask=torch.zeros(n, TEXT).bool())
            | {"use_kv_cache": False}
        ),
        TWO,
        (Stack("transformer_blocks", None, small.LAST),),
    ),
    Guided(
        "ernie-image",
        core(
            "ernie_image.modular_blocks_ernie_image.ErnieImageCoreDenoiseStep", lambda: small._build_ernie().transformer
        ),
        lambda cfg, n: latents(n, 16, 4, 4) | small._both(cfg, prompt_embeds=list(small._text(n))),
        TWO,
        (Stack("layers", None, FIRST, axis=0),),
    ),
    Guided(
        "anima",
        core(
            "anima.modular_blocks_anima.AnimaCoreDenoiseStep",
            lambda: tiny_models.build("cosmos"),
            text_conditioner=Conditioner,
        ),
        anima,
        TWO,
        small.ALONE,
    ),
    Guided(
        "hunyuan-video 1.5",
        core(f"{HUNYUAN}CoreDenoiseStep", lambda: tiny_models.build("hunyuan_video_15")),
        video_15,
        TWO,
        (Stack("transformer_blocks", 0),),
    ),
    Guided(
        "hunyuan-video 1.5 image to video",
        core(f"{HUNYUAN}Image2VideoCoreDenoiseStep", lambda: tiny_models.build("hunyuan_video_15")),
        lambda cfg, n: (
            video_15(cfg, n)
            | {
                "image_latents": small._rand("image", 1, 4, 1, 4, 4),
                "image_embeds": small._rand("siglip", 1, 3, 8),
            }
        ),
        TWO,
        (Stack("transformer_blocks", 0),),
        batch=1,
    ),
    Ordinary(
        "HunyuanImageRefinerPipeline",
        lambda: small._pipe("HunyuanImageRefinerPipeline", refiner()),
        lambda cfg, n: (
            prompt(cfg, n, **masks(n))
            | {"image": small._rand("image", n, 4, 2, 4, 4), "latents": small._rand("latents", n, 4, 2, 4, 4)}
            | {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
        ),
        TWO,
        (Stack("transformer_blocks", 0), Stack("single_transformer_blocks", 0)),
        block=3,
    ),
    ordinary("HunyuanImagePipeline"),
    ordinary("HunyuanVideo15Pipeline"),
    ordinary("MotifVideoPipeline"),
)
GUIDED = {family.name: family for family in FAMILIES}
RUNS = [(name, cfg) for name in GUIDED for cfg in (False, True)]
each_run = pytest.mark.parametrize(("name", "cfg"), [pytest.param(*run, id=f"{run[0]}-{run[1]}") for run in RUNS])


@cache
def built(name: str) -> Any:
    return GUIDED[name].build()


def known(name: str) -> bool:
    """Whether dgkit has a row for the transformer."""
    return all(type(model).__name__ in TRANSFORMERS for model in GUIDED[name].models(built(name)))


class Unchanged(ClassifierFreeGuidance):
    """diffusers' own, that says the conditional prediction to be what it was before a hook changed it."""

    outputs: list[Tensor]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        output = super().forward(pred_cond, pred_uncond)
        output.pred_cond = self.outputs[-1 if pred_uncond is None else -2]
        return output


def plain(name: str, cfg: bool) -> Tensor:
    GUIDED[name].guide_by(built(name), ClassifierFreeGuidance(guidance_scale=S, enabled=cfg))
    return GUIDED[name].run(built(name), cfg)


def naive(name: str, cfg: bool, family: Guided | None = None) -> Tensor:
    """Every pass of the transformer made a second time as a whole, and w (c - c_m) added by a hook."""
    family, pipe, outputs = family or GUIDED[name], built(name), []
    guider: Any = ClassifierFreeGuidance(guidance_scale=S, enabled=cfg)
    with ExitStack() as hooks:
        if family.rescaled:
            guider = Unchanged(guidance_scale=S, enabled=cfg)
            guider.outputs = outputs
            for model in family.models(pipe):
                hook = model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
                hooks.callback(hook.remove)
        family.guide_by(pipe, guider)
        hooks.enter_context(naive_detail_guidance(pipe, family, family.block, DIMS, W, cfg))
        return family.run(pipe, cfg)


def guider_of(name: str, cfg: bool, **options: Any) -> DetailGuidance:
    settings = {"guidance_scale": S if cfg else 1.0, "scale": W, "block": GUIDED[name].block, "dims": DIMS}
    return DetailGuidance(**settings | options)


def guided(name: str, cfg: bool, guider: DetailGuidance) -> Tensor:
    GUIDED[name].guide_by(built(name), guider)
    return GUIDED[name].run(built(name), cfg)


def marks(name: str) -> list[Any]:
    return [state(model) for model in GUIDED[name].models(built(name))]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest latent of `a`."""
    return float((a - b).abs().max() / a.abs().max())


# ---------------------------------------------------------------------------------------------------------- each family


@each_run
def test_guidance_is_that_of_plain_hooks(name: str, cfg: bool) -> None:
    if not known(name):
        pytest.skip("a transformer of which dgkit has no row")
    family, before, expected, marks_before = GUIDED[name], plain(name, cfg), naive(name, cfg), marks(name)
    assert before.isfinite().all() and distance(before, expected) > 1e-3
    guider = guider_of(name, cfg)
    assert distance(expected, guided(name, cfg, guider)) <= 1e-5
    assert distance(expected, guided(name, cfg, guider_of(name, cfg, sharing="none"))) <= 1e-5
    assert marks(name) == marks_before and torch.equal(plain(name, cfg), before), "nothing is left behind"
    blocks = len(family.blocks(family.models(built(name))[0]))
    passes, branch = blocks * family.batch * (2 if cfg else 1), (blocks - family.block - 1) * family.batch
    assert guider.cost.block_evaluations == STEPS * (passes + branch)


@pytest.mark.parametrize("name", GUIDED)
def test_transformers_without_a_row_are_refused(name: str) -> None:
    if known(name):
        pytest.skip("a transformer of which dgkit has a row")
    marks_before, cls = marks(name), type(GUIDED[name].models(built(name))[0]).__name__
    with pytest.raises(ModelError, match=f"or a transformer of class .*, got {cls}"):
        guided(name, False, guider_of(name, False))
    assert marks(name) == marks_before


@pytest.mark.parametrize("name", [name for name in GUIDED if "edit" in name or "layered" in name])
def test_tokens_of_reference_images_would_be_noticed(name: str) -> None:
    family = GUIDED[name]
    wrong = tuple(
        replace(stack, tokens=slice(None) if stack.tokens == FIRST else slice(TEXT, None)) for stack in family.stacks
    )
    assert distance(naive(name, False), naive(name, False, replace(family, stacks=wrong))) > 2e-4


@pytest.mark.parametrize("name", ["wan", "HunyuanImagePipeline"])
def test_an_exception_leaves_nothing_behind(name: str) -> None:
    before, expected = marks(name), plain(name, True)
    last, _ = GUIDED[name].blocks(built(name).transformer)[-1]
    for number in (1, 2):  # the pass for c; that for c_m
        calls = []

        def interrupt(
            module: nn.Module, args: Any, output: Any, calls: list[int] = calls, number: int = number
        ) -> None:
            calls.append(1)
            if len(calls) == number:
                raise ZeroDivisionError

        handle = last.register_forward_hook(interrupt)
        with pytest.raises(ZeroDivisionError):
            guided(name, True, guider_of(name, True))
        handle.remove()
        GUIDED[name].guide_by(built(name), None)
    assert marks(name) == before and torch.equal(plain(name, True), expected)


# -------------------------------------------------------------------------------------------------------------- windows


@torch.no_grad()
def heun_by_hand(model: nn.Module, scales: list[float], s: float, steps: int, batch: int = 2) -> Tensor:
    """Heun's steps by diffusers' scheduler, with w = scales[timestep]; and how many timesteps there are."""
    scheduler, given = FlowMatchHeunDiscreteScheduler(), prompts("sd3", batch)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == len(scales) == 2 * steps - 1
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    for t, w in zip(scheduler.timesteps, scales, strict=True):
        call, negative = (
            {
                "hidden_states": x,
                "timestep": t.expand(batch),
                "encoder_hidden_states": given[f"{kind}prompt_embeds"],
                "pooled_projections": given[f"{kind}pooled_prompt_embeds"],
            }
            for kind in ("", "negative_")
        )
        c, u, c_m = model(**call).sample, model(**negative).sample, degraded("sd3", model, call, DIMS)
        x = scheduler.step(u + s * (c - u) + w * (c - c_m), t, x).prev_sample
    return x


@pytest.mark.parametrize("s", [1.0, S])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.75), (0.4, 1.0), (0.3, 0.7), (0.0, 1.0)])
def test_window_counts_the_timesteps_of_the_schedule(start: float, stop: float, s: float) -> None:
    """Heun's has 7 for `num_inference_steps` = 4."""
    guider = DetailGuidance(guidance_scale=s, scale=W, block=1, dims=DIMS, start=start, stop=stop)
    pipe = modular(guider)
    pipe.update_components(scheduler=FlowMatchHeunDiscreteScheduler())
    scales = [W if int(start * 7) <= i < int(stop * 7) else 0.0 for i in range(7)]
    expected = heun_by_hand(pipe.transformer, scales, s, 4)
    assert distance(expected, run(pipe, num_inference_steps=4)) <= 1e-5


@pytest.mark.parametrize("name", ["wan", "HunyuanImagePipeline"])
def test_window_ends_guidance(name: str) -> None:
    """Of three steps the second alone; one of Wan's block states, one of a plain loop."""
    guider = guider_of(name, True, start=0.34, stop=0.67)
    latents = guided(name, True, guider)
    blocks, n = len(GUIDED[name].blocks(built(name).transformer)), GUIDED[name].batch
    assert guider.cost.block_evaluations == STEPS * 2 * blocks * n + (blocks - GUIDED[name].block - 1) * n
    assert distance(latents, plain(name, True)) > 1e-4


def test_window_in_a_loop_that_does_not_tell() -> None:
    guider = DetailGuidance(scale=W, block=1, dims=DIMS, stop=0.5)
    with pytest.raises(ModelError, match=r"start=0.0, stop=0.5 cannot be kept: .* how many timesteps it has"):
        guider.set_state(0, 4, torch.tensor(1000.0))
    timesteps = torch.tensor([1000.0, 500.0])  # of another loop
    with pytest.raises(ModelError, match="cannot be kept"):
        guider.set_state(1, len(timesteps), torch.tensor(400.0))
    guider.set_state(1, 1, timesteps[1])
    assert guider.num_conditions == 1
    guider.set_state(0, 1, timesteps[0])
    assert guider.num_conditions == 2


# ----------------------------------------------------------------------------------------------------- negative prompts


def test_negative_prompt_is_asked_for_between_steps() -> None:
    """Pipelines ask before the loop, and again before the next one."""
    for s in (1.0, S):
        guider = DetailGuidance(guidance_scale=s, scale=W, block=1, dims=DIMS, stop=0.5)
        assert guider.num_conditions == 2
        GUIDED["wan"].guide_by(built("wan"), guider)
        GUIDED["wan"].run(built("wan"), True)
        assert guider.num_conditions == 2
    assert DetailGuidance(scale=0.0).num_conditions == 1
    assert DetailGuidance(guidance_scale=S, scale=0.0).num_conditions == 2
    assert DetailGuidance(guidance_scale=S, scale=W, enabled=False).num_conditions == 1


@pytest.mark.parametrize("name", ["flux 2 klein base", "z-image", "qwen-image"])
def test_cfg_without_a_negative_prompt_is_refused(name: str) -> None:
    marks_before = marks(name)
    with pytest.raises(DgkitError, match=r"guidance_scale=4.0 needs a negative prompt: .* guidance_scale=1.0"):
        guided(name, False, guider_of(name, True))
    assert marks(name) == marks_before


@pytest.mark.parametrize("names", [("a", "b", "b", "a"), ("a",)])
def test_a_loop_with_predictions_of_its_own_is_refused(names: tuple[str, ...]) -> None:
    """LTX-2's tells its guider of four."""
    guider = DetailGuidance(scale=W, block=1, dims=DIMS)
    block_state = BlockState(a=torch.zeros(1), b=torch.ones(1))
    guider.set_state(0, STEPS, torch.tensor(500.0))
    with pytest.raises(ModelError, match="predictions of its own beside the conditional and the unconditional one"):
        guider.prepare_inputs_from_block_state(block_state, {"encoder_hidden_states": names})
    with pytest.raises(ModelError, match="predictions of its own"):
        guider.prepare_inputs({"encoder_hidden_states": tuple(getattr(block_state, name) for name in names)})


# ----------------------------------------------------------------------------------------------------- reference images


def test_references_that_stand_elsewhere_are_refused() -> None:
    own, other = torch.randn(1, 3, 4), torch.randn(1, 2, 4)

    def in_a_loop(block_state: Any, latents: Tensor | list[Tensor]) -> int | None:
        return generated_tokens(latents)

    state = BlockState(latents=own)
    assert in_a_loop(state, torch.cat([own, other], 1)) == 3
    assert in_a_loop(state, own) is None
    assert in_a_loop(state, torch.cat([own, other], 1).bfloat16()) == 3
    assert in_a_loop(state, [own[0]]) is None and in_a_loop(BlockState(), own) is None
    with pytest.raises(ModelError, match="reference images do not stand behind"):
        in_a_loop(state, torch.cat([other, own], 1))


# --------------------------------------------------------------------------------------------------------------- caches


class SD3Transformer2DModel(diffusers.SD3Transformer2DModel):
    """One with keys and values that are kept, as Qwen-Image 2.1 has."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, kv_cache: Any = None, **others: Any) -> Any:
        return super().forward(hidden_states, timestep=timestep, **others)


@torch.no_grad()
def test_kept_keys_and_values_are_refused() -> None:
    model = SD3Transformer2DModel.from_config(tiny_models.build("sd3").config)
    before, call = state(model), tiny_models.inputs("sd3", 1)
    guider = DetailGuidance(scale=W, block=1, dims=DIMS)
    for kept in (None, [torch.zeros(1)]):
        guider.set_state(0, STEPS, torch.tensor(500.0))
        guider.prepare_models(model)
        if kept is None:
            model(**call, kv_cache=kept)
            continue
        with pytest.raises(ModelError, match="keys and values .* call it with use_kv_cache=False"):
            model(**call, kv_cache=kept)
    assert state(model) == before
