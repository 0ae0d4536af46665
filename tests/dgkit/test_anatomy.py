"""Anatomy: the blocks, image tokens and gates of each class against diffusers itself."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor, nn

import dgkit
from dgkit.anatomy import Block, Call, dissect
from dgkit.disruption import make_edit
from dgkit.errors import DgkitError, ModelError
from tests.small_pipelines import BY_NAME
from tests.tiny_models import ALL_CLASSES, STREAMS, TEXT, build, image_slice, inputs, streams

SIDE = 2  # image tokens along one side
each_class = pytest.mark.parametrize("name", ALL_CLASSES)


def predict(model: nn.Module, call: dict[str, Any]) -> Tensor:
    prediction = model(**call, return_dict=False)
    prediction = prediction if isinstance(prediction, Tensor) else prediction[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


@contextmanager
def after(module: nn.Module, hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook, **options)
    try:
        yield
    finally:
        handle.remove()


def taken(output: Any, index: int | None, where: str) -> Tensor:
    """The image tokens of a block's output as `STREAMS` has it."""
    return (output if index is None else output[index])[:, image_slice(where, SIDE)]


# -------------------------------------------------------------------------------------------------------------- blocks


@each_class
@torch.no_grad()
def test_block_order_is_the_order_of_execution(name: str) -> None:
    model = build(name)
    order: list[nn.Module] = []
    with ExitStack() as stack:
        for path in STREAMS[name]:
            for block in getattr(model, path):
                stack.enter_context(after(block, lambda m, a, o: order.append(m)))
        predict(model, inputs(name, 1, tokens=SIDE))
    anatomy = dissect(model)
    assert [block.module for block in anatomy.blocks] == order
    assert [block.index for block in anatomy.blocks] == list(range(len(order)))


def read_by_the_prediction(name: str, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """In Motif-Video the last block begins anew, and reads the image tokens of those before by its attention alone."""
    return blocks[-1:] if name == "motif_video" else blocks


def without_mixing(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An attention in which no token sees another, so that a text token cannot reach an image token."""
    return value if value.shape[2] == query.shape[2] else torch.zeros_like(query)


@each_class
@torch.no_grad()
def test_the_image_tokens_are_those_that_the_prediction_is_made_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens do not mix, changing an image token changes the prediction, and changing all the others does not."""
    tokens = torch.arange(SIDE**2)
    model, call = build(name, depth=2), inputs(name, len(tokens), tokens=SIDE)
    monkeypatch.setattr(F, "scaled_dot_product_attention", without_mixing)
    anatomy = dissect(model)
    with anatomy.follow():
        plain = predict(model, call)
        for block in read_by_the_prediction(name, anatomy.blocks):

            def all_others_changed(module: nn.Module, args: Any, output: Any, block=block) -> Any:
                parts = output if isinstance(output, tuple) else (output,)
                noisy = tuple(part if part is None else part + 1 for part in parts)
                return block.with_image(noisy if isinstance(output, tuple) else noisy[0], block.image(output))

            def each_changed(module: nn.Module, args: Any, output: Any, block=block) -> Any:
                image = block.image(output).clone()
                assert image.shape == (len(tokens), len(tokens), anatomy.channels)
                image[tokens, tokens, 0] += 1  # another token in each row of the batch
                return block.with_image(output, image)

            with after(block.module, all_others_changed):
                torch.testing.assert_close(predict(model, call), plain, rtol=1e-5, atol=1e-5)
            with after(block.module, each_changed):
                assert ((predict(model, call) - plain).abs() > 1e-4).flatten(1).any(1).all()


@each_class
@torch.no_grad()
def test_text_stands_where_the_stack_says_in_joint_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, but inside: noise on the attention's outputs at the text tokens does not reach the prediction."""
    model, call = build(name, depth=2), inputs(name, 1, tokens=SIDE)

    def run(block: Block, noisy: str) -> tuple[Tensor, int]:
        """The prediction, and how many attentions of the block were joint."""
        inside, joint = [False], [0]

        def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = without_mixing(query, key, value).clone()
            others = query.shape[2] - SIDE**2
            if inside[0] and key.shape[2] == query.shape[2] and others > 0:
                joint[0] += 1
                border = others if block.stack.text_first else SIDE**2
                output[:, :, :border] += noisy == ("text" if block.stack.text_first else "image")
                output[:, :, border:] += noisy == ("image" if block.stack.text_first else "text")
            return output

        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        enter = block.module.register_forward_pre_hook(lambda m, a: inside.__setitem__(0, True))
        with after(block.module, lambda m, a, o: inside.__setitem__(0, False)):
            prediction = predict(model, call)
        enter.remove()
        return prediction, joint[0]

    for block in read_by_the_prediction(name, dissect(model).blocks):
        plain, joint = run(block, "nothing")
        assert joint == (block.stack.text_first is not None)
        if joint:
            torch.testing.assert_close(run(block, "text")[0], plain, rtol=1e-5, atol=1e-5)
            assert ((run(block, "image")[0] - plain).abs() > 1e-4).any()


@each_class
@torch.no_grad()
def test_disrupt_changes_the_image_tokens_of_one_block(name: str) -> None:
    """Against a hook that knows only diffusers; every other token of the block's output stays."""
    model, call = build(name, depth=2, seed=1), inputs(name, 3, seed=2, tokens=SIDE)
    dims = [0, 5]
    plain = predict(model, call)
    for number, (block, index, where) in enumerate(streams(name, model)):
        outputs: list[Any] = []

        def zero(module: nn.Module, args: Any, output: Any, outputs=outputs, index=index, where=where) -> Any:
            changed = [output] if index is None else list(output)
            changed[index or 0] = changed[index or 0].clone()
            changed[index or 0][:, image_slice(where, SIDE), dims] = 0
            outputs.append(changed)
            return changed[0] if index is None else tuple(changed)

        def see(module: nn.Module, args: Any, output: Any, outputs=outputs, index=index) -> None:
            outputs.append([output] if index is None else output)

        with after(block, zero):
            expected = predict(model, call)
        with dgkit.disrupt(model, block=number, dims=dims), after(block, see):
            assert torch.equal(predict(model, call), expected)
        for ours, theirs in zip(*outputs, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        assert not torch.equal(expected, plain)
    assert torch.equal(predict(model, call), plain)


@each_class
@torch.no_grad()
def test_replay_is_exact(name: str) -> None:
    """What the guidance engine relies on: blocks up to m may all return what the last of their stack returned."""
    model, call = build(name, depth=3), inputs(name, 2, tokens=SIDE)
    blocks = streams(name, model)
    paths = [path for path in STREAMS[name] for _ in getattr(model, path)]
    anatomy = dissect(model)
    edit = make_edit(anatomy, [1, 4])
    kept: list[Any] = []
    with anatomy.follow(), ExitStack() as stack:
        for block, *_ in blocks:
            stack.enter_context(after(block, lambda m, a, o: kept.append(o)))
        plain = predict(model, call)
    outputs = list(kept)
    for last in range(len(blocks)):
        with dgkit.disrupt(model, block=last, dims=edit.dims):
            disrupted = predict(model, call)
        block = anatomy.blocks[last]
        edited = block.with_image(outputs[last], edit(block.image(outputs[last])))
        for own, expected in ((outputs[last], plain), (edited, disrupted)):
            known = {path: outputs[i] for i, path in enumerate(paths[: last + 1])} | {paths[last]: own}
            for (module, *_), path in list(zip(blocks, paths, strict=True))[: last + 1]:
                module.forward = lambda *args, known=known[path], **kwargs: known
            assert torch.equal(predict(model, call), expected)
            for module, *_ in blocks[: last + 1]:
                del module.forward


# --------------------------------------------------------------------------------------------------------------- gates


# branch -> submodule whose output alpha scales, by list of blocks; None: added as it is, without a gate
DOUBLE = {"msa": "attn", "mlp": "ff"}
FLUX = {"transformer_blocks": DOUBLE, "single_transformer_blocks": {"msa+mlp": "proj_out"}}
CROSS = {"msa": "attn1", None: "attn2", "mlp": "ff"}
WAN: dict[str, dict[str | None, str]] = {"blocks": {"msa": "attn1", None: "attn2", "mlp": "ffn"}}
BRANCHES: dict[str, dict[str, dict[str | None, str]]] = {
    "sd3": {"transformer_blocks": {**DOUBLE, "msa2": "attn2"}},
    "flux": FLUX,
    "dit": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "bria": FLUX,
    "longcat_image": FLUX,
    "ovis_image": FLUX,
    "pixart": {"transformer_blocks": CROSS},
    "sana": {"transformer_blocks": CROSS},
    "auraflow": {"joint_transformer_blocks": {"mlp": "ff"}, "single_transformer_blocks": {"mlp": "ff"}},
    "lumina2": dict.fromkeys(("noise_refiner", "layers"), {"msa": "norm2", "mlp": "ffn_norm2"}),
    "z_image": dict.fromkeys(("noise_refiner", "layers"), {"msa": "attention_norm2", "mlp": "ffn_norm2"}),
    "qwen_image": {"transformer_blocks": {"msa": "attn", "mlp": "img_mlp"}},
    "hunyuan_image": FLUX,
    "hidream": dict.fromkeys(
        ("double_stream_blocks", "single_stream_blocks"), {"msa": "block.attn1", "mlp": "block.ff_i"}
    ),
    "chroma": FLUX,
    "cogview3_plus": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "cogview4": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "cogvideox": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "wan": WAN,
    "ltx": {"transformer_blocks": CROSS},
    "flux2": {"transformer_blocks": DOUBLE, "single_transformer_blocks": {"msa+mlp": "attn"}},
    "mochi": {"transformer_blocks": {"msa": "norm2.norm", "mlp": "norm4.norm"}},
    "lumina": {"layers": {"msa": "norm2", "mlp": "ffn_norm2"}},
    "glm_image": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "krea2": {"transformer_blocks": DOUBLE},
    "prx": {"blocks": {"msa": "attention", "mlp": "down_proj"}},
    "bria_fibo": FLUX,
    "nucleus_moe": {"transformer_blocks": {"msa": "attn", "mlp": "img_mlp"}},
    "cosmos": {"transformer_blocks": {"msa": "attn1", "cross": "attn2", "mlp": "ff"}},
    "kandinsky5": {
        "visual_transformer_blocks": {"msa": "self_attention", "cross": "cross_attention", "mlp": "feed_forward"}
    },
    "allegro": {"transformer_blocks": CROSS},
    "wan_vace": WAN,
    "skyreels_v2": WAN,
    "anyflow": WAN,
    "hunyuan_video": FLUX,
    "hunyuan_video_15": {"transformer_blocks": DOUBLE},
    "easyanimate": {"transformer_blocks": {"msa": "attn1", "mlp": "ff"}},
    "sana_video": {"transformer_blocks": CROSS},
    "motif_video": FLUX,
}
# submodules whose output holds text too, in a block whose own output keeps the two apart
TEXT_IN_BRANCH = {
    ("flux", "proj_out"): "last",
    ("bria", "proj_out"): "last",
    ("longcat_image", "proj_out"): "last",
    ("ovis_image", "proj_out"): "last",
    ("cogview3_plus", "ff"): "last",
    ("hunyuan_image", "proj_out"): "first",
    ("cogvideox", "ff"): "last",
    ("hunyuan_video", "proj_out"): "first",
    ("motif_video", "proj_out"): "first",
}


@each_class
@torch.no_grad()
def test_gates_are_the_residual_scaling_of_eq_2(name: str) -> None:
    """z^{k+1} - z^k = sum over branches of alpha_k times the branch's output, for image tokens."""
    model, call = build(name, depth=3), inputs(name, 2, tokens=SIDE)
    if name not in ("kandinsky5", "motif_video"):  # parts of which compute in float32
        model, call = model.double(), {k: as_double(v) for k, v in call.items()}
    blocks = {block.module: block for block in dissect(model).blocks}
    for path, (index, where) in STREAMS[name].items():
        for module in getattr(model, path):
            branches = {b: s for b, s in BRANCHES[name][path].items() if b != "msa2" or module.use_dual_attention}
            seen: dict[Any, Tensor] = {}
            with ExitStack() as stack:

                def keep(module: nn.Module, args: Any, output: Any, seen=seen, branches=branches) -> None:
                    seen.setdefault(module, output[0] if isinstance(output, tuple) else output)  # image before text

                def boundary(module: nn.Module, args: Any, kwargs: Any, output: Any, seen=seen) -> None:
                    given = (*args, *(kwargs[key] for key in ("hidden_states", "x") if key in kwargs))[0]
                    seen["change"] = taken(output, index, where) - given[:, image_slice(where, SIDE)]  # noqa: B023

                def alpha(module: nn.Module, args: Any, kwargs: Any, output: Any, gate: Any = None, seen=seen) -> None:
                    seen[f"alpha {gate.branch}"] = gate.read(module, args, kwargs, output)

                for submodule in branches.values():
                    stack.enter_context(after(module.get_submodule(submodule), keep))
                for gate, source in blocks[module].gates:
                    stack.enter_context(
                        after(source, lambda m, a, kw, o, g=gate, f=alpha: f(m, a, kw, o, g), with_kwargs=True)
                    )
                stack.enter_context(after(module, boundary, with_kwargs=True))
                predict(model, call)
            assert [gate.branch for gate, _ in blocks[module].gates] == [
                b for b in ("msa", "msa2", "cross", "mlp", "msa+mlp") if b in branches
            ]
            total = torch.zeros_like(seen["change"])
            for branch, submodule in branches.items():
                output = seen[module.get_submodule(submodule)]
                output = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
                output = output.flatten(1, 3) if output.ndim == 5 else output
                output = output[:, image_slice(TEXT_IN_BRANCH.get((name, submodule), where), SIDE)]
                gate = 1 if branch is None else seen[f"alpha {branch}"][:, None]
                assert branch is None or gate.shape == (2, 1, output.shape[-1])
                total += gate * output
            assert (seen["change"] - total).norm() <= 1e-5 * seen["change"].norm()


def as_double(value: Any) -> Any:
    if isinstance(value, list):
        return [as_double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_dual_attention_blocks_have_three_gates_and_others_two() -> None:
    blocks = dissect(build("sd3")).blocks
    assert [[g.branch for g, _ in b.gates] for b in blocks] == [["msa", "msa2", "mlp"], ["msa", "mlp"], ["msa", "mlp"]]


@torch.no_grad()
def test_flux2_has_one_gate_for_all_blocks_of_a_stack() -> None:
    model = build("flux2", depth=4)
    with dgkit.record(model) as trace:
        predict(model, inputs("flux2", 2))
    gates = dgkit.residual_gates(trace)
    assert torch.equal(gates.of(0, "msa"), gates.of(2, "msa"))
    assert torch.equal(gates.of(3, "msa+mlp"), gates.of(6, "msa+mlp"))
    assert not torch.equal(gates.of(0, "msa"), gates.of(0, "mlp"))


@pytest.mark.parametrize("name", ["wan", "ltx"])
@torch.no_grad()
def test_a_timestep_per_token(name: str) -> None:
    """Image-to-video gives the tokens of the first frame the timestep 0; alpha is then the mean over tokens."""
    model, call = build(name), inputs(name, 2, tokens=SIDE)
    apart = []
    for t in (500.0, 0.0):
        with dgkit.record(model) as trace:
            predict(model, call | {"timestep": torch.full((2,), t)})
        apart.append(dgkit.residual_gates(trace).mean)
    with dgkit.record(model) as trace:
        predict(model, call | {"timestep": torch.tensor([[500.0, 0.0, 500.0, 500.0]] * 2)})
    assert trace.timesteps() == [500.0]
    torch.testing.assert_close(dgkit.residual_gates(trace).mean, 0.75 * apart[0] + 0.25 * apart[1])


@pytest.mark.parametrize("name", ["skyreels_v2", "anyflow"])
@torch.no_grad()
def test_a_timestep_per_frame(name: str) -> None:
    """Diffusion forcing, and videos that go on from given frames."""
    model, call = build(name), inputs(name, 2, tokens=SIDE)
    call["hidden_states"] = torch.cat([call["hidden_states"]] * 2, 1 if name == "anyflow" else 2)
    more = {"enable_diffusion_forcing": True} if name == "skyreels_v2" else {"r_timestep": torch.zeros(2, 2)}
    means = []
    for frames in ([500.0, 500.0], [0.0, 0.0], [500.0, 0.0]):
        with dgkit.record(model) as trace:
            predict(model, call | more | {"timestep": torch.tensor([frames] * 2)})
        means.append(dgkit.residual_gates(trace).mean)
    torch.testing.assert_close(means[2], (means[0] + means[1]) / 2)
    assert not torch.allclose(means[0], means[1])


@torch.no_grad()
def test_the_reference_images_of_glm_image_are_refused() -> None:
    """They are passed through the transformer beforehand, which keeps their keys and values."""
    model, call = build("glm_image", depth=2), inputs("glm_image", 1, tokens=SIDE)
    caches = GlmImageKVCache(2)
    with dgkit.record(model):
        predict(model, call | {"kv_caches": caches})
        caches.set_mode("write")
        with pytest.raises(ModelError, match="reference images of GlmImageTransformer2DModel are not supported"):
            predict(model, call | {"kv_caches": caches})


@pytest.mark.parametrize("name", ["lumina2", "z_image", "mochi", "flux"])
@torch.no_grad()
def test_timesteps_run_from_noise_to_image(name: str) -> None:
    model, call = build(name, depth=2), inputs(name, 1, tokens=SIDE)
    argument = "t" if name == "z_image" else "timestep"
    with dgkit.record(model) as trace:
        for t in (0.25, 0.75):
            predict(model, call | {argument: torch.tensor([t])})
    assert trace.timesteps() == ([0.75, 0.25] if name == "flux" else [0.25, 0.75])


def test_dit_and_pixart_guide_the_noise_half_only() -> None:
    assert dissect(build("dit")).predicted_channels == dissect(build("pixart")).predicted_channels == 4
    assert dissect(build("lumina")).predicted_channels == 4
    assert dissect(build("sd3")).predicted_channels is None


# -------------------------------------------------------------------------------------------- layouts that calls decide


@torch.no_grad()
def test_hidream_pads_what_is_not_square() -> None:
    model, call = build("hidream", depth=2), inputs("hidream", 2)
    call["hidden_states"] = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))  # 2 x 4 patches
    kept: list[Tensor] = []
    blocks = [block for block, *_ in streams("hidream", model)]
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(
                after(block, lambda m, a, o: kept.append((o[0] if isinstance(o, tuple) else o)[:, :8].double()))
            )
        predict(model, call)
    with dgkit.record(model) as trace:
        predict(model, call)
    for number, image in enumerate(kept):
        torch.testing.assert_close(trace.mean_abs()[number], image.abs().mean((0, 1)), rtol=1e-6, atol=1e-7)
    model.double()
    sizes = {"img_sizes": torch.tensor([[2, 4], [4, 2]]), "hidden_states_masks": torch.ones(2, 8)}
    anatomy = dissect(model)
    assert anatomy.row.tokens(model, call | sizes) == 8  # type: ignore[misc]
    sizes["img_sizes"] = torch.tensor([[2, 4], [2, 2]])
    with pytest.raises(ModelError, match=r"the images of one batch have \[8, 4\] tokens"):
        anatomy.row.tokens(model, call | sizes)  # type: ignore[misc]


@torch.no_grad()
def test_the_layout_is_that_of_the_last_call() -> None:
    model = build("flux2", depth=2)
    with dgkit.record(model) as trace, dgkit.record(model) as inner:
        for side in (2, 4):
            predict(model, inputs("flux2", 1, tokens=side))
            assert trace.anatomy.layout.tokens == inner.anatomy.layout.tokens == side**2


@torch.no_grad()
def test_lumina2_refuses_prompts_of_different_length_in_one_batch() -> None:
    model, call = build("lumina2", depth=2), inputs("lumina2", 2, tokens=SIDE)
    call["encoder_attention_mask"][1, -2:] = False
    predict(model, call)
    with pytest.raises(ModelError, match=r"have \[5, 3\] tokens.*different places"), dgkit.record(model):
        predict(model, call)


@torch.no_grad()
def test_z_image_with_prompts_of_different_length() -> None:
    """The image comes first, so edits hit it; but a batch without its longest prompt would be shorter."""
    model, call = build("z_image", depth=2), inputs("z_image", 2, tokens=SIDE)
    call["cap_feats"][1] = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    together = []
    for rows in ([0, 1], [0], [1]):
        with dgkit.record(model) as trace:
            predict(model, {k: [v[row] for row in rows] for k, v in call.items() if k != "t"} | {"t": call["t"][rows]})
        together.append(trace.mean_abs())
    torch.testing.assert_close(together[0], (together[1] + together[2]) / 2, rtol=1e-4, atol=1e-5)
    anatomy = dissect(model)
    _, cut = anatomy.select_rows((), call, [1], 2)
    assert len(cut["x"]) == len(cut["cap_feats"]) == len(cut["t"]) == 1
    with pytest.raises(ModelError, match=r"have \[32, 64\] tokens: rows \[0\] alone"):
        anatomy.select_rows((), call, [0], 2)
    call["x"][0] = torch.randn(4, 1, 8, 8)
    with pytest.raises(ModelError, match=r"the images of one batch have \[16, 4\] tokens"), dgkit.record(model):
        predict(model, call)
    with pytest.raises(ModelError, match="omni"), dgkit.record(model):
        model([[call["x"][0]]], torch.tensor([0.5]), [[call["cap_feats"][0]]])


def test_image_tokens_are_unknown_before_a_call_is_followed() -> None:
    with pytest.raises(ModelError, match=r"enter `anatomy.follow\(\)` before the model runs"):
        dissect(build("flux2")).blocks[-1].image(torch.zeros(1, 9, 16))


# ----------------------------------------------------------------------------------------------------- rows of a batch


def check_selected(model: nn.Module, call: dict[str, Any], batch: int) -> None:
    """Some rows of a call, its first argument given by position, are predicted as they were among all."""
    first, rows = next(iter(call)), [0, batch - 1]
    others = {name: value for name, value in call.items() if name != first}
    args, kwargs = dissect(model).select_rows((call[first],), others, rows, batch)
    assert len(args) == 1 and kwargs.keys() == others.keys()
    prediction = predict(model, {first: args[0]} | kwargs)
    torch.testing.assert_close(prediction, predict(model, call)[rows], rtol=1e-4, atol=1e-5)


@each_class
@pytest.mark.parametrize("batch", [SIDE**2, TEXT])  # as long as the positions of the image and of the text
@torch.no_grad()
def test_selected_rows_are_predicted_as_before(name: str, batch: int) -> None:
    check_selected(build(name, depth=2), inputs(name, batch, tokens=SIDE), batch)


@torch.no_grad()
def test_selected_rows_of_calls_with_arguments_that_pipelines_add() -> None:
    rotary = {"image_rotary_emb": (torch.rand(SIDE**2, 8), torch.rand(SIDE**2, 8))}
    check_selected(build("cogvideox"), inputs("cogvideox", SIDE**2, tokens=SIDE) | rotary, SIDE**2)
    scale = {"rope_interpolation_scale": torch.tensor([0.1, 30.0, 20.0])}
    check_selected(build("ltx"), inputs("ltx", 3, tokens=SIDE) | scale, 3)


@torch.no_grad()
def test_qwen_image_with_a_reference_image() -> None:
    """For editing the reference's tokens are modulated as at timestep 0; alpha is that of the tokens generated."""
    plain = build("qwen_image")
    model = QwenImageTransformer2DModel.from_config(plain.config, zero_cond_t=True)
    model.load_state_dict(plain.state_dict())
    call = inputs("qwen_image", 3, tokens=SIDE)
    both = call | {
        "hidden_states": torch.cat([call["hidden_states"]] * 2, 1),
        "img_shapes": [[(1, SIDE, SIDE), (1, SIDE, SIDE)]] * 3,
    }
    check_selected(model, both, 3)
    with dgkit.record(model) as trace:
        predict(model, both)
    with dgkit.record(plain) as expected:
        predict(plain, call)
    torch.testing.assert_close(dgkit.residual_gates(trace).mean, dgkit.residual_gates(expected).mean)


@each_class
@pytest.mark.parametrize("batch", [1, SIDE**2])
@torch.no_grad()
def test_grown_rows_are_computed_as_before(name: str, batch: int) -> None:
    model, call = build(name, depth=2), inputs(name, batch, tokens=SIDE)
    anatomy = dissect(model)
    rows = [0] if batch == 1 else [1, 3]
    calls: list[Any] = []
    with anatomy.follow(), ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(
                after(block.module, lambda m, a, kw, o, b=block: calls.append((b, a, kw, o)), with_kwargs=True)
            )
        predict(model, call)
    for block, args, kwargs, output in list(calls):
        args, kwargs = anatomy.grow(block, args, kwargs, rows, batch)
        again = anatomy.grow(block, args, kwargs, rows, batch)
        assert all(a is b for a, b in zip(args, again[0], strict=True) if isinstance(a, Tensor))
        image = block.image(block.module(*again[0], **again[1]))
        expected = block.image(output)
        torch.testing.assert_close(image, torch.cat([expected, expected[rows]]), rtol=1e-4, atol=1e-5)


@each_class
@torch.no_grad()
def test_the_batch_can_grow_where_the_stack_says(name: str) -> None:
    """Rows that join after a block, edited, come out of the last block as they do from a disrupted pass."""
    model, call = build(name, depth=2), inputs(name, 2, tokens=SIDE)
    anatomy = dissect(model)
    edit, rows, last = make_edit(anatomy, [1, 4]), [0, 1], anatomy.blocks[-1]
    seen: list[Tensor] = []

    def each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(output, tuple):
            return tuple(part if part is None else change(part) for part in output)
        return change(output)

    def edited_joins(block: Block, output: Any) -> Any:
        edited = block.with_image(output, edit(block.image(output)))
        parts = iter(edited if isinstance(edited, tuple) else (edited,))
        return each(output, lambda t: torch.cat([t, next(part for part in parts if part is not None)]))

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(last.image(output))
        return each(output, lambda t: t[:2])

    for block in anatomy.blocks[:-1]:
        with anatomy.follow(), dgkit.disrupt(model, block=block.index, dims=edit.dims), after(last.module, leave):
            predict(model, call)
        with anatomy.follow(), ExitStack() as stack:
            stack.enter_context(after(block.module, lambda m, a, o, b=block: edited_joins(b, o)))
            for later in anatomy.blocks[block.index + 1 :]:
                grow = later.module.register_forward_pre_hook(
                    lambda m, a, kw, b=later: anatomy.grow(b, a, kw, rows, 2), with_kwargs=True
                )
                stack.callback(grow.remove)
            stack.enter_context(after(last.module, leave))
            if block.stack.fork:
                predict(model, call)
                torch.testing.assert_close(seen[-1][2:], seen[-2], rtol=1e-4, atol=1e-5)
            else:
                with pytest.raises((AssertionError, RuntimeError)):
                    predict(model, call)
                    torch.testing.assert_close(seen[-1][2:], seen[-2], rtol=1e-4, atol=1e-5)


def test_select_rows_copies_dicts_and_leaves_what_has_no_batch() -> None:
    shared = {"scale": 1.0, "masks": torch.ones(2, 3), "image_rotary_emb": (torch.ones(2, 4), torch.ones(2, 4))}
    samples = [torch.ones(2, 3), torch.ones(2, 3)]  # one per block, not one per row
    _, kwargs = dissect(build("flux")).select_rows(
        (),
        {"joint_attention_kwargs": shared, "controlnet_block_samples": samples, "guidance": None},
        [1],
        2,
    )
    copied = kwargs["joint_attention_kwargs"]
    assert copied is not shared and copied["scale"] == 1.0 and copied["masks"].shape == (1, 3)
    assert [t.shape for t in copied["image_rotary_emb"]] == [(2, 4), (2, 4)]
    assert [t.shape for t in kwargs["controlnet_block_samples"]] == [(1, 3), (1, 3)] and kwargs["guidance"] is None


def test_call_reads_positional_and_keyword_latents() -> None:
    latents = torch.randn(2, 3)
    anatomy = dissect(build("dit"))
    assert Call.of(anatomy, (latents,), {"timestep": torch.tensor([7])}).timesteps == [7.0, 7.0]
    assert Call.of(anatomy, (), {"hidden_states": latents, "timestep": torch.tensor(7)}).batch == 2
    assert Call.of(dissect(build("wan")), (latents, torch.tensor([[3.0, 9.0], [0.0, 8.0]])), {}).timesteps == [9, 8]
    assert Call.of(dissect(build("cogvideox")), (latents, latents, 7), {}).timesteps == [7.0, 7.0]


@each_class
def test_call_reads_every_class(name: str) -> None:
    call = inputs(name, 2, tokens=SIDE)
    read = Call.of(dissect(build(name, depth=2)), (), call)
    latents, t = next(iter(call.values())), next(v for k, v in call.items() if k in ("timestep", "timesteps", "t"))
    assert read.latents is latents and read.batch == 2 and read.timesteps == t.flatten().tolist()
    assert not read.halves_equal
    first = next(iter(call))
    twice = [latents[0], latents[0]] if isinstance(latents, list) else torch.stack([latents[0], latents[0]])
    assert Call.of(dissect(build(name, depth=2)), (), call | {first: twice}).halves_equal


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [-1, 3, 1.0, "1", None, True])
def test_block_out_of_range(bad: object) -> None:
    with pytest.raises(DgkitError, match=r"block=.* is not allowed: DiTTransformer2DModel has blocks 0 to 2"):
        dissect(build("dit")).block(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[], "5", [16], [-1], [1, 1], [0.5], [None], 5, [True]])
def test_bad_dims(bad: object) -> None:
    with pytest.raises(DgkitError, match=r"dims=.* is not allowed.*channels from 0 to 15"):
        dissect(build("dit")).dims(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [None, 3, "sd3", nn.Linear(2, 2), object()])
def test_what_is_no_transformer_is_refused(target: object) -> None:
    with pytest.raises(ModelError, match="expected a diffusers pipeline with a transformer"):
        dissect(target)


def test_a_class_without_a_row_is_refused() -> None:
    with pytest.raises(ModelError, match="got LatteTransformer3DModel .of another class: give dgkit.dissect"):
        dissect(BY_NAME["LattePipeline"].build().transformer)


def test_a_block_without_room_for_the_image_is_refused() -> None:
    single = dissect(build("chroma")).blocks[-1]
    single.layout.tokens = 4
    with pytest.raises(ModelError, match="returned 3 tokens for 4 image tokens.*another row"):
        single.image(torch.zeros(1, 3, 16))


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_whole_model_compile_is_refused(way: str) -> None:
    model = build("dit")
    if way == "wrapped":
        model = torch.compile(model)  # type: ignore[assignment]
    else:
        model.compile()
    with pytest.raises(ModelError, match="compiled as a whole"):
        dissect(model)


def test_compiled_blocks_are_accepted() -> None:
    model = build("dit")
    for block in model.transformer_blocks:
        block.compile()
    assert len(dissect(model).blocks) == 3
