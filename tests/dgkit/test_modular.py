"""`DetailGuidance` in diffusers' modular pipelines: against Eq. 4 / Eq. 5 written out, and the ordinary pipeline."""

import gc
import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.flux2.denoise import Flux2KleinBaseLoopDenoiser
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.qwenimage.denoise import QwenImageLoopDenoiser
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser
from diffusers.modular_pipelines.z_image.denoise import ZImageLoopDenoiser
from torch import Tensor, nn

import dgkit
from dgkit import DetailGuidance
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import Every, Schedule
from dgkit.zoo import MODELS, Model, Preset
from tests.tiny_models import autoencoder, build, image_slice, inputs, pipeline, prompts, sample, streams

BLOCK, DIMS, W = 1, [2, 9], 1.5
STEPS, TOTAL = 4, 3  # of the small SD3, with three blocks


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """diffusers warns at each guider that its API is experimental."""
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("guiders", "modular_pipelines")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def modular(guider: Any, transformer: nn.Module | None = None) -> Any:
    """The real modular pipeline, without its text encoders: it is given prompt embeddings."""
    blocks = StableDiffusion3AutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    # steps print a progress bar of their own
    for step in blocks.sub_blocks["denoise"].sub_blocks.values():
        step.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    pipe = blocks.init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(
        transformer=transformer or build("sd3"), vae=autoencoder(), scheduler=scheduler, guider=guider
    )
    return pipe


def run(pipe: Any, batch: int = 2, **changes: Any) -> Tensor:
    """Final latents (B, C, H, W), from the same noise and prompts as `sample`."""
    generator = [torch.Generator().manual_seed(i) for i in range(batch)]
    call = {**prompts("sd3", batch), "num_inference_steps": STEPS, "generator": generator} | changes
    return pipe(**call, output_type="latent", output="images")


def detail(**changes: Any) -> DetailGuidance:
    return DetailGuidance(**({"scale": W, "block": BLOCK, "dims": DIMS} | changes))


def degraded(name: str, model: nn.Module, call: dict[str, Any], dims: list[int], tokens: int = 4) -> Any:
    """A full pass, the image tokens of block `BLOCK` zeroed at `dims` by a hook that knows only diffusers."""
    block, index, where = streams(name, model)[BLOCK]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        changed = (output if index is None else output[index]).clone()
        changed[:, image_slice(where, tokens), dims] = 0
        return changed if index is None else (*output[:index], changed, *output[index + 1 :])

    handle = block.register_forward_hook(hook)
    try:
        return model(**call, return_dict=False)[0]
    finally:
        handle.remove()


@torch.no_grad()
def by_hand(model: nn.Module, s: float, scales: list[float], batch: int = 2) -> Tensor:
    """Eq. 4 (s = 1) and Eq. 5 with lambda = s - 1: three naive passes and an Euler step, with w = scales[step]."""
    scheduler, given = FlowMatchEulerDiscreteScheduler(shift=3.0), prompts("sd3", batch)
    scheduler.set_timesteps(len(scales))
    sigmas = scheduler.sigmas.tolist()
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    for i, w in enumerate(scales):
        call, negative = (
            {
                "hidden_states": x,
                "timestep": scheduler.timesteps[i].expand(batch),
                "encoder_hidden_states": given[f"{kind}prompt_embeds"],
                "pooled_projections": given[f"{kind}pooled_prompt_embeds"],
            }
            for kind in ("", "negative_")
        )
        c, u, c_m = model(**call).sample, model(**negative).sample, degraded("sd3", model, call, DIMS)
        x = x + (sigmas[i + 1] - sigmas[i]) * (c + (s - 1) * (c - u) + w * (c - c_m))
    return x


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def marks(model: nn.Module) -> list[Any]:
    """What hooks and stand-ins would change."""
    return [
        (dict(module._forward_hooks), dict(module._forward_pre_hooks), sorted(vars(module)))
        for module in model.modules()
    ]


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("sharing", ["replay", "fork", "none"])
@pytest.mark.parametrize("s", [1.0, 4.0])
def test_images_follow_eq_4_and_eq_5(s: float, sharing: str) -> None:
    guider = detail(guidance_scale=s, sharing=sharing)
    pipe = modular(guider)
    before = marks(pipe.transformer)
    ours = run(pipe)
    assert distance(ours, by_hand(pipe.transformer, s, [W] * STEPS)) <= 1e-5
    assert distance(ours, by_hand(pipe.transformer, s, [0.0] * STEPS)) > 1e-2, "guidance has to change something"
    assert marks(pipe.transformer) == before
    passes = 2 if s == 1 else 3
    naive = passes * TOTAL * 2 * STEPS
    assert guider.cost.naive_block_evaluations == naive
    shared = 0 if sharing == "none" else (BLOCK + 1) * 2 * STEPS
    assert guider.cost.block_evaluations == naive - shared


@pytest.mark.parametrize("kind", ["zero", "mean", "random"])
@pytest.mark.parametrize("s", [1.0, 4.0])
def test_images_equal_those_of_the_ordinary_pipeline(s: float, kind: str) -> None:
    """Bitwise without CFG; with it the ordinary pipeline computes c and u in one batch."""
    settings = {"scale": W, "block": BLOCK, "dims": DIMS, "kind": kind, "seed": 3, "start": 0.25, "stop": 0.8}
    ordinary = pipeline("sd3")
    ours = run(modular(DetailGuidance(guidance_scale=s, **settings), ordinary.transformer))
    with dgkit.detail_guidance(ordinary, **settings) as guidance:
        theirs = sample(ordinary, "sd3", guidance_scale=s, steps=STEPS)
    assert torch.equal(ours, theirs) if s == 1 else distance(ours, theirs) <= 1e-5
    assert guidance.cost.ratio < 1
    assert distance(ours, sample(ordinary, "sd3", guidance_scale=s, steps=STEPS)) > 1e-3


def test_sharing_changes_no_image() -> None:
    images = {way: run(modular(detail(guidance_scale=4.0, sharing=way))) for way in ("replay", "none", "fork")}
    assert torch.equal(images["replay"], images["none"])
    assert distance(images["fork"], images["none"]) <= 1e-5


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_window_is_that_of_detail_guidance_and_cfg_goes_on(s: float) -> None:
    guider = detail(guidance_scale=s, start=0.3, stop=0.75)  # of 4 steps: from int(1.2) to before int(3.0)
    pipe = modular(guider)
    expected = by_hand(pipe.transformer, s, [0.0, W, W, 0.0])
    first, second = run(pipe), run(pipe)
    assert distance(first, expected) <= 1e-5
    assert torch.equal(first, second)
    plain = 1 if s == 1 else 2
    assert guider.cost.block_evaluations == 2 * 2 * (STEPS * plain * TOTAL + 2 * (TOTAL - BLOCK - 1))


SKIPPING = Schedule(Every(2, missing="extrapolate"), Every(2, 0.5, "extrapolate"))


@pytest.mark.parametrize("schedule", ["cheap", SKIPPING, Schedule(Every(2, missing="drop"), Every(None, 0.5, "drop"))])
def test_schedules_are_those_of_the_ordinary_pipeline(schedule: Any) -> None:
    settings = {"scale": W, "block": BLOCK, "dims": DIMS, "schedule": schedule}
    ordinary = pipeline("sd3")
    guider = DetailGuidance(guidance_scale=4.0, **settings)
    pipe = modular(guider, ordinary.transformer)
    ours = [run(pipe), run(pipe)]
    with dgkit.detail_guidance(ordinary, **settings) as guidance:
        for image in ours:
            assert distance(image, sample(ordinary, "sd3", guidance_scale=4.0, steps=STEPS)) <= 2e-5
    assert guider.cost == guidance.cost and guidance.cost.ratio < 0.8


def test_schedules_survive_saving_and_copying(tmp_path: Path) -> None:
    guider = detail(guidance_scale=4.0, schedule=SKIPPING)
    guider.save_pretrained(tmp_path)
    loaded, image = DetailGuidance.from_pretrained(tmp_path), run(modular(guider))
    every = {"n": 2, "missing": "extrapolate", "cosine": None}
    assert loaded.config["schedule"] == {"branch": {**every, "after": 0.0}, "uncond": {**every, "after": 0.5}}
    for other in (loaded, guider.new()):
        assert torch.equal(run(modular(other)), image)


def test_whole_run_is_guided_whatever_the_scheduler_counts() -> None:
    """Second-order schedulers take up to 2 n - 1 steps for num_inference_steps = n."""
    guider = detail(guidance_scale=4.0)
    guider.set_state(2 * STEPS - 2, STEPS, torch.tensor(1.0))
    assert guider.num_conditions == 3


def test_scale_zero_is_plain_cfg_at_its_cost() -> None:
    guider = detail(guidance_scale=4.0, scale=0.0)
    pipe = modular(guider)
    assert distance(run(pipe), by_hand(pipe.transformer, 4.0, [0.0] * STEPS)) <= 1e-5
    assert guider.cost.block_evaluations == 2 * TOTAL * 2 * STEPS


def test_disabled_is_the_conditional_prediction_alone() -> None:
    guider = detail(guidance_scale=4.0, enabled=False)
    pipe = modular(guider)
    model = pipe.transformer
    assert distance(run(pipe), by_hand(model, 1.0, [0.0] * STEPS)) <= 1e-5
    assert guider.cost.block_evaluations == 0 and guider.num_conditions == 1
    guider.enable()
    assert distance(run(pipe), by_hand(model, 4.0, [W] * STEPS)) <= 1e-5
    guider.disable()
    assert distance(run(pipe), by_hand(model, 1.0, [0.0] * STEPS)) <= 1e-5


def test_predictions_and_dtype() -> None:
    """The guider's own arithmetic, in float32: w (c - c_m) of close predictions would be lost in bfloat16."""
    pipe = modular(detail(guidance_scale=4.0))
    run(pipe, num_inference_steps=1)
    g = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 4, 8, 8, generator=g).bfloat16() for _ in range(2))
    c_m = (c * 1.01).bfloat16()
    output = pipe.guider.forward(pred_cond=c, pred_uncond=u, pred_cond_degraded=c_m)
    exact = u.double() + 4 * (c.double() - u.double()) + W * (c.double() - c_m.double())
    assert output.pred.dtype == torch.bfloat16 and output.pred_cond is c and output.pred_uncond is u
    assert torch.equal(output.pred, exact.float().bfloat16())


def test_bfloat16_runs() -> None:
    pipe = modular(detail(guidance_scale=4.0), build("sd3").to(torch.bfloat16))
    given = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in prompts("sd3", 2).items()}
    latents = run(pipe, **given)
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()


# ------------------------------------------------------------------------------------------------------ other denoisers


def state_of(name: str, batch: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Conditional and unconditional arguments of the transformer, and what the pipeline's loop holds of them."""
    call, other = inputs(name, batch), inputs(name, batch, seed=1)
    text = "cap_feats" if name == "z_image" else "encoder_hidden_states"
    negative = call | {text: other[text]}
    loop = {"num_inference_steps": STEPS, "prompt_embeds": call[text], "negative_prompt_embeds": other[text]}
    if name == "z_image":
        loop |= {"latent_model_input": call["x"], "timestep": call["t"], "dtype": torch.float32}
    elif name == "wan":
        loop |= {"latent_model_input": call["hidden_states"], "dtype": torch.float32, "attention_kwargs": None}
    elif name == "qwen_image":
        mask = "encoder_hidden_states_mask"
        loop |= {"prompt_embeds_mask": call[mask], "negative_prompt_embeds_mask": call[mask]}
        loop |= {"latent_model_input": call["hidden_states"], "timestep": 1000 * call["timestep"]}
        loop |= {"denoiser_input_fields": {"img_shapes": call["img_shapes"]}, "additional_cond_kwargs": {}}
        loop |= {"attention_kwargs": None}
    else:
        loop |= {"latents": call["hidden_states"], "latent_ids": call["img_ids"], "joint_attention_kwargs": None}
        loop |= {"txt_ids": call["txt_ids"], "negative_txt_ids": call["txt_ids"]}
    return call, negative, loop


def as_loop(name: str, prediction: Any) -> Tensor:
    """Z-Image's loop turns the transformer's list of predictions (C, 1, H, W) round."""
    return -torch.stack(prediction).squeeze(2) if name == "z_image" else prediction


@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "denoiser"),
    [
        ("z_image", ZImageLoopDenoiser),
        ("wan", WanLoopDenoiser),
        ("qwen_image", QwenImageLoopDenoiser),
        ("flux2", Flux2KleinBaseLoopDenoiser),
    ],
)
@torch.no_grad()
def test_step_of_other_modular_pipelines(name: str, denoiser: Any, s: float) -> None:
    model, batch = build(name), 2
    call, negative, loop = state_of(name, batch)
    c, u = (as_loop(name, model(**arguments, return_dict=False)[0]) for arguments in (call, negative))
    c_m = as_loop(name, degraded(name, model, call, DIMS))
    expected = c + (s - 1) * (c - u) + W * (c - c_m)
    if name == "qwen_image":  # its loop gives each token the norm that c has
        expected = expected * c.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    before = marks(model)
    guider = detail(guidance_scale=s)
    state = BlockState(**loop)
    denoiser()(SimpleNamespace(transformer=model, guider=guider), state, 0, torch.tensor(500.0))
    assert distance(state.noise_pred, expected) <= 1e-5 * float(expected.abs().max())
    assert distance(c, c_m) > 1e-4 and guider.cost.ratio < 1
    assert marks(model) == before


# ------------------------------------------------------------------------------------------------------- preset, config


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Model(
        None, "StableDiffusion3Pipeline", "SD3Transformer2DModel", TOTAL, 16, "none", 0.0,
        Preset(BLOCK, tuple(DIMS), 0.5, W, 4.0, STEPS, "made up"), dual=True,
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "small", row)


@pytest.mark.parametrize(("s", "w"), [(1.0, 0.5), (4.0, W)])
def test_what_is_left_out_comes_from_the_preset(preset: None, s: float, w: float) -> None:
    guider = DetailGuidance(guidance_scale=s)
    pipe = modular(guider)
    assert guider.dg is None
    assert distance(run(pipe), by_hand(pipe.transformer, s, [w] * STEPS)) <= 1e-5
    assert guider.dg is not None and (guider.dg.block, guider.dg.dims) == (BLOCK, DIMS)
    assert guider.config.block is None, "the config says what was given"
    assert f"block={BLOCK}, dims={DIMS}" in repr(guider)


def test_given_scale_is_used_with_and_without_cfg(preset: None) -> None:
    pipe = modular(DetailGuidance(scale=0.25))
    assert distance(run(pipe), by_hand(pipe.transformer, 1.0, [0.25] * STEPS)) <= 1e-5
    pipe.guider.guidance_scale = 4.0
    assert distance(run(pipe), by_hand(pipe.transformer, 4.0, [0.25] * STEPS)) <= 1e-5


def test_one_guider_for_two_models(preset: None) -> None:
    guider, deeper = DetailGuidance(), build("sd3", depth=4)
    pipe = modular(guider)
    first = run(pipe)
    with pytest.raises(DgkitError, match="no preset"):
        run(modular(guider, deeper))
    assert torch.equal(run(pipe), first)


def test_save_and_load(tmp_path: Path) -> None:
    guider = detail(guidance_scale=4.0, kind="random", seed=5, start=0.25, stop=0.9, sharing="none")
    guider.save_pretrained(tmp_path / "one")
    loaded = DetailGuidance.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    files = [json.loads((tmp_path / name / "guider_config.json").read_text()) for name in ("one", "two")]
    assert files[0] == files[1]
    given = {"guidance_scale": 4.0, "scale": W, "block": BLOCK, "dims": DIMS, "kind": "random", "seed": 5}
    given |= {"start": 0.25, "stop": 0.9, "schedule": "full", "sharing": "none", "enabled": True}
    assert {k: v for k, v in files[0].items() if not k.startswith("_")} == given
    assert torch.equal(run(modular(loaded)), run(modular(guider)))


def test_new_copies_and_changes() -> None:
    guider = detail(guidance_scale=4.0)
    pipe = modular(guider)
    image = run(pipe)
    pipe.update_components(guider=guider.new())
    assert pipe.guider is not guider and torch.equal(run(pipe), image)
    assert pipe.guider.cost == guider.cost, "each counts its own run"
    pipe.update_components(guider=guider.new(guidance_scale=1.0, scale=0.5))
    assert distance(run(pipe), by_hand(pipe.transformer, 1.0, [0.5] * STEPS)) <= 1e-5
    again = pipe.get_component_spec("guider").create()
    assert type(again) is DetailGuidance and again.config == pipe.guider.config


# ------------------------------------------------------------------------------------------------------ nothing is left


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(5))  # of step 1: c, its branch; u; step 2: c, its branch
@pytest.mark.parametrize("where", ["before the call", "inside a block"])
def test_no_trace_is_left_after_an_exception(where: str, call: int, error: type[BaseException]) -> None:
    pipe = modular(detail(guidance_scale=4.0))
    model, expected = pipe.transformer, run(pipe)
    module = model if where == "before the call" else model.transformer_blocks[2].norm1
    before, calls = marks(model), []

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call + 1:
            raise error("on purpose")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(error, match="on purpose"):
        run(pipe)
    handle.remove()
    assert marks(model) == before
    assert torch.equal(run(pipe), expected)
    assert marks(model) == before


@torch.no_grad()
def test_call_that_is_prepared_but_not_made() -> None:
    model, call = build("sd3"), inputs("sd3", 2)
    before, plain = marks(model), model(**call).sample
    guider = detail()
    guider.set_state(0, STEPS, torch.tensor(500.0))
    guider.prepare_models(model)
    guider.cleanup_models(model)
    assert marks(model) == before
    guider.prepare_models(model)  # an exception in the loop before the call
    guider.set_state(0, STEPS, torch.tensor(500.0))
    guider.prepare_models(model)
    assert torch.equal(model(**call).sample, plain) and marks(model) == before


def test_two_guiders_on_one_transformer() -> None:
    first = modular(detail(guidance_scale=4.0))
    second = modular(detail(scale=0.5), first.transformer)
    expected = by_hand(first.transformer, 4.0, [W] * STEPS), by_hand(first.transformer, 1.0, [0.5] * STEPS)
    for _ in range(2):
        assert distance(run(first), expected[0]) <= 1e-5
        assert distance(run(second), expected[1]) <= 1e-5


def test_guider_keeps_no_hold_of_the_transformer() -> None:
    guider = detail()
    pipe = modular(guider)
    run(pipe)
    alive = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert alive() is None


def test_blocks_may_be_exchanged_between_runs() -> None:
    pipe = modular(detail())
    model = pipe.transformer
    run(pipe)
    model.transformer_blocks[BLOCK] = build("sd3", seed=1).transformer_blocks[BLOCK]
    assert distance(run(pipe), by_hand(model, 1.0, [W] * STEPS)) <= 1e-5


def test_offloading_and_the_users_own_hooks_go_on() -> None:
    """accelerate replaces `forward`; a hook of the user counts c and u once each and not the stand-in for c_m."""
    pipe = modular(detail(guidance_scale=4.0))
    expected, calls = run(pipe), []
    add_hook_to_module(pipe.transformer, ModelHook())
    pipe.transformer.register_forward_hook(lambda m, a, o: calls.append(o))
    offloaded = vars(pipe.transformer)["forward"]
    assert torch.equal(run(pipe), expected)
    assert vars(pipe.transformer)["forward"] is offloaded
    assert len(calls) == 2 * STEPS


# ------------------------------------------------------------------------------------------------------------ bad input

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": "4"}, "guidance_scale='4' is not allowed: give a finite number"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"guidance_scale": None}, "guidance_scale=None"),
    ({"scale": -1.0}, "scale=-1.0 is not allowed: give a finite number, 0 or above$"),
    ({"scale": float("nan")}, "scale=nan"),
    ({"scale": lambda sigma: 1.0}, "scale=<function"),
    ({"scale": True}, "scale=True"),
    ({"block": "auto"}, "block='auto' is not allowed: .* dgkit.calibrate"),
    ({"block": 1.0}, "block=1.0"),
    ({"dims": "auto"}, "dims='auto' is not allowed: .* dgkit.calibrate"),
    ({"dims": torch.tensor([1])}, "dims=tensor"),
    ({"dims": [1, 2.0]}, r"dims=\[1, 2.0\]"),
    ({"seed": None}, "seed=None"),
    ({"start": 0.5, "stop": 0.5}, "start=0.5 is not allowed"),
    ({"stop": 1.5}, "stop=1.5"),
    ({"enabled": 1}, "enabled=1"),
]

BAD_FOR_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"block": TOTAL}, f"block={TOTAL} is not allowed: .* blocks 0 to {TOTAL - 1}"),
    ({"block": -1}, "block=-1"),
    ({"dims": [16]}, r"dims=\[16\] .* from 0 to 15"),
    ({"dims": []}, r"dims=\[\]"),
    ({"dims": [3, 3]}, r"dims=\[3, 3\] .* repeated"),
    ({"kind": "median"}, "kind='median'"),
    ({"sharing": "half"}, "sharing='half'"),
    ({"scale": None, "dims": None}, "scale, dims left out, but no preset"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        detail(**changes)


@pytest.mark.parametrize(("changes", "message"), BAD_FOR_THE_MODEL)
def test_bad_arguments_for_the_model_are_refused_in_the_first_step(changes: dict[str, Any], message: str) -> None:
    pipe = modular(detail(**changes))
    before = marks(pipe.transformer)
    with pytest.raises(DgkitError, match=message):
        run(pipe)
    assert marks(pipe.transformer) == before


def test_cfg_without_a_negative_prompt_is_refused() -> None:
    nothing = dict.fromkeys(("negative_prompt_embeds", "negative_pooled_prompt_embeds"))
    with pytest.raises(DgkitError, match=r"guidance_scale=4.0 needs a negative prompt: .* guidance_scale=1.0"):
        run(modular(detail(guidance_scale=4.0)), **nothing)
    pipe = modular(detail())
    assert distance(run(pipe, **nothing), by_hand(pipe.transformer, 1.0, [W] * STEPS)) <= 1e-5


def prepared(model: nn.Module) -> None:
    guider = detail()
    guider.set_state(0, STEPS, torch.tensor(500.0))
    guider.prepare_models(model)


def test_denoisers_that_cannot_be_guided() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="UNet2DConditionModel"):
        prepared(unet)
    compiled = build("sd3")
    compiled.compile()
    with pytest.raises(ModelError, match="compiled as a whole"):
        prepared(compiled)
    caching = build("cogview4")
    caching.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ModelError, match="disable_cache"):
        prepared(caching)
    caching.disable_cache()
    prepared(caching)


def test_a_transformer_that_is_guided_already() -> None:
    ordinary = pipeline("sd3")
    pipe = modular(detail(), ordinary.transformer)
    with (
        dgkit.detail_guidance(ordinary, scale=W, block=BLOCK, dims=DIMS),
        pytest.raises(ModelError, match="already guided"),
    ):
        run(pipe)
    assert distance(run(pipe), by_hand(pipe.transformer, 1.0, [W] * STEPS)) <= 1e-5


# ---------------------------------------------------------------------------------------------- diffusers' API may move


def other_set_state(self: Any, state: Any) -> None:
    pass


def other_init(self: Any, start: float = 0.0, stop: float = 1.0, enabled: bool = True) -> None:
    self._step = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.delattr(BaseGuidance, "_prepare_batch"), "_prepare_batch is gone"),
        (lambda patch: patch.delattr(BaseGuidance, "cleanup_models"), "cleanup_models is gone"),
        (lambda patch: patch.setattr(BaseGuidance, "set_state", other_set_state), "set_state .* other arguments"),
        (lambda patch: patch.setattr(BaseGuidance, "__init__", other_init), "no _enabled"),
    ],
)
def test_guiders_that_changed(
    change: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with pytest.raises(ModelError, match=rf"diffusers [\d.]+ has other guiders .*{message}"):
        detail()


def test_guiders_that_moved() -> None:
    """In a fresh process, where also nothing else of dgkit may import the guiders."""
    program = """
import sys
import dgkit.guidance
from dgkit.errors import ModelError

dgkit.guide, dgkit.guidance.detail_guidance, dgkit.load
assert not any(name.startswith("diffusers.guiders") for name in sys.modules)
for home in ("diffusers.guiders", "diffusers.guiders.guider_utils"):
    sys.modules[home] = None
    for package in (dgkit, dgkit.guidance):
        try:
            package.DetailGuidance
        except ModelError as error:
            print(error)
    del sys.modules[home]
assert dgkit.DetailGuidance is dgkit.guidance.DetailGuidance
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == 4
    assert all("has other guiders than those of 0.42" in message for message in messages)
    assert all("diffusers.guiders" in message for message in messages)


def step_of_a_loop(guider: DetailGuidance, model: nn.Module, call: dict[str, Any], *, prepare: bool) -> Any:
    guider.set_state(0, STEPS, torch.tensor(500.0))
    batches = guider.prepare_inputs({"hidden_states": call["hidden_states"]})
    for batch in batches:
        if prepare:
            guider.prepare_models(model)
        batch.noise_pred = model.forward(**call).sample  # past the module's call
        if prepare:
            guider.cleanup_models(model)
    return guider(batches)


@pytest.mark.parametrize("prepare", [True, False])
@torch.no_grad()
def test_loop_that_changed(prepare: bool) -> None:
    """Else c_m would be c, and Detail Guidance silently nothing."""
    with pytest.raises(ModelError, match="did not call the denoiser between"):
        step_of_a_loop(detail(), build("sd3"), inputs("sd3", 1), prepare=prepare)


def test_loop_that_makes_more_predictions() -> None:
    model, guider = build("sd3"), detail()
    guider.set_state(0, STEPS, torch.tensor(500.0))
    for _ in range(2):
        guider.prepare_models(model)
        guider.cleanup_models(model)
    with pytest.raises(ModelError, match="more predictions"):
        guider.prepare_models(model)
