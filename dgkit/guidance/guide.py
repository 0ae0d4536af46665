"""Guidance of the pipelines people use, by hooks on their transformer; no copied `__call__`."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgkit.anatomy import COND, NO_CFG, TWO_CALLS, UNCOND, UNKNOWN, Anatomy, Call, CallReader, Runs, dissect
from dgkit.checks import refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.dg import DG
from dgkit.guidance.engine import Cost, Engine
from dgkit.guidance.methods import Branching, Combining, Method, Reuse, Scale

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
    engine = Engine(anatomy, sharing)
    bound = [method.bound(None if by_itself else target, anatomy, cfg) for method in methods]
    if read.cfg == TWO_CALLS:
        _refuse_two_scales(target, bound)
    steps = _Steps(read, engine, bound, None if by_itself else lambda: getattr(target, transformer))
    others.append(subject)
    try:
        with engine.attached(), anatomy.watched(steps.before, steps.after):
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
    reuse: Reuse | None = None,
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
        reuse: take the same direction for several steps, see `Reuse`.
        sharing: "replay" computes the blocks that both passes share once, "none" is two full passes, "fork" see
            `dgkit.guidance.Engine`.
        cfg, transformer: see `guide`.

    Yields:
        The `Guidance`: its `dg` holds the block, dims and scale that are used, its `cost` the block evaluations.

    Raises:
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: see `guide`.
    """
    method = DG(scale=scale, block=block, dims=dims, kind=kind, seed=seed, start=start, stop=stop, reuse=reuse)
    return guide(target, method, sharing=sharing, cfg=cfg, transformer=transformer)


def _refuse_two_scales(target: Any, methods: Sequence[Method]) -> None:
    for method in methods:
        if isinstance(method, DG) and method.scale != method.scale_with_cfg:
            raise DgkitError(
                f"scale left out, but the preset has {method.scale:g} alone and {method.scale_with_cfg:g} beside true "
                f"CFG, and {type(target).__name__} does not tell which before its second call: give a value"
            )


@dataclass
class _Memory:
    """What a method keeps from step to step of one run."""

    direction: Tensor | None = None  # c - c_branch
    age: int = 0  # steps since it was computed
    lasts: int = 1  # steps it is used for
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Conditional:
    """The latest conditional call, for the unconditional call that follows it where CFG is two calls (Flux)."""

    c: Tensor
    added: Tensor | None
    output: Any


@dataclass
class _Run:
    """What is kept of one run of a pipeline."""

    memories: dict[int, _Memory] = field(default_factory=dict)  # by id of the method
    conditional: _Conditional | None = None
    unanswered: bool = False  # a conditional call still waits for the unconditional one

    def memory(self, method: Method) -> _Memory:
        return self.memories.setdefault(id(method), _Memory())


class _UnderWay(threading.local):
    """The call under way in each thread, and the methods that are active in it or compute a direction for it."""

    call: Call | None = None
    run: _Run
    active: list[Branching]
    computed: list[Branching]


class _Steps:
    """What happens before and after each call of the transformer."""

    def __init__(
        self, read: CallReader, engine: Engine, methods: Sequence[Method], current: Callable[[], Any] | None
    ) -> None:
        self.read = read
        self.engine = engine
        self.anatomy = engine.anatomy
        self.branching = [method for method in methods if isinstance(method, Branching)]
        self.combining = next((method for method in methods if isinstance(method, Combining)), None)
        self.current = current  # the pipeline's transformer as it is now
        self.runs = Runs(_Run)
        self.now = _UnderWay()

    # not to be traced where the transformer is compiled inside the `with`
    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self.now
        self.engine.forget()
        now.call = None
        call = self.read(args, kwargs)
        if not call.ours:
            if call.loop is None:
                raise ModelError(
                    "the transformer was called outside its pipeline's `__call__`, which alone tells the rows of a "
                    "batch: for a sampling loop of your own, guide the transformer itself"
                )
            return
        model = self.anatomy.model
        if self.current is not None and (self.current() is not model or model._compiled_call_impl is not None):
            raise ModelError("the transformer was compiled or exchanged inside guidance: leave the `with` before that")
        if kwargs.get("skip_layers") is not None:
            raise ModelError("skip_guidance_layers cannot be combined with dgkit's guidance: leave it out, or use slg")
        if UNKNOWN in call.labels:
            raise ModelError(
                "the pipeline calls its transformer for more than the conditional and the unconditional prediction: "
                "switch its other guidance off"
            )
        now.run = self.runs.of(call.loop)
        with_cfg = UNCOND in call.labels
        if with_cfg:
            now.run.unanswered = False
        now.active = []
        if COND in call.labels:
            now.active = [m for m in self.branching if m.active(call) and m.weight(call, with_cfg) != 0]
        now.computed = [method for method in now.active if _due(now.run.memory(method))]
        now.call = call
        self.engine.begin([method.perturbation(call) for method in now.computed], call)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        now, call = self.now, self.now.call
        if call is None:
            return None
        now.call, run = None, now.run
        branches = self.engine.finish(args, kwargs, reused=len(now.active) - len(now.computed))
        whole = upcast(_prediction(output))
        channels = self.anatomy.predicted_channels or whole.shape[1]
        values, cond = whole[:, :channels], call.rows(COND)
        if cond:
            added = self._added(call, values[cond], [upcast(_prediction(branch))[:, :channels] for branch in branches])
            run.conditional = _Conditional(values[cond], added, output)
        assert run.conditional is not None, "the conditional call comes first"
        c, added = run.conditional.c, run.conditional.added
        if self.combining is None:
            if added is None:
                return None
            # w (c - c_branch) on both halves: CFG, being affine with weights that sum to 1, passes it on unchanged
            guided_values = values + _repeated(added, len(values))
        else:
            combined = self._combined(self.combining, call, c, values[call.rows(UNCOND)])
            # the same in both halves, which CFG's u + s (c - u) then leaves as it is
            guided_values = _repeated(combined if added is None else combined + added, len(values))
        result = torch.cat([guided_values, whole[:, channels:]], 1)
        if not cond and self.combining is not None:
            _overwrite(run.conditional.output, result)  # the pipeline has not used it yet
        guided_output = _with_prediction(output, result)
        if cond:
            run.conditional.output = guided_output
        return guided_output

    def _added(self, call: Call, c: Tensor, branches: list[Tensor]) -> Tensor | None:
        """The sum of w (c - c_branch), None if no method with a branch is active."""
        for method, branch in zip(self.now.computed, branches, strict=True):
            _remember(self.now.run.memory(method), method.reuse, c - branch)
        added: Tensor | None = None
        for method in self.now.active:
            direction = self.now.run.memory(method).direction
            assert direction is not None
            part = method.weight(call, UNCOND in call.labels) * direction
            added = part if added is None else added + part
        return added

    def _combined(self, method: Combining, call: Call, c: Tensor, u: Tensor) -> Tensor:
        if not method.active(call):
            return c
        run = self.now.run
        if len(u):
            return method.combine(c, u, call, run.memory(method).own)
        if self.read.cfg != TWO_CALLS or run.unanswered:
            raise self._cfg_is_off()
        run.unanswered = True
        return c

    def check_answered(self) -> None:
        """Raise an error if a method takes the place of CFG and the last unconditional call did not come."""
        if any(run.unanswered for run in self.runs.all()):
            raise self._cfg_is_off()

    def _cfg_is_off(self) -> DgkitError:
        assert self.combining is not None
        name, scale = self.combining.name, self.read.scale
        return DgkitError(f"{name} takes the place of CFG, which is off: call the pipeline with {scale} above 1")


def _due(memory: _Memory) -> bool:
    memory.age += 1
    return memory.direction is None or memory.age >= memory.lasts


def _remember(memory: _Memory, reuse: Reuse | None, direction: Tensor) -> None:
    if reuse is None:
        memory.lasts = 1
    elif reuse.cosine is None:
        memory.lasts = reuse.every
    elif memory.direction is not None:
        cosine = F.cosine_similarity(direction.flatten(1), memory.direction.flatten(1)).min()
        memory.lasts = min(memory.lasts + 1, reuse.every) if cosine >= reuse.cosine else 1
    memory.direction, memory.age = direction, 0


def _repeated(values: Tensor, count: int) -> Tensor:
    """`values` again and again along the batch, up to `count` rows."""
    return torch.cat([values] * (count // len(values)))


def upcast(prediction: Tensor) -> Tensor:
    """At least float32: differences of predictions are small."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _prediction(output: Any) -> Tensor:
    """The prediction in a transformer's output: a tensor, or the first of a tuple or dataclass; Z-Image's is a list."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """`output` with another prediction, in the dtype that it had."""
    first = output if isinstance(output, Tensor) else output[0]
    listed = isinstance(first, list)
    prediction = prediction.to(first[0].dtype if listed else first.dtype)
    value = list(prediction.unbind()) if listed else prediction
    if isinstance(output, Tensor):
        return value
    return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)


def _overwrite(output: Any, prediction: Tensor) -> None:
    """Write a prediction into an output in place."""
    first = output if isinstance(output, Tensor) else output[0]
    for old, new in zip(first, prediction, strict=True):
        old.copy_(new)
