"""Guidance of the pipelines people use, by hooks on their transformer; no copied `__call__`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgkit.anatomy import COND, UNCOND, Call, CallReader, calling_pipeline, dissect, pipeline_row
from dgkit.checks import refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.dg import DG
from dgkit.guidance.engine import Cost, Engine
from dgkit.guidance.methods import Branching, Combining, Method, Reuse, Scale

guided_transformers: WeakSet[nn.Module] = WeakSet()


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


@contextmanager
def guide(pipe: Any, *methods: Method, sharing: str = "replay") -> Iterator[Guidance]:
    """Guide every sampling step of `pipe` inside the `with`.

    With c and u the conditional and unconditional predictions, methods with a branch (DG, PAG, ...) each add
    w (c - c_branch) to c, or beside the pipeline's own CFG to u + s (c - u). A method that combines c and u (APG,
    CFG++, ...) takes CFG's place: the pipeline has to be called with CFG on (`guidance_scale` or, in Flux,
    `true_cfg_scale` above 1), but the scale is the method's own. In DiT the noise is guided, the learned sigma is not.
    Other pipelines that share the transformer are left alone.

    Args:
        pipe: a `StableDiffusion3Pipeline`, `FluxPipeline` or `DiTPipeline`, or one of their image-to-image and
            inpainting variants.
        methods: any number with a branch and at most one that combines, see `dgkit.guidance.baselines`.
        sharing: how branches share work with the ordinary pass, see `dgkit.guidance.Engine`.

    Raises:
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: a pipeline dgkit cannot guide, a transformer compiled as a whole, cached or already guided.
    """
    row = pipeline_row(pipe)
    anatomy = dissect(pipe)
    if not methods or not all(isinstance(method, Method) for method in methods):
        refuse("methods", list(methods), "give one or more of dgkit.guidance.METHODS")
    if sum(isinstance(method, Combining) for method in methods) > 1:
        names = ", ".join(method.name for method in methods if isinstance(method, Combining))
        raise DgkitError(f"{names} all take the place of CFG: give one of them")
    if anatomy.model in guided_transformers:
        raise ModelError("this pipeline's transformer is already guided: leave the outer `with` first")
    engine = Engine(anatomy, sharing)
    bound = [method.bound(pipe, anatomy) for method in methods]
    if not row.batched_cfg:
        _refuse_two_scales(pipe, bound)
    steps = _Steps(pipe, engine, bound)
    with engine.attached():
        before = anatomy.model.register_forward_pre_hook(steps.before, with_kwargs=True)
        after = anatomy.model.register_forward_hook(steps.after, with_kwargs=True)
        guided_transformers.add(anatomy.model)
        try:
            yield Guidance(bound, engine.cost)
            if steps.unanswered:
                raise steps.cfg_is_off()
        finally:
            guided_transformers.discard(anatomy.model)
            before.remove()
            after.remove()


def detail_guidance(
    pipe: Any,
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
) -> Any:
    """Guide every sampling step of `pipe` inside the `with` away from its own detail-deficient version.

    With c and u the conditional and unconditional predictions and c_m the conditional one with `dims` of block `block`
    edited, the step uses c + w (c - c_m) without CFG (Eq. 4) and u + s (c - u) + w (c - c_m) with the pipeline's own
    CFG at `guidance_scale` s, where s = lambda + 1 in terms of Eq. 5. In DiT the noise is guided, the learned sigma is
    not.

    Args:
        pipe: see `guide`.
        scale: w, or a function of sigma; the model's preset (Table 5) by default.
        block: zero-based block, the paper's m - 1; the model's preset (Table 4) by default; "auto" looks for it.
        dims: channels to edit; the model's preset (Table 4) by default; "auto" looks for them (see `calibrate`).
        kind, seed: how to edit them, see `dgkit.disrupt`; the paper zeroes them.
        start, stop: the part of the steps that is guided.
        reuse: take the same direction for several steps, see `Reuse`.
        sharing: "replay" computes the blocks that both passes share once, "none" is two full passes, "fork" see
            `dgkit.guidance.Engine`.

    Yields:
        The `Guidance`: its `dg` holds the block, dims and scale that are used, its `cost` the block evaluations.

    Raises:
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: a pipeline dgkit cannot guide, a transformer compiled as a whole, cached or already guided.
    """
    method = DG(scale=scale, block=block, dims=dims, kind=kind, seed=seed, start=start, stop=stop, reuse=reuse)
    return guide(pipe, method, sharing=sharing)


def _refuse_two_scales(pipe: Any, methods: Sequence[Method]) -> None:
    for method in methods:
        if isinstance(method, DG) and method.scale != method.scale_with_cfg:
            raise DgkitError(
                f"scale left out, but the preset has {method.scale:g} alone and {method.scale_with_cfg:g} beside true "
                f"CFG, and {type(pipe).__name__} does not tell which before its second call: give a value"
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
    output: Tensor


class _Steps:
    """The hooks before and after each call of the transformer."""

    def __init__(self, pipe: Any, engine: Engine, methods: Sequence[Method]) -> None:
        self.pipe = pipe
        self.engine = engine
        self.anatomy = engine.anatomy
        self.branching = [method for method in methods if isinstance(method, Branching)]
        self.combining = next((method for method in methods if isinstance(method, Combining)), None)
        self.batched_cfg = pipeline_row(pipe).batched_cfg
        self.read = CallReader(pipe, engine.anatomy)
        self.memories: dict[int, _Memory] = {}  # by id of the method
        self.schedule: Tensor | None = None  # each run of a pipeline makes one
        self.ours = True  # whether the call under way is one of `pipe`
        self.call: Call
        self.active: list[Branching] = []
        self.computed: list[Branching] = []
        self.conditional: _Conditional | None = None
        self.unanswered = False  # a conditional call still waits for the unconditional one

    # not to be traced where the transformer is compiled inside the `with`
    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.engine.forget()
        self.ours = calling_pipeline() in (self.pipe, None)
        if not self.ours:
            return
        if self.pipe.transformer is not self.anatomy.model or self.anatomy.model._compiled_call_impl is not None:
            raise ModelError("the transformer was compiled or exchanged inside guidance: leave the `with` before that")
        if kwargs.get("skip_layers") is not None:
            raise ModelError("skip_guidance_layers cannot be combined with dgkit's guidance: leave it out, or use slg")
        if self.schedule is not self.pipe.scheduler.timesteps:
            self.schedule = self.pipe.scheduler.timesteps
            self.memories = {}
        self.call = call = self.read(args, kwargs)
        with_cfg = UNCOND in call.labels
        if with_cfg:
            self.unanswered = False
        self.active = []
        if COND in call.labels:
            self.active = [m for m in self.branching if m.active(call) and m.weight(call, with_cfg) != 0]
        self.computed = [method for method in self.active if self._due(method)]
        self.engine.begin([method.perturbation(call) for method in self.computed], call)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.ours:
            return None
        branches = self.engine.finish(args, kwargs, reused=len(self.active) - len(self.computed))
        prediction = _prediction(output)
        channels = self.anatomy.predicted_channels or prediction.shape[1]
        whole = upcast(prediction)
        values, cond = whole[:, :channels], self.call.rows(COND)
        if cond:
            added = self._added(values[cond], [upcast(_prediction(branch))[:, :channels] for branch in branches])
            self.conditional = _Conditional(values[cond], added, prediction)
        assert self.conditional is not None, "the conditional call comes first"
        c, added = self.conditional.c, self.conditional.added
        if self.combining is None:
            if added is None:
                return None
            # w (c - c_branch) on both halves: CFG, being affine with weights that sum to 1, passes it on unchanged
            guided = values + _repeated(added, len(values))
        else:
            combined = self._combined(self.combining, c, values[self.call.rows(UNCOND)])
            # the same in both halves, which CFG's u + s (c - u) then leaves as it is
            guided = _repeated(combined if added is None else combined + added, len(values))
        result = torch.cat([guided, whole[:, channels:]], 1).to(prediction.dtype)
        if not cond and self.combining is not None:
            self.conditional.output.copy_(result)  # the pipeline has not used it yet
        if cond:
            self.conditional.output = result
        return _with_prediction(output, result)

    def _due(self, method: Branching) -> bool:
        memory = self._memory(method)
        memory.age += 1
        return memory.direction is None or memory.age >= memory.lasts

    def _added(self, c: Tensor, branches: list[Tensor]) -> Tensor | None:
        """The sum of w (c - c_branch), None if no method with a branch is active."""
        for method, branch in zip(self.computed, branches, strict=True):
            self._remember(method, c - branch)
        added: Tensor | None = None
        for method in self.active:
            direction = self._memory(method).direction
            assert direction is not None
            part = method.weight(self.call, UNCOND in self.call.labels) * direction
            added = part if added is None else added + part
        return added

    def _remember(self, method: Branching, direction: Tensor) -> None:
        memory, reuse = self._memory(method), method.reuse
        if reuse is None:
            memory.lasts = 1
        elif reuse.cosine is None:
            memory.lasts = reuse.every
        elif memory.direction is not None:
            cosine = F.cosine_similarity(direction.flatten(1), memory.direction.flatten(1)).min()
            memory.lasts = min(memory.lasts + 1, reuse.every) if cosine >= reuse.cosine else 1
        memory.direction, memory.age = direction, 0

    def _combined(self, method: Combining, c: Tensor, u: Tensor) -> Tensor:
        if len(u):
            return method.combine(c, u, self.call, self._memory(method).own) if method.active(self.call) else c
        if self.batched_cfg or self.unanswered:
            raise self.cfg_is_off()
        self.unanswered = True
        return c

    def cfg_is_off(self) -> DgkitError:
        """The error where a method takes the place of CFG and no unconditional call comes."""
        assert self.combining is not None
        cfg = "guidance_scale" if self.batched_cfg else "true_cfg_scale"
        return DgkitError(
            f"{self.combining.name} takes the place of CFG, which is off: call the pipeline with {cfg} above 1"
        )

    def _memory(self, method: Method) -> _Memory:
        return self.memories.setdefault(id(method), _Memory())


def _repeated(values: Tensor, count: int) -> Tensor:
    """`values` again and again along the batch, up to `count` rows."""
    return torch.cat([values] * (count // len(values)))


def upcast(prediction: Tensor) -> Tensor:
    """At least float32: differences of predictions are small."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _prediction(output: Any) -> Tensor:
    """The prediction in a transformer's output, which is a tuple or a dataclass with `sample`."""
    return output[0]


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)
