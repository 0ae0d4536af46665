"""Anatomy: the blocks are the real ones, and the gates are those of Eq. 2."""

import pytest
import torch
from torch import nn

from dgkit.anatomy import Call, dissect, select_rows
from dgkit.errors import DgkitError, ModelError
from tests.tiny_models import CLASSES, build, inputs


@pytest.mark.parametrize("name", CLASSES)
def test_block_order_is_the_order_of_execution(name: str) -> None:
    model = build(name)
    order: list[int] = []
    for block in dissect(model).blocks:
        block.module.register_forward_hook(lambda m, a, o, i=block.index: order.append(i))
    with torch.no_grad():
        model(**inputs(name, 1))
    assert order == list(range(len(order))) and len(order) == {"sd3": 3, "flux": 5, "dit": 3}[name]


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_gates_are_the_residual_scaling_of_eq_2(name: str) -> None:
    """z^{k+1} - z^k = sum over branches of alpha_k times the branch's output, for image tokens."""
    model = build(name, depth=4).double()
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str):
        def hook(module: nn.Module, args, kwargs, output) -> None:
            seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    for block in dissect(model).blocks:
        gates = {gate.branch: module for gate, module in block.gates}
        module, tokens = block.module, 16
        if "msa+mlp" in gates:
            branches = {"msa+mlp": module.proj_out}
        else:
            branches = {"msa": getattr(module, "attn", None) or module.attn1, "mlp": module.ff}
            if "msa2" in gates:
                branches["msa2"] = module.attn2
        handles = [m.register_forward_hook(keep(b), with_kwargs=True) for b, m in branches.items()]
        for gate, norm in block.gates:
            handles.append(
                norm.register_forward_hook(
                    lambda m, a, o, k=gate: seen.__setitem__(f"alpha {k.branch}", o[k.index])  # type: ignore[misc]
                )
            )

        def boundary(module: nn.Module, args, kwargs, output, block=block) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]
            seen["out"] = block.image(output)

        handles.append(module.register_forward_hook(boundary, with_kwargs=True))
        model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs(name, 2).items()})
        assert set(gates) == set(branches)
        total = sum(seen[f"alpha {b}"][:, None] * seen[b][:, -tokens:] for b in branches)
        difference = seen["out"] - seen["in"]
        assert (difference - total).norm() <= 1e-5 * difference.norm()
        for handle in handles:
            handle.remove()


def test_dual_attention_blocks_have_three_gates_and_others_two() -> None:
    blocks = dissect(build("sd3")).blocks
    assert [[g.branch for g, _ in b.gates] for b in blocks] == [["msa", "msa2", "mlp"], ["msa", "mlp"], ["msa", "mlp"]]


def test_dit_guides_the_noise_half_only() -> None:
    assert dissect(build("dit")).predicted_channels == 4
    assert dissect(build("sd3")).predicted_channels is None


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


def test_select_rows_cuts_batched_tensors_and_copies_dicts() -> None:
    shared = {"scale": 1.0}
    args, kwargs = select_rows(
        (torch.arange(4),), {"temb": torch.ones(4, 2), "k": shared, "n": None}, torch.tensor([2, 3]), 4
    )
    assert args[0].tolist() == [2, 3] and kwargs["temb"].shape == (2, 2)
    assert kwargs["k"] == shared and kwargs["k"] is not shared and kwargs["n"] is None


def test_call_reads_positional_and_keyword_latents() -> None:
    latents = torch.randn(2, 3)
    assert Call.of((latents,), {"timestep": torch.tensor([7])}).timesteps() == [7.0, 7.0]
    assert Call.of((), {"hidden_states": latents, "timestep": torch.tensor(7)}).batch == 2
