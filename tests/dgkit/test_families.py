"""Detail Guidance and recording of every family of pipelines, against plain hooks that know by hand what is where."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgkit
from dgkit.anatomy import pipeline_row
from dgkit.errors import DgkitError, ModelError
from dgkit.sampling import generate
from tests.dgkit.test_combinations import state
from tests.naive_guidance import naive_detail_guidance, seen_by_plain_hooks, zeroed
from tests.small_pipelines import BY_NAME, FAMILIES, LEFT_OUT, Family

W, DIMS, STEPS = 1.5, [2, 9], 2
RUNS = [(family.name, cfg) for family in FAMILIES for cfg in (False, True) if not (cfg and family.order == "no CFG")]
each_run = pytest.mark.parametrize(("name", "cfg"), [pytest.param(*run, id=f"{run[0]}-{run[1]}") for run in RUNS])


@cache
def built(name: str) -> Any:
    return BY_NAME[name].build()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for remembered in (built, plain, naive, guided):
        remembered.cache_clear()


def run(family: Family, cfg: bool) -> Tensor:
    return family.run(built(family.name), cfg, STEPS)


@cache
def plain(name: str, cfg: bool) -> Tensor:
    return run(BY_NAME[name], cfg)


@cache
def naive(name: str, cfg: bool) -> Tensor:
    return naive_with(BY_NAME[name], cfg)


def naive_with(family: Family, cfg: bool) -> Tensor:
    pipe = built(family.name)
    with naive_detail_guidance(pipe, family, family.block, DIMS, W, cfg):
        return run(family, cfg)


@cache
def guided(name: str, cfg: bool, sharing: str) -> tuple[Tensor, int]:
    """The latents under dgkit's guidance, and the block evaluations that they took."""
    family = BY_NAME[name]
    with ExitStack() as stack:
        guidance = [stack.enter_context(context) for context in guidances(name, sharing=sharing)]
        latents = run(family, cfg)
    return latents, sum(one.cost.block_evaluations for one in guidance)


def guidances(name: str, **options: Any) -> list[Any]:
    """Detail Guidance of each of the pipeline's transformers."""
    family, pipe = BY_NAME[name], built(name)
    options |= {"scale": W, "block": family.block, "dims": DIMS}
    return [dgkit.detail_guidance(pipe, **options | which) for which in transformers(name)]


def transformers(name: str) -> list[dict[str, Any]]:
    """The argument that says which transformer of a pipeline is meant; none for its first."""
    return [{"transformer": which} if which != "transformer" else {} for which in BY_NAME[name].transformers]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest latent of `a`."""
    return float((a - b).abs().max() / a.abs().max())


@each_run
def test_the_edit_acts(name: str, cfg: bool) -> None:
    assert plain(name, cfg).isfinite().all() and plain(name, cfg).dtype == torch.float32
    assert distance(plain(name, cfg), naive(name, cfg)) > 1e-3


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.order != "no CFG"])
def test_cfg_acts(name: str) -> None:
    assert distance(plain(name, False), plain(name, True)) > 1e-3


SWAPPED = {"uncond, cond": "cond, uncond", "cond, uncond": "uncond, cond"}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.order in SWAPPED])
def test_the_other_rows_would_be_noticed(name: str) -> None:
    other = replace(BY_NAME[name], order=SWAPPED[BY_NAME[name].order])
    assert distance(naive(name, True), naive_with(other, True)) > 2e-4


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.stacks_hold_more])
def test_other_tokens_would_be_noticed(name: str) -> None:
    """Text, padding and reference images in the same tensor."""
    family = BY_NAME[name]
    other = replace(family, stacks=tuple(replace(stack, tokens=slice(None)) for stack in family.stacks))
    assert distance(naive(name, False), naive_with(other, False)) > 2e-4


@each_run
def test_guidance_is_that_of_plain_hooks(name: str, cfg: bool) -> None:
    latents, _ = guided(name, cfg, "replay")
    assert (latents - naive(name, cfg)).abs().max() <= 1e-5 * plain(name, cfg).abs().max()


@each_run
def test_replay_is_two_passes(name: str, cfg: bool) -> None:
    """Bitwise, unless replay keeps what blocks made of a doubled batch, where matrix products may round otherwise."""
    replay, two_passes = guided(name, cfg, "replay")[0], guided(name, cfg, "none")[0]
    if cfg and BY_NAME[name].order != "two calls":
        assert distance(replay, two_passes) <= 1e-6
    else:
        assert torch.equal(replay, two_passes)


@each_run
def test_cost(name: str, cfg: bool) -> None:
    family = BY_NAME[name]
    blocks = len(family.blocks(family.models(built(name))[0]))
    passes, branch = blocks * family.batch * (2 if cfg else 1), (blocks - (family.block + 1)) * family.batch
    assert guided(name, cfg, "replay")[1] == STEPS * (passes + branch)


@each_run
def test_recording_is_that_of_plain_hooks(name: str, cfg: bool) -> None:
    family, pipe = BY_NAME[name], built(name)
    with ExitStack() as stack:
        traces = [stack.enter_context(dgkit.record(pipe, **which)) for which in transformers(name)]
        seen = [stack.enter_context(seen_by_plain_hooks(model, family, cfg)) for model in family.models(pipe)]
        latents = run(family, cfg)
    assert torch.equal(latents, plain(name, cfg))
    for trace, expected in zip(traces, seen, strict=True):
        assert set(trace.labels) == ({"cond", "uncond"} if cfg else {"cond"})
        torch.testing.assert_close(trace.mean_abs("cond"), expected(), rtol=1e-5, atol=1e-7)


def interrupting(module: nn.Module, call: int) -> Any:
    """A forward hook that raises in the module's `call`-th call."""
    calls = [0]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise ZeroDivisionError

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_an_exception_leaves_nothing_behind(name: str) -> None:
    cfg = BY_NAME[name].order != "no CFG"
    family, pipe = BY_NAME[name], built(name)
    expected = plain(name, cfg)
    before = [state(model) for model in family.models(pipe)]
    last, _ = family.blocks(family.models(pipe)[0])[-1]
    with ExitStack() as stack:
        for context in guidances(name):
            stack.enter_context(context)
        handle = interrupting(last, 2)  # the first call's branch
        with pytest.raises(ZeroDivisionError):
            run(family, cfg)
        handle.remove()
    assert [state(model) for model in family.models(pipe)] == before
    assert torch.equal(run(family, cfg), expected)


@pytest.mark.parametrize("block", [0, 2])
def test_blocks_that_a_controlnet_shares_are_left_alone_outside_of_a_call(block: int) -> None:
    """Z-Image's is given the transformer's own first block, and runs before each call of the transformer."""
    family = BY_NAME["ZImageControlNetPipeline"]
    model, inside = built(family.name).transformer, [False]
    edited, stack = family.blocks(model)[block]
    handles = [
        model.register_forward_pre_hook(lambda module, args: inside.__setitem__(0, True)),
        model.register_forward_hook(lambda module, args, output: inside.__setitem__(0, False)),
        edited.register_forward_hook(
            lambda module, args, output: zeroed(output, stack, DIMS) if inside[0] else None,
        ),
    ]
    expected = run(family, True)
    for handle in handles:
        handle.remove()
    with dgkit.disrupt(built(family.name), block=block, dims=DIMS):
        assert torch.equal(run(family, True), expected)
    assert distance(expected, plain(family.name, True)) > 1e-3
    family = replace(family, block=block)
    expected = naive_with(family, True)
    with dgkit.detail_guidance(built(family.name), scale=W, block=block, dims=DIMS):
        assert distance(run(family, True), expected) <= 1e-5


@pytest.mark.parametrize("name", [family.name for family in LEFT_OUT])
def test_what_no_row_describes_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="expected a diffusers pipeline"), dgkit.record(built(name)):
        pass


@pytest.mark.parametrize("scale", [1.5, 2.0])
def test_cosmos_has_no_cfg_between_1_and_2(scale: float) -> None:
    """Its formula is c + g (c - u), for g above 1 alone."""
    name = "Cosmos2TextToImagePipeline"
    assert pipeline_row(built(name)).guidance(2.5, 1) == {"guidance_scale": 1.5}
    assert pipeline_row(built(name)).guidance(1.0, 1) == {"guidance_scale": 0.0}
    with pytest.raises(DgkitError, match=rf"guidance_scale={scale} is not allowed.*above 2"):
        generate(built(name), ["a"], [0], num_inference_steps=1, guidance_scale=scale)


def test_noise_levels_of_cosmos_are_not_known() -> None:
    """Its sigmas run from 80 down, and its transformer is handed scaled latents."""
    family = BY_NAME["Cosmos2TextToImagePipeline"]
    by_sigma = dgkit.detail_guidance(built(family.name), scale=lambda sigma: sigma, block=1, dims=DIMS)
    with by_sigma, pytest.raises(DgkitError, match=r"sigma=.* is no noise level of x"):
        run(family, False)


def test_the_scale_of_a_guider_is_not_given_in_the_call() -> None:
    assert pipeline_row(built("MotifVideoPipeline")).guidance(1.0, 1) == {}
    with pytest.raises(DgkitError, match=r"guidance_scale=3.0 is not allowed.*set pipe.guider"):
        pipeline_row(built("MotifVideoPipeline")).guidance(3.0, 1)
