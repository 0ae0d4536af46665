"""Detail Guidance: the engine against two full passes, the pipelines against Eq. 4 / Eq. 5 written out here."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dgkit
from dgkit.anatomy import COND, Call, dissect
from dgkit.disruption import make_edit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import Engine, Perturbation
from tests.tiny_models import ALL_CLASSES, CLASSES, WITH_PIPELINES, build, inputs, pipeline, prompts, sample


def zeroed(model: nn.Module, block: int, dims: list[int], **call: Any) -> Tensor:
    """One full pass, the image tokens of the block's output zeroed at `dims` by a hook that knows only diffusers."""
    blocks = list(model.transformer_blocks) + list(getattr(model, "single_transformer_blocks", []))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        image = (output[1] if isinstance(output, tuple) else output).clone()
        image[..., dims] = 0
        return (output[0], image) if isinstance(output, tuple) else image

    handle = blocks[block].register_forward_hook(hook)
    prediction = model(**call, return_dict=False)[0]
    handle.remove()
    return prediction


# -------------------------------------------------------------------------------------------------------------- engine


def predicted(output: Any) -> Tensor:
    """The prediction; Z-Image returns a list with one tensor per image."""
    return torch.stack(output[0]) if isinstance(output[0], list) else output[0]


def branched(model: nn.Module, call: dict[str, Any], sharing: str, *perturbations: Perturbation) -> list[Tensor]:
    """The ordinary prediction and those of the branches, and a check that the ordinary one is left alone."""
    engine, batch = Engine(dissect(model), sharing), len(next(iter(call.values())))
    plain = predicted(model(**call))
    with engine.attached():
        engine.begin(perturbations, Call(engine.anatomy, call, labels=(COND,) * batch))
        output = predicted(model(**call))
        branches = [predicted(branch) for branch in engine.finish((), call)]
    close = (output - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(output, plain) if sharing != "fork" else close
    assert torch.equal(predicted(model(**call)), plain), "nothing is left behind"
    return branches


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [name for name in ALL_CLASSES if name not in WITH_PIPELINES])
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16]),
    depth=st.integers(2, 4),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([2, 4]),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["zero", "mean", "random"]),
    data=st.data(),
)
@torch.no_grad()
def test_replay_equals_two_full_passes_bitwise_and_fork_nearly(
    name: str, heads: int, head_dim: int, depth: int, batch: int, tokens: int, seed: int, kind: str, data: Any
) -> None:
    model = build(name, heads=heads, head_dim=head_dim, depth=depth, seed=seed)
    call = inputs(name, batch, seed, tokens=tokens)
    anatomy = dissect(model)
    dims = data.draw(st.lists(st.integers(0, anatomy.channels - 1), min_size=1, max_size=3, unique=True))
    edit = make_edit(anatomy, dims, kind, seed)
    block = data.draw(st.integers(0, len(anatomy.blocks) - 1))
    outputs = {s: branched(model, call, s, Perturbation(edits={block: edit}))[0] for s in ("replay", "none")}
    assert torch.equal(outputs["replay"], outputs["none"])
    if all(b.stack.fork for b in anatomy.blocks[block:]):
        forked = branched(model, call, "fork", Perturbation(edits={block: edit}))[0]
        assert relative_distance(forked, outputs["none"]) <= 1e-5
    else:
        with pytest.raises(DgkitError, match="where the batch may grow between blocks"):
            branched(model, call, "fork", Perturbation(edits={block: edit}))
    if kind == "zero" and name in CLASSES:
        assert torch.equal(outputs["none"], zeroed(model, block, edit.dims, **call))


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_several_branches_at_once(name: str) -> None:
    """Each equals the branch run alone, whatever else branches off, in every order of depth."""
    model, call = build(name, depth=4), inputs(name, 2)
    edit = make_edit(dissect(model), [1, 5])
    deep, shallow = Perturbation(edits={3: edit}), Perturbation(edits={0: edit, 2: make_edit(dissect(model), [2])})
    skipping = Perturbation(skips=frozenset([1, 2]))
    alone = [branched(model, call, "none", p)[0] for p in (deep, shallow, skipping)]
    for order in ([0, 1, 2], [2, 1, 0]):
        several = branched(model, call, "replay", *[(deep, shallow, skipping)[i] for i in order])
        assert all(torch.equal(several[k], alone[i]) for k, i in enumerate(order))
    for order in ([0, 1], [1, 0]):
        several = branched(model, call, "fork", *[(deep, shallow)[i] for i in order])
        assert all(relative_distance(several[k], alone[i]) <= 1e-5 for k, i in enumerate(order))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_block_evaluations_are_what_runs(name: str) -> None:
    """Counted by hooks inside the blocks (on a submodule that a stand-in does not reach), images counted as rows."""
    model, batch = build(name, depth=4), 3
    anatomy = dissect(model)
    counted = [0]
    for block in anatomy.blocks:
        block.gates[0][1].register_forward_hook(lambda m, a, o: counted.__setitem__(0, counted[0] + len(o[0])))
    total, call = len(anatomy.blocks), inputs(name, batch)
    for index in range(total):
        for sharing in ("replay", "fork", "none"):
            engine, counted[0] = Engine(anatomy, sharing), 0
            with engine.attached():
                p = Perturbation(edits={index: make_edit(anatomy, [0])})
                engine.begin([p], Call(anatomy, call, labels=(COND,) * batch))
                model(**call)
                engine.finish((), call)
            assert engine.cost.block_evaluations == counted[0]
            assert engine.cost.naive_block_evaluations == 2 * total * batch
            depth = index + 1  # the paper's m
            expected = 1.0 if sharing == "none" else (2 * total - depth) / (2 * total)
            assert engine.cost.ratio == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------- pipelines


@torch.no_grad()
def eq_5_loop_dit(pipe: Any, s: float, w: float, block: int, dims: list[int], batch: int, steps: int) -> Tensor:
    """Eq. 4 (s = 1) and Eq. 5 with lambda = s - 1, three naive passes per step, DDIM; returns decoded images."""
    model, scheduler = pipe.transformer, pipe.scheduler
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    classes = torch.tensor(prompts("dit", batch)["class_labels"])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        time = t.expand(batch)
        c = model(x, timestep=time, class_labels=classes).sample[:, :4]
        u = model(x, timestep=time, class_labels=torch.full_like(classes, 1000)).sample[:, :4]
        c_m = zeroed(model, block, dims, hidden_states=x, timestep=time, class_labels=classes)[:, :4]
        guided = c + (s - 1) * (c - u) + w * (c - c_m)
        x = scheduler.step(guided, t, x).prev_sample
    return (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def eq_5_loop_flow(
    pipe: Any, name: str, s: float, w: float, block: int, dims: list[int], batch: int, steps: int
) -> Tensor:
    """The same for rectified flow (SD3, Flux): velocity predictions and Euler steps; returns final latents."""
    model, scheduler = pipe.transformer, pipe.scheduler
    given_prompts = prompts(name, batch)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
    x, extra, unit = torch.cat(noise), {}, 1.0
    if name == "flux":  # 2x2 patches of the latents are the tokens; time runs from 1 to 0
        x = x.view(batch, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, 16, 16)
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        positions = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
        extra, unit = {"img_ids": positions, "txt_ids": torch.zeros(5, 3)}, 1000.0
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).numpy())
    else:
        scheduler.set_timesteps(steps)

    def predict(kind: str) -> dict[str, Any]:
        return {
            "encoder_hidden_states": given_prompts[f"{kind}prompt_embeds"],
            "pooled_projections": given_prompts[f"{kind}pooled_prompt_embeds"],
        } | extra

    sigmas = scheduler.sigmas.tolist()
    for i, t in enumerate(scheduler.timesteps):
        time = (t / unit).expand(batch)
        c = model(hidden_states=x, timestep=time, **predict("")).sample
        u = model(hidden_states=x, timestep=time, **predict("negative_")).sample
        c_m = zeroed(model, block, dims, hidden_states=x, timestep=time, **predict(""))
        x = x + (sigmas[i + 1] - sigmas[i]) * (c + (s - 1) * (c - u) + w * (c - c_m))
    return x


@pytest.mark.parametrize("sharing", ["replay", "fork", "none"])
@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize("name", CLASSES)
def test_pipelines_follow_eq_4_and_eq_5(name: str, s: float, sharing: str) -> None:
    pipe, block, dims, w = pipeline(name), 1, [2, 9], 1.5
    with dgkit.detail_guidance(pipe, scale=w, block=block, dims=dims, sharing=sharing) as guidance:
        ours = sample(pipe, name, guidance_scale=s)
    if name == "dit":
        expected = eq_5_loop_dit(pipe, s, w, block, dims, 2, 3)
    else:
        expected = eq_5_loop_flow(pipe, name, s, w, block, dims, 2, 3)
    assert (ours - expected).abs().max() <= 1e-5
    assert (ours - sample(pipe, name, guidance_scale=s)).abs().max() > 1e-4, "guidance has to change something"
    total = len(dissect(pipe).blocks)
    passes = 2 if s == 1 else 3
    if sharing != "none":
        assert guidance.cost.ratio == pytest.approx((passes * total - block - 1) / (passes * total))


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_learned_sigma_is_not_guided(s: float) -> None:
    model = (pipe := pipeline("dit")).transformer
    outputs: list[Tensor] = []
    with dgkit.detail_guidance(pipe, scale=2.0, block=0, dims=[1]):
        last = model.register_forward_hook(lambda m, a, o: outputs.append(o.sample))
        first = model.register_forward_hook(lambda m, a, o: outputs.append(o.sample), prepend=True)
        sample(pipe, "dit", guidance_scale=s, steps=1)
        last.remove()
        first.remove()
    before, after = outputs
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.equal(before[:, :4], after[:, :4])


def test_scale_zero_changes_nothing() -> None:
    pipe = pipeline("sd3")
    with dgkit.detail_guidance(pipe, scale=0.0, block=0, dims=[1]):
        guided = sample(pipe, "sd3", guidance_scale=4.0)
    assert torch.equal(guided, sample(pipe, "sd3", guidance_scale=4.0))


def test_bfloat16_stays_bfloat16() -> None:
    pipe = pipeline("sd3")
    pipe.transformer.to(torch.bfloat16)
    call = {k: v.bfloat16() for k, v in inputs("sd3", 2).items()}
    with dgkit.detail_guidance(pipe.transformer, scale=1.0, block=0, dims=[1]), torch.no_grad():
        assert pipe.transformer(**call, return_dict=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", CLASSES)
def test_model_cpu_offload_keeps_both_calls_guided(name: str) -> None:
    """Offloading replaces `transformer.forward` and renews it after each call; the CPU stands in for the GPU."""
    pipe, reference = pipeline(name), pipeline(name)
    pipe.enable_model_cpu_offload(device="cpu")
    assert "forward" in pipe.transformer.__dict__, "accelerate has to be in charge for this test to mean anything"
    with dgkit.detail_guidance(reference, scale=1.0, block=1, dims=[3]):
        expected = sample(reference, name, guidance_scale=4.0)
    with dgkit.detail_guidance(pipe, scale=1.0, block=1, dims=[3]) as guidance:
        first = sample(pipe, name, guidance_scale=4.0)
        once = guidance.cost.block_evaluations
        second = sample(pipe, name, guidance_scale=4.0)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert guidance.cost.block_evaluations == 2 * once > 0


def test_block_level_forward_of_offloading_comes_back() -> None:
    """Sequential offloading gives each block an instance `forward`; replay has to put it back."""
    model = build("sd3")
    marks = []
    for block in model.transformer_blocks:
        own = block.forward
        block.forward = lambda *a, own=own, **k: own(*a, **k)  # type: ignore[method-assign]
        marks.append(block.forward)
    with torch.no_grad():
        branched(model, inputs("sd3", 1), "replay", Perturbation(edits={1: make_edit(dissect(model), [0])}))
    assert [b.forward for b in model.transformer_blocks] == marks


@pytest.mark.parametrize("where", ["between", "inside a pass"])
def test_no_trace_is_left_after_an_exception(where: str) -> None:
    pipe = pipeline("sd3")
    before = sample(pipe, "sd3", guidance_scale=4.0)
    handle = None
    with pytest.raises(KeyboardInterrupt), dgkit.detail_guidance(pipe, scale=1.0, block=1, dims=[3]):
        if where == "inside a pass":
            calls = []

            def stop(module: nn.Module, args: Any) -> None:
                calls.append(1)
                if len(calls) == 2:  # in the degraded pass, with the stand-ins in place
                    raise KeyboardInterrupt

            handle = pipe.transformer.transformer_blocks[2].register_forward_pre_hook(stop)
            sample(pipe, "sd3", guidance_scale=4.0)
        raise KeyboardInterrupt
    if handle:
        handle.remove()
    modules = list(pipe.transformer.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)
    with dgkit.record(pipe) as trace:
        assert torch.equal(sample(pipe, "sd3", guidance_scale=4.0), before)
    assert sorted(trace.labels) == ["cond", "uncond"]


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_transformer_is_refused(way: str) -> None:
    pipe = pipeline("sd3")
    if way == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer)
    else:
        pipe.transformer.compile()
    with (
        pytest.raises(ModelError, match="compiled as a whole"),
        dgkit.detail_guidance(pipe, scale=1.0, block=0, dims=[1]),
    ):
        pass


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": -1.0}, "scale=-1.0 is not allowed"),
        ({"scale": float("nan")}, "scale=nan is not allowed"),
        ({"scale": float("inf")}, "scale=inf is not allowed"),
        ({"scale": "1"}, "scale='1' is not allowed"),
        ({"scale": True}, "scale=True is not allowed"),
        ({"block": 3}, "block=3 is not allowed"),
        ({"block": -1}, "block=-1 is not allowed"),
        ({"dims": []}, r"dims=\[\] is not allowed"),
        ({"dims": [16]}, "because of 16"),
        ({"dims": 3}, "dims=3 is not allowed"),
        ({"sharing": "some"}, "sharing='some' is not allowed: use one of replay, fork, none"),
        ({"kind": "blur"}, "kind='blur' is not allowed: use one of zero, mean, random"),
        ({"kind": "random", "seed": "x"}, "seed='x' is not allowed: give an integer"),
        ({"kind": "random", "dims": list(range(9))}, "only 7 other channels are left"),
        ({"scale": None}, "scale left out, but no preset for this model states it"),
        ({"block": None, "dims": None}, "block, dims left out"),
    ],
)
def test_detail_guidance_refuses(options: dict[str, Any], words: str) -> None:
    pipe = pipeline("dit")
    with pytest.raises(DgkitError, match=words):  # noqa: SIM117
        with dgkit.detail_guidance(pipe, **({"scale": 1.0, "block": 0, "dims": [1]} | options)):
            pass
    assert not pipe.transformer._forward_hooks


def test_nesting_is_refused() -> None:
    pipe, options = pipeline("dit"), {"scale": 1.0, "block": 0, "dims": [1]}
    for outer, inner in ((pipe, pipe), (pipe, pipe.transformer), (pipe.transformer, pipe)):
        with dgkit.detail_guidance(outer, **options):  # noqa: SIM117
            with pytest.raises(ModelError, match="already guided"), dgkit.detail_guidance(inner, **options):
                pass
    with dgkit.detail_guidance(pipe, **options):
        pass


def test_skip_guidance_layers_are_refused() -> None:
    pipe = pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)
    with (
        pytest.raises(ModelError, match="skip_guidance_layers"),
        dgkit.detail_guidance(pipe, scale=1.0, block=0, dims=[1]),
    ):
        pipe(**prompts("sd3", 1), num_inference_steps=4, guidance_scale=4.0, output_type="latent",
             skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- disrupt


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_disrupt_edits_image_tokens_of_one_block_only(name: str) -> None:
    model, call = build(name), inputs(name, 2)
    plain = model(**call)[0]
    with dgkit.disrupt(model, block=1, dims=[2, 5]):
        assert torch.equal(model(**call)[0], zeroed(model, 1, [2, 5], **call))
    assert torch.equal(model(**call)[0], plain)
    with dgkit.record(model, keep=[1]) as before:
        model(**call)
    with dgkit.disrupt(model, block=1, dims=[2], kind="mean"), dgkit.record(model, keep=[1]) as after:
        model(**call)
    expected = before.tensors(1).clone()
    expected[..., 2] = expected[..., 2].mean(1, keepdim=True)
    torch.testing.assert_close(after.tensors(1), expected)


def test_random_dims_exclude_the_named_ones_and_depend_on_the_seed() -> None:
    anatomy = dissect(build("dit", heads=4))
    draws = [make_edit(anatomy, [1, 2], "random", seed).dims for seed in range(50)]
    assert all(len(d) == 2 and not {1, 2} & set(d) for d in draws)
    assert draws[7] == make_edit(anatomy, [1, 2], "random", 7).dims and len({tuple(d) for d in draws}) > 30


def test_pag_pipelines_are_refused() -> None:
    pipe = pipeline("sd3")
    pipe.__class__ = StableDiffusion3PAGPipeline
    with (
        pytest.raises(ModelError, match="StableDiffusion3PAGPipeline runs classifier-free guidance is not known"),
        dgkit.detail_guidance(pipe, scale=1.0, block=0, dims=[1]),
    ):
        pass
