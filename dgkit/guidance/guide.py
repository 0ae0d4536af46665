"""Guidance of the pipelines people use, by hooks on their transformer; no copied `__call__`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dgkit.anatomy import NO_CFG, TWO_CALLS, Anatomy, CallReader, dissect
from dgkit.checks import refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.dg import DG
from dgkit.guidance.engine import Cost, Engine
from dgkit.guidance.methods import Combining, Method, Scale
from dgkit.guidance.schedule import Every, Schedule
from dgkit.guidance.steps import Steps, uncond_of
from dgkit.taps import answered

guided: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The guided transformers, each with what guidance was given: pipelines, or the transformer itself."""


@dataclass(frozen=True)
class Guidance:
    """What `guide` does inside its `with`.

    Attributes:
        methods: with everything filled in that was left out or looked for.
        cost: block evaluations so far.
    """

    methods: list[Method]
    cost: Cost

    @property
    def dg(self) -> DG:
        """The Detail Guidance among `methods`."""
        return next(method for method in self.methods if isinstance(method, DG))


class Guiding(AbstractContextManager[Guidance]):
    """The `with` of `guide`, which may be entered again and again."""

    def __init__(self, enter: Callable[[], AbstractContextManager[Guidance]]) -> None:
        self._enter = enter
        self._entered: list[AbstractContextManager[Guidance]] = []

    def __enter__(self) -> Guidance:
        context = self._enter()
        guidance = context.__enter__()
        self._entered.append(context)
        return guidance

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.pop().__exit__(*exception)


def guide(
    target: Any,
    *methods: Method,
    sharing: str = "replay",
    cfg: str | None = None,
    transformer: str = "transformer",
) -> Guiding:
    """Guide every sampling step of `target` inside the `with`.

    With c and u the conditional and unconditional predictions, methods with a branch (DG, PAG, ...) each add
    w (c - c_branch) to c, or beside the pipeline's own CFG to u + s (c - u). A method that combines c and u (APG,
    CFG++, ...) takes CFG's place: the pipeline has to be called with CFG on (`guidance_scale` or, in Flux,
    `true_cfg_scale` above 1), but the scale is the method's own. Where the transformer also predicts sigma (DiT,
    PixArt) only the noise is guided. Other pipelines that share the transformer are left alone.

    Args:
        target: a pipeline, see `dgkit.anatomy.PIPELINES`; or a transformer or its anatomy, all of whose calls are
            guided, in whatever sampling loop.
        methods: any number with a branch and at most one that combines, see `dgkit.guidance.baselines`.
        sharing: how branches share work with the ordinary pass, see `dgkit.guidance.Engine`.
        cfg: how CFG is run, where dgkit does not know: "uncond, cond" or "cond, uncond" (one call of the transformer on
            a doubled batch), "two calls" (the conditional one first) or "none" (every row is conditional, as is taken
            of a transformer by itself).
        transformer: which of the pipeline's transformers, see `dgkit.anatomy.dissect`.

    Raises (when entered):
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: a pipeline dgkit cannot guide, a transformer compiled as a whole, cached or already guided.
    """
    return Guiding(lambda: _guiding(target, methods, sharing, cfg, transformer))


@contextmanager
def _guiding(
    target: Any, methods: Sequence[Method], sharing: str, cfg: str | None, transformer: str
) -> Iterator[Guidance]:
    anatomy = dissect(target, transformer=transformer)
    by_itself = isinstance(target, nn.Module | Anatomy)
    read = CallReader(target, anatomy, NO_CFG if cfg is None and by_itself else cfg)
    if not methods or not all(isinstance(method, Method) for method in methods):
        refuse("methods", list(methods), "give one or more of dgkit.guidance.METHODS")
    if sum(isinstance(method, Combining) for method in methods) > 1:
        names = ", ".join(method.name for method in methods if isinstance(method, Combining))
        raise DgkitError(f"{names} all take the place of CFG: give one of them")
    subject = anatomy.model if by_itself else target
    others = guided.setdefault(anatomy.model, [])
    if any(other is subject or anatomy.model in (other, subject) for other in others):
        raise ModelError("this transformer is already guided: leave the outer `with` first")
    uncond = uncond_of(methods)
    engine = Engine(anatomy, sharing)
    bound = [method.bound(None if by_itself else target, anatomy, cfg) for method in methods]
    if read.cfg == TWO_CALLS:
        _refuse_two_scales(target, bound)
    steps = Steps(read, engine, bound, uncond, None if by_itself else lambda: getattr(target, transformer))
    answers = read.cfg == TWO_CALLS and uncond != Every()
    others.append(subject)
    try:
        with (
            engine.attached(),
            anatomy.watched(steps.before, steps.after),
            answered(anatomy.model, steps.answer) if answers else nullcontext(),
        ):
            yield Guidance(bound, engine.cost)
            steps.check_answered()
    finally:
        others.remove(subject)


def detail_guidance(
    target: Any,
    *,
    scale: Scale | None = None,
    block: int | str | None = None,
    dims: Sequence[int] | str | None = None,
    kind: str = "zero",
    seed: int = 0,
    start: float = 0.0,
    stop: float = 1.0,
    schedule: Schedule | str = "full",
    sharing: str = "replay",
    cfg: str | None = None,
    transformer: str = "transformer",
) -> Guiding:
    """Guide every sampling step of `target` inside the `with` away from its own detail-deficient version.

    With c and u the conditional and unconditional predictions and c_m the conditional one with `dims` of block `block`
    edited, the step uses c + w (c - c_m) without CFG (Eq. 4) and u + s (c - u) + w (c - c_m) with the pipeline's own
    CFG at `guidance_scale` s, where s = lambda + 1 in terms of Eq. 5. Where the transformer also predicts sigma (DiT,
    PixArt) only the noise is guided.

    Args:
        target: see `guide`.
        scale: w, or a function of sigma; the model's preset (Table 5) by default.
        block: zero-based block, the paper's m - 1; the model's preset (Table 4) by default; "auto" looks for it.
        dims: channels to edit; the model's preset (Table 4) by default; "auto" looks for them (see `calibrate`).
        kind, seed: how to edit them, see `dgkit.disrupt`; the paper zeroes them.
        start, stop: the part of the steps that is guided.
        schedule: which predictions are computed in which steps, see `Schedule`; "cheap" is CFG + DG for about the price
            of CFG.
        sharing: "replay" computes the blocks that both passes share once, "none" is two full passes, "fork" see
            `dgkit.guidance.Engine`.
        cfg, transformer: see `guide`.

    Yields:
        The `Guidance`: its `dg` holds the block, dims and scale that are used, its `cost` the block evaluations.

    Raises:
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: see `guide`.
    """
    method = DG(scale=scale, block=block, dims=dims, kind=kind, seed=seed, start=start, stop=stop, schedule=schedule)
    return guide(target, method, sharing=sharing, cfg=cfg, transformer=transformer)


def _refuse_two_scales(target: Any, methods: Sequence[Method]) -> None:
    for method in methods:
        if isinstance(method, DG) and method.scale != method.scale_with_cfg:
            raise DgkitError(
                f"scale left out, but the preset has {method.scale:g} alone and {method.scale_with_cfg:g} beside true "
                f"CFG, and {type(target).__name__} does not tell which before its second call: give a value"
            )
