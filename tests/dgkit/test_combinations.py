"""Guidance together with what else people do to a pipeline, and that nothing is left on it afterwards.

Two references that do not share code with dgkit's engine: the images of the same pipeline without the combination, and
`plain_hooks`, one more full pass per conditional call.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    PyramidAttentionBroadcastConfig,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

import dgkit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import APG, CFG, DG, METHODS, PAG
from tests.tiny_models import CLASSES, TEXT, autoencoder, inputs, pipeline, prompts, sample

W, BLOCK, DIMS = 1.5, 1, [2, 9]
SHARING = ("replay", "fork", "none")


def guided(pipe: Any, **options: Any) -> Any:
    return dgkit.detail_guidance(pipe, **({"scale": W, "block": BLOCK, "dims": DIMS} | options))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]


def zeroing(block: nn.Module, dims: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        image = (output[1] if isinstance(output, tuple) else output).clone()
        image[..., dims] = 0
        return (output[0], image) if isinstance(output, tuple) else image

    return block.register_forward_hook(hook)


@contextmanager
def plain_hooks(pipe: Any, name: str, with_cfg: bool, block: int = BLOCK, w: float = W) -> Iterator[None]:
    """Eq. 4 and Eq. 5 by one hook that repeats each conditional call as a whole; w (c - c_m) goes to both halves."""
    model, kept = pipe.transformer, {"calls": 0, "busy": False}

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kept["busy"]:
            return None
        sample, count = output[0], len(output[0])
        unconditional = name == "flux" and with_cfg and kept["calls"] % 2 == 1
        kept["calls"] += 1
        if not unconditional:
            handle, kept["busy"] = zeroing(blocks_of(model)[block], DIMS), True
            try:
                added = w * (sample.float() - model(*args, **kwargs)[0].float())
            finally:
                handle.remove()
                kept["busy"] = False
            if with_cfg and name == "sd3":
                added = added[count // 2 :].repeat(2, 1, 1, 1)
            if with_cfg and name == "dit":
                added = added[: count // 2].repeat(2, 1, 1, 1)
            if name == "dit":
                added[:, 4:] = 0  # the learned sigma
            kept["added"] = added
        result = (sample.float() + kept["added"]).to(sample.dtype)
        return (result,) if isinstance(output, tuple) else type(output)(sample=result)

    handle = model.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
)


def state(model: nn.Module, renewed: bool = False) -> list[Any]:
    """What guidance could leave behind on each module: attributes, forward, hooks, compiled call, diffusers' hooks.

    With `renewed`, offloading renews the instance's forward after each call, so that only what made it is compared.
    """

    def forward(module: nn.Module) -> Any:
        own = module.__dict__.get("forward")
        return getattr(own, "func", own).__qualname__ if own is not None and renewed else id(own)

    return [
        (
            name,
            sorted(module.__dict__),
            forward(module),
            [[(key, id(hook)) for key, hook in getattr(module, hooks).items()] for hooks in HOOKS],
            id(module._compiled_call_impl),
            list(module._diffusers_hook.hooks) if hasattr(module, "_diffusers_hook") else None,
            type(getattr(module, "_hf_hook", None)).__name__,
            module.training,
        )
        for name, module in model.named_modules()
    ]


@contextmanager
def no_trace(pipe: Any, name: str, renewed: bool = False, s: float = 4.0) -> Iterator[None]:
    """Outputs and state of the pipeline are bitwise the same before and after; it is run before, for lazy set-up."""
    plain = sample(pipe, name, guidance_scale=s, steps=2)
    before = state(pipe.transformer, renewed)
    yield
    assert state(pipe.transformer, renewed) == before
    assert torch.equal(sample(pipe, name, guidance_scale=s, steps=2), plain)
    assert state(pipe.transformer, renewed) == before


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


# ------------------------------------------------------------------------------------- the two references against dgkit


@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize("name", CLASSES)
def test_plain_hooks_are_detail_guidance(name: str, s: float) -> None:
    pipe = pipeline(name)
    plain = sample(pipe, name, guidance_scale=s)
    with plain_hooks(pipe, name, s > 1):
        expected = sample(pipe, name, guidance_scale=s)
    with guided(pipe):
        assert distance(sample(pipe, name, guidance_scale=s), expected) <= 1e-5 < 1e-4 < distance(plain, expected)


# ---------------------------------------------------------------------------------------------------------- offloading


def group_offload(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), **options)


def sequential_offload(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload`, which accelerate cannot do on the CPU without the buffers.

    Weights are on "meta" until their layer runs.
    """
    for model in (pipe.vae, pipe.transformer):
        cpu_offload(model, "cpu", offload_buffers=True)


OFFLOADING: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential_offload,
    "blocks": lambda pipe: group_offload(pipe, offload_type="block_level", num_blocks_per_group=1),
    "groups of blocks": lambda pipe: group_offload(pipe, offload_type="block_level", num_blocks_per_group=3),
    "leaves": lambda pipe: group_offload(pipe, offload_type="leaf_level"),
}


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("way", OFFLOADING)
def test_offloading(way: str, name: str, weights_leave: None) -> None:
    reference, pipe = pipeline(name), pipeline(name)
    OFFLOADING[way](pipe)
    with no_trace(pipe, name, renewed=way == "model"):
        for sharing in SHARING:
            with guided(reference, sharing=sharing):
                expected = sample(reference, name, guidance_scale=4.0, steps=2)
            with guided(pipe, sharing=sharing):
                for _ in range(2 if sharing == "replay" else 1):  # offloading renews its hooks after each run
                    assert torch.equal(sample(pipe, name, guidance_scale=4.0, steps=2), expected), sharing


@pytest.mark.parametrize("way", ["sequential", "groups of blocks"])
def test_offloading_with_every_kind_of_branch(way: str, weights_leave: None) -> None:
    name = "sd3"
    reference, pipe = pipeline(name), pipeline(name)
    OFFLOADING[way](pipe)
    with no_trace(pipe, name):
        for method in ("pag", "slg", "tpg", "block-drop"):
            with dgkit.guidance.guide(reference, METHODS[method](scale=1.0)):
                expected = sample(reference, name, guidance_scale=4.0, steps=2)
            with dgkit.guidance.guide(pipe, METHODS[method](scale=1.0)):
                assert torch.equal(sample(pipe, name, guidance_scale=4.0, steps=2), expected), method


# ------------------------------------------------------------------------------------------ weights, precision, kernels


class LowRank(nn.Module):
    """What a LoRA does to a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(5)
        self.down = nn.Parameter(0.3 * torch.randn(2, layer.in_features, generator=generator))
        self.up = nn.Parameter(0.3 * torch.randn(layer.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def add_lora(pipe: Any) -> None:
    for block in blocks_of(pipe.transformer):
        block.attn.to_q = LowRank(block.attn.to_q)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "LoRA": add_lora,
    "attention backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "gradient checkpointing": lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
}


@pytest.fixture
def attention_backend_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers sets it for all models."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


CHANGED = [(change, "flux") for change in CHANGES] + [
    # SD3's own attention knows no backends, and fused projections fail in its dual attention
    (change, "sd3")
    for change in CHANGES
    if change not in ("attention backend", "fused projections")
]


@pytest.mark.parametrize(("change", "name"), CHANGED)
def test_changed_models_are_guided_as_by_plain_hooks(
    change: str, name: str, attention_backend_comes_back: None
) -> None:
    pipe = pipeline(name)
    CHANGES[change](pipe)
    with plain_hooks(pipe, name, True):
        expected = sample(pipe, name, guidance_scale=4.0, steps=2)
    with no_trace(pipe, name):
        for sharing in SHARING:
            with guided(pipe, sharing=sharing):
                assert distance(sample(pipe, name, guidance_scale=4.0, steps=2), expected) <= 1e-5, sharing
    assert distance(sample(pipe, name, guidance_scale=4.0, steps=2), expected) > 1e-4


def test_perturbed_attention_needs_the_native_attention(attention_backend_comes_back: None) -> None:
    pipe = pipeline("flux")
    with dgkit.guidance.guide(pipe, PAG(scale=1.0)):
        expected = sample(pipe, "flux", steps=2)
    pipe.transformer.set_attention_backend("_native_math")
    with no_trace(pipe, "flux"), dgkit.guidance.guide(pipe, PAG(scale=1.0)):
        assert distance(sample(pipe, "flux", steps=2), expected) <= 1e-5
    pipe.transformer.set_attention_backend("flex")
    with (
        pytest.raises(ModelError, match="use the native attention backend"),
        dgkit.guidance.guide(pipe, PAG(scale=1.0)),
    ):
        sample(pipe, "flux", steps=1)


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_pipelines(name: str) -> None:
    """Latents and prediction stay bfloat16; the direction is as close to float32 as the plain prediction is."""
    half, full = pipeline(name), pipeline(name)
    half.to(torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    half.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: dtypes.add((args[0] if args else kwargs["hidden_states"]).dtype), with_kwargs=True
    )
    given = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in prompts(name, 2).items()}

    def run(pipe: Any, **call: Any) -> Tensor:
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(**call, num_inference_steps=2, generator=generator, output_type="pt").images

    plain, plain_half = run(full, **prompts(name, 2)), run(half, **given)
    for sharing in SHARING:
        with guided(full, sharing=sharing):
            exact = run(full, **prompts(name, 2))
        with guided(half, sharing=sharing):
            rounded = run(half, **given)
        assert rounded.dtype == plain_half.dtype and dtypes == {torch.bfloat16}
        assert distance(rounded, exact) <= max(3 * distance(plain_half, plain), 0.02)
        assert distance(rounded, plain_half) > 2 * distance(rounded, exact)


@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_pass_through_guidance_but_not_through_checkpointing(sharing: str) -> None:
    """The transformer called by hand, with gradients on."""
    gradients = []
    for references in (True, False):
        pipe, call = pipeline("sd3"), inputs("sd3", 2)
        pipe._guidance_scale = 1.0
        call["hidden_states"].requires_grad_()
        with plain_hooks(pipe, "sd3", False) if references else guided(pipe.transformer, sharing=sharing):
            pipe.transformer(**call).sample.square().sum().backward()
        gradients.append(call["hidden_states"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(ModelError, match="gradient checkpointing"), guided(pipe.transformer, sharing=sharing):
        pipe.transformer(**call)
    assert not pipe.transformer._forward_hooks


# ------------------------------------------------------------------------------------------------------ compiled blocks


class Counting:
    """A backend of torch.compile that runs the traced graph as it is and counts the compilations."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def compile_in_place(model: nn.Module, backend: Any) -> None:
    for block in blocks_of(model):
        block.compile(backend=backend)


def compile_wrapped(model: nn.Module, backend: Any) -> None:
    for blocks in (model.transformer_blocks, getattr(model, "single_transformer_blocks", [])):
        for i in range(len(blocks)):
            blocks[i] = torch.compile(blocks[i], backend=backend)


COMPILING: dict[str, Callable[[nn.Module, Any], None]] = {
    "in place": compile_in_place,
    "wrapped": compile_wrapped,
    "repeated": lambda model, backend: model.compile_repeated_blocks(backend=backend, fullgraph=True),
}


@pytest.mark.parametrize(("way", "name"), [("in place", "dit"), ("wrapped", "sd3"), ("repeated", "flux")])
def test_blocks_compiled_before(way: str, name: str) -> None:
    torch._dynamo.reset()
    reference, pipe, backend = pipeline(name), pipeline(name), Counting()
    COMPILING[way](pipe.transformer, backend)
    with no_trace(pipe, name, s=1.0):
        plain = backend.count
        for sharing in SHARING:
            with guided(reference, sharing=sharing):
                expected = sample(reference, name, guidance_scale=1.0, steps=2)
            with guided(pipe, sharing=sharing):
                sample(pipe, name, guidance_scale=1.0, steps=1)
                once = backend.count
                result = sample(pipe, name, guidance_scale=1.0, steps=2)
            assert distance(result, expected) <= 1e-5, sharing
            assert backend.count == once, "more steps compile nothing more"
        assert plain < backend.count <= 2 * plain, "once more for the larger batch of fork"


def test_record_of_compiled_blocks() -> None:
    """All passes and blocks are seen; the gates inside compiled blocks are not."""
    torch._dynamo.reset()
    pipe = pipeline("dit")
    with guided(pipe), dgkit.record(pipe) as expected:
        sample(pipe, "dit", steps=2)
    compile_in_place(pipe.transformer, "eager")
    sample(pipe, "dit", steps=1)
    with guided(pipe), dgkit.record(pipe) as trace:
        sample(pipe, "dit", steps=2)
    for label in ("cond", "degraded"):
        torch.testing.assert_close(trace.mean_abs(label), expected.mean_abs(label), equal_nan=True)
    assert trace.labels == expected.labels and trace.num_gates_seen() == 0 < expected.num_gates_seen()


def test_blocks_compiled_inside() -> None:
    torch._dynamo.reset()
    reference, pipe, backend = pipeline("dit"), pipeline("dit"), Counting()
    plain = sample(pipe, "dit", steps=2)
    with guided(reference):
        expected = sample(reference, "dit", steps=2)
    with guided(pipe):
        assert torch.equal(sample(pipe, "dit", steps=2), expected)
        compile_in_place(pipe.transformer, backend)
        assert distance(sample(pipe, "dit", steps=2), expected) <= 1e-5
        once = backend.count
        sample(pipe, "dit", steps=3)
    assert 0 < backend.count == once
    assert distance(sample(pipe, "dit", steps=2), plain) <= 1e-5
    with guided(reference, dims=[4]):
        expected = sample(reference, "dit", steps=2)
    with guided(pipe, dims=[4]):
        assert distance(sample(pipe, "dit", steps=2), expected) <= 1e-5, "what was traced before does not stay"


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_transformer_compiled_inside_is_refused(way: str) -> None:
    pipe = pipeline("sd3")
    model = pipe.transformer
    with pytest.raises(ModelError, match="compiled or exchanged inside guidance"), guided(pipe):
        sample(pipe, "sd3", steps=1)
        if way == "wrapped":
            pipe.transformer = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
        sample(pipe, "sd3", steps=1)
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


# --------------------------------------------------------------------------------------------------- diffusers' caches


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "attention": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "Taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_are_refused(kind: str) -> None:
    """They keep blocks' outputs from pass to pass, and would take a branch for a sampling step."""
    pipe = pipeline("flux")
    pipe.transformer.enable_cache(CACHES[kind])
    with pytest.raises(ModelError, match="disable_cache"), guided(pipe):
        pass
    pipe.transformer.disable_cache()
    with guided(pipe):
        sample(pipe, "flux", steps=1)
        pipe.transformer.enable_cache(CACHES[kind])
        with pytest.raises(ModelError, match="disable_cache"):
            sample(pipe, "flux", steps=1)
    assert not pipe.transformer._forward_hooks


# ------------------------------------------------------------------------------------- several pipelines, several runs


def test_another_pipeline_with_the_same_transformer_is_left_alone() -> None:
    """Whatever its CFG, and also when it is called from the guided pipeline's callback."""
    first = pipeline("sd3")
    second = StableDiffusion3Pipeline(**first.components)
    second.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    second.set_progress_bar_config(disable=True)
    plain = {s: sample(second, "sd3", guidance_scale=s) for s in (1.0, 4.0)}
    between: list[Tensor] = []

    def preview(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        between.append(sample(second, "sd3", guidance_scale=4.0))
        return kwargs

    with no_trace(first, "sd3"):
        with guided(first):
            expected = sample(first, "sd3", guidance_scale=4.0)
        with guided(first) as guidance:
            for s in (1.0, 4.0):
                assert torch.equal(sample(second, "sd3", guidance_scale=s), plain[s])
            assert guidance.cost.block_evaluations == 0
            assert torch.equal(run(first, "sd3", callback_on_step_end=preview), expected)
        assert torch.equal(sample(second, "sd3", guidance_scale=4.0), plain[4.0])
    assert len(between) == 3 and all(torch.equal(image, plain[4.0]) for image in between)
    with guided(second):
        assert torch.equal(sample(second, "sd3", guidance_scale=4.0), expected)


def run(pipe: Any, name: str, s: float = 4.0, batch: int = 2, **options: Any) -> Tensor:
    """`sample` with other arguments of the pipeline."""
    scale = {"true_cfg_scale" if name == "flux" else "guidance_scale": s}
    count = batch * options.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    call = {"num_inference_steps": 3, "output_type": "pt" if name == "dit" else "latent", "generator": generator}
    return pipe(**(prompts(name, batch) | scale | call | options))[0]


@pytest.mark.parametrize("sharing", ["replay", "fork"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_runs_of_every_kind_one_after_the_other(name: str, sharing: str) -> None:
    """None leaves anything for the next, whatever its batch, CFG, number of images, or an interrupt."""

    def interrupt(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return kwargs

    runs: list[dict[str, Any]] = [
        {"s": 4.0, "batch": 2},
        {"s": 1.0, "batch": 1, "callback_on_step_end": interrupt},
        {"s": 1.0, "batch": 3, "return_dict": False},
        {"s": 4.0, "batch": 1},
    ]
    if name == "flux":  # StableDiffusion3Pipeline does not repeat the pooled embeddings it is given
        runs.append({"s": 4.0, "batch": 1, "num_images_per_prompt": 2})
    pipe = pipeline(name)
    with no_trace(pipe, name), guided(pipe, sharing=sharing):
        results = [run(pipe, name, **options) for options in runs]
    for options, result in zip(runs, results, strict=True):
        with plain_hooks(pipe, name, options["s"] > 1):
            assert distance(result, run(pipe, name, **options)) <= 1e-5, options


def test_same_latents_twice_in_one_step() -> None:
    """Flux' unconditional call is known by its latents being those of the call before, but here it is a second run."""
    pipe = pipeline("flux")
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    runs = [prompts("flux", 2, seed) | {"latents": latents, "num_inference_steps": 1} for seed in (0, 1)]
    with plain_hooks(pipe, "flux", False):
        expected = [run(pipe, "flux", s=1.0, **options) for options in runs]
    with guided(pipe):
        results = [run(pipe, "flux", s=1.0, **options) for options in runs]
    assert all(distance(*pair) <= 1e-5 for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("method", ["apg", "dg"])
def test_memory_ends_with_the_run(method: str) -> None:
    """An interrupted run, then one that starts at a lower noise level, as image-to-image does."""
    if method == "apg":
        chosen = APG(scale=3.0, norm=2.0)
    else:
        chosen = DG(scale=W, block=BLOCK, dims=DIMS, schedule=dgkit.guidance.Schedule(dgkit.guidance.Every(10)))
    late = {"sigmas": [0.5, 0.3, 0.1]}
    pipe = pipeline("flux")

    def stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> Any:
        raise KeyboardInterrupt

    with dgkit.guidance.guide(pipe, chosen):
        expected = run(pipe, "flux", **late)
    with dgkit.guidance.guide(pipe, chosen):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, "flux", callback_on_step_end=stop)
        assert torch.equal(run(pipe, "flux", **late), expected)


def test_cfg_that_is_off_is_noticed_after_one_step() -> None:
    pipe = pipeline("flux")
    with pytest.raises(DgkitError, match="cfg takes the place of CFG, which is off"):  # noqa: SIM117
        with dgkit.guidance.guide(pipe, CFG()):
            run(pipe, "flux", s=1.0, num_inference_steps=1)
    assert not pipe.transformer._forward_hooks


# ---------------------------------------------------------------------------------------------- exceptions of all kinds


def in_pass(model: nn.Module, number: int, error: type[BaseException]) -> Any:
    """Raise at the start of the last block's `number`-th call."""
    calls = [0]

    def hook(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise error

    return blocks_of(model)[-1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("way", ["plain", *OFFLOADING, "compiled"])
def test_exceptions_leave_no_trace_and_no_trap(way: str, weights_leave: None) -> None:
    """Raised in an ordinary pass, in a branch's, and in the callback; the next run inside the `with` is right again."""
    pipe, reference = pipeline("sd3"), pipeline("sd3")
    if way == "compiled":
        torch._dynamo.reset()
        compile_in_place(pipe.transformer, "eager")
    elif way != "plain":
        OFFLOADING[way](pipe)
    with guided(reference):
        expected = sample(reference, "sd3", guidance_scale=4.0, steps=2)

    def stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> Any:
        raise ZeroDivisionError

    with no_trace(pipe, "sd3", renewed=way == "model"):
        with guided(pipe):
            for number, error in ((1, ZeroDivisionError), (2, KeyboardInterrupt)):
                if way == "compiled":
                    break  # a hook on a block would compile it anew
                handle = in_pass(pipe.transformer, number, error)
                with pytest.raises(error):
                    sample(pipe, "sd3", guidance_scale=4.0, steps=2)
                handle.remove()
            with pytest.raises(ZeroDivisionError):
                run(pipe, "sd3", callback_on_step_end=stop)
            assert torch.equal(sample(pipe, "sd3", guidance_scale=4.0, steps=2), expected)
        with pytest.raises(SystemExit), guided(pipe):
            sample(pipe, "sd3", guidance_scale=4.0, steps=1)
            raise SystemExit


@pytest.mark.parametrize("sharing", ["replay", "fork"])
def test_an_exception_does_not_reach_another_pipeline(sharing: str) -> None:
    """What the broken pass had begun must not go on in the next call, which is another pipeline's."""
    first = pipeline("sd3")
    second = StableDiffusion3Pipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    plain = sample(second, "sd3")
    with guided(first, sharing=sharing):
        handle = in_pass(first.transformer, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            sample(first, "sd3")
        handle.remove()
        with dgkit.record(second) as trace:
            assert torch.equal(sample(second, "sd3"), plain)
    assert trace.labels == ["cond"]


def test_an_exception_between_conditional_and_unconditional_pass() -> None:
    pipe = pipeline("flux")
    with dgkit.guidance.guide(pipe, CFG(scale=3.0)):
        expected = run(pipe, "flux")
        handle = in_pass(pipe.transformer, 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, "flux")
        handle.remove()
        assert torch.equal(run(pipe, "flux"), expected)


# --------------------------------------------------------------------------------------- variants of the pipelines


def variant(cls: Any, name: str, **config: Any) -> Any:
    """A pipeline of class `cls` around the parts of `pipeline(name)`; `config` changes that of the transformer."""
    pipe = pipeline(name)
    if config:
        torch.manual_seed(0)
        pipe.transformer = (
            type(pipe.transformer).from_config({**pipe.transformer.config, "_use_default_values": [], **config}).eval()
        )
    channels = pipe.transformer.config.out_channels
    parts = pipe.components | ({"vae": autoencoder(channels)} if name == "sd3" else {})
    pipe = cls(**{part: parts[part] for part in inspect.signature(cls).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
MASK = torch.zeros(2, 1, 16, 16)
MASK[..., 8:] = 1.0
IMAGE_TO_IMAGE = {"image": IMAGE, "strength": 0.7}
INPAINTING = IMAGE_TO_IMAGE | {"mask_image": MASK}
VARIANTS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "sd3 image to image": (StableDiffusion3Img2ImgPipeline, "sd3", IMAGE_TO_IMAGE, {}),
    "sd3 inpainting": (StableDiffusion3InpaintPipeline, "sd3", INPAINTING, {"in_channels": 16, "out_channels": 16}),
    # masked latents and mask as further channels
    "sd3 trained inpainting": (
        StableDiffusion3InpaintPipeline,
        "sd3",
        INPAINTING,
        {"in_channels": 33, "out_channels": 16},
    ),
    "flux image to image": (FluxImg2ImgPipeline, "flux", IMAGE_TO_IMAGE, {}),
    "flux inpainting": (FluxInpaintPipeline, "flux", INPAINTING, {}),
    "flux, distilled": (FluxPipeline, "flux", {"guidance_scale": 3.5}, {"guidance_embeds": True}),
    "flux fill": (FluxFillPipeline, "flux", INPAINTING | {"strength": 1.0}, {"in_channels": 48, "out_channels": 16}),
}


@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_are_guided_as_by_plain_hooks(kind: str, s: float) -> None:
    cls, name, options, config = VARIANTS[kind]
    if cls is FluxFillPipeline:
        if s > 1:
            pytest.skip("it has no true CFG")
        options = options | dict.fromkeys(("negative_prompt_embeds", "negative_pooled_prompt_embeds", "true_cfg_scale"))
    pipe = variant(cls, name, **config)

    def images() -> Tensor:
        given = {"num_inference_steps": 4, "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
        call = prompts(name, 2) | {"true_cfg_scale" if name == "flux" else "guidance_scale": s} | given | options
        return pipe(**{k: v for k, v in call.items() if v is not None}, output_type="latent").images

    plain = images()
    before = state(pipe.transformer)
    with plain_hooks(pipe, name, s > 1):
        expected = images()
    for sharing in SHARING:
        with guided(pipe, sharing=sharing):
            assert distance(images(), expected) <= 1e-5, sharing
    if s > 1:
        with dgkit.guidance.guide(pipe, CFG(scale=s)):
            assert distance(images(), plain) <= 1e-5, "the same method in CFG's place"
        with dgkit.guidance.guide(pipe, APG(scale=s, norm=2.0)):
            if config.get("in_channels") == 33:
                with pytest.raises(ModelError, match="space='prediction'"):
                    images()
            else:
                assert distance(images(), plain) > 1e-4
    assert state(pipe.transformer) == before and torch.equal(images(), plain)
    assert distance(expected, plain) > 1e-4


# -------------------------------------------------------------------------------------------------------- batch shapes


@pytest.mark.parametrize(
    ("name", "batch"), [("flux", TEXT), ("flux", 16), ("flux", 16 + TEXT), ("sd3", 16), ("dit", 16)]
)
def test_as_many_images_as_tokens(name: str, batch: int) -> None:
    """Arguments without a batch axis (positions) can have its length."""
    pipe = pipeline(name)
    with guided(pipe):
        whole = sample(pipe, name, batch=batch, guidance_scale=4.0, steps=2)
    with plain_hooks(pipe, name, True):
        expected = sample(pipe, name, batch=batch, guidance_scale=4.0, steps=2)
    assert distance(whole, expected) <= 1e-5
    with guided(pipe, sharing="fork"):
        assert distance(sample(pipe, name, batch=batch, guidance_scale=4.0, steps=2), expected) <= 1e-5
