"""Where image tokens are: maps of channels over frames, rows and columns, and edits of some frames of a video."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, LTXPipeline, QwenImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dgkit
from dgkit.errors import DgkitError, ModelError
from tests.naive_guidance import conditional_rows, image
from tests.small_pipelines import BY_NAME, Family, _changed
from tests.tiny_models import ALL_CLASSES, VACE_CHANNELS, build, inputs, streams

# latents of three frames (in two transformers of images: one) of 8 x 12, or packed 4 x 6 tokens
VIDEO = (2, 4, 3, 8, 12)
WIDE: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "WanPipeline": (VIDEO, {"num_frames": 9, "width": 96}),
    "CogVideoXPipeline": ((2, 3, 4, 8, 12), {"num_frames": 9, "width": 96}),
    "LTXPipeline": ((2, 72, 16), {"num_frames": 17, "width": 192}),
    "MochiPipeline": (VIDEO, {"num_frames": 13, "width": 96}),
    "HunyuanVideoPipeline": (VIDEO, {"num_frames": 9, "width": 96}),
    "StableDiffusion3Pipeline": ((2, 4, 8, 12), {"width": 24}),
    "FluxPipeline": ((2, 24, 16), {"width": 96}),
}
VIDEOS = [name for name, (latents, _) in WIDE.items() if len(latents) == 5 or name == "LTXPipeline"]
HEIGHT, WIDTH = 4, 6  # of a frame, in tokens

# square, with other tokens in the same stream or other channels in the same latents
SQUARE = [
    "FluxKontextPipeline",
    "Flux2KleinPipeline editing",
    "QwenImageEditPlusPipeline",
    "ZImagePipeline",
    "HiDreamImagePipeline",
    "WanImageToVideoPipeline",
    "LTXImageToVideoPipeline",
    "CogVideoXImageToVideoPipeline",
]


def frames(name: str) -> int:
    return 3 if name in VIDEOS else 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    built.cache_clear()


@cache
def built(name: str) -> Any:
    pipe = BY_NAME[name].build()
    if name == "MochiPipeline":  # its timesteps ascend
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return pipe


def wide(name: str) -> Family:
    """The family, with frames that are not square."""
    family, (shape, size) = BY_NAME[name], WIDE[name]
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return replace(family, arguments=lambda cfg, n: family.arguments(cfg, n) | size | {"latents": latents})


@contextmanager
def kept_by_hand(model: nn.Module, family: Family, with_cfg: bool) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, |z| of the conditional rows' image tokens is kept in float64 for each block, call by call."""
    kept: dict[int, list[Tensor]] = {}
    calls = [0]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls[0] += 1

    def keep(index: int, stack: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            magnitude = image(output, stack).double().abs()
            rows = conditional_rows(family.order, with_cfg, calls[0], len(magnitude))
            if rows:
                kept.setdefault(index, []).append(magnitude[rows])

        return hook

    with ExitStack() as handles:
        handles.callback(model.register_forward_hook(after).remove)
        for index, (block, stack) in enumerate(family.blocks(model)):
            handles.callback(block.register_forward_hook(keep(index, stack)).remove)
        yield kept


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("name", [*WIDE, *SQUARE])
def test_map_is_the_mean_of_each_token(name: str, cfg: bool) -> None:
    family, pipe = wide(name) if name in WIDE else BY_NAME[name], built(name)
    model, dims = pipe.transformer, [9, 2]
    with dgkit.record(pipe, maps=dims) as trace, kept_by_hand(model, family, cfg) as kept:
        latents = family.run(pipe, cfg)
    assert torch.equal(latents, family.run(pipe, cfg))
    shape = (frames(name), HEIGHT, WIDTH) if name in WIDE else (-1, 4, 4)
    times = trace.timesteps("cond")
    for block, seen in kept.items():
        assert len(seen) == len(times) == 3
        for dim in dims:
            for step, z in enumerate(seen):
                expected = z[..., dim].mean(0).reshape(shape)
                torch.testing.assert_close(trace.map(block, dim, "cond", times[step]), expected, rtol=1e-6, atol=1e-8)
            expected = torch.cat(seen)[..., dim].mean(0).reshape(shape)
            torch.testing.assert_close(trace.map(block, dim), expected, rtol=1e-6, atol=1e-8)
    assert set(trace.labels) == ({"cond", "uncond"} if cfg else {"cond"})


# whose other arguments do not depend on the size of the latents
ANY_SIZE = (
    "cogvideox", "wan", "mochi", "z_image", "hunyuan_video", "hunyuan_video_15", "skyreels_v2", "anyflow",
    "easyanimate", "sana_video", "motif_video", "sd3", "dit", "pixart", "sana", "auraflow", "lumina2",
    "hunyuan_image", "cogview3_plus", "cogview4", "prx",
)  # fmt: skip


def latents_of(name: str) -> Tensor:
    """Those of `tiny_models.inputs`, for one image of 4 x 4 tokens."""
    call = inputs(name, 1, tokens=4)
    return call["x"][0][None] if name == "z_image" else call["hidden_states"]


PATCHED = [
    name for name in ALL_CLASSES if latents_of(name).ndim > 3 and dgkit.dissect(build(name)).row.grid is not None
]


def given_latents(name: str, call: dict[str, Any], latents: Tensor) -> dict[str, Any]:
    """The call with these latents, and with whatever else has to be of their size."""
    if name == "z_image":
        return call | {"x": list(latents)}
    _, _, frames, height, width = latents.shape if latents.ndim == 5 else (*latents.shape[:2], 1, *latents.shape[2:])
    more: dict[str, dict[str, Any]] = {
        "anyflow": {name: torch.full((1, latents.shape[1]), 500.0) for name in ("timestep", "r_timestep")},
        "wan_vace": {"control_hidden_states": torch.zeros(1, VACE_CHANNELS, frames, height, width)},
        "glm_image": {
            "prior_token_id": torch.zeros(1, height * width // 4, dtype=torch.long),
            "prior_token_drop": torch.zeros(1, height * width // 4, dtype=torch.bool),
        },
    }
    return call | {"hidden_states": latents} | more.get(name, {})


class Stop(Exception):
    pass


@torch.no_grad()
def first_input(name: str, model: Any, call: dict[str, Any]) -> Tensor:
    """What the first block of the image stream is given, (B, T, C): no attention has mixed the tokens yet."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise Stop

    handle = streams(name, model)[0][0].register_forward_pre_hook(before, with_kwargs=True)
    with pytest.raises(Stop):
        model(**call)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", PATCHED)
def test_grid_is_that_of_the_patches(name: str) -> None:
    """What changes at one place of the latents changes the token at that place of the grid, and no other."""
    like = latents_of(name)
    axis = list(like.shape).index(1, 1) if like.ndim == 5 else None  # of the frames
    count, height, width = (3 if axis else 1, 3, 4) if name in ANY_SIZE else (1, 4, 4)
    patch = like.shape[-1] // 4
    shape = [*like.shape[:-2], patch * height, patch * width]
    place = [0] * len(shape)
    frame, row, column = count - 1, 1, width - 2
    place[-2:] = [patch * row, patch * column]
    if axis is not None:
        shape[axis], place[axis] = count, frame
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    moved = latents.clone()
    moved[tuple(place)] += 1
    model, call = build(name), inputs(name, 1, tokens=4)
    call, other = given_latents(name, call, latents), given_latents(name, call, moved)
    grid = dgkit.dissect(model).grid()(call)
    assert grid == (count, height, width)
    changed = (first_input(name, model, call) != first_input(name, model, other)).any(-1)[0]
    assert changed[: count * height * width].reshape(grid).nonzero().tolist() == [[frame, row, column]]


def test_grid_is_that_of_the_pipelines_packing() -> None:
    latents = torch.zeros(1, 16, 3, 4, 6)
    latents[0, 0, 2, 1, 4] = 1
    packed = LTXPipeline._pack_latents(latents)
    grid = dgkit.dissect(build("ltx")).grid()({"num_frames": 3, "height": 4, "width": 6})
    assert packed.any(-1)[0].reshape(grid).nonzero().tolist() == [[2, 1, 4]]
    latents = torch.zeros(1, 4, 6, 10)
    latents[0, 0, 3, 8] = 1  # in row 1 and column 4 of 3 x 5 tokens
    packed = FluxPipeline._pack_latents(latents, 1, 4, 6, 10)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    for given_ids in (ids, ids[None]):
        grid = dgkit.dissect(build("flux")).grid()({"img_ids": given_ids})
        assert packed.any(-1)[0].reshape(grid).nonzero().tolist() == [[0, 1, 4]]
    packed = QwenImagePipeline._pack_latents(latents, 1, 4, 6, 10)
    for shapes in ([[(1, 3, 5)]], [(1, 3, 5)], [[(1, 3, 5), (1, 7, 7)]]):
        grid = dgkit.dissect(build("qwen_image")).grid()({"img_shapes": shapes})
        assert packed.any(-1)[0].reshape(grid).nonzero().tolist() == [[0, 1, 4]]


def test_a_patch_may_be_several_latent_frames() -> None:
    """CogVideoX 1.5."""
    model = _changed("cogvideox", patch_size_t=2, patch_bias=False)
    latents = torch.randn(1, 4, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    call = inputs("cogvideox", 1) | {"hidden_states": latents}
    grid = dgkit.dissect(model).grid()(call)
    assert grid == (2, 3, 5)
    moved = latents.clone()
    moved[0, 3, 0, 2, 8] += 1
    after = first_input("cogvideox", model, call | {"hidden_states": moved})
    changed = (first_input("cogvideox", model, call) != after).any(-1)[0].reshape(grid)
    assert changed.nonzero().tolist() == [[1, 1, 4]]


@settings(max_examples=25, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    times=st.lists(st.lists(st.sampled_from([900.0, 500.0]), min_size=1, max_size=3), min_size=1, max_size=3),
    dims=st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True),
)
@torch.no_grad()
def test_map_is_a_plain_reshape(sides: tuple[int, int, int], times: list[list[float]], dims: list[int]) -> None:
    """Any number of frames, images and calls, and timesteps of their rows."""
    model, kept = build("wan"), []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output.double().abs()))
    count, height, width = sides
    with dgkit.record(model, maps=dims) as trace:
        for seed, rows in enumerate(times):
            g = torch.Generator().manual_seed(seed)
            latents = torch.randn(len(rows), 4, count, 2 * height, 2 * width, generator=g)
            call = inputs("wan", len(rows), seed) | {"hidden_states": latents, "timestep": torch.tensor(rows)}
            model(**call)
    handle.remove()
    z, at = torch.cat(kept), torch.tensor([time for rows in times for time in rows])
    for dim in dims:
        assert_map(trace.map(1, dim), z[..., dim], sides)
        for time in at.unique().tolist():
            assert_map(trace.map(1, dim, timestep=time), z[at == time][..., dim], sides)


def assert_map(found: Tensor, z: Tensor, sides: tuple[int, ...]) -> None:
    count, height, width = sides
    assert found.shape == sides
    for token, value in enumerate(z.mean(0).tolist()):
        frame, place = divmod(token, height * width)
        assert found[frame, place // width, place % width] == pytest.approx(value, rel=1e-6)


def test_maps_of_a_degraded_pass() -> None:
    """Only its blocks from the edited one on are computed."""
    family, pipe = wide("WanPipeline"), built("WanPipeline")
    with dgkit.detail_guidance(pipe, scale=1.0, block=1, dims=[2]), dgkit.record(pipe, maps=[2, 3]) as trace:
        family.run(pipe, False)
    assert (trace.map(1, 2, "degraded") == 0).all() and (trace.map(1, 2, "cond") > 0).all()
    torch.testing.assert_close(trace.map(1, 3, "degraded"), trace.map(1, 3, "cond"))
    assert trace.map(0, 2, "degraded").isnan().all()


def test_memory_does_not_grow_with_the_images() -> None:
    model = build("wan")
    with torch.no_grad(), dgkit.record(model, maps=[1, 2]) as trace:
        for seed in range(3):
            model(**inputs("wan", 2, seed))
    (cell,) = trace._cells.values()
    assert cell.sum_maps.shape == (3, 2, 16)


# -------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", VIDEOS)
def test_edited_frames_are_those_of_a_plain_hook(name: str, kind: str, cfg: bool) -> None:
    family, pipe, chosen, dims = wide(name), built(name), [2, 0], [2, 9]
    block, stack = family.blocks(pipe.transformer)[1]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        changed = output.clone() if stack.index is None else tuple(part.clone() for part in output)
        tokens = image(changed, stack).unflatten(1, (3, HEIGHT, WIDTH))
        value = tokens[..., dims].mean((1, 2, 3), keepdim=True)[:, 0] if kind == "mean" else 0
        for frame in chosen:
            tokens[:, frame, :, :, dims] = value
        return changed

    handle = block.register_forward_hook(hook)
    expected = family.run(pipe, cfg)
    handle.remove()
    with dgkit.disrupt(pipe, block=1, dims=dims, kind=kind, tokens=dgkit.Frames(chosen)) as edit:
        found = family.run(pipe, cfg)
    assert edit.tokens == dgkit.Frames(chosen)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - family.run(pipe, cfg)).abs().max() > 1e-4
    with dgkit.disrupt(pipe, block=1, dims=dims, kind=kind):
        assert (found - family.run(pipe, cfg)).abs().max() > 1e-4, "the other frame would be noticed"


def test_an_image_is_one_frame() -> None:
    family, pipe = wide("StableDiffusion3Pipeline"), built("StableDiffusion3Pipeline")
    with dgkit.disrupt(pipe, block=1, dims=[2]):
        expected = family.run(pipe, True)
    with dgkit.disrupt(pipe, block=1, dims=[2], tokens=dgkit.Frames([0])):
        assert torch.equal(family.run(pipe, True), expected)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [[], [0, 0], [-1], [0.0], [True], "01", None, 0, {0}])
def test_frames_refuse(bad: Any) -> None:
    with pytest.raises(DgkitError, match=r"^frames=.* is not allowed.*: give a non-empty list of distinct integers"):
        dgkit.Frames(bad)


@pytest.mark.parametrize("name", ["wan", "sd3"])
@torch.no_grad()
def test_no_such_frame_of_an_image(name: str) -> None:
    model = build(name)
    with (
        dgkit.disrupt(model, block=1, dims=[2], tokens=dgkit.Frames([0, 1])),
        pytest.raises(DgkitError, match=r"frames=\[0, 1\] is not allowed: what is generated has frame 0 alone"),
    ):
        model(**inputs(name, 1))


def test_no_such_frame_of_a_video() -> None:
    family, pipe = wide("WanPipeline"), built("WanPipeline")
    with (
        dgkit.disrupt(pipe, block=1, dims=[2], tokens=dgkit.Frames([3])),
        pytest.raises(DgkitError, match=r"frames=\[3\] is not allowed: what is generated has frames 0 to 2$"),
    ):
        family.run(pipe, False)


def test_class_whose_grid_is_not_known() -> None:
    model = build("sd3")
    anatomy = dgkit.dissect(model, replace(dgkit.dissect(model).row, grid=None))
    message = "the grid in which the image tokens of SD3Transformer2DModel stand is not known to dgkit"
    with pytest.raises(ModelError, match=message), dgkit.record(anatomy, maps=[1]):
        pass
    with pytest.raises(ModelError, match=message), dgkit.disrupt(anatomy, block=0, dims=[1], tokens=dgkit.Frames([0])):
        pass
    with torch.no_grad(), dgkit.record(anatomy) as trace, dgkit.disrupt(anatomy, block=0, dims=[1]):
        model(**inputs("sd3", 1))
    assert trace.labels


def without_size(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in call.items() if k not in ("num_frames", "height", "width")}


BAD_CALLS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("ltx", without_size, "does not state num_frames, height and width"),
    ("ltx", lambda call: call | {"width": 2}, "put out 16 image tokens where the call says 1 x 4 x 2"),
    ("flux", lambda call: call | {"img_ids": call["img_ids"].flip(0)}, "do not number the rows and columns"),
    ("flux", lambda call: call | {"img_ids": torch.zeros(16, 3)}, "do not number the rows and columns"),
    ("qwen_image", lambda call: call | {"img_shapes": [[(1, 2, 4), (1, 2, 4)]]}, "16 image tokens .* says 1 x 2 x 4"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CALLS)
@torch.no_grad()
def test_call_that_does_not_tell(name: str, change: Any, message: str) -> None:
    model, call = build(name), change(inputs(name, 1))
    if name == "ltx":
        call |= {"video_coords": torch.zeros(1, 3, 16)}
    with dgkit.record(model, maps=[1]), pytest.raises(ModelError, match=message):
        model(**call)
    edit = dgkit.disrupt(model, block=1, dims=[1], tokens=dgkit.Frames([0]))
    with edit, pytest.raises(ModelError, match=message):
        model(**call)


@torch.no_grad()
def test_maps_refuse() -> None:
    model = build("wan")
    for bad in ([16], [-1], [1, 1], "all", 1, [1.0]):
        with pytest.raises(DgkitError, match="^maps="), dgkit.record(model, maps=bad):
            pass
    with dgkit.record(model, maps=[1]) as trace:
        with pytest.raises(DgkitError, match="the trace is empty"):
            trace.map(0, 1)
        model(**inputs("wan", 1))
        with pytest.raises(DgkitError, match=r"maps=\[1\] are of 1 x 4 x 4 tokens, not of 1 x 2 x 2"):
            model(**inputs("wan", 1, tokens=2))
    for arguments, message in (
        ((0, 2), "dim=2 was not mapped"),
        ((3, 1), "block=3 is not allowed"),
        ((0, 1, "cond"), "label='cond' was not recorded"),
        ((0, 1, None, 3.0), "timestep=3.0 was not recorded"),
    ):
        with pytest.raises(DgkitError, match=message):
            trace.map(*arguments)
    with dgkit.record(model) as plain:
        model(**inputs("wan", 1))
    with pytest.raises(DgkitError, match=r"dim=0 was not mapped: record\(\.\.\., maps=\[\]\) decides"):
        plain.map(0, 0)
