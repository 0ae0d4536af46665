"""What would change or hide guidance without a word is refused: parallel wrappers, scales of a whole batch, caches.

torchao is no dependency: where it is not installed a tensor of the same structure stands in for its int8 weights, and
computes as they do.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

import dgkit
from dgkit.errors import ModelError
from dgkit.guidance import DG
from dgkit.guidance.engine import Perturbation
from tests.tiny_models import build, inputs, pipeline, prompts, sample


def guided(pipe: Any, **options: Any) -> Any:
    return dgkit.detail_guidance(pipe, **({"scale": 1.5, "block": 1, "dims": [2, 9]} | options))


# -------------------------------------------------------------------------------------------------- on several devices


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("gloo") / "store"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def one_block_sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.transformer_blocks[0], mesh=init_device_mesh("cpu", (1,)))
    return model


def in_context_parallel(model: nn.Module) -> nn.Module:
    """What `enable_parallelism` leaves on a model; itself it wants more than one process."""
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    return model


PARALLEL: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (DataParallel, "wrapped by DataParallel: use its `.module`"),
    "DistributedDataParallel": (DistributedDataParallel, "wrapped by DistributedDataParallel: use its `.module`"),
    "FSDP": (lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")), "sharded by FSDP"),
    "FSDP2": (sharded, "sharded by FSDP"),
    "FSDP2 of a block": (one_block_sharded, "sharded by FSDP"),
    "context parallel": (in_context_parallel, "runs by `enable_parallelism`"),
}


@pytest.mark.parametrize("way", PARALLEL)
def test_parallel_transformers_are_refused(way: str, one_process: None) -> None:
    make, words = PARALLEL[way]
    pipe = pipeline("flux")
    pipe.transformer = make(pipe.transformer)
    entering: list[Callable[[Any], Any]] = [
        guided,
        dgkit.record,
        lambda target: dgkit.disrupt(target, block=0, dims=[1]),
    ]
    for enter in entering:
        for target in (pipe, pipe.transformer):
            with pytest.raises(ModelError, match=f"{words}.*a pipeline of its own"), enter(target):
                pass


def test_what_is_wrapped_is_guided(one_process: None) -> None:
    """As the error advises: by `.module`."""
    model = build("dit")
    wrapped, call = DistributedDataParallel(model), inputs("dit", 2)
    with torch.no_grad(), guided(model):
        expected = model(**call).sample
    with torch.no_grad(), guided(wrapped.module):
        assert torch.equal(wrapped.module(**call).sample, expected)


def test_parallelism_after_entering_is_noticed() -> None:
    pipe = pipeline("flux")
    with guided(pipe):
        sample(pipe, "flux", steps=1)
        in_context_parallel(pipe.transformer)
        with pytest.raises(ModelError, match="runs by `enable_parallelism`"):
            sample(pipe, "flux", steps=1)


# -------------------------------------------------------------------------------------------- scales of a whole batch


class PerTensor:
    """torchao's, by name."""


class PerRow:
    """torchao's, by name."""


class QuantisedWeight(nn.Parameter):
    """A weight that says how its layer's input is quantised, as torchao's `Int8Tensor` does."""

    act_quant_kwargs: Any = None
    act_quant_scale: Any = None


class QuantisedLinear(nn.Linear):
    """Symmetric int8 of the input, with a scale for all of it, or for each token."""

    def forward(self, x: Tensor) -> Tensor:
        per_tensor = isinstance(self.weight.act_quant_kwargs.granularity, PerTensor)
        largest = x.abs().amax() if per_tensor else x.abs().amax(-1, keepdim=True)
        scale = largest.clamp(min=1e-6) / 127
        return super().forward((x / scale).round().clamp(-128, 127) * scale)


def standing_in(model: nn.Module, granularity: str) -> None:
    kind = {"PerTensor": PerTensor, "PerRow": PerRow}[granularity]
    for block in model.transformer_blocks:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = QuantisedLinear
                layer.weight = QuantisedWeight(layer.weight.detach(), requires_grad=False)
                layer.weight.act_quant_kwargs = SimpleNamespace(granularity=kind())


def of_torchao(model: nn.Module, granularity: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    kind = getattr(torchao, granularity)()
    inside = {layer for block in model.transformer_blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    config = torchao.Int8DynamicActivationInt8WeightConfig(granularity=kind)
    torchao.quantize_(model, config, filter_fn=lambda module, name: module in inside)


@contextmanager
def nothing_edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A branch that changes nothing: c - c_branch should be zero."""
    with monkeypatch.context() as patch:
        same = Perturbation(edits={1: lambda image: image.clone()})
        patch.setattr(DG, "perturbation", lambda self, call: same)
        yield


@pytest.mark.parametrize("make", [standing_in, of_torchao])
def test_one_scale_for_a_batch_is_refused_where_it_acts(
    make: Callable[[nn.Module, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CFG in one batch, and wherever the branch joins the batch; without, replay and two passes are exact."""
    pipe = pipeline("sd3")
    make(pipe.transformer, "PerTensor")
    words = r"transformer_blocks\..* one scale for all rows of a batch.*granularity=PerRow\(\)"
    for sharing in ("replay", "fork", "none"):
        with guided(pipe, sharing=sharing), pytest.raises(ModelError, match=words):
            sample(pipe, "sd3", guidance_scale=4.0, steps=1)
    with guided(pipe, sharing="fork"), pytest.raises(ModelError, match=words):
        sample(pipe, "sd3", guidance_scale=1.0, steps=1)
    plain = sample(pipe, "sd3", steps=2)
    for sharing in ("replay", "none"):
        with nothing_edited(monkeypatch), guided(pipe, sharing=sharing):
            assert torch.equal(sample(pipe, "sd3", steps=2), plain)
        with guided(pipe, sharing=sharing):
            assert (sample(pipe, "sd3", steps=2) - plain).abs().max() > 1e-3
    monkeypatch.setattr("dgkit.guidance.engine.refuse_scales_of_batch", lambda model: None)
    plain = sample(pipe, "sd3", guidance_scale=4.0, steps=1)
    with guided(pipe):
        effect = (sample(pipe, "sd3", guidance_scale=4.0, steps=1) - plain).norm()
    with nothing_edited(monkeypatch), guided(pipe):
        error = (sample(pipe, "sd3", guidance_scale=4.0, steps=1) - plain).norm()
    assert error > 1e-3 * effect, "what is refused: the branch differs although nothing is edited"


@pytest.mark.parametrize("make", [standing_in, of_torchao])
def test_scales_per_row_are_exact(make: Callable[[nn.Module, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sd3")
    make(pipe.transformer, "PerRow")
    plain = sample(pipe, "sd3", guidance_scale=4.0, steps=1)
    for sharing in ("replay", "none"):
        with guided(pipe, sharing=sharing):
            effect = (sample(pipe, "sd3", guidance_scale=4.0, steps=1) - plain).norm()
        with nothing_edited(monkeypatch), guided(pipe, sharing=sharing):
            error = (sample(pipe, "sd3", guidance_scale=4.0, steps=1) - plain).norm()
        assert error < 1e-5 * effect


def test_other_kinds_of_one_scale_are_known() -> None:
    """torchao's former weights (`quant_kwargs`) and its Float8Linear; fixed scales are no matter."""
    former, training, fixed = pipeline("sd3"), pipeline("sd3"), pipeline("sd3")
    layer = former.transformer.transformer_blocks[2].attn.to_q
    layer.weight.quant_kwargs = {"activation_granularity": PerTensor()}
    float8 = type("Float8Linear", (nn.Linear,), {})
    layer = training.transformer.transformer_blocks[2].attn.to_q
    layer.__class__, layer.config = float8, SimpleNamespace()
    layer.config.cast_config_input = SimpleNamespace(scaling_granularity=SimpleNamespace(name="TENSORWISE"))
    for pipe in (former, training):
        with guided(pipe), pytest.raises(ModelError, match=r"transformer_blocks\.2\.attn\.to_q quantises its input"):
            sample(pipe, "sd3", guidance_scale=4.0, steps=1)
    layer = fixed.transformer.transformer_blocks[2].attn.to_q
    layer.weight.act_quant_kwargs, layer.weight.act_quant_scale = SimpleNamespace(granularity=PerTensor()), 1.0
    with guided(fixed):
        sample(fixed, "sd3", guidance_scale=4.0, steps=1)


def test_quantised_after_entering_is_noticed() -> None:
    pipe = pipeline("sd3")
    with guided(pipe):
        sample(pipe, "sd3", guidance_scale=4.0, steps=1)
        standing_in(pipe.transformer, "PerTensor")
        with pytest.raises(ModelError, match="one scale for all rows of a batch"):
            sample(pipe, "sd3", guidance_scale=4.0, steps=1)


# -------------------------------------------------------------------------------------------------- after entering


def test_blocks_compiled_by_diffusers_after_entering() -> None:
    torch._dynamo.reset()
    reference, pipe = pipeline("flux"), pipeline("flux")
    with guided(reference):
        expected = sample(reference, "flux", steps=2)
    with guided(pipe):
        sample(pipe, "flux", steps=1)
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert (sample(pipe, "flux", steps=2) - expected).abs().max() <= 1e-5


def test_cache_between_two_steps_is_noticed() -> None:
    """From the pipeline's own callback."""
    pipe = pipeline("flux")

    def enable(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        return {}

    with guided(pipe), pytest.raises(ModelError, match="disable_cache"):
        pipe(**prompts("flux", 1), num_inference_steps=2, output_type="latent", callback_on_step_end=enable)
