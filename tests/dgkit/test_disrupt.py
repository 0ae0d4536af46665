"""Edits of some tokens and steps only, and edits that leave the LayerNorms' statistics alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dgkit
from dgkit.errors import DgkitError, ModelError
from tests.tiny_models import CLASSES, build, inputs, pipeline, sample

DIMS = [2, 5]


def layer_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """All LayerNorms after block 1 of a small model of `build`, by name."""
    last = {name: module for name, module in model.named_modules() if name.startswith("norm_out")}
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())][2:]
    later = {f"{i}.{name}": m for i, block in enumerate(blocks) for name, m in block.named_modules()} | last
    return {name: m for name, m in later.items() if isinstance(m, nn.LayerNorm)}


def watched(model: nn.Module, call: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of every LayerNorm of `layer_norms` in one call."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        norm.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args[0].clone(), output)}))
        for name, norm in layer_norms(model).items()
    ]
    model(**call)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
@torch.no_grad()
def test_later_layer_norms_keep_the_statistics_that_the_tokens_had(name: str) -> None:
    model, call = build(name, depth=4), inputs(name, 2)
    with dgkit.record(model, keep=[1]) as trace:
        before = watched(model, call)
    removed = torch.zeros_like(trace.tensors(1)).double()
    removed[..., DIMS] = trace.tensors(1)[..., DIMS].double()
    with dgkit.disrupt(model, block=1, dims=DIMS, keep_norm=True):
        after = watched(model, call)
    assert len(after) >= 4
    others = [c for c in range(removed.shape[-1]) if c not in DIMS]
    for norm, (tokens, output) in after.items():
        x = tokens.double().numpy()
        full = x.copy()
        if "context" not in norm:
            full[:, -removed.shape[1] :] += removed.numpy()
        eps = layer_norms(model)[norm].eps
        expected = (x - full.mean(-1, keepdims=True)) / np.sqrt(full.var(-1, keepdims=True) + eps)
        np.testing.assert_allclose(output.numpy(), expected, atol=1e-5, err_msg=norm)
    first = next(norm for norm in after if "context" not in norm)  # reads the edited tokens themselves
    torch.testing.assert_close(after[first][1][..., others], before[first][1][..., others], atol=1e-5, rtol=0)
    assert not torch.allclose(after[first][1][..., DIMS], before[first][1][..., DIMS])
    again = watched(model, call)
    assert all(torch.equal(again[norm][1], before[norm][1]) for norm in before)


@torch.no_grad()
def test_without_keep_norm_the_other_channels_are_scaled_up() -> None:
    model, call = build("dit", depth=4), inputs("dit", 2)
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].bias[2] = 1000.0  # a channel that is massive after block 1
    first = "0.norm1.norm"
    before = watched(model, call)[first][1]
    with dgkit.disrupt(model, block=1, dims=[2]):
        zeroed = watched(model, call)[first][1]
    with dgkit.disrupt(model, block=1, dims=[2], keep_norm=True):
        kept = watched(model, call)[first][1]
    others = [c for c in range(before.shape[-1]) if c != 2]
    assert zeroed[..., others].std() > 5 * before[..., others].std()
    torch.testing.assert_close(kept[..., others], before[..., others], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_only_the_named_tokens_are_edited(name: str) -> None:
    model, call = build(name), inputs(name, 2)
    with dgkit.record(model, keep=[1]) as trace:
        model(**call)
    for kind in ("zero", "mean"):
        with dgkit.disrupt(model, block=1, dims=DIMS, kind=kind, tokens=[3, 0]), dgkit.record(model, keep=[1]) as seen:
            model(**call)
        expected = trace.tensors(1).clone()
        for token in (0, 3):
            for dim in DIMS:
                expected[:, token, dim] = 0 if kind == "zero" else trace.tensors(1)[:, :, dim].mean(1)
        torch.testing.assert_close(seen.tensors(1), expected)


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
@pytest.mark.parametrize(("start", "stop", "edited"), [(0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.25, 0.6, [1])])
def test_only_some_steps_are_edited(name: str, start: float, stop: float, edited: list[int]) -> None:
    pipe = pipeline(name)
    with dgkit.disrupt(pipe, block=1, dims=DIMS, start=start, stop=stop), dgkit.record(pipe) as trace:
        sample(pipe, name, guidance_scale=4.0, steps=4)
    zero = [bool((trace.mean_abs(timestep=t)[1, DIMS] == 0).all()) for t in trace.timesteps()]
    assert [index for index, is_zero in enumerate(zero) if is_zero] == edited and len(zero) == 4


@torch.no_grad()
def test_keep_norm_keeps_half_precision() -> None:
    model, call = build("sd3"), inputs("sd3", 2)
    with dgkit.disrupt(model, block=0, dims=DIMS, keep_norm=True):
        expected = model(**call)[0]
        half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
        output = model.bfloat16()(**half)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, r"tokens=\[\] is not allowed"),
        ({"tokens": [1, 1]}, r"tokens=\[1, 1\] is not allowed"),
        ({"tokens": [-1]}, r"tokens=\[-1\] is not allowed"),
        ({"tokens": "all"}, "tokens='all' is not allowed"),
        ({"start": 0.5, "stop": 0.5}, "start=0.5 is not allowed: give a number below stop=0.5"),
        ({"stop": 2}, "stop=2 is not allowed: give a number from 0 to 1"),
        ({"stop": 0.5}, "a bare transformer has no steps"),
    ],
)
def test_bad_edits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DgkitError, match=message), dgkit.disrupt(build("dit"), block=0, dims=[0], **options):
        pass


def test_what_cannot_be_edited_is_said() -> None:
    model, call = build("dit"), inputs("dit", 1)
    with (
        pytest.raises(DgkitError, match="tokens=9999 is not allowed: the image has tokens 0 to "),
        dgkit.disrupt(model, block=0, dims=[0], tokens=[9999]),
    ):
        model(**call)
    with pytest.raises(ModelError, match="LayerNorms of WanTransformer3DModel are not known"):
        dgkit.disrupt(build("wan"), block=0, dims=[0], keep_norm=True).__enter__()
    model.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(ModelError, match="compiled blocks"):
        dgkit.disrupt(model, block=0, dims=[0], keep_norm=True).__enter__()
    pipe = pipeline("dit")
    with (
        pytest.raises(ModelError, match="inside guidance"),
        dgkit.detail_guidance(pipe, scale=1.0, block=1, dims=[1]),
        dgkit.disrupt(pipe, block=0, dims=[0], keep_norm=True),
    ):
        sample(pipe, "dit", guidance_scale=4.0)
