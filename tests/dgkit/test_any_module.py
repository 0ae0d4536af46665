"""Transformers outside diffusers: built as facebookresearch's DiT, trained by somebody else, or of any other kind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgkit
from dgkit.anatomy import Stack, Transformer, output
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import Every, Schedule
from tests import external_dit

WIDTH, DEPTH = 32, 4


class ResearchBlock(nn.Module):
    """As facebookresearch/DiT's: one adaLN modulation of six parts, gates third and sixth."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ResearchDiT(nn.Module):
    """As people fork it: learned sigma in further channels, CFG in `forward_with_cfg`, which calls `forward` itself.

    `pair`: whether the output is a pair, as in REPA.
    """

    def __init__(self, learn_sigma: bool = True, pair: bool = False) -> None:
        super().__init__()
        self.in_channels, self.pair = 3, pair
        self.x_embedder = nn.Linear(3, WIDTH)
        self.t_embedder, self.y_embedder = nn.Linear(1, WIDTH), nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(ResearchBlock() for _ in range(DEPTH))
        self.final = nn.Linear(WIDTH, 6 if learn_sigma else 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        tokens = self.x_embedder(x.flatten(2).mT)
        c = self.t_embedder(t[:, None].float() / 1000) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        result = self.final(tokens).mT.unflatten(2, x.shape[2:])
        return (result, [tokens]) if self.pair else result

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        c, u = eps.chunk(2)
        eps = u + cfg_scale * (c - u)
        return torch.cat([torch.cat([eps, eps]), rest], 1)


def research(**options: Any) -> Any:
    torch.manual_seed(0)
    return ResearchDiT(**options).eval().requires_grad_(False)


def noisy(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, 4, 4, generator=generator),
        torch.full((batch,), 700),
        torch.arange(batch) % 10,
    )


@contextmanager
def zeroed(block: nn.Module, dims: list[int]) -> Iterator[None]:
    def zero(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[..., dims] = 0
        return out

    handle = block.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


BLOCK, DIMS, W, S = 1, [3, 7], 1.5, 4.0


@pytest.mark.parametrize("options", [{}, {"learn_sigma": False}, {"learn_sigma": False, "pair": True}])
@pytest.mark.parametrize("sharing", ["replay", "fork", "none"])
def test_detail_guidance_of_the_research_design(options: dict[str, bool], sharing: str) -> None:
    """Every row is conditional, in whatever sampling loop; the learned sigma stays."""
    model, call = research(**options), noisy(3)

    def prediction(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    plain = prediction(model(*call))
    with zeroed(model.blocks[BLOCK], DIMS):
        degraded = prediction(model(*call))
    expected = plain.clone()
    expected[:, :3] += W * (plain - degraded)[:, :3]
    with dgkit.detail_guidance(model, scale=W, block=BLOCK, dims=DIMS, sharing=sharing) as guidance:
        for way in (model, model.forward):
            torch.testing.assert_close(prediction(way(*call)), expected, rtol=1e-5, atol=1e-6)
    shared = 0 if sharing == "none" else BLOCK + 1
    assert guidance.cost.block_evaluations == 2 * 3 * (DEPTH + DEPTH - shared)
    assert torch.equal(prediction(model(*call)), plain) and "forward" not in vars(model)


@pytest.mark.parametrize("sharing", ["replay", "fork", "none"])
def test_cfg_inside_the_model(sharing: str) -> None:
    """Eq. 5: the loop states that the batch is doubled and in which order."""
    model = research()
    x, t, y = noisy(2)
    call = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)]))
    plain = model.forward_with_cfg(*call, S)
    c = model(x, t, y)[:, :3]
    with zeroed(model.blocks[BLOCK], DIMS):
        degraded = model(x, t, y)[:, :3]
    expected = plain.clone()
    expected[:, :3] += torch.cat([W * (c - degraded)] * 2)
    with (
        dgkit.detail_guidance(model, scale=W, block=BLOCK, dims=DIMS, sharing=sharing, cfg="cond, uncond") as guidance,
        dgkit.record(model, cfg="cond, uncond") as trace,
    ):
        torch.testing.assert_close(model.forward_with_cfg(*call, S), expected, rtol=1e-5, atol=1e-5)
    assert set(trace.labels) == {"cond", "uncond", "degraded"}
    assert guidance.cost.block_evaluations == 4 * DEPTH + 2 * (DEPTH - (0 if sharing == "none" else BLOCK + 1))
    assert torch.equal(model.forward_with_cfg(*call, S), plain)


def test_threads_with_loops_of_their_own_do_not_mix() -> None:
    """A direction kept for later steps is that of the thread's own loop."""
    model, ready = research(), threading.Barrier(2)
    loops = [noisy(2), tuple(part.flip(0) if part.ndim > 1 else part for part in noisy(2))]
    options = {"scale": W, "block": BLOCK, "dims": DIMS, "schedule": Schedule(Every(2))}

    def steps(call: Any, together: bool) -> list[Tensor]:
        found = []
        for _ in range(4):
            if together:
                ready.wait(timeout=60)
            found.append(model(*call))
        return found

    expected = []
    for call in loops:
        with dgkit.detail_guidance(model, **options):
            expected.append(steps(call, False))
    found: dict[int, list[Tensor]] = {}
    with dgkit.detail_guidance(model, **options):
        threads = [threading.Thread(target=lambda i=i: found.update({i: steps(loops[i], True)})) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(found[i], expected[i], strict=True))
    assert not torch.equal(expected[0][0], expected[1][0])


def test_record_and_gates_of_the_research_design() -> None:
    model, call = research(), noisy(3)
    outputs: list[Tensor] = []
    alphas: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        block.adaLN_modulation.register_forward_hook(lambda module, args, out: alphas.append(out))
    with dgkit.record(model) as trace:
        model.forward(*call)
    assert trace.labels == ["unknown"] and trace.timesteps() == [700.0]
    torch.testing.assert_close(trace.mean_abs().float(), torch.stack([z.abs().mean((0, 1)) for z in outputs]))
    gates = dgkit.residual_gates(trace)
    assert [branch for _, branch in gates.rows] == ["msa", "mlp"] * DEPTH
    expected = [alpha.abs().mean(0)[i * WIDTH : (i + 1) * WIDTH] for alpha in alphas for i in (2, 5)]
    torch.testing.assert_close(gates.mean_abs.float(), torch.stack(expected))
    with dgkit.disrupt(model, block=BLOCK, dims=DIMS):
        disrupted = model.forward(*call)
    with zeroed(model.blocks[BLOCK], DIMS):
        assert torch.equal(model(*call), disrupted)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "blocks", nn.ModuleList()),
        lambda model: setattr(model, "blocks", nn.ModuleList([nn.Linear(2, 2)])),
        lambda model: setattr(
            model.blocks[2], "adaLN_modulation", nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 4 * WIDTH))
        ),
        lambda model: setattr(model.blocks[0], "adaLN_modulation", nn.Identity()),
    ],
)
def test_what_is_built_otherwise_is_refused(change: Callable[[Any], None]) -> None:
    model = research()
    change(model)
    with pytest.raises(ModelError, match="got ResearchDiT .of another class: give dgkit.dissect"), dgkit.record(model):
        pass


def test_no_preset_and_no_search_without_a_pipeline() -> None:
    model = research()
    with pytest.raises(DgkitError, match="scale, block, dims left out"), dgkit.detail_guidance(model):
        pass
    with pytest.raises(DgkitError, match="start=0.5.*no steps|no pipeline makes the call"):  # noqa: SIM117
        with dgkit.detail_guidance(model, scale=1.0, block=0, dims=[1], start=0.5):
            model(*noisy(2))
    with pytest.raises(ModelError, match="auto.* needs a pipeline"):  # noqa: SIM117
        with dgkit.detail_guidance(model, scale=1.0, block="auto", dims=[1]):
            pass
    assert "forward" not in vars(model)


# -------------------------------------------------------------------------------- one that somebody else has trained

# largest channel, mean |z| and its ratio to the lower of the middle two channels, by block: a pass of its own code
TRAINED = {
    999: [(42, 9.050, 7.29), (42, 10.384, 8.28), (42, 12.775, 10.32)],
    500: [(42, 8.440, 6.49), (42, 9.887, 7.53), (42, 12.590, 9.58)],
    100: [(42, 3.970, 3.75), (42, 3.255, 3.60), (42, 2.917, 3.56)],
    10: [(42, 2.631, 2.55), (42, 2.186, 2.88), (8, 3.403, 4.99)],
}


@pytest.mark.parametrize("t", TRAINED)
def test_largest_channels_of_a_trained_one(t: int) -> None:
    anatomy = dgkit.dissect(external_dit.load(), external_dit.ROW)
    x, y = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    with dgkit.record(anatomy) as trace:
        out = anatomy.model(x, torch.full((64,), t), y)
    if t == 500:
        assert (round(float(out.mean()), 4), round(float(out.std()), 4)) == (0.1935, 1.0145)
        second = dgkit.residual_gates(trace).of(1, "mlp")
        assert int(second.argmax()) == 42 and round(float(second[42]), 3) == 1.596
    for magnitude, (channel, size, ratio) in zip(trace.mean_abs(), TRAINED[t], strict=True):
        found = float(magnitude[channel])
        assert int(magnitude.argmax()) == channel
        assert found == pytest.approx(size, abs=6e-4) and found / float(magnitude.median()) == pytest.approx(
            ratio, abs=6e-3
        )


def test_guiding_a_trained_one_in_a_loop_of_its_own() -> None:
    """DDIM as the DDPM paper's schedule has it, written here; Eq. 4 by hooks that know nothing of dgkit."""
    model, w, block, dims = external_dit.load(), 0.5, 1, [42, 8]
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()
    y = torch.arange(8)

    def sampled(predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(3))
        for t in range(999, -1, -111):
            eps = predict(x, torch.full((8,), t), y)
            x0 = (x - (1 - kept[t]).sqrt() * eps) / kept[t].sqrt()
            after = kept[t - 111] if t >= 111 else torch.tensor(1.0)
            x = after.sqrt() * x0 + (1 - after).sqrt() * eps
        return x

    def by_hand(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = model(x, t, y)
        with zeroed(model.dits[block], dims):
            return c + w * (c - model(x, t, y))

    plain, expected = sampled(model), sampled(by_hand)
    with dgkit.detail_guidance(dgkit.dissect(model, external_dit.ROW), scale=w, block=block, dims=dims):
        found = sampled(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.05 and torch.equal(sampled(model), plain)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Transformer((Stack("layers", None, ()),), channels=lambda model: 64), "layers"),
        (Transformer((Stack("dits", None, (output("msa", "alpha9"),)),), channels=lambda model: 64), "alpha9"),
        (Transformer((), channels=lambda model: 64), "no block"),
        (Transformer((Stack("dits", None, ()),), channels=lambda model: 64, latents="z"), "latents='z'"),
        (Transformer((Stack("dits", None, ()),), channels=lambda model: 64, latents="x", timestep="s"), "timestep='s'"),
        (Transformer((Stack("dits", None, ()),), channels=lambda model: 63, latents="x", timestep="t"), "63 channels"),
    ],
)
def test_a_row_that_does_not_fit(row: Transformer, words: str) -> None:
    model = external_dit.load()
    with pytest.raises(ModelError, match=words), dgkit.record(dgkit.dissect(model, row)):
        model(torch.zeros(1, 1, 28, 28), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
