"""What guidance does before and after each call of a transformer."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy import COND, TWO_CALLS, UNCOND, UNKNOWN, Call, CallReader, Runs
from dgkit.anatomy.arguments import named
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.engine import Engine, Perturbation
from dgkit.guidance.methods import Branching, Combining, Method
from dgkit.guidance.schedule import Every, Kept


def uncond_of(methods: Sequence[Method]) -> Every:
    """When u is computed, as at most one of the methods says."""
    said = {method.when.uncond for method in methods} - {Every()}
    if len(said) > 1:
        raise DgkitError(f"the schedules of {', '.join(m.name for m in methods)} differ in uncond: give it to one")
    return said.pop() if said else Every()


@dataclass
class _Memory:
    """What a method keeps from step to step of one run: its direction c - c_branch, and what is its own."""

    kept: Kept = field(default_factory=Kept)
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
    uncond: Kept = field(default_factory=Kept)  # c - u
    conditional: _Conditional | None = None
    unanswered: bool = False  # a conditional call still waits for the unconditional one

    def memory(self, method: Method) -> _Memory:
        return self.memories.setdefault(id(method), _Memory())


class _UnderWay(threading.local):
    """The call under way in each thread.

    Attributes:
        call: the call; None between calls.
        read: a call that was read before `before` begins.
        run: what is kept of its run.
        active: the methods with a branch that guide it, and those of them whose direction is computed in it, each with
            what its branch does differently.
        labels: of the rows that the pipeline asked for, of which `call` may have the conditional ones alone.
    """

    call: Call | None = None
    read: Call | None = None
    run: _Run
    active: list[Branching]
    computed: list[tuple[Branching, Perturbation | None]]
    labels: tuple[str, ...]


class Steps:
    """What happens before and after each call of the transformer."""

    def __init__(
        self,
        read: CallReader,
        engine: Engine,
        methods: Sequence[Method],
        uncond: Every,
        current: Callable[[], Any] | None,
    ) -> None:
        self.read = read
        self.engine = engine
        self.anatomy = engine.anatomy
        self.branching = [method for method in methods if isinstance(method, Branching)]
        self.combining = next((method for method in methods if isinstance(method, Combining)), None)
        self.uncond = uncond
        self.current = current  # the pipeline's transformer as it is now
        self.runs = Runs(_Run)
        self.now = _UnderWay()

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of an unconditional call that the schedule leaves out; None for all other calls."""
        now = self.now
        now.read = call = self.read(args, kwargs)
        if not call.ours or UNCOND not in call.labels:
            return None
        run = self.runs.of(call.loop)
        if run.conditional is None or _due(run.uncond, self.uncond, call):
            return None
        now.call, now.read, now.run, now.labels = None, None, run, call.labels
        run.unanswered = False
        self.engine.answered(call.batch)
        output = run.conditional.output
        rest = upcast(_prediction(output))[:, self._channels(_prediction(output)) :]
        u = self._filled(run.conditional.c)
        guided_values = self._guided(call, u, run.conditional)
        result = torch.cat([u if guided_values is None else guided_values, rest], 1)
        if self.combining is not None:
            _overwrite(output, result)
        return _with_prediction(output, result)

    # not to be traced where the transformer is compiled inside the `with`
    @torch.compiler.disable
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        now = self.now
        self.engine.forget()
        now.call = None
        call, now.read = now.read or self.read(args, kwargs), None
        if not call.ours:
            if call.loop is None:
                raise ModelError(
                    "the transformer was called outside its pipeline's `__call__`, which alone tells the rows of a "
                    "batch: for a sampling loop of your own, guide the transformer itself"
                )
            return None
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
        now.run, now.labels = self.runs.of(call.loop), call.labels
        with_cfg = UNCOND in call.labels
        if with_cfg:
            now.run.unanswered = False
        now.active = []
        if COND in call.labels:
            now.active = [m for m in self.branching if m.active(call) and m.weight(call, with_cfg) != 0]
        due = [m for m in now.active if _due(now.run.memory(m).kept, m.when.branch, call)]
        now.computed = [(method, method.perturbation(call)) for method in due]
        alone = with_cfg and COND in call.labels and not _due(now.run.uncond, self.uncond, call)
        if alone:
            args, kwargs = self.anatomy.select_rows(args, kwargs, call.rows(COND), call.batch)
            rows = (COND,) * len(call.rows(COND))
            call = replace(call, arguments=named(module, args, kwargs), labels=rows)
        now.call = call
        self.engine.begin([branch for _, branch in now.computed if branch is not None], call, alone=alone)
        return (args, kwargs) if alone else None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        now, call = self.now, self.now.call
        if call is None:
            return None
        now.call, run = None, now.run
        alone = len(now.labels) > call.batch
        branches = self.engine.finish(args, kwargs, reused=len(now.active) - len(now.computed) + alone)
        whole = upcast(_prediction(output))
        channels = self._channels(whole)
        values, rest, cond = whole[:, :channels], whole[:, channels:], call.rows(COND)
        previous, kept = run.conditional, run.uncond
        if cond:
            c = values[cond]
            of_branches = (upcast(_prediction(branch))[:, :channels] for branch in branches)
            for method, branch in now.computed:
                other = next(of_branches) if branch is not None else previous.c if previous is not None else None
                if other is not None:
                    run.memory(method).kept.take(method.when.branch, c - other)
            run.conditional = _Conditional(c, self._added(call), output)
        assert run.conditional is not None, "the conditional call comes first"
        if alone:
            u = self._filled(values)
            values, rest = (_in_order(now.labels, *pair) for pair in ((values, u), (rest, rest)))
        elif UNCOND in now.labels and self.uncond != Every():
            kept.take(self.uncond, run.conditional.c - values[call.rows(UNCOND)])
        guided_values = self._guided(call, values, run.conditional)
        if guided_values is None and not alone:
            return None
        result = torch.cat([values if guided_values is None else guided_values, rest], 1)
        if not cond and self.combining is not None:
            _overwrite(run.conditional.output, result)  # the pipeline has not used it yet
        guided_output = _with_prediction(output, result)
        if cond:
            run.conditional.output = guided_output
        return guided_output

    def _channels(self, prediction: Tensor) -> int:
        return self.anatomy.predicted_channels or prediction.shape[1]

    def _filled(self, c: Tensor) -> Tensor:
        """u where it was not computed: c less what stands for c - u."""
        direction = self.now.run.uncond.direction(self.uncond)
        return c if direction is None else c - direction

    def _added(self, call: Call) -> Tensor | None:
        """The sum of w (c - c_branch), None if there is none."""
        added: Tensor | None = None
        for method in self.now.active:
            direction = self.now.run.memory(method).kept.direction(method.when.branch)
            if direction is not None:
                part = method.weight(call, UNCOND in self.now.labels) * direction
                added = part if added is None else added + part
        return added

    def _guided(self, call: Call, values: Tensor, conditional: _Conditional) -> Tensor | None:
        """The guided prediction of all rows that the pipeline asked for, from their own; None: the same."""
        c, added = conditional.c, conditional.added
        if self.combining is None:
            # w (c - c_branch) on both halves: CFG, being affine with weights that sum to 1, passes it on unchanged
            return None if added is None else values + _repeated(added, len(values))
        u = values[[row for row, label in enumerate(self.now.labels) if label == UNCOND]]
        combined = self._combined(self.combining, call, c, u)
        # the same in both halves, which CFG's u + s (c - u) then leaves as it is
        return _repeated(combined if added is None else combined + added, len(values))

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


def _due(kept: Kept, every: Every, call: Call) -> bool:
    return kept.due(every, early=every.after > 0 and call.within(0.0, every.after))


def _in_order(labels: tuple[str, ...], c: Tensor, u: Tensor) -> Tensor:
    """The conditional and the unconditional rows in the order of a doubled batch."""
    return torch.cat([c, u] if labels[0] == COND else [u, c])


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
