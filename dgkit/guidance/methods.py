"""Every guidance method as data: what its branch does differently, or how it combines c and u.

c and u are the conditional and unconditional predictions of a step (velocity, or noise), s is CFG's scale in
u + s (c - u). Methods with a branch add w (c - c_branch) to the prediction, whatever CFG does beside them; the others
take CFG's place. All can be limited to a part of the steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dgkit.anatomy import Anatomy, Call, Step, dissect, step_of
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.branches import Perturbation
from dgkit.guidance.calibrate import Calibration, calibrate
from dgkit.hooks import checked_steps, make_edit
from dgkit.zoo import preset_of

Scale = float | Callable[[float], float]


@dataclass(frozen=True)
class Now:
    """A call of a pipeline's transformer; `step` is worked out only where a method asks."""

    pipe: Any
    anatomy: Anatomy
    call: Call

    @cached_property
    def step(self) -> Step:
        """The sampling step."""
        return step_of(self.pipe, self.call)


@dataclass(frozen=True)
class Reuse:
    """Reuse of a branch's direction c - c_branch in the following steps.

    Attributes:
        every: compute it in every n-th step only.
        cosine: compute it anew after one step more each time, up to `every`, as long as it has turned little: while the
            cosine to the direction before, in each image of the batch, is at least this. None: always after `every`.
    """

    every: int
    cosine: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise DgkitError(f"every={self.every!r} is not allowed: give an integer, 1 or above")
        if self.cosine is not None and not (_number(self.cosine) and -1 <= self.cosine <= 1):
            raise DgkitError(f"cosine={self.cosine!r} is not allowed: give a number from -1 to 1, or None")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods have.

    Attributes:
        scale: w (methods with a branch) or s (the others), or a function of the noise level sigma, which runs from 1 to
            0 in rectified flow and is noise over signal in DiT's diffusion.
        start, stop: the part of the steps that is guided, as in diffusers: from int(start * steps) to before int(stop *
            steps). Outside, methods that take CFG's place leave c.
    """

    scale: Scale
    start: float = 0.0
    stop: float = 1.0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.scale is not None and not callable(self.scale):
            checked_scale("scale", self.scale)
        checked_steps(self.start, self.stop)

    def bound(self, pipe: Any, anatomy: Anatomy) -> Self:
        """The method with everything left out filled in and checked for this pipeline."""
        return self

    def active(self, now: Now) -> bool:
        """Whether this step is guided."""
        if (self.start, self.stop) == (0.0, 1.0):
            return True
        return now.step.within(self.start, self.stop)

    def weight(self, now: Now, with_cfg: bool) -> float:
        """The scale of this step."""
        return _at(self.scale, now)


# ------------------------------------------------------------------------------------------------ methods with a branch


@dataclass(frozen=True, kw_only=True)
class Branching(Method):
    """c + w (c - c_branch), or beside CFG u + s (c - u) + w (c - c_branch) with the pipeline's own s.

    Attributes:
        reuse: see `Reuse`; None computes the branch in every step.
    """

    scale: Scale = 1.0
    reuse: Reuse | None = None

    def perturbation(self, now: Now) -> Perturbation:
        """What the branch does differently in this step."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DG(Branching):
    """Detail Guidance, Eq. 4 and Eq. 5 (arXiv 2510.11538): the branch zeroes massive channels of one block's output.

    Attributes:
        scale: w; by default that of the model's preset (Table 5).
        scale_with_cfg: w beside CFG; by default `scale`, or that of the preset.
        block: zero-based block, the paper's m - 1; by default the preset's (Table 4). "auto": see `calibrate`.
        dims: the channels; by default the preset's (Table 4). "auto": see `calibrate`.
        kind, seed: how they are edited, see `dgkit.disrupt`.
        found: what "auto" found.
    """

    name = "dg"
    scale: Scale | None = None  # type: ignore[assignment]
    scale_with_cfg: Scale | None = None
    block: int | str | None = None
    dims: Sequence[int] | str | None = None
    kind: str = "zero"
    seed: int = 0
    found: Calibration | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_with_cfg is not None and not callable(self.scale_with_cfg):
            checked_scale("scale_with_cfg", self.scale_with_cfg)

    def bound(self, pipe: Any, anatomy: Anatomy) -> Self:
        filled, found = _filled_in(self, pipe, anatomy)
        make_edit(anatomy, filled["dims"], self.kind, self.seed)
        bound = replace(self, **filled)
        object.__setattr__(bound, "found", found)
        return bound

    def weight(self, now: Now, with_cfg: bool) -> float:
        return _at(self.scale_with_cfg if with_cfg else self.scale, now)

    def perturbation(self, now: Now) -> Perturbation:
        assert isinstance(self.block, int) and self.dims is not None and not isinstance(self.dims, str)
        return Perturbation(edits={self.block: make_edit(now.anatomy, self.dims, self.kind, self.seed)})


def _filled_in(dg: DG, pipe: Any, anatomy: Anatomy) -> tuple[dict[str, Any], Calibration | None]:
    """The settings left out, from the model's preset, and those that are "auto", from a calibration."""
    preset = preset_of(anatomy)
    known: dict[str, Any] = {"scale": dg.scale, "block": dg.block, "dims": dg.dims}
    for name, value in known.items():
        if value is None:
            known[name] = getattr(preset, name, None)
    lacking = [name for name, value in known.items() if value is None]
    if lacking:
        raise DgkitError(f"{', '.join(lacking)} left out, but no preset for this model states it: give a value")
    with_cfg = dg.scale_with_cfg
    if with_cfg is None:
        with_cfg = preset.scale_with_cfg if dg.scale is None and preset else known["scale"]
    found: Calibration | None = None
    if "auto" in (known["block"], known["dims"]):
        block, dims = (None if known[name] == "auto" else known[name] for name in ("block", "dims"))
        found = calibrate(pipe, block=block, dims=dims)
        known |= {"block": found.block, "dims": found.dims}
    block, dims = anatomy.block(known["block"]).index, anatomy.dims(known["dims"])
    return known | {"scale_with_cfg": with_cfg, "block": block, "dims": dims}, found


@dataclass(frozen=True, kw_only=True)
class Blocks(Branching):
    """Methods that change what some blocks do: `blocks`, by default (empty) the middle one.

    Where the middle block is the first of its stack, which cannot be skipped, the default is the one after it.
    """

    blocks: Sequence[int] = ()

    def bound(self, pipe: Any, anatomy: Anatomy) -> Self:
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence):
            raise DgkitError(f"blocks={self.blocks!r} is not allowed: give a list of blocks")
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

    def perturbation(self, now: Now) -> Perturbation:
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
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float) or not self.sigma > 0:
            raise DgkitError(f"sigma={self.sigma!r} is not allowed: give a number above 0, or infinity")

    def perturbation(self, now: Now) -> Perturbation:
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

    def perturbation(self, now: Now) -> Perturbation:
        return Perturbation(skips=frozenset(self.blocks))


@dataclass(frozen=True, kw_only=True)
class TPG(Blocks):
    """Token perturbation guidance (Rajabi et al. 2025, arXiv 2506.10036): image tokens are shuffled after the blocks.

    Attributes:
        seed: with the step decides the order, the same for all images of a batch.
    """

    name = "tpg"
    seed: int = 0

    def perturbation(self, now: Now) -> Perturbation:
        index = now.step.index

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
        if not _number(self.share) or not 0 < self.share < 1:
            raise DgkitError(f"share={self.share!r} is not allowed: give a number between 0 and 1")

    def perturbation(self, now: Now) -> Perturbation:
        blocks = now.anatomy.blocks
        candidates = [b.index for a, b in zip(blocks, blocks[1:], strict=False) if a.stack is b.stack]
        count = min(len(candidates), max(1, round(self.share * len(blocks))))
        order = torch.randperm(len(candidates), generator=_generator(self.seed, now.step.index))
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

    def bound(self, pipe: Any, anatomy: Anatomy) -> Self:
        if not isinstance(self.bad, nn.Module) or self.bad is anatomy.model:
            raise DgkitError("bad is not allowed: give another transformer, a worse one of the same inputs")
        if type(self.bad) is not type(anatomy.model):
            raise ModelError(f"bad is a {type(self.bad).__name__}, the pipeline's a {type(anatomy.model).__name__}")
        dissect(self.bad)
        return self

    def perturbation(self, now: Now) -> Perturbation:
        return Perturbation(model=self.bad)


# ------------------------------------------------------------------------------------------- methods in place of CFG


@dataclass(frozen=True, kw_only=True)
class Combining(Method):
    """Methods that take the place of CFG; the pipeline's own CFG has to be on, its scale is not used."""

    scale: Scale = 4.0

    def combine(self, c: Tensor, u: Tensor, now: Now, memory: dict[str, Any]) -> Tensor:
        """The guided prediction; `memory` lasts for one run of the pipeline."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CFG(Combining):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): u + s (c - u); Eq. 1 with lambda = s.

    With `start` and `stop` or a `scale` of sigma it is guidance in a limited interval (Kynkaanniemi et al. 2024, arXiv
    2404.07724).
    """

    name = "cfg"

    def combine(self, c: Tensor, u: Tensor, now: Now, memory: dict[str, Any]) -> Tensor:
        return u + self.weight(now, True) * (c - u)


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
        if self.space not in ("x0", "prediction"):
            raise DgkitError(f"space={self.space!r} is not allowed: use x0 or prediction")
        if isinstance(self.norm, bool) or not isinstance(self.norm, int | float) or not self.norm > 0:
            raise DgkitError(f"norm={self.norm!r} is not allowed: give a number above 0, or infinity")
        for argument, value in (("eta", self.eta), ("momentum", self.momentum)):
            if not _number(value):
                raise DgkitError(f"{argument}={value!r} is not allowed: give a finite number")

    def combine(self, c: Tensor, u: Tensor, now: Now, memory: dict[str, Any]) -> Tensor:
        x = None if self.space == "prediction" else _latents(now, c)
        c, u = (p if x is None else now.step.denoised(x, p) for p in (c, u))
        memory["sum"] = difference = c - u + self.momentum * memory.get("sum", 0.0)
        axes = tuple(range(1, c.ndim))
        size = (difference * difference).sum(axes, keepdim=True).sqrt()
        difference = difference * (self.norm / size).clamp(max=1.0)
        along = (difference * c).sum(axes, keepdim=True) / (c * c).sum(axes, keepdim=True) * c
        guided = c + (self.weight(now, True) - 1) * (difference - along + self.eta * along)
        return guided if x is None else now.step.prediction(x, guided)


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
            raise DgkitError(f"scale={self.scale!r} is not allowed: CFG++ takes a number from 0 to 1")

    def combine(self, c: Tensor, u: Tensor, now: Now, memory: dict[str, Any]) -> Tensor:
        step = now.step
        if not step.deterministic:
            raise ModelError(
                f"cfg++ needs Euler or DDIM steps, not {type(now.pipe.scheduler).__name__} with these settings: use "
                f"{'FlowMatchEulerDiscreteScheduler' if step.velocity else 'DDIMScheduler(clip_sample=False)'}"
            )
        kept = step.next_signal * step.noise
        return u + self.weight(now, True) * kept / (kept - step.signal * step.next_noise) * (c - u)


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
        if isinstance(self.zero_steps, bool) or not isinstance(self.zero_steps, int) or self.zero_steps < 0:
            raise DgkitError(f"zero_steps={self.zero_steps!r} is not allowed: give an integer, 0 or above")

    def combine(self, c: Tensor, u: Tensor, now: Now, memory: dict[str, Any]) -> Tensor:
        if self.zero_steps and not now.step.velocity:
            raise ModelError("zero_steps is for velocity prediction, and this model predicts noise: give zero_steps=0")
        if self.zero_steps and now.step.index < self.zero_steps:
            return torch.zeros_like(c)
        axes = tuple(range(1, c.ndim))
        square = (u * u).sum(axes, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)  # u may be zero everywhere
        u = (c * u).sum(axes, keepdim=True) / square * u
        return u + self.weight(now, True) * (c - u)


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DG, PAG, SEG, SLG, TPG, BlockDrop, Autoguidance, CFG, APG, CFGPlusPlus, CFGZeroStar)
}


# --------------------------------------------------------------------------------------------------------------- checks


def checked_scale(argument: str, scale: Any) -> float:
    """A finite scale, 0 or above."""
    if not _number(scale) or scale < 0:
        raise DgkitError(
            f"{argument}={scale!r} is not allowed: give a finite number, 0 or above, or a function of sigma"
        )
    return float(scale)


def _at(scale: Any, now: Now) -> float:
    return checked_scale("scale(sigma)", scale(now.step.sigma)) if callable(scale) else float(scale)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _latents(now: Now, prediction: Tensor) -> Tensor:
    """x of the conditional rows, in the prediction's dtype."""
    x = now.call.hidden_states[: len(prediction)]
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
