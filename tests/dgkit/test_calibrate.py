"""`calibrate` against loops over tensors that plain hooks kept; its words, its figure, and what it refuses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgkit
from dgkit.anatomy import NO_CFG, PIPELINES
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.calibration_figure import COLUMNS, _binned
from tests.naive_guidance import seen_by_plain_hooks
from tests.small_pipelines import FAMILIES, Family
from tests.tiny_models import image_slice, pipeline, prompts, streams


def plant(block: Any, dim: int, value: float, index: int | None = None) -> Any:
    """Add a value to a channel of the image tokens that a block puts out."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        image = output if index is None else output[index]
        image = image + value * F.one_hot(torch.tensor(dim), image.shape[-1]).to(image.dtype)
        return image if index is None else (*output[:index], image, *output[index + 1 :])

    return block.register_forward_hook(hook)


@contextmanager
def kept(name: str, pipe: Any) -> Iterator[list[list[Tensor]]]:
    """The image tokens (images, T, C) of each block, in float64, from each call of the transformer."""
    blocks = streams(name, pipe.transformer)
    outputs: list[list[Tensor]] = [[] for _ in blocks]
    side = {"sd3": 4, "flux": 4, "dit": 4}[name]

    def keep(number: int, index: int | None, where: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            image = (output if index is None else output[index])[:, image_slice(where, side)]
            outputs[number].append(image.double())

        return hook

    handles = [block.register_forward_hook(keep(number, *place)) for number, (block, *place) in enumerate(blocks)]
    yield outputs
    for handle in handles:
        handle.remove()


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
def test_table_by_loops(name: str) -> None:
    """Every number of the table from kept tensors, for two images in three steps."""
    pipe, steps = pipeline(name), 3
    side = {"height": 32, "width": 32} if name == "flux" else {}  # 16 tokens of 2 x 2 latents, as in the others
    given = {} if name == "dit" else prompts(name, 2) | {"height": 8, "width": 8} | side
    if name == "dit":
        given = {"prompts": [1, 2]}
    first, *_, last = streams(name, pipe.transformer)
    plant(first[0], 3, 20.0, first[1])
    plant(last[0], 5, 40.0, last[1])
    with kept(name, pipe) as outputs:
        found = dgkit.calibrate(pipe, dims=[3, 5], num_inference_steps=steps, **given)
    table = found.table().set_index("block")
    for block, calls in enumerate(outputs):
        # images one after another (DiT) or in one call
        by_step = [calls[step::steps] for step in range(steps)]
        per_step = [torch.cat(tensors) for tensors in by_step]
        channels = per_step[0].shape[2]
        means = [[float(z[..., c].abs().mean()) for c in range(channels)] for z in per_step]
        mean = [sum(m[c] for m in means) / steps for c in range(channels)]
        energy = [sum(float(z[..., c].square().sum()) for z in per_step) for c in range(channels)]
        largest = sorted(range(channels), key=lambda c: -mean[c])[:2]
        fixed = [sum(c in sorted(range(channels), key=lambda d: -m[d])[:2] for m in means) / steps for c in largest]
        row = table.loc[block]
        assert row["channels"] == largest
        assert row["ratio"] == pytest.approx([mean[c] / median(mean) for c in largest], rel=1e-5)
        assert row["energy"] == pytest.approx([energy[c] / sum(energy) for c in largest], rel=1e-5)
        assert row["fixed"] == pytest.approx(fixed)
        assert row["dims_ratio"] == pytest.approx(min(mean[3], mean[5]) / median(mean), rel=1e-5)
        assert row["dims_energy"] == pytest.approx((energy[3] + energy[5]) / sum(energy), rel=1e-5)
    assert [role == "chosen" for role in table["role"]] == [block == found.block for block in table.index]


RUNNABLE = [family for family in FAMILIES if family.name.split()[0] in PIPELINES]


@pytest.mark.parametrize("family", RUNNABLE, ids=lambda family: family.name)
def test_every_family_of_pipelines(family: Family) -> None:
    """From embeddings or else one prompt or class, each of the transformers; what is recorded is what hooks see."""
    for name in family.transformers:
        pipe = family.build()
        if family.switch is not None:
            family.switch(pipe, False)
        given = family.arguments(False, family.batch)
        if condition := {"prompt", "class_labels"} & set(given):
            given = family.arguments(False, 1)
            given["prompts"] = given.pop(condition.pop())
        steps = given.pop("num_inference_steps", 2)
        with family.around(), seen_by_plain_hooks(getattr(pipe, name), family, False) as seen:
            found = dgkit.calibrate(pipe, num_inference_steps=steps, transformer=name, **given)
        torch.testing.assert_close(found.trace.mean_abs(), seen(), rtol=1e-4, atol=1e-6)
        assert f"block={found.block}, dims={found.dims}" in str(found)


# ------------------------------------------------------------------------------------------------------ what it chooses


def classes(planted: dict[int, int]) -> Any:
    """DiT of three blocks in which each class has a massive channel of its own from block 0 on."""
    pipe = pipeline("dit")
    seen: dict[str, list[int]] = {}
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(labels=kwargs["class_labels"].tolist()), with_kwargs=True
    )

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, label in enumerate(seen["labels"]):
            output[row, :, planted[label]] += 100
        return output

    pipe.transformer.transformer_blocks[0].register_forward_hook(hook)
    return pipe


def test_halves_that_agree_and_halves_that_do_not() -> None:
    one = dgkit.calibrate(classes({1: 5, 2: 5}), prompts=[1, 1, 2, 2], num_inference_steps=2)
    assert one.agrees and one.dims == [5] and one.halves == ((0, [5]), (0, [5]))
    assert "both give the same block and dims" in str(one)
    two = dgkit.calibrate(classes({1: 5, 2: 7}), prompts=[1, 1, 2, 2], num_inference_steps=2)
    assert two.agrees is False and two.halves is not None
    assert [dims for _, dims in two.halves] == [[5], [7]]
    assert "they differ, so take more samples (block 0, dims [5]; block 0, dims [7])" in str(two)
    single = dgkit.calibrate(classes({1: 5}), prompts=[1], num_inference_steps=2)
    assert single.agrees is None and "halves of the images: not recorded apart" in str(single)


def test_prompts_of_ones_own_are_what_runs() -> None:
    pipe = dgkit.load("tiny-sd3")
    seen: list[list[str]] = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda **kwargs: seen.append(kwargs["prompt"]) or encode(**kwargs)
    found = dgkit.calibrate(pipe, prompts=["a red door", "a wall"], num_samples=3, num_inference_steps=1)
    assert seen == [["a red door"], ["a wall"], ["a red door"]] and found.num_samples == 3
    assert pipe.vae.decoder is not None and "3 images, 1 timesteps" in str(found)


def test_words_say_why() -> None:
    pipe = pipeline("dit")
    plant(pipe.transformer.transformer_blocks[1], 5, 100.0)
    found = dgkit.calibrate(pipe, num_inference_steps=2)
    words = " ".join(str(found).split())
    assert (found.block, found.dims, found.candidates, found.given) == (1, [5], [1, 2], ())
    assert "DiTTransformer2DModel, 3 blocks of 16 channels; 4 images, 2 timesteps" in words
    assert "massive in 2 of 3 blocks" in words and "a quarter of the way in (block 0) or later" in words
    assert "other candidates: 2" in words and "not massive" not in words
    assert list(found.table()["role"]) == ["below 5", "chosen", "candidate"]
    given = dgkit.calibrate(pipe, block=2, dims=[5], num_inference_steps=2)
    assert given.given == ("block", "dims") and "dims: given" in str(given) and "block: given" in str(given)
    nothing = dgkit.calibrate(pipeline("dit"), num_inference_steps=2)
    assert "no channel is massive" in str(nothing) and "nothing for DG to take away" in " ".join(str(nothing).split())


def test_words_on_the_scale_are_the_presets() -> None:
    words = str(dgkit.calibrate(pipeline("dit"), num_inference_steps=1, num_samples=1))
    assert "w is not found by this; try 0.25, 0.5, 1, 2" in words
    # Table 5 of the paper: w for SD3, SD3.5 and Flux, alone and beside CFG
    assert "sd3: 1 / 1 (Tables 4 and 5)" in words
    assert "sd3.5-large, flux-dev, flux-dev-de-distill: 4 / 2 (Tables 4 and 5)" in words
    assert "tiny-dit: 0.02 / 0.2 (dims by detect_massive, w by the calibration in the model card)" in words


def test_cfg_of_a_pipeline_that_dgkit_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sd3")
    monkeypatch.delitem(PIPELINES, "StableDiffusion3Pipeline")
    with pytest.raises(ModelError, match="how StableDiffusion3Pipeline runs classifier-free guidance is not known"):
        dgkit.calibrate(pipe, num_inference_steps=2, **prompts("sd3", 2))
    plant(pipe.transformer.transformer_blocks[0], 4, 100.0, 1)
    assert dgkit.calibrate(pipe, num_inference_steps=2, cfg=NO_CFG, **prompts("sd3", 2)).dims == [4]


def test_each_of_two_transformers() -> None:
    """Also where guidance looks for block and dims by itself."""
    family = next(family for family in FAMILIES if family.name == "WanPipeline with two transformers")
    pipe, given = family.build(), family.arguments(False, 1)
    for name, dim in (("transformer", 3), ("transformer_2", 6)):
        plant(getattr(pipe, name).blocks[0], dim, 100.0)
    for name, dim in (("transformer", 3), ("transformer_2", 6)):
        assert dgkit.calibrate(pipe, transformer=name, **given).dims == [dim]
    original = type(pipe).__call__
    fixed = {name: value for name, value in given.items() if name not in ("num_inference_steps", "prompt")}
    own = {"__call__": lambda self, prompt=None, **kwargs: original(self, **(kwargs | fixed))}
    pipe.__class__ = type("MyPipeline", (type(pipe),), own)
    auto = {"scale": 1.0, "block": "auto", "dims": "auto", "cfg": "two calls"}
    with dgkit.detail_guidance(pipe, transformer="transformer_2", **auto) as guidance:
        assert guidance.dg.dims == [6]
    with dgkit.detail_guidance(pipe, **auto) as guidance:
        assert guidance.dg.dims == [3]


# ----------------------------------------------------------------------------------------------------------- its figure


def test_figure_shows_the_recorded_numbers() -> None:
    pipe = pipeline("dit")
    plant(pipe.transformer.transformer_blocks[1], 5, 100.0)
    with kept("dit", pipe) as outputs:
        found = dgkit.calibrate(pipe, num_inference_steps=2, num_samples=2)
    figure = found.figure()
    chart, ratio, energy, by_step, energy_by_step, _ = figure.axes
    z = torch.stack([torch.cat(calls) for calls in outputs])  # (blocks, images and steps, tokens, channels)
    mean = z.abs().mean((1, 2))
    expected = mean / mean.quantile(0.5, dim=1, keepdim=True)
    np.testing.assert_allclose(chart.images[0].get_array(), expected, rtol=1e-5)
    assert chart.collections[0].get_offsets().tolist() == [[5, 1]], "the chosen channel and block"
    np.testing.assert_allclose(ratio.lines[0].get_xdata(), expected[:, 5], rtol=1e-5)
    square = z.square().sum((1, 2))
    np.testing.assert_allclose(energy.lines[0].get_xdata(), 100 * square[:, 5] / square.sum(1), rtol=1e-5)
    steps = [torch.cat(outputs[1][step::2]) for step in range(2)]
    means = [s.abs().mean((0, 1)) for s in steps]
    np.testing.assert_allclose(by_step.lines[0].get_ydata(), [m[5] / m.quantile(0.5) for m in means], rtol=1e-5)
    shares = [100 * s[..., 5].square().sum() / s.square().sum() for s in steps]
    np.testing.assert_allclose(energy_by_step.lines[0].get_ydata(), shares, rtol=1e-5)
    assert all(axes.get_xlabel() for axes in figure.axes[:5]) and "%" in energy.get_xlabel()
    figure.savefig(BytesIO(), format="png")


def test_one_channel_of_many_is_not_lost_in_the_map() -> None:
    ratios = torch.ones(2, 3 * COLUMNS + 1)
    ratios[1, 770] = 50
    shown, wide = _binned(ratios)
    assert wide == 4 and shown.shape == (2, 301) and shown.isfinite().all()
    assert (shown == 50).nonzero().tolist() == [[1, 770 // 4]]
    assert torch.equal(_binned(ratios[:, :COLUMNS])[0], ratios[:, :COLUMNS])


def test_figure_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dgkit.calibrate(pipeline("dit"), num_inference_steps=1, num_samples=1)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(DgkitError, match="drawn by matplotlib, which cannot be imported.*pip install matplotlib"):
        found.figure()


# ------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": "a fox"}, "prompts='a fox' is not allowed: give a list"),
        ({"prompts": []}, r"prompts=\[\] is not allowed"),
        ({"class_labels": [1]}, r"class_labels=\[1\] is not allowed: give them as prompts"),
        ({"num_samples": 0}, "num_samples=0 is not allowed"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not allowed"),
        ({"seed": 0.5}, "seed=0.5 is not allowed"),
        ({"block": 3}, "block=3 is not allowed: DiTTransformer2DModel has blocks 0 to 2"),
        ({"dims": [16]}, r"dims=\[16\] is not allowed"),
        ({"cfg": "both"}, "cfg='both' is not allowed"),
        ({"transformer": "unet"}, "expected a diffusers pipeline with a unet"),
        ({"strength": 0.5}, "DiTPipeline does not run with .*unexpected keyword argument 'strength'"),
    ],
)
def test_calibrate_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        dgkit.calibrate(pipeline("dit"), **options)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_pipeline_without_text_encoders_is_refused(name: str) -> None:
    words = "it has no text encoder: .*its call also takes prompt_embeds, pooled_prompt_embeds"
    with pytest.raises(ModelError, match=words):
        dgkit.calibrate(pipeline(name), height=16, width=16)
    with pytest.raises(DgkitError, match="prompt_embeds decides on prompts and their number"):
        dgkit.calibrate(pipeline(name), num_samples=2, **prompts(name, 2))


def test_a_transformer_that_is_not_called_is_refused() -> None:
    family = next(family for family in FAMILIES if family.name == "WanPipeline with two transformers")
    pipe, given = family.build(), family.arguments(False, 1)
    pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(ModelError, match="did not call its transformer_2 in 3 steps"):
        dgkit.calibrate(pipe, transformer="transformer_2", **given)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.float32, float("nan"))])
def test_a_record_that_is_not_finite_is_refused(dtype: torch.dtype, value: float) -> None:
    """1e5 is an infinity in float16, as a massive channel of a large model may be."""
    pipe = pipeline("dit").to(dtype)
    plant(pipe.transformer.transformer_blocks[1], 6, value)
    words = "block 1 put out an infinity or NaN in channel .* at timestep .*float16.* overflows; .* bfloat16 or float32"
    with pytest.raises(ModelError, match=words) as caught:
        dgkit.calibrate(pipe, num_inference_steps=2, num_samples=1)
    if dtype == torch.float16:
        assert "in channel 6 at" in str(caught.value)
