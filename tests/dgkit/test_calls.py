"""What belongs to a call or run stays with it: pipelines that share a transformer, threads, copies, steps, classes."""

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

import dgkit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import CFG, DG, PAG, CFGPlusPlus, guide
from tests.tiny_models import CLASSES, build, inputs, pipeline, prompts, sample


def twins(name: str) -> tuple[Any, Any]:
    """Two pipelines around one transformer, each with a scheduler of its own."""
    first = pipeline(name)
    parts = first.components | {"scheduler": type(first.scheduler).from_config(first.scheduler.config)}
    second = type(first)(**parts)
    second.set_progress_bar_config(disable=True)
    return first, second


def guided(pipe: Any, w: float, **options: Any) -> AbstractContextManager[Any]:
    return dgkit.detail_guidance(pipe, scale=w, block=1, dims=[2, 5], **options)


@contextmanager
def slow_blocks(model: nn.Module) -> Iterator[None]:
    """Every block lets other threads run before it."""
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(lambda module, args: time.sleep(0.002)).remove)
        yield


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each run in a thread of its own, all at the same time."""
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --------------------------------------------------------------------------------------- two pipelines, one transformer


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "guided, plain": (lambda pipe: guided(pipe, 1.0), lambda pipe: nullcontext()),
    "guided, guided otherwise": (lambda pipe: guided(pipe, 1.0), lambda pipe: guided(pipe, 3.0, sharing="none")),
    "perturbed attention, guided": (lambda pipe: guide(pipe, PAG(scale=1.0)), lambda pipe: guided(pipe, 1.0)),
    "fork, replay": (lambda pipe: guided(pipe, 1.0, sharing="fork"), lambda pipe: guided(pipe, 3.0)),
    "disrupted in part, plain": (
        lambda pipe: dgkit.disrupt(pipe, block=0, dims=[3], start=0.5),
        lambda pipe: nullcontext(),
    ),
    "disrupted, disrupted otherwise": (
        lambda pipe: dgkit.disrupt(pipe, block=0, dims=[3]),
        lambda pipe: dgkit.disrupt(pipe, block=1, dims=[4], stop=0.5),
    ),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_threads_do_not_mix(way: str, name: str) -> None:
    first, second = twins(name)
    runs = [
        lambda: sample(first, name, guidance_scale=4.0, steps=4, seed=1),
        lambda: sample(second, name, guidance_scale=3.0, steps=3, seed=2, batch=1),
    ]
    expected = []
    for pipe, enter, run in zip((first, second), WAYS[way], runs, strict=True):
        with enter(pipe):
            expected.append(run())
    with WAYS[way][0](first), WAYS[way][1](second), slow_blocks(first.transformer):
        found = at_once(*runs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], sample(first, name, guidance_scale=4.0, steps=4, seed=1))


@pytest.mark.parametrize("name", CLASSES)
def test_threads_are_recorded_apart(name: str) -> None:
    first, second = twins(name)

    def run(pipe: Any, seed: int) -> Tensor:
        return sample(pipe, name, guidance_scale=4.0, seed=seed)

    alone = []
    for seed, pipe in enumerate((first, second)):
        with dgkit.record(pipe) as trace:
            run(pipe, seed)
        alone.append(trace)
    with dgkit.record(first) as one, dgkit.record(second) as two, slow_blocks(first.transformer):
        at_once(lambda: run(first, 0), lambda: run(second, 1))
    for trace, expected in zip((one, two), alone, strict=True):
        for label in ("cond", "uncond"):
            torch.testing.assert_close(trace.mean_abs(label), expected.mean_abs(label), rtol=1e-9, atol=0)
            torch.testing.assert_close(trace.gates(label), expected.gates(label), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_runs_inside_one_another_and_by_turns(name: str) -> None:
    """The same methods on both: what they keep of a run, such as a direction for later steps, is of that run alone."""
    first, second = twins(name)
    inner: list[Tensor] = []

    def run(pipe: Any, s: float, preview: bool = False) -> Tensor:
        def nested(*args: Any) -> dict[str, Any]:
            inner.append(run(second, 3.0))
            return {}

        calls = [0]

        def after(module: nn.Module, args: Any, output: Any) -> None:  # DiT's pipeline has no callback
            calls[0] += 1
            if preview and calls[0] == 2:
                handle.remove()
                nested()

        handle = pipe.vae.register_forward_hook(lambda *a: None)
        if preview and name == "dit":
            handle = pipe.transformer.register_forward_hook(after)
            preview_options: dict[str, Any] = {}
        else:
            preview_options = {"callback_on_step_end": nested} if preview else {}
        scale = {"true_cfg_scale" if name == "flux" else "guidance_scale": s}
        try:
            return pipe(
                **prompts(name, 2), **scale, **preview_options, num_inference_steps=4,
                generator=[torch.Generator().manual_seed(i) for i in range(2)],
                output_type="pt" if name == "dit" else "latent",
            ).images  # fmt: skip
        finally:
            handle.remove()

    method = DG(scale=1.0, block=1, dims=[2], schedule=dgkit.guidance.Schedule(dgkit.guidance.Every(3)))
    expected = []
    for pipe, s in ((first, 4.0), (second, 3.0)):
        with guide(pipe, method):
            expected.append(run(pipe, s))
    with guide(first, method), guide(second, method):
        assert torch.equal(run(first, 4.0, preview=True), expected[0])
        assert inner and all(torch.equal(image, expected[1]) for image in inner)
        for _ in range(2):
            assert torch.equal(run(first, 4.0), expected[0]) and torch.equal(run(second, 3.0), expected[1])


def test_entering_the_same_guidance_twice() -> None:
    pipe = pipeline("sd3")
    guidance = guided(pipe, 1.0)
    with guidance:
        expected = sample(pipe, "sd3")
    with guidance as again:
        assert torch.equal(sample(pipe, "sd3"), expected)
        with pytest.raises(ModelError, match="already guided"), guidance:
            pass
        assert torch.equal(sample(pipe, "sd3"), expected)
    assert again.cost.block_evaluations > 0 and not pipe.transformer._forward_hooks


def test_the_transformer_by_hand_inside_a_pipelines_guidance_is_refused() -> None:
    pipe = pipeline("sd3")
    with guided(pipe, 1.0), pytest.raises(ModelError, match="called outside its pipeline"):
        pipe.transformer(**inputs("sd3", 2))
    assert not pipe.transformer._forward_hooks


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_without_dgkit(name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    pipe, call = pipeline(name), inputs(name, 2)
    sample(pipe, name, steps=1)  # diffusers' own attributes come with the first run
    before = [sorted(vars(module)) for module in pipe.transformer.modules()]
    with torch.no_grad():
        plain = pipe.transformer(**call)[0]
    with guided(pipe, 1.0), dgkit.record(pipe) as trace, dgkit.disrupt(pipe.transformer, block=0, dims=[1]):
        sample(pipe, name, steps=1)
        copied = make(pipe.transformer)
        seen = trace.mean_abs().clone()
        with torch.no_grad():
            assert torch.equal(copied(**call)[0], plain)
        assert torch.equal(trace.mean_abs(), seen)
    assert [sorted(vars(module)) for module in copied.modules()] == before
    for module in copied.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert [sorted(vars(module)) for module in pipe.transformer.modules()] == before


def test_copies_keep_the_hooks_of_others() -> None:
    model = build("sd3")
    model.transformer_blocks[0].register_forward_hook(torch.nn.Identity())
    with dgkit.disrupt(model, block=0, dims=[1]):
        copied = copy.deepcopy(model)
    assert len(copied.transformer_blocks[0]._forward_hooks) == 1


# ---------------------------------------------------------------------------------------------------------------- steps


SCHEDULES: dict[str, tuple[str, Any, int]] = {
    "Euler": ("sd3", FlowMatchEulerDiscreteScheduler(), 6),
    "Heun": ("sd3", FlowMatchHeunDiscreteScheduler(), 5),
    "two calls": ("flux", FlowMatchEulerDiscreteScheduler(), 5),
    "DDIM": ("dit", DDIMScheduler(), 6),
    "PNDM": ("dit", PNDMScheduler(), 6),
    "PNDM with Runge-Kutta": ("dit", PNDMScheduler(skip_prk_steps=False), 6),
    "PNDM, shortened": ("dit", PNDMScheduler(skip_prk_steps=True), 7),
    "DPM-Solver": ("dit", DPMSolverMultistepScheduler(), 6),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.5, 1.0), (0.34, 0.67)])
def test_a_part_of_the_steps_is_counted_in_timesteps(kind: str, start: float, stop: float) -> None:
    """Also where timesteps repeat: by counting the calls of the transformer, one (Flux: two) for each timestep."""
    name, scheduler, steps = SCHEDULES[kind]
    pipe = pipeline(name)
    pipe.scheduler = scheduler
    calls: list[int] = []
    edited: list[bool] = []

    def before(module: nn.Module, args: Any) -> None:
        calls.append(len(calls))

    def note(module: nn.Module, args: Any, output: Any) -> None:
        image = output[1] if isinstance(output, tuple) else output
        edited.append(bool((image[..., 2] == 0).all()))

    first = pipe.transformer.register_forward_pre_hook(before)
    with dgkit.disrupt(pipe, block=0, dims=[2], start=start, stop=stop):
        last = pipe.transformer.transformer_blocks[0].register_forward_hook(note)
        sample(pipe, name, guidance_scale=4.0, steps=steps)
    first.remove()
    last.remove()
    count = len(pipe.scheduler.timesteps)
    per_step = 2 if name == "flux" else 1
    assert len(calls) == count * per_step
    expected = [int(start * count) <= call // per_step < int(stop * count) for call in range(len(calls))]
    assert edited == expected and any(expected) and not all(expected)


@pytest.mark.parametrize("clipping", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_cfg_plus_plus_refuses_clipping(clipping: dict[str, bool]) -> None:
    """DDIM's own step then changes x0, which the formula for the prediction does not know."""
    pipe = pipeline("dit")
    pipe.scheduler = DDIMScheduler(**clipping)
    with pytest.raises(ModelError, match="without clipping"), guide(pipe, CFGPlusPlus()):
        sample(pipe, "dit", guidance_scale=4.0)


def test_cfg_switched_off_after_the_methods_part() -> None:
    """By a callback, as users do to save the unconditional passes of the second half."""
    pipe = pipeline("sd3")
    texts = ["prompt_embeds", "pooled_prompt_embeds"]

    def switch_off(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
        return {k: v[len(v) // 2 :] for k, v in kwargs.items()} if step == 1 else {}

    def run() -> Tensor:
        return pipe(
            **prompts("sd3", 1), guidance_scale=4.0, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=switch_off,
            callback_on_step_end_tensor_inputs=texts,
        ).images  # fmt: skip

    plain = run()
    with guide(pipe, CFG(scale=4.0, stop=0.5)):
        torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-5)
    with guide(pipe, CFG(scale=4.0)), pytest.raises(DgkitError, match="cfg takes the place of CFG, which is off"):
        run()


# -------------------------------------------------------------------------------------------------------------- classes


class Batching(FluxPipeline):
    """As people write it: true CFG in one call on a doubled batch."""

    @torch.no_grad()
    def __call__(self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, pooled: Tensor, steps: int = 3) -> Tensor:  # type: ignore[override]
        self.scheduler.set_timesteps(steps, mu=1.0)
        latents = torch.randn(len(prompt_embeds), 16, 16, generator=torch.Generator().manual_seed(0))
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        for _, t in enumerate(self.scheduler.timesteps):
            velocity = self.transformer(
                torch.cat([latents, latents]), text, torch.cat([pooled, pooled]), t.expand(len(text)) / 1000,
                img_ids=self._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
                txt_ids=torch.zeros(text.shape[1], 3), return_dict=False,
            )[0]  # fmt: skip
            u, c = velocity.chunk(2)
            latents = self.scheduler.step(u + 4.0 * (c - u), t, latents, return_dict=False)[0]
        return latents


def batching() -> tuple[Any, dict[str, Tensor]]:
    pipe = pipeline("flux")
    given = prompts("flux", 2)
    call = {"prompt_embeds": given["prompt_embeds"], "negative_prompt_embeds": given["negative_prompt_embeds"]}
    return Batching(**pipe.components), call | {"pooled": given["pooled_prompt_embeds"]}


def test_a_subclass_with_a_call_of_its_own_has_to_say_how_it_runs_cfg() -> None:
    pipe, call = batching()
    for context in (guided(pipe, 1.0), dgkit.record(pipe)):
        with pytest.raises(ModelError, match="how Batching runs classifier-free guidance.*cfg='uncond, cond'"), context:
            pipe(**call)
    assert not pipe.transformer._forward_hooks
    with dgkit.record(pipe, cfg="uncond, cond") as trace:
        plain = pipe(**call)
    assert trace.labels == ["uncond", "cond"]
    with guided(pipe, 1.0, cfg="uncond, cond", sharing="none"):
        expected = pipe(**call)
    with guided(pipe, 1.0, cfg="uncond, cond") as guidance:
        assert torch.equal(pipe(**call), expected) and not torch.equal(expected, plain)
    blocks = len(dgkit.dissect(pipe).blocks)
    assert guidance.cost.block_evaluations == 3 * (4 * blocks + 2 * (blocks - 2))


def test_a_subclass_that_hands_on_to_the_call_above_needs_to_say_nothing() -> None:
    class Polite(StableDiffusion3Pipeline):
        def __call__(self, **call: Any) -> Any:
            return super().__call__(**call)

    pipe = pipeline("sd3")
    with guided(pipe, 1.0):
        expected = sample(pipe, "sd3", guidance_scale=4.0)
    pipe.__class__ = Polite
    with guided(pipe, 1.0), dgkit.record(pipe) as trace:
        assert torch.equal(sample(pipe, "sd3", guidance_scale=4.0), expected)
    assert set(trace.labels) == {"cond", "uncond", "degraded"}


def test_a_null_class_asked_for_is_no_cfg() -> None:
    """Two images of equal noise without CFG, the second of the null class: both are conditional."""
    pipe = pipeline("dit")
    call = {"class_labels": [3, 1000], "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "pt"}

    def run() -> Tensor:
        return pipe(**call, generator=[torch.Generator().manual_seed(0) for _ in range(2)]).images

    with dgkit.record(pipe) as trace:
        run()
    assert trace.labels == ["cond"]
    with guided(pipe, 1.0):
        both = run()
    call["class_labels"] = [1000, 3]
    with guided(pipe, 1.0):
        assert torch.equal(run().flip(0), both)


@pytest.mark.parametrize("cfg", ["", "both", "cond,uncond", 3, ["cond"]])
def test_bad_cfg(cfg: Any) -> None:
    pipe = pipeline("sd3")
    for context in (guided(pipe, 1.0, cfg=cfg), dgkit.record(pipe, cfg=cfg), dgkit.record(pipe.transformer, cfg=cfg)):
        with pytest.raises(DgkitError, match="cfg=.* is not allowed: use one of uncond, cond"), context:
            pass


@pytest.mark.parametrize("transformer", ["transformer_2", "vae", ""])
def test_a_transformer_that_the_pipeline_lacks(transformer: str) -> None:
    pipe = pipeline("sd3")
    with pytest.raises(ModelError, match="expected a diffusers pipeline"), dgkit.record(pipe, transformer=transformer):
        pass


def test_the_calls_own_way_of_dit() -> None:
    """`DiTPipeline` counts no steps and doubles its latents for good: what the reader says of each call."""
    pipe: DiTPipeline = pipeline("dit")
    with dgkit.record(pipe) as trace:
        sample(pipe, "dit", guidance_scale=4.0)
        sample(pipe, "dit", guidance_scale=1.0)
    images = {label: sum(float(cell.images[0]) for cell in trace._select(label, None)) for label in trace.labels}
    assert images == {"cond": 12.0, "uncond": 6.0}
