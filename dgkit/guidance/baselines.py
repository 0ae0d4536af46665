"""The other guidance methods, each with its source."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dgkit.anatomy import Anatomy, Call, dissect
from dgkit.checks import integer, is_number, number, one_of, refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.engine import Perturbation
from dgkit.guidance.methods import Branching, Combining, Scale

# ------------------------------------------------------------------------------------------------ methods with a branch


@dataclass(frozen=True, kw_only=True)
class Blocks(Branching):
    """Methods that change what some blocks do: `blocks`, by default (empty) the middle one.

    Where the middle block is the first of its stack, which cannot be skipped, the default is the one after it.
    """

    blocks: Sequence[int] = ()

    def bound(self, pipe: Any, anatomy: Anatomy, cfg: str | None = None) -> Self:
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence):
            refuse("blocks", self.blocks, "give a list of blocks")
        middle = len(anatomy.blocks) // 2
        first = middle > 0 and anatomy.blocks[middle].stack is not anatomy.blocks[middle - 1].stack
        blocks = {anatomy.block(block).index for block in self.blocks} or {middle + first}
        return replace(self, blocks=tuple(sorted(blocks)))


@dataclass(frozen=True, kw_only=True)
class PAG(Blocks):
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): self-attention becomes the identity.

    Each image token attends to no image token but itself; text tokens, and its attention to them, stay (as in
    diffusers' processor for SD3).
    """

    name = "pag"

    def perturbation(self, call: Call) -> Perturbation:
        return Perturbation(attention=dict.fromkeys(self.blocks, _identity_attention))


def _identity_attention(attend: Any, image: slice, query: Tensor, **options: Any) -> Tensor:
    tokens = query.shape[2]
    mask = torch.zeros(tokens, tokens, dtype=query.dtype, device=query.device)
    mask[image, image] = float("-inf")
    mask.fill_diagonal_(0)
    given = options.pop("attn_mask", None)
    if given is not None:
        mask = mask + (
            given if given.dtype != torch.bool else torch.zeros_like(mask).masked_fill(~given, float("-inf"))
        )
    return attend(query=query, attn_mask=mask, **options)


@dataclass(frozen=True, kw_only=True)
class SEG(Blocks):
    """Smoothed energy guidance (Hong 2024, arXiv 2408.00760): the queries of image tokens are blurred over the image.

    Attributes:
        sigma: standard deviation of the Gaussian in tokens; infinite (the mean of all queries) by default. Models with
            rotary embeddings (Flux) are blurred after them.
    """

    name = "seg"
    sigma: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        number("sigma", self.sigma, above=0, infinite=True)

    def perturbation(self, call: Call) -> Perturbation:
        return Perturbation(attention=dict.fromkeys(self.blocks, self._attention))

    def _attention(self, attend: Any, image: slice, query: Tensor, **options: Any) -> Tensor:
        blurred = query.clone()
        blurred[:, :, image] = self._blurred(query[:, :, image])
        return attend(query=blurred, **options)

    def _blurred(self, query: Tensor) -> Tensor:
        if self.sigma == math.inf:
            return query.mean(2, keepdim=True).expand_as(query)
        batch, heads, tokens, width = query.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise DgkitError(f"sigma={self.sigma} needs square images, and {tokens} tokens are none: use infinity")
        grid = query.transpose(2, 3).reshape(batch, heads * width, side, side)
        # kernel as in the method's published code, cut to what reflection at the border allows
        size = min(math.ceil(6 * self.sigma) | 1, 2 * side - 1)
        grid = gaussian_blur(grid, [size, size], [self.sigma, self.sigma])
        return grid.reshape(batch, heads, width, tokens).transpose(2, 3)


@dataclass(frozen=True, kw_only=True)
class SLG(Blocks):
    """Skip-layer guidance (Stability AI's for SD3.5; Hyung et al. 2024, arXiv 2411.18664): blocks are left out.

    SD3.5-Medium's published setting: blocks 7, 8, 9, w = 2.8, start 0.01, stop 0.2.
    """

    name = "slg"

    def perturbation(self, call: Call) -> Perturbation:
        return Perturbation(skips=frozenset(self.blocks))


@dataclass(frozen=True, kw_only=True)
class TPG(Blocks):
    """Token perturbation guidance (Rajabi et al. 2025, arXiv 2506.10036): image tokens are shuffled after the blocks.

    Attributes:
        seed: with the step decides the order, the same for all images of a batch.
    """

    name = "tpg"
    seed: int = 0

    def perturbation(self, call: Call) -> Perturbation:
        index, _ = call.place

        def shuffled(block: int) -> Callable[[Tensor], Tensor]:
            def edit(image: Tensor) -> Tensor:
                return image[:, torch.randperm(image.shape[1], generator=_generator(self.seed, index, block))]

            return edit

        return Perturbation(edits={block: shuffled(block) for block in self.blocks})


@dataclass(frozen=True, kw_only=True)
class BlockDrop(Branching):
    """S2-Guidance (Chen et al. 2025, arXiv 2508.12880): in each step other blocks, drawn at random, are left out.

    Attributes:
        share: share of the blocks that is left out, at least one; never a stack's first.
        seed: with the step decides which.
    """

    name = "block-drop"
    scale: Scale = 0.25
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.share) and 0 < self.share < 1):
            refuse("share", self.share, "give a number between 0 and 1")

    def perturbation(self, call: Call) -> Perturbation:
        blocks = call.anatomy.blocks
        candidates = [b.index for a, b in zip(blocks, blocks[1:], strict=False) if a.stack is b.stack]
        count = min(len(candidates), max(1, round(self.share * len(blocks))))
        order = torch.randperm(len(candidates), generator=_generator(self.seed, call.place[0]))
        return Perturbation(skips=frozenset(candidates[i] for i in order[:count].tolist()))


@dataclass(frozen=True, kw_only=True)
class Autoguidance(Branching):
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): the branch is a worse model, such as an earlier checkpoint.

    Attributes:
        scale: w, the source's scale minus 1.
        bad: the worse transformer, with the same inputs.
    """

    name = "autoguidance"
    bad: nn.Module | None = None

    def bound(self, pipe: Any, anatomy: Anatomy, cfg: str | None = None) -> Self:
        if not isinstance(self.bad, nn.Module) or self.bad is anatomy.model:
            raise DgkitError("bad is not allowed: give another transformer, a worse one of the same inputs")
        if type(self.bad) is not type(anatomy.model):
            raise ModelError(f"bad is a {type(self.bad).__name__}, the pipeline's a {type(anatomy.model).__name__}")
        dissect(self.bad)
        return self

    def perturbation(self, call: Call) -> Perturbation:
        return Perturbation(model=self.bad)


@dataclass(frozen=True, kw_only=True)
class SGPrev(Branching):
    """SG-prev (Li et al. 2024, arXiv 2412.05827): c_branch is the c of the step before, which costs nothing."""

    name = "sg-prev"

    def perturbation(self, call: Call) -> None:
        return None


# ------------------------------------------------------------------------------------------- methods in place of CFG


@dataclass(frozen=True, kw_only=True)
class CFG(Combining):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): u + s (c - u); Eq. 1 with lambda = s.

    With `start` and `stop` or a `scale` of sigma it is guidance in a limited interval (Kynkaanniemi et al. 2024, arXiv
    2404.07724).
    """

    name = "cfg"

    def combine(self, c: Tensor, u: Tensor, call: Call, memory: dict[str, Any]) -> Tensor:
        return u + self.weight(call, True) * (c - u)


@dataclass(frozen=True, kw_only=True)
class APG(Combining):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), Algorithm 1.

    With d the running sum of differences, d = (D_c - D_u) + momentum * d, cut to the norm `norm`, and its part parallel
    to D_c weighted by `eta`: D = D_c + (s - 1) d. Norm and projection are over all of an image's values.

    Attributes:
        eta: weight of the parallel part.
        momentum: beta, negative.
        norm: r; infinite for none. It has to suit the size of the latents.
        space: "x0", as the source has it: D are denoised images; "prediction": D are the raw predictions, as in
            diffusers.
    """

    name = "apg"
    eta: float = 0.0
    momentum: float = -0.5
    norm: float = 15.0
    space: str = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("space", self.space, ("x0", "prediction"))
        number("norm", self.norm, above=0, infinite=True)
        number("eta", self.eta)
        number("momentum", self.momentum)

    def combine(self, c: Tensor, u: Tensor, call: Call, memory: dict[str, Any]) -> Tensor:
        x = None if self.space == "prediction" else _latents(call, c)
        c, u = (p if x is None else call.step.denoised(x, p) for p in (c, u))
        memory["sum"] = difference = c - u + self.momentum * memory.get("sum", 0.0)
        axes = tuple(range(1, c.ndim))
        size = (difference * difference).sum(axes, keepdim=True).sqrt()
        difference = difference * (self.norm / size).clamp(max=1.0)
        along = (difference * c).sum(axes, keepdim=True) / (c * c).sum(axes, keepdim=True) * c
        guided = c + (self.weight(call, True) - 1) * (difference - along + self.eta * along)
        return guided if x is None else call.step.prediction(x, guided)


@dataclass(frozen=True, kw_only=True)
class CFGPlusPlus(Combining):
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): denoise with u + scale (c - u), renoise with u.

    A DDIM step of the source from (signal a, noise b) to (a', b') equals the scheduler's own step with the prediction
    u + scale * a' b / (a' b - a b') * (c - u). Rectified flow has a = 1 - sigma, b = sigma, where the factor is
    sigma (1 - sigma') / (sigma - sigma'). Needs the scheduler's deterministic Euler or DDIM steps.

    Attributes:
        scale: lambda, from 0 to 1.
    """

    name = "cfg++"
    scale: Scale = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.scale) and self.scale > 1:
            refuse("scale", self.scale, "CFG++ takes a number from 0 to 1")

    def combine(self, c: Tensor, u: Tensor, call: Call, memory: dict[str, Any]) -> Tensor:
        step = call.step
        if not step.deterministic:
            assert call.loop is not None, "it knows the step"
            euler, ddim = "FlowMatchEulerDiscreteScheduler", "DDIMScheduler(clip_sample=False)"
            raise ModelError(
                f"cfg++ needs Euler or DDIM steps without clipping, not {type(call.loop.pipe.scheduler).__name__} with "
                f"these settings: use {euler if step.predicts == 'velocity' else ddim}"
            )
        kept = step.next_signal * step.noise
        return u + self.weight(call, True) * kept / (kept - step.signal * step.next_noise) * (c - u)


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(Combining):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): s* u + s (c - s* u) with s* = <c, u> / |u|^2; zero at the start.

    Attributes:
        zero_steps: in how many first steps the velocity is zero. The official code's `zero_steps` counts from zero
            (`i <= zero_steps`) and is one less; diffusers' `zero_init_steps` is the same as here. Noise prediction
            (DiT) has no zero step: give 0.
    """

    name = "cfg-zero*"
    zero_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("zero_steps", self.zero_steps, 0)

    def combine(self, c: Tensor, u: Tensor, call: Call, memory: dict[str, Any]) -> Tensor:
        if self.zero_steps and call.step.predicts != "velocity":
            predicts = call.step.predicts
            raise ModelError(f"zero_steps is for velocity prediction, not for {predicts}: give zero_steps=0")
        if self.zero_steps and call.place[0] < self.zero_steps:
            return torch.zeros_like(c)
        axes = tuple(range(1, c.ndim))
        square = (u * u).sum(axes, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)  # u may be zero everywhere
        u = (c * u).sum(axes, keepdim=True) / square * u
        return u + self.weight(call, True) * (c - u)


def _latents(call: Call, prediction: Tensor) -> Tensor:
    """x of the conditional rows, in the prediction's dtype."""
    x = call.latents[: len(prediction)]
    if x.shape != prediction.shape:
        raise ModelError(
            f"the latents {tuple(x.shape)} hold more than the sample, so x0 cannot be told: space='prediction'"
        )
    return x.to(prediction.dtype)


def _generator(*seeds: int) -> torch.Generator:
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + int(part) + 1) % (1 << 63)
    return torch.Generator().manual_seed(seed)
