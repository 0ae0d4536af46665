"""`record` against tensors kept by hand; labels; memory; detection of planted channels."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dgkit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.calibrate import locate
from dgkit.massive import channel_ratio, matched_dims
from tests.tiny_models import ALL_CLASSES, CLASSES, build, image_slice, inputs, pipeline, prompts, sample, streams


def block_outputs(name: str, model: nn.Module, calls: list[dict]) -> list[torch.Tensor]:
    """Image tokens of every block, kept by hand over all calls, as a list of (images, T, C) in float64."""
    blocks = streams(name, model)
    kept: list[list[torch.Tensor]] = [[] for _ in blocks]

    def keep(number: int, index: int | None, where: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[number].append((output if index is None else output[index])[:, image_slice(where, 4)].double())

        return hook

    handles = [b.register_forward_hook(keep(number, *place)) for number, (b, *place) in enumerate(blocks)]
    with torch.no_grad():
        for call in calls:
            model(**call)
    for handle in handles:
        handle.remove()
    return [torch.cat(k) for k in kept]


@pytest.mark.parametrize("name", ALL_CLASSES)
def test_statistics_equal_those_of_kept_tensors(name: str) -> None:
    model = build(name)
    calls = [inputs(name, batch, seed) for seed, batch in enumerate((3, 1, 2))]
    with torch.no_grad(), dgkit.record(model, ratio=1.5, track=[3, 0], keep=[1]) as trace:
        for call in calls:
            model(**call)
    assert trace.labels == ["unknown"]
    for index, z in enumerate(block_outputs(name, model, calls)):
        mean = z.abs().mean(1)
        massive = z.abs() > 1.5 * mean.quantile(0.5, dim=1)[:, None, None]
        torch.testing.assert_close(trace.mean_abs()[index], mean.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(trace.max_abs()[index], z.abs().amax((0, 1)), rtol=1e-6, atol=0)
        torch.testing.assert_close(trace.token_share()[index], massive.double().mean((0, 1)), rtol=0, atol=1e-6)
        torch.testing.assert_close(trace.tracked()[0, :, index].double(), mean[:, [3, 0]], rtol=1e-6, atol=1e-7)
        energy = z.square().sum((0, 1))
        torch.testing.assert_close(trace.energy_share()[index], energy / energy.sum(), rtol=1e-6, atol=1e-9)
        share = float((z[..., 3].square().sum() + z[..., 0].square().sum()) / z.square().sum())
        assert abs(float(trace.energy_share([3, 0])[index]) - share) <= 1e-6 * share
        if index == 1:
            torch.testing.assert_close(trace.tensors(1).double(), z)


def test_energy_share_of_float16_does_not_overflow() -> None:
    """300^2 is beyond float16; by one loop over tokens in float64."""
    model = build("dit").half()
    model.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: output + 300 * F.one_hot(torch.tensor(5), 16).half()
    )
    call = {k: v.half() if v.is_floating_point() else v for k, v in inputs("dit", 2).items()}
    with torch.no_grad(), dgkit.record(model, keep=[1]) as trace:
        model(**call)
    in_channel = total = 0.0
    for token in trace.tensors(1).double().flatten(0, 1).tolist():
        in_channel += token[5] ** 2
        total += sum(value**2 for value in token)
    assert float(trace.energy_share([5])[1]) == pytest.approx(in_channel / total, rel=1e-6)
    assert 0.99 < float(trace.energy_share([5])[1]) < 1
    assert torch.allclose(trace.energy_share().sum(1), torch.ones(3, dtype=torch.float64))


def test_energy_share_is_kept_per_timestep() -> None:
    model, call = build("sd3"), inputs("sd3", 2)
    call["timestep"] = torch.tensor([900, 10])
    with torch.no_grad(), dgkit.record(model, keep=[2]) as trace:
        model(**call)
    for timestep in (900, 10):
        energy = trace.tensors(2, timestep=timestep).double().square().sum((0, 1))
        torch.testing.assert_close(trace.energy_share(timestep=timestep)[2], energy / energy.sum(), rtol=1e-6, atol=0)
    with pytest.raises(DgkitError, match="dims=.*from 0 to 15"):
        trace.energy_share([16])
    with pytest.raises(DgkitError, match="timestep=5 was not recorded"):
        trace.energy_share([3], timestep=5)


def test_rows_of_different_timesteps_are_kept_apart() -> None:
    model, call = build("dit"), inputs("dit", 4)
    call["timestep"] = torch.tensor([900, 10, 900, 10])
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**call)
    with torch.no_grad(), dgkit.record(model) as alone:
        model(**{k: v[1::2] for k, v in call.items()})
    assert trace.timesteps() == [900.0, 10.0]
    torch.testing.assert_close(trace.mean_abs(timestep=10), alone.mean_abs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_branches_are_labelled(name: str) -> None:
    pipe = pipeline(name)
    with dgkit.record(pipe) as plain:
        sample(pipe, name, guidance_scale=1.0)
    assert plain.labels == ["cond"]
    with dgkit.record(pipe) as cfg:
        sample(pipe, name, guidance_scale=4.0)
    assert sorted(cfg.labels) == ["cond", "uncond"]
    first = max(cfg.timesteps())  # same starting noise and prompts, so the same conditional statistics
    torch.testing.assert_close(cfg.mean_abs("cond", first), plain.mean_abs("cond", first), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cfg.mean_abs("uncond", first), plain.mean_abs("cond", first), rtol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("inner", ["record", "guidance"])
@pytest.mark.parametrize("sharing", ["replay", "none"])
def test_degraded_passes_are_labelled_in_either_nesting(name: str, inner: str, sharing: str) -> None:
    pipe = pipeline(name)
    options = {"scale": 1.0, "block": 1, "dims": [3], "sharing": sharing}
    if inner == "record":
        with dgkit.detail_guidance(pipe, **options), dgkit.record(pipe, keep=[1]) as trace:
            sample(pipe, name, guidance_scale=4.0)
    else:
        with dgkit.record(pipe, keep=[1]) as trace, dgkit.detail_guidance(pipe, **options):
            sample(pipe, name, guidance_scale=4.0)
    assert sorted(trace.labels) == ["cond", "degraded", "uncond"]
    assert trace.timesteps("degraded") == trace.timesteps("cond")
    cond, degraded = trace.tensors(1, "cond"), trace.tensors(1, "degraded")
    assert (degraded[..., 3] == 0).all() and (cond[..., 3] != 0).any()
    cond[..., 3] = 0
    torch.testing.assert_close(degraded, cond, rtol=1e-5, atol=1e-6)
    assert trace.mean_abs("degraded")[0].isnan().all(), "blocks before the edited one are not computed"
    assert trace.mean_abs("degraded")[2].isfinite().all()
    assert trace.gates("degraded")[-1].isfinite().all()


def test_nested_records_see_the_same() -> None:
    model, call = build("flux"), inputs("flux", 2)
    with torch.no_grad(), dgkit.record(model) as outer, dgkit.record(model) as inner:
        model(**call)
    assert torch.equal(outer.mean_abs(), inner.mean_abs())


def test_record_sees_what_disrupt_leaves_in_either_nesting() -> None:
    model, call = build("dit"), inputs("dit", 2)
    with torch.no_grad():
        with dgkit.record(model) as outside, dgkit.disrupt(model, block=0, dims=[2]):
            model(**call)
        with dgkit.disrupt(model, block=0, dims=[2]), dgkit.record(model) as inside:
            model(**call)
    assert outside.mean_abs()[0, 2] == 0 and torch.equal(outside.mean_abs(), inside.mean_abs())


def test_memory_is_that_of_the_table() -> None:
    """100 steps more, at timesteps already seen, add nothing; tracked dims are not asked for."""
    model = build("dit", depth=2)

    def steps(count: int) -> None:
        for step in range(count):
            call = inputs("dit", 2, seed=step)
            call["timestep"] = torch.full((2,), step % 20)
            model(**call)

    with torch.no_grad(), dgkit.record(model) as trace:
        steps(40)
        gc.collect()
        tracemalloc.start()
        tensors_before = sum(type(o) is torch.Tensor for o in gc.get_objects())
        before = tracemalloc.get_traced_memory()[0]
        steps(100)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tensors_after = sum(type(o) is torch.Tensor for o in gc.get_objects())
        tracemalloc.stop()
    assert len(trace.timesteps()) == 20
    assert tensors_after < tensors_before + 10 and grown < 30_000  # 100 steps of several tensors each


def test_hooks_come_off_after_an_exception() -> None:
    pipe = pipeline("dit")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())
    with pytest.raises(RuntimeError, match="inside"), dgkit.record(pipe), dgkit.disrupt(pipe, block=0, dims=[0]):
        raise RuntimeError("inside")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()) == hooks


# ------------------------------------------------------------------------------------------------------------ detection


def planted(name: str, dims: list[int], factor: float, seed: int) -> nn.Module:
    """A random model whose embedded image tokens carry `dims` at about `factor` times the others' magnitude."""
    model = build(name, heads=4, depth=3, seed=seed)
    layer = model.x_embedder if name == "flux" else model.pos_embed.proj
    with torch.no_grad():
        signs = torch.tensor([1.0 if d % 2 else -1.0 for d in dims])
        layer.bias[dims] = factor * signs
    return model


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=10, deadline=None)
@given(
    dims=st.lists(st.integers(0, 31), min_size=1, max_size=3, unique=True),
    factor=st.floats(40, 400),
    seed=st.integers(0, 10_000),
)
def test_planted_channels_are_found_and_no_others(name: str, dims: list[int], factor: float, seed: int) -> None:
    model = planted(name, dims, factor, seed)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs(name, 2, seed))
    ratios = channel_ratio(trace.mean_abs())
    assert (ratios[:, dims] >= 10).all(), "the plant itself has to reach 10 x the median in every block"
    found = dgkit.detect_massive(trace)
    assert sorted(found.dims) == sorted(found.fixed_dims) == sorted(dims)
    assert all(sorted(found.in_block(b)) == sorted(dims) for b in range(len(ratios)))


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_nothing_is_found_where_nothing_is_planted(name: str, seed: int) -> None:
    model = build(name, heads=4, depth=3, seed=seed)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs(name, 2, seed))
    assert dgkit.detect_massive(trace).dims == []


def test_criteria_by_hand() -> None:
    model = planted("dit", [4], 5000.0, 0)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs("dit", 2))
    mean, largest = trace.mean_abs(), trace.max_abs()
    for block in range(3):
        median = mean[block].sort().values[15:17].mean()
        expected = [d for d in range(32) if largest[block, d] > 100 and largest[block, d] > 1000 * median]
        assert dgkit.detect_massive(trace, "sun").in_block(block) == expected == [4]
    top = dgkit.detect_massive(trace, "top_k", k=2)
    assert [len(top.in_block(b)) for b in range(3)] == [2, 2, 2] and top.in_block(0)[0] == 4
    assert list(top.table().columns) == ["block", "dim", "mean_abs", "max_abs", "ratio", "token_share"]


def test_token_share_condition_excludes_a_channel_of_few_tokens() -> None:
    """One token of 16 at 1,000: the channel's mean is far above the median, yet it is not massive in all tokens."""
    model = build("dit", heads=4)
    block = model.transformer_blocks[0]

    def spike(module: nn.Module, args, output: torch.Tensor) -> torch.Tensor:
        output[:, 0, 7] = 1000.0
        return output

    handle = block.register_forward_hook(spike)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs("dit", 2))
    handle.remove()
    assert channel_ratio(trace.mean_abs())[0, 7] > 10
    assert dgkit.detect_massive(trace).in_block(0) == []
    assert dgkit.detect_massive(trace, share=0.05).in_block(0) == [7]


def test_matched_dims_carry_as_much_magnitude_and_are_others() -> None:
    model = planted("dit", [4], 3.0, 0)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs("dit", 2))
    dims = matched_dims(trace, 1, [4])
    energy = trace.mean_abs()[1].square()
    assert 4 not in dims and energy[dims].sum() >= energy[4] > energy[dims[:-1]].sum()


def test_gates_of_the_trace_equal_the_adaln_output() -> None:
    """alpha of DiT, from its embedding through adaLN by hand (Eq. 7)."""
    model, call = build("dit"), inputs("dit", 2)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**call)
        norm = model.transformer_blocks[1].norm1
        embedding = norm.emb(call["timestep"], call["class_labels"], hidden_dtype=torch.float32)
        gate_mlp = (nn.functional.silu(embedding) @ norm.linear.weight.T + norm.linear.bias).chunk(6, 1)[5]
    gates = dgkit.residual_gates(trace)
    torch.testing.assert_close(gates.of(1, "mlp").float(), gate_mlp.abs().mean(0))
    torch.testing.assert_close(gates.mean[gates.rows.index((1, "mlp"))].float(), gate_mlp.mean(0))
    assert len(gates.table()) == 3 * 2 * 16
    agreement = dgkit.gate_agreement(trace)
    assert set(agreement["branch"]) == {"msa", "mlp"} and agreement["rank_correlation"].between(-1, 1).all()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "ratio=1.0 is not allowed"),
        ({"ratio": float("nan")}, "ratio=nan is not allowed"),
        ({"ratio": "5"}, "ratio='5' is not allowed"),
        ({"track": [99]}, "because of 99"),
        ({"keep": [7]}, "block=7 is not allowed"),
        ({"keep": 1}, "keep=1 is not allowed: give a list of blocks"),
        ({"track": 5}, "track=5 is not allowed"),
    ],
)
def test_record_refuses(options: dict, words: str) -> None:
    with pytest.raises(DgkitError, match=words), dgkit.record(build("dit"), **options):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criterion": "big"}, "criterion='big' is not allowed: use one of ratio, sun, top_k"),
        ({"ratio": 0.5}, "ratio=0.5 is not allowed"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"share": 1.5}, "share=1.5 is not allowed"),
        ({"criterion": "top_k", "k": 0}, "k=0 is not allowed"),
        ({"criterion": "top_k", "k": 17}, "integer from 1 to 16"),
        ({"criterion": "sun", "magnitude": -1}, "magnitude=-1 is not allowed"),
        ({"label": "uncond"}, "label='uncond' was not recorded: use one of"),
        ({"timestep": 3}, "timestep=3 was not recorded"),
    ],
)
def test_detection_refuses(options: dict, words: str) -> None:
    model = build("dit")
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs("dit", 1))
    with pytest.raises(DgkitError, match=words):
        dgkit.detect_massive(trace, **options)


def test_empty_trace_and_what_was_not_asked_for() -> None:
    model = build("dit")
    with dgkit.record(model) as trace:
        pass
    with pytest.raises(DgkitError, match="the trace is empty"):
        dgkit.detect_massive(trace)
    with torch.no_grad(), dgkit.record(model) as trace:
        model(**inputs("dit", 1))
    with pytest.raises(DgkitError, match="no dim was tracked"):
        trace.tracked()
    with pytest.raises(DgkitError, match="block=0 was not kept"):
        trace.tensors(0)


def test_record_refuses_an_unknown_pipeline() -> None:
    class Sketch:
        transformer = build("dit")

    with pytest.raises(ModelError, match="expected a diffusers pipeline, got Sketch"), dgkit.record(Sketch()):
        pass


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_compiled_blocks_are_recorded_without_their_gates(way: str) -> None:
    """Gate hooks would become part of the graph: compiled anew for each batch size, and fullgraph would fail."""
    torch._dynamo.reset()
    model = build("dit", depth=2)
    for index, block in enumerate(model.transformer_blocks):
        if way == "in place":
            block.compile(backend="eager", fullgraph=True)
        else:
            model.transformer_blocks[index] = torch.compile(block, backend="eager", fullgraph=True)
    reference = build("dit", depth=2)
    with torch.no_grad(), dgkit.record(model) as trace, dgkit.record(reference) as expected:
        for batch in (2, 1):
            model(**inputs("dit", batch))
            reference(**inputs("dit", batch))
    torch.testing.assert_close(trace.mean_abs(), expected.mean_abs())
    assert trace.num_gates_seen() == 0
    with pytest.raises(ModelError, match="record before compiling"):
        dgkit.residual_gates(trace)


def test_runs_of_one_step_and_other_pipelines_are_told_apart() -> None:
    """Two Flux runs on the same latents object, then another pipeline on the same transformer."""
    pipe, latents = pipeline("flux"), torch.randn(1, 16, 16)
    call = prompts("flux", 1) | {"num_inference_steps": 1, "output_type": "latent", "latents": latents}
    with dgkit.record(pipe, track=[0]) as trace:
        pipe(**call)
        pipe(**call)
    assert trace.labels == ["cond"] and trace.tracked().shape[1] == 2
    other = pipeline("flux")
    other.transformer = pipe.transformer
    with dgkit.record(pipe) as trace:
        pipe(**call)
        other(**call)
    assert sorted(trace.labels) == ["cond", "unknown"]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_named_wherever_a_trace_is_judged(value: float) -> None:
    """One value after block 1, as float16 makes it where massive channels are large; the next blocks are NaN then."""
    pipe = pipeline("sd3")

    def overflow(module: Any, args: Any, output: Any) -> Any:
        output[1][:, 3, 7] = value
        return output

    pipe.transformer.transformer_blocks[1].register_forward_hook(overflow)
    with dgkit.record(pipe, track=[7], maps=[7], keep=[1]) as trace:
        sample(pipe, "sd3")
    readings: dict[str, Callable[[], Any]] = {
        "ratio": lambda: dgkit.detect_massive(trace),
        "sun": lambda: dgkit.detect_massive(trace, "sun"),
        "top_k": lambda: dgkit.detect_massive(trace, "top_k", k=2),
        "matched": lambda: matched_dims(trace, 2, [7]),
        "gates": lambda: dgkit.residual_gates(trace),
        "agreement": lambda: dgkit.gate_agreement(trace),
        "locate": lambda: locate(trace),
        "mean": trace.mean_abs,
        "share": trace.token_share,
        "energy": trace.energy_share,
        "tracked": trace.tracked,
        "map": lambda: trace.map(1, 7),
        "one timestep": lambda: trace.mean_abs(timestep=trace.timesteps()[0]),
    }
    for read in readings.values():
        with pytest.raises(ModelError, match="block 1 put out an infinity or NaN in channel 7 .*float16.* overflows"):
            read()
    largest = trace.max_abs(timestep=trace.timesteps()[0])
    assert largest[0].isfinite().all() and not largest[1, 7].isfinite()
    assert not trace.tensors(1).isfinite().all()
