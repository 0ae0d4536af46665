"""Every guidance method against its formula written out here, or against the official behaviour."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from torch import Tensor, nn

import dgkit
from dgkit.anatomy import Anatomy, Call, dissect
from dgkit.disruption import make_edit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance import (
    APG,
    CFG,
    DG,
    METHODS,
    PAG,
    SEG,
    SLG,
    TPG,
    Autoguidance,
    BlockDrop,
    CFGPlusPlus,
    CFGZeroStar,
    Every,
    Method,
    Schedule,
)
from dgkit.guidance.baselines import _identity_attention
from tests.tiny_models import CLASSES, build, pipeline, prompts, sample

STEPS = 3


class Naive:
    """The same pipeline run by hand: naive passes and a formula; knows diffusers, not dgkit's engine."""

    def __init__(self, pipe: Any, name: str, batch: int = 2, steps: int = STEPS) -> None:
        self.pipe, self.name, self.batch, self.steps = pipe, name, batch, steps
        self.given = prompts(name, batch)
        self.extra: dict[str, Any] = {}
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
        if name == "flux":
            noise = noise.view(batch, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, 16, 16)
            rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
            positions = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
            self.extra = {"img_ids": positions, "txt_ids": torch.zeros(5, 3)}
        self.noise = noise

    def predict(self, x: Tensor, t: Tensor, negative: bool = False, model: nn.Module | None = None) -> Tensor:
        model = model or self.pipe.transformer
        if self.name == "dit":
            classes = torch.tensor(self.given["class_labels"])
            classes = torch.full_like(classes, 1000) if negative else classes
            return model(x, timestep=t.expand(self.batch), class_labels=classes).sample[:, :4]
        kind = "negative_" if negative else ""
        return model(
            hidden_states=x,
            timestep=(t / (1000.0 if self.name == "flux" else 1.0)).expand(self.batch),
            encoder_hidden_states=self.given[f"{kind}prompt_embeds"],
            pooled_projections=self.given[f"{kind}pooled_prompt_embeds"],
            **self.extra,
        ).sample

    @torch.no_grad()
    def run(self, formula: Callable[..., Tensor]) -> Tensor:
        """`formula(x, t, i, sigma, sigma_next)` is the guided prediction; sigma is a pair (signal, noise) for DiT."""
        scheduler, x = self.pipe.scheduler, self.noise
        if self.name == "flux":
            scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / self.steps, self.steps).numpy())
        else:
            scheduler.set_timesteps(self.steps)
        for i, t in enumerate(scheduler.timesteps):
            if self.name == "dit":
                previous = int(t) - 1000 // self.steps
                kept = float(scheduler.alphas_cumprod[int(t)])
                after = float(scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod)
                levels = (kept**0.5, (1 - kept) ** 0.5), (after**0.5, (1 - after) ** 0.5)
                x = scheduler.step(formula(x, t, i, *levels), t, x).prev_sample
            else:
                now, after = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
                x = x + (after - now) * formula(x, t, i, (1 - now, now), (1 - after, after))
        return (self.pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1) if self.name == "dit" else x


def guided(pipe: Any, name: str, *methods: Method, s: float = 4.0, steps: int = STEPS, **options: Any) -> Tensor:
    with dgkit.guide(pipe, *methods, **options):
        return sample(pipe, name, guidance_scale=s, steps=steps)


def check(pipe: Any, name: str, ours: Tensor, formula: Callable[..., Tensor], tolerance: float = 2e-5) -> None:
    expected = Naive(pipe, name).run(formula)
    assert (ours - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------ methods with a branch


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer_blocks) + list(getattr(model, "single_transformer_blocks", []))


def perturbed(naive: Naive, change: Callable[[list[nn.Module]], list[Any]], *where: Any) -> Tensor:
    """A full conditional pass with `change(blocks)`, which returns handles, in force."""
    handles = change(blocks_of(naive.pipe.transformer))
    try:
        return naive.predict(*where)
    finally:
        for handle in handles:
            handle.remove()


def skip(blocks: list[int]) -> Callable[[list[nn.Module]], list[Any]]:
    """By hooks: a skipped block returns what it was given."""

    def change(modules: list[nn.Module]) -> list[Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = kwargs.get("hidden_states", args[0] if args else None)
            return (kwargs["encoder_hidden_states"], given) if isinstance(output, tuple) else given

        return [modules[b].register_forward_hook(hook, with_kwargs=True) for b in blocks]

    return change


@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize("name", CLASSES)
def test_slg_skips_blocks(name: str, s: float) -> None:
    pipe, w = pipeline(name), 1.5
    naive = Naive(pipe, name)

    def formula(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        return u + s * (c - u) + w * (c - perturbed(naive, skip([1, 2] if name != "flux" else [1, 3]), x, t))

    blocks = [1, 2] if name != "flux" else [1, 3]
    ours = guided(pipe, name, SLG(scale=w, blocks=blocks), s=s)
    assert (ours - Naive(pipe, name).run(formula)).abs().max() <= 2e-5
    assert (ours - sample(pipe, name, guidance_scale=s)).abs().max() > 1e-3


def test_slg_is_the_skip_layer_guidance_of_diffusers_sd3_pipeline() -> None:
    pipe = pipeline("sd3")
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    official = pipe(
        **prompts("sd3", 2), guidance_scale=4.0, num_inference_steps=STEPS, generator=generator, output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=-0.01,
        skip_layer_guidance_stop=1.01,
    ).images  # fmt: skip
    ours = guided(pipe, "sd3", SLG(scale=2.8, blocks=[1]))
    assert (ours - official).abs().max() <= 2e-5


def attention_by_hand(name: str, block: int, images: int, change: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """Replaces F.scaled_dot_product_attention while one block runs; softmax(q k' / sqrt d + bias) v in plain terms."""

    def replace(modules: list[nn.Module]) -> list[Any]:
        original = F.scaled_dot_product_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            text = query.shape[2] - images
            start = text if name == "flux" else 0
            query, bias = change(query, slice(start, start + images))
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
            return scores.softmax(-1) @ value

        def before(*_: Any) -> None:
            F.scaled_dot_product_attention = attend

        def after(*_: Any) -> None:
            F.scaled_dot_product_attention = original

        return [modules[block].register_forward_pre_hook(before), modules[block].register_forward_hook(after)]

    return replace


def identity(query: Tensor, image: slice) -> tuple[Tensor, Tensor]:
    """Image tokens see no other image token."""
    bias = torch.zeros(query.shape[2], query.shape[2])
    for i in range(image.start, image.stop):
        for j in range(image.start, image.stop):
            if i != j:
                bias[i, j] = float("-inf")
    return query, bias


def mean_query(query: Tensor, image: slice) -> tuple[Tensor, Tensor]:
    query = query.clone()
    for i in range(image.start, image.stop):
        query[:, :, i] = query[:, :, image].mean(2) if i == image.start else query[:, :, image.start]
    return query, torch.zeros(())


@pytest.mark.parametrize(("method", "change"), [("pag", identity), ("seg", mean_query)])
@pytest.mark.parametrize("name", CLASSES)
def test_pag_and_seg_change_the_attention_of_image_tokens(name: str, method: str, change: Any) -> None:
    pipe, w, block = pipeline(name), 2.0, 1
    naive = Naive(pipe, name)

    def formula(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        return u + 4 * (c - u) + w * (c - perturbed(naive, attention_by_hand(name, block, 16, change), x, t))

    for sharing in ("replay", "none"):
        ours = guided(pipe, name, METHODS[method](scale=w, blocks=[block]), sharing=sharing)
        assert (ours - Naive(pipe, name).run(formula)).abs().max() <= 2e-5
    assert (ours - sample(pipe, name, guidance_scale=4.0)).abs().max() > 1e-4


def test_pag_on_self_attention_alone_returns_the_values() -> None:
    """In DiT, without text, identity attention is the identity: output = value (Ahn et al., Eq. 12)."""
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind(0)
    out = _identity_attention(F.scaled_dot_product_attention, slice(0, 16), query=q, key=k, value=v)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_seg_blur_is_a_gaussian_over_the_image(sigma: float) -> None:
    method = SEG(sigma=sigma)
    impulse = torch.zeros(1, 1, 225, 1)
    impulse[0, 0, 112] = 1.0
    blurred = method._blurred(impulse).reshape(15, 15)
    size = min(math.ceil(6 * sigma) | 1, 29) // 2
    axis = torch.arange(-7, 8).double()
    weights = torch.exp(-0.5 * (axis / sigma) ** 2) * (axis.abs() <= size)
    expected = torch.outer(weights / weights.sum(), weights / weights.sum())
    torch.testing.assert_close(blurred.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_tpg_shuffles_tokens_and_block_drop_skips_others_each_step(name: str) -> None:
    pipe = pipeline(name)
    for method, kind in ((TPG(scale=2.0, blocks=[1], seed=3), "tpg"), (BlockDrop(), "drop")):
        first, again = guided(pipe, name, method), guided(pipe, name, method)
        assert torch.equal(first, again), f"{kind} depends on its seed alone"
        other = guided(pipe, name, type(method)(**{**vars(method), "seed": 11}))
        assert not torch.equal(first, other)
        assert (first - guided(pipe, name, method, sharing="none")).abs().max() <= 2e-5


@pytest.mark.parametrize(("name", "depth", "expected"), [("dit", 5, 2), ("flux", 3, 3), ("flux", 5, 5), ("sd3", 4, 2)])
def test_the_middle_block_is_the_default_unless_it_is_a_stacks_first(name: str, depth: int, expected: int) -> None:
    """Flux of depth d has d - 1 double and d single blocks, so that block d - 1, the middle one, is a first."""
    anatomy = dissect(build(name, depth=depth))
    assert SLG().bound(None, anatomy).blocks == (expected,)
    assert PAG(blocks=[1, 0, 1]).bound(None, anatomy).blocks == (0, 1)


def call_of_step(anatomy: Anatomy, index: int) -> Call:
    """A call in step `index` of 60."""
    call = Call(anatomy, {})
    call.place = index, 60
    return call


def test_tpg_keeps_every_token() -> None:
    edit = TPG(blocks=[1]).perturbation(call_of_step(dissect(build("dit")), 2)).edits[1]
    tokens = torch.arange(16.0)[None, :, None].repeat(2, 1, 3)
    shuffled = edit(tokens)
    assert torch.equal(shuffled.sort(1).values, tokens) and not torch.equal(shuffled, tokens)


def test_block_drop_draws_the_stated_share_and_never_a_first_block() -> None:
    anatomy = dissect(build("flux", depth=10))  # 9 double and 10 single blocks
    seen: set[int] = set()
    for index in range(60):
        skips = BlockDrop(share=0.2).perturbation(call_of_step(anatomy, index)).skips
        assert len(skips) == 4
        seen |= skips
    assert seen == set(range(19)) - {0, 9}


@pytest.mark.parametrize("name", CLASSES)
def test_autoguidance_uses_the_worse_model(name: str) -> None:
    pipe, bad, w = pipeline(name), build(name, depth=2, seed=5), 1.2
    naive = Naive(pipe, name)

    def formula(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        return u + 4 * (c - u) + w * (c - naive.predict(x, t, model=bad))

    with dgkit.guide(pipe, Autoguidance(scale=w, bad=bad)) as guidance:
        ours = sample(pipe, name, guidance_scale=4.0, steps=STEPS)
    check(pipe, name, ours, formula)
    total, small = len(blocks_of(pipe.transformer)), len(blocks_of(bad))
    assert guidance.cost.block_evaluations == STEPS * 2 * (2 * total + small)


# ------------------------------------------------------------------------------------------- methods in place of CFG


@pytest.mark.parametrize("s_of_pipeline", [2.0, 7.0])
@pytest.mark.parametrize("name", CLASSES)
def test_cfg_has_its_own_scale(name: str, s_of_pipeline: float) -> None:
    pipe = pipeline(name)
    ours = guided(pipe, name, CFG(scale=3.0), s=s_of_pipeline)
    assert (ours - sample(pipe, name, guidance_scale=3.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("space", ["prediction", "x0"])
def test_apg_is_algorithm_1(name: str, space: str) -> None:
    """Against the published `normalized_guidance` that diffusers carries, with its original formulation."""
    pipe, options = pipeline(name), {"eta": 0.3, "momentum": -0.5, "norm": 0.5}
    naive, buffer = Naive(pipe, name), MomentumBuffer(-0.5)
    cut = []

    def formula(x: Tensor, t: Tensor, i: int, now: tuple[float, float], after: tuple[float, float]) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        if space == "x0":  # denoised images
            signal, noise = now
            if name == "dit":
                c, u = (x - noise * c) / signal, (x - noise * u) / signal
            else:
                c, u = x - noise * c, x - noise * u
        cut.append(float((c - u).flatten(1).norm(dim=1).max()) > 0.5)
        d = normalized_guidance(c, u, 5.0, buffer, 0.3, 0.5, use_original_formulation=True)
        if space == "prediction":
            return d
        return (x - signal * d) / noise if name == "dit" else (x - d) / noise

    ours = guided(pipe, name, APG(scale=6.0, space=space, **options))
    check(pipe, name, ours, formula, 1e-4)
    if space == "prediction":
        assert any(cut), "the norm has to be cut somewhere for this test to mean anything"
    assert (ours - sample(pipe, name, guidance_scale=6.0)).abs().max() > 1e-3


def test_apg_without_its_three_changes_is_cfg() -> None:
    pipe = pipeline("sd3")
    plain = APG(scale=3.0, eta=1.0, momentum=0.0, norm=math.inf)
    assert (guided(pipe, "sd3", plain) - sample(pipe, "sd3", guidance_scale=3.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_cfg_plus_plus_renoises_with_the_unconditional_prediction(name: str) -> None:
    """The source's DDIM form: x0 from u + lambda (c - u), then back to the next noise level with u's noise."""
    pipe, scale = pipeline(name), 0.6
    naive = Naive(pipe, name)
    scheduler, x = pipe.scheduler, naive.noise
    ours = guided(pipe, name, CFGPlusPlus(scale=scale))
    if name == "flux":
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / STEPS, STEPS).numpy())
    else:
        scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            c, u = naive.predict(x, t), naive.predict(x, t, True)
            mixed = u + scale * (c - u)
            if name == "dit":
                kept = float(scheduler.alphas_cumprod[int(t)])
                left = int(t) - 1000 // STEPS
                after = float(scheduler.alphas_cumprod[left] if left >= 0 else scheduler.final_alpha_cumprod)
                x0, noise = (x - (1 - kept) ** 0.5 * mixed) / kept**0.5, u
                x = after**0.5 * x0 + (1 - after) ** 0.5 * noise
            else:
                sigma, after = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
                x0, noise = x - sigma * mixed, x + (1 - sigma) * u
                x = (1 - after) * x0 + after * noise
    expected = (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1).detach() if name == "dit" else x
    assert (ours - expected).abs().max() <= 5e-5 * max(1.0, float(expected.abs().max()))


def test_cfg_plus_plus_refuses_other_schedulers() -> None:
    pipe = pipeline("dit")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ModelError, match="needs Euler or DDIM steps without clipping, not DPMSolverMultistepScheduler"):
        guided(pipe, "dit", CFGPlusPlus())
    pipe = pipeline("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(ModelError, match="needs Euler or DDIM steps"):
        guided(pipe, "sd3", CFGPlusPlus())


@pytest.mark.parametrize("zero_steps", [0, 1, 2])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_cfg_zero_star(name: str, zero_steps: int) -> None:
    """Official code: `i <= official` is zero, with official = zero_steps - 1; its s* as diffusers carries it."""
    pipe, w, official = pipeline(name), 3.0, zero_steps - 1
    naive = Naive(pipe, name)

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        if i <= official:
            return c * 0.0
        star = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).view(-1, *[1] * (c.ndim - 1))
        return u * star + w * (c - u * star)

    check(pipe, name, guided(pipe, name, CFGZeroStar(scale=w, zero_steps=zero_steps)), formula)


def test_cfg_zero_star_on_noise_prediction_has_no_zero_step() -> None:
    pipe = pipeline("dit")
    with pytest.raises(ModelError, match="give zero_steps=0"):
        guided(pipe, "dit", CFGZeroStar())
    naive = Naive(pipe, "dit")

    def formula(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        star = (c * u).flatten(1).sum(1) / (u * u).flatten(1).sum(1)
        u = star.view(-1, 1, 1, 1) * u
        return u + 4 * (c - u)

    check(pipe, "dit", guided(pipe, "dit", CFGZeroStar(zero_steps=0)), formula)


@pytest.mark.parametrize("method", ["cfg", "apg", "cfg++", "cfg-zero*"])
@pytest.mark.parametrize("name", CLASSES)
def test_methods_in_place_of_cfg_need_cfg(name: str, method: str) -> None:
    pipe = pipeline(name)
    with pytest.raises(DgkitError, match=r"takes the place of CFG, which is off: call the pipeline with .* above 1"):
        guided(pipe, name, METHODS[method](), s=1.0)
    assert not pipe.transformer._forward_hooks


# ---------------------------------------------------------------------------------------------- together, and in part


@pytest.mark.parametrize("name", CLASSES)
def test_apg_and_dg_and_pag_add_up(name: str) -> None:
    pipe = pipeline(name)
    naive = Naive(pipe, name)

    def zero(modules: list[nn.Module]) -> list[Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            image = (output[1] if isinstance(output, tuple) else output).clone()
            image[..., [2, 9]] = 0
            return (output[0], image) if isinstance(output, tuple) else image

        return [modules[1].register_forward_hook(hook)]

    def formula(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        star = (c * u).flatten(1).sum(1) / (u * u).flatten(1).sum(1)
        u = star.view(-1, *[1] * (c.ndim - 1)) * u
        pag = perturbed(naive, attention_by_hand(name, 2, 16, identity), x, t)
        return u + 3 * (c - u) + 0.7 * (c - perturbed(naive, zero, x, t)) + 1.1 * (c - pag)

    methods = (
        CFGZeroStar(scale=3.0, zero_steps=0),
        DG(scale=0.7, block=1, dims=[2, 9]),
        PAG(scale=1.1, blocks=[2]),
    )
    for order in (methods, methods[::-1]):
        check(pipe, name, guided(pipe, name, *order), formula)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("start", "stop", "steps_guided"), [(0.0, 0.5, {0, 1}), (0.5, 1.0, {2, 3}), (0.3, 0.6, {1})])
def test_interval_is_that_of_diffusers(name: str, start: float, stop: float, steps_guided: set[int]) -> None:
    """int(start * steps) <= step < int(stop * steps), for a branch and in place of CFG."""
    pipe, steps = pipeline(name), 4
    naive = Naive(pipe, name, steps=steps)

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        skipped = perturbed(naive, skip([1]), x, t)
        return (u + 3 * (c - u) if i in steps_guided else c) + (1.5 * (c - skipped) if i in steps_guided else 0)

    methods = [
        CFG(scale=3.0, start=start, stop=stop),
        SLG(scale=1.5, blocks=[1], start=start, stop=stop),
    ]
    with dgkit.guide(pipe, *methods) as guidance:
        for _ in range(2):  # the second run starts anew
            ours = sample(pipe, name, guidance_scale=4.0, steps=steps)
    expected = naive.run(formula)
    assert (ours - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))
    total = len(blocks_of(pipe.transformer))
    branch = len(steps_guided) * 2 * (total - 2)  # one block shared, one skipped
    assert guidance.cost.block_evaluations == 2 * (steps * 4 * total + branch)


@pytest.mark.parametrize("name", CLASSES)
def test_scale_may_depend_on_sigma(name: str) -> None:
    pipe, sigmas = pipeline(name), []
    naive = Naive(pipe, name)

    def schedule(sigma: float) -> float:
        sigmas.append(sigma)
        return 0.5 * sigma if sigma < 0.9 else 0.0

    def formula(x: Tensor, t: Tensor, i: int, now: tuple[float, float], after: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        sigma = now[1] / now[0] if name == "dit" else now[1]
        w = 0.5 * sigma if sigma < 0.9 else 0.0
        return u + 4 * (c - u) + w * (c - perturbed(naive, skip([1]), x, t))

    check(pipe, name, guided(pipe, name, SLG(scale=schedule, blocks=[1])), formula)
    assert any(s >= 0.9 for s in sigmas) and any(s < 0.9 for s in sigmas)


def test_bad_schedules_are_refused_when_they_are_called() -> None:
    with pytest.raises(DgkitError, match=r"scale\(sigma\)=-1.0 is not allowed"):
        guided(pipeline("sd3"), "sd3", SLG(scale=lambda sigma: -1.0, blocks=[1]))


# ------------------------------------------------------------------------------------------------------ direction reuse


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_reuse_takes_the_direction_of_every_nth_step(name: str, every: int) -> None:
    pipe, steps = pipeline(name), 5
    naive = Naive(pipe, name, steps=steps)
    kept: list[Tensor] = []

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        if i % every == 0:
            kept[:] = [c - perturbed(naive, skip([1]), x, t)]
        return u + 4 * (c - u) + 1.5 * kept[0]

    with dgkit.guide(pipe, SLG(scale=1.5, blocks=[1], schedule=Schedule(Every(every)))) as guidance:
        for _ in range(2):
            ours = sample(pipe, name, guidance_scale=4.0, steps=steps)
    expected = naive.run(formula)
    assert (ours - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))
    total, computed = len(blocks_of(pipe.transformer)), math.ceil(steps / every)
    assert guidance.cost.block_evaluations == 2 * 2 * (steps * 2 * total + computed * (total - 2))


@pytest.mark.parametrize("cosine", [-1.0, 0.9, 1.0])
def test_reuse_by_cosine_waits_longer_while_the_direction_turns_little(cosine: float) -> None:
    pipe, steps, every = pipeline("sd3"), 12, 3
    naive = Naive(pipe, "sd3", steps=steps)
    state: dict[str, Any] = {"direction": None, "left": 0, "lasts": 1}
    computed: list[int] = []

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        if state["left"] == 0:
            new = (c - perturbed(naive, skip([1]), x, t)).double()
            if state["direction"] is not None:
                old = state["direction"]
                turned = min(float((a * b).sum() / a.norm() / b.norm()) for a, b in zip(new, old, strict=True))
                state["lasts"] = min(state["lasts"] + 1, every) if turned >= cosine else 1
            state["direction"], state["left"] = new, state["lasts"]
            computed.append(i)
        state["left"] -= 1
        return u + 4 * (c - u) + 1.5 * state["direction"].float()

    with dgkit.guide(pipe, SLG(scale=1.5, blocks=[1], schedule=Schedule(Every(every, cosine=cosine)))) as guidance:
        ours = sample(pipe, "sd3", guidance_scale=4.0, steps=steps)
    assert (ours - naive.run(formula)).abs().max() <= 2e-5
    assert guidance.cost.block_evaluations == 2 * (steps * 2 * 3 + len(computed) * 1)
    assert {-1.0: [0, 1, 3, 6, 9], 1.0: list(range(steps))}.get(cosine, computed) == computed


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("slg", {"scale": -1}, "scale=-1 is not allowed"),
        ("slg", {"scale": "2"}, "scale='2' is not allowed"),
        ("slg", {"scale": math.nan}, "scale=nan is not allowed"),
        ("slg", {"start": -0.1}, "start=-0.1 is not allowed"),
        ("slg", {"stop": 1.1}, "stop=1.1 is not allowed"),
        ("slg", {"start": 0.5, "stop": 0.5}, "start=0.5 is not allowed: give a number below stop=0.5"),
        ("slg", {"start": "0"}, "start='0' is not allowed"),
        ("slg", {"start": True}, "start=True is not allowed"),
        ("slg", {"blocks": [3]}, "block=3 is not allowed"),
        ("slg", {"blocks": "1"}, "blocks='1' is not allowed"),
        ("slg", {"blocks": 1}, "blocks=1 is not allowed"),
        ("slg", {"blocks": [1.0]}, "block=1.0 is not allowed"),
        ("slg", {"blocks": [0]}, "block 0 cannot be skipped: it is the first of its stack"),
        ("seg", {"sigma": 0}, "sigma=0 is not allowed"),
        ("seg", {"sigma": "inf"}, "sigma='inf' is not allowed"),
        ("seg", {"sigma": math.nan}, "sigma=nan is not allowed"),
        ("block-drop", {"share": 0.0}, "share=0.0 is not allowed"),
        ("block-drop", {"share": 1}, "share=1 is not allowed"),
        ("autoguidance", {}, "bad is not allowed: give another transformer"),
        ("autoguidance", {"bad": 3}, "bad is not allowed"),
        ("autoguidance", {"bad": nn.Linear(1, 1)}, "bad is a Linear, the pipeline's a SD3Transformer2DModel"),
        ("apg", {"space": "velocity"}, "space='velocity' is not allowed: use one of x0, prediction"),
        ("apg", {"norm": 0}, "norm=0 is not allowed"),
        ("apg", {"eta": math.inf}, "eta=inf is not allowed"),
        ("apg", {"momentum": None}, "momentum=None is not allowed"),
        ("cfg++", {"scale": 1.5}, "CFG\\+\\+ takes a number from 0 to 1"),
        ("cfg-zero*", {"zero_steps": -1}, "zero_steps=-1 is not allowed"),
        ("cfg-zero*", {"zero_steps": 1.0}, "zero_steps=1.0 is not allowed"),
        ("dg", {"block": "middle", "dims": [1], "scale": 1.0}, "block='middle' is not allowed"),
        ("dg", {"block": 1, "dims": "all", "scale": 1.0}, "dims='all' is not allowed"),
        ("dg", {"block": 1, "dims": [1], "scale": 1.0, "scale_with_cfg": -2.0}, "scale_with_cfg=-2.0 is not allowed"),
        ("dg", {"block": "auto", "dims": [99], "scale": 1.0}, "because of 99"),
    ],
)
def test_methods_refuse(method: str, options: dict[str, Any], words: str) -> None:
    pipe = pipeline("sd3")
    with pytest.raises((DgkitError, ModelError), match=words):
        guided(pipe, "sd3", METHODS[method](**options))
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n=0 is not allowed"),
        ({"n": 1.5}, "n=1.5 is not allowed"),
        ({"n": True}, "n=True is not allowed"),
        ({"n": 2, "cosine": 1.5}, "cosine=1.5 is not allowed"),
        ({"n": 2, "cosine": "0.9"}, "cosine='0.9' is not allowed"),
        ({"n": None, "cosine": 0.9}, "cosine=0.9 is not allowed: give n as well"),
        ({"after": 1.5}, "after=1.5 is not allowed"),
        ({"missing": "guess"}, "missing='guess' is not allowed: use one of reuse, extrapolate, drop"),
    ],
)
def test_every_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        Every(**arguments)


@pytest.mark.parametrize(
    ("methods", "sharing", "words"),
    [
        ((), "replay", r"methods=\[\] is not allowed"),
        (("pag",), "replay", r"methods=\['pag'\] is not allowed"),
        ((CFG(), APG()), "replay", "cfg, apg all take the place of CFG: give one of them"),
        ((PAG(),), "fork", 'sharing="fork" is only for branches that edit block outputs'),
        ((SLG(),), "fork", 'sharing="fork" is only for branches that edit block outputs'),
        ((SLG(),), "both", "sharing='both' is not allowed"),
    ],
)
def test_guide_refuses(methods: tuple[Any, ...], sharing: str, words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        guided(pipeline("sd3"), "sd3", *methods, sharing=sharing)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_every_method_is_registered_with_its_source_and_is_short() -> None:
    assert set(METHODS) == {
        "dg", "pag", "seg", "slg", "tpg", "block-drop", "autoguidance", "sg-prev", "cfg", "apg", "cfg++", "cfg-zero*",
    }  # fmt: skip
    for method in METHODS.values():
        assert "arXiv" in (method.__doc__ or "")
        code = inspect.getsource(method).replace(method.__doc__ or "", "")
        assert len([line for line in code.splitlines() if line.strip()]) <= 32, method


@pytest.mark.parametrize("edited", ["planted", "none"])
def test_auto_finds_block_and_dims(edited: str) -> None:
    """Channel 5 is made massive from block 1 on; without it the largest channel is taken and is not massive."""
    pipe = pipeline("sd3")
    if edited == "planted":
        block = pipe.transformer.transformer_blocks[1]
        block.register_forward_hook(lambda m, a, o: (o[0], o[1] + 50 * F.one_hot(torch.tensor(5), 16)))
    call = {"height": 16, "width": 16}
    given = prompts("sd3", 4)
    original = type(pipe).__call__

    def with_embeddings(self: Any, prompt: Any = None, **kwargs: Any) -> Any:
        kept = {k: v[: len(prompt)] for k, v in given.items() if isinstance(v, Tensor)}
        return original(self, **(call | kept | kwargs))

    pipe.__class__ = type("StableDiffusion3Test", (type(pipe),), {"__call__": with_embeddings})
    found = dgkit.calibrate(pipe, num_inference_steps=2)
    if edited == "planted":
        assert (found.block, found.dims, found.massive) == (1, [5], True) and found.ratio > 20
    else:
        assert not found.massive and len(found.dims) == 1
    with dgkit.detail_guidance(pipe, scale=1.0, block="auto", dims="auto") as guidance:
        again = dgkit.calibrate(pipe)
        assert (guidance.dg.block, guidance.dg.dims) == (again.block, again.dims)


def test_make_edit_is_what_dg_applies() -> None:
    pipe = pipeline("dit")
    with dgkit.detail_guidance(pipe, scale=1.0, block=1, dims=(3,), kind="random", seed=4) as guidance:
        assert guidance.dg.dims == [3]
    assert make_edit(dissect(pipe), [3], "random", 4).dims != [3]
