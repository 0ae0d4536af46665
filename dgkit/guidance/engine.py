"""The branch engine: passes that differ from the ordinary one only after some block share all blocks before it."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy import COND, DEGRADED, Anatomy, Block, Call, Pass, degraded_pass, dissect
from dgkit.anatomy.arguments import consecutive, map_arguments, map_tensors
from dgkit.anatomy.batch_dependence import refuse_parallel, refuse_scales_of_batch
from dgkit.anatomy.diffusers_hooks import offloaded_groups_loaded, refuse_caches
from dgkit.checks import one_of
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.attention import Attention, attention_replaced
from dgkit.taps import replaced, tap, tap_before

SHARING = ("replay", "fork", "none")


@dataclass(frozen=True)
class Perturbation:
    """What a branch does differently.

    Attributes:
        edits: changes of the image tokens (B, T, C) that blocks put out, by block.
        skips: blocks that are left out: they put out what the block before them did.
        attention: replacements of the self-attention inside blocks, by block.
        model: another transformer that makes the whole prediction instead.
    """

    edits: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    skips: frozenset[int] = frozenset()
    attention: Mapping[int, Attention] = field(default_factory=dict)
    model: nn.Module | None = None

    @cached_property
    def shared(self) -> int:
        """How many blocks compute the same as in the ordinary pass; for DG the paper's m."""
        if self.model is not None:
            return 0
        return min([*(block + 1 for block in self.edits), *self.skips, *self.attention])


@dataclass
class Cost:
    """Work done so far, in block evaluations: one block applied to the tokens of one image.

    Attributes:
        block_evaluations: what was computed.
        naive_block_evaluations: what as many full passes would have computed.
    """

    block_evaluations: int = 0
    naive_block_evaluations: int = 0

    @property
    def ratio(self) -> float:
        """Computed over naive; with depth m = block + 1: (2N - m) / 2N for DG, (3N - m) / 3N for CFG + DG."""
        return self.block_evaluations / self.naive_block_evaluations

    def add(self, computed: int, naive: int) -> None:
        """Count work."""
        self.block_evaluations += computed
        self.naive_block_evaluations += naive


class _UnderWay(threading.local):
    """The call under way in each thread.

    Attributes:
        call: the call; None between calls.
        branches: what is branched off it.
        rows: of the call, which the branches repeat.
        given: its arguments by name, lists and dicts as they were before it: some forwards empty them.
        kept: outputs of blocks.
        forked: numbers of the branches that have joined the batch, in that order.
        last: their rows of the last block's output.
        running: the branch whose pass is under way, and its first live block.
        before_skip: what the block before a skipped one put out.
    """

    call: Call | None = None
    branches: Sequence[Perturbation]
    rows: list[int]
    given: dict[str, Any]
    kept: dict[int, Any]
    forked: list[int]
    last: Any
    running: tuple[Perturbation, int] | None = None
    before_skip: Any


class Engine:
    """Runs branches off the passes of one transformer.

    For each call of the transformer: `begin`, the call itself, then `finish` for the branches' outputs.

    Sharing:
        "replay": the ordinary pass keeps one block output; in the branch's pass the blocks before return at once. Extra
            memory: that output (and one per earlier stack of blocks). For equal batch rows the result is bitwise that
            of "none".
        "fork": the branch's rows join the batch where it branches off, so that all later blocks run once on a larger
            batch; for branches that only edit block outputs. Faster where a batch does not fill the device.
        "none": full passes, the reference.
    """

    def __init__(self, anatomy: Anatomy, sharing: str = "replay") -> None:
        self.sharing = one_of("sharing", sharing, SHARING)
        refuse_caches(anatomy.model)
        self.anatomy = anatomy
        self.cost = Cost()
        self._taps: dict[tuple[str, int], Callable[[], None]] = {}
        self._lock = threading.Lock()  # of `cost` and `_taps`
        self._now = _UnderWay()
        self._rows_independent = False  # whether it was looked at in this run and found so

    def forget(self) -> None:
        """Drop the call under way, of which an exception may have left something."""
        vars(self._now).clear()
        degraded_pass.set(None)

    # ---- one call

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, calls can be branched off; afterwards nothing is left on the transformer."""
        with self.anatomy.follow():
            try:
                yield
            finally:
                for remove in self._taps.values():
                    remove()
                self._taps.clear()
                self.forget()

    def begin(self, branches: Sequence[Perturbation], call: Call, *, alone: bool = False) -> None:
        """Prepare for `call` of the transformer, whose conditional rows the branches are to repeat.

        With `alone` these rows are all that is left of what the pipeline asked for.

        Raises:
            DgkitError: a perturbation that "fork" cannot run, or that skips the first block of a stack.
            ModelError: a transformer with a cache, on several devices at once, with gradients by checkpointing, or with
                activations quantised by a scale of the whole batch where the branch has other rows.
        """
        self.forget()
        first = call.made == 0  # of a run; to look through all modules in every step would cost more than small blocks
        refuse_caches(self.anatomy.model, scan=first)
        refuse_parallel(self.anatomy.model, scan=first)
        other_rows = self.sharing == "fork" or len(call.rows(COND)) < call.batch
        self._rows_independent = self._rows_independent and not first
        if (alone or (branches and other_rows)) and not self._rows_independent:
            refuse_scales_of_batch(self.anatomy.model)
            self._rows_independent = True
        if torch.is_grad_enabled() and getattr(self.anatomy.model, "gradient_checkpointing", False):
            raise ModelError(
                "gradient checkpointing runs blocks again in the backward pass, where they are not guided: use "
                "`torch.no_grad()`, or call `transformer.disable_gradient_checkpointing()`"
            )
        for branch in branches:
            self._check(branch)
        self._now.call, self._now.branches, self._now.rows = call, branches, call.rows(COND)
        self._now.given = {name: map_tensors(name, value, (), _itself) for name, value in call.arguments.items()}
        self._now.kept, self._now.forked = {}, []
        with self._lock:
            self._place_taps()
        if alone:  # hooks on the blocks may know of the rows that were asked for
            degraded_pass.set(Pass(call.labels, call.timesteps))

    def finish(self, args: tuple[Any, ...], kwargs: dict[str, Any], reused: int = 0) -> list[Any]:
        """The branches' outputs for the call just made with (args, kwargs), in order.

        `reused` counts the predictions that something kept from other steps stands for.
        """
        call = self._now.call
        assert call is not None, "begin comes first"
        branches, count = self._now.branches, len(self._now.rows)
        outputs = []
        try:
            if branches:
                given = self._now.given
                args, kwargs = map_arguments(self.anatomy.model, args, kwargs, lambda name, value: given[name])
                args, kwargs = self.anatomy.select_rows(args, kwargs, self._now.rows, call.batch)
                outputs = [self._branch_output(number, args, kwargs) for number in range(len(branches))]
        finally:
            self.forget()
        total = len(self.anatomy.blocks)
        with self._lock:
            self.cost.add(total * call.batch, total * call.batch + reused * total * count)
            for branch in branches:
                blocks = total if branch.model is None else len(dissect(branch.model).blocks)
                naive = blocks - len(branch.skips)
                self.cost.add((naive if self.sharing == "none" else naive - branch.shared) * count, naive * count)
        return outputs

    def answered(self, count: int) -> None:
        """Count a call of `count` rows that something kept from other steps stands for."""
        with self._lock:
            self.cost.add(0, len(self.anatomy.blocks) * count)

    def _branch_output(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        branch, call = self._now.branches[number], self._now.call
        if branch.model is not None:
            return branch.model(*args, **kwargs)
        assert call is not None
        blocks, total = self.anatomy.blocks, len(self.anatomy.blocks)
        # with "fork" only what follows the blocks is left to do
        first_live = {"replay": branch.shared, "fork": total, "none": 0}[self.sharing]
        edited = total - 1 if self.sharing == "fork" else branch.shared - 1
        timesteps = [call.timesteps[row] for row in self._now.rows]
        degraded_pass.set(Pass((DEGRADED,) * len(timesteps), timesteps, edited))
        self._now.running = (branch, first_live)
        try:
            with ExitStack() as stack:
                outputs = self._known_outputs(number, first_live)
                for block in blocks[:first_live]:
                    stack.enter_context(replaced(block.module, _returning(outputs[block.index])))
                for index in sorted(branch.skips):
                    stack.enter_context(replaced(blocks[index].module, lambda *a, **k: self._now.before_skip))
                stack.enter_context(offloaded_groups_loaded(blocks, {*range(first_live), *branch.skips}))
                for index, attention in branch.attention.items():
                    stack.enter_context(attention_replaced(blocks[index], attention))
                return self.anatomy.run(*args, **kwargs)
        finally:
            self._now.running = None
            degraded_pass.set(None)

    def _known_outputs(self, number: int, first_live: int) -> list[Any]:
        """What each block before `first_live` returns in the branch's pass."""
        outputs: dict[int, Any] = {}
        for index in self._kept_blocks(first_live):
            block = self.anatomy.blocks[index]
            if self.sharing == "fork" and index == first_live - 1:
                start = self._now.forked.index(number) * len(self._now.rows)
                output = _each_tensor(self._now.last, itemgetter(slice(start, start + len(self._now.rows))))
            else:
                own = consecutive(self._now.rows)  # after a fork the call's own rows come first
                output = _each_tensor(self._now.kept[index], itemgetter(own))
                edit = self._now.branches[number].edits.get(index)
                if edit and self.sharing == "replay":
                    output = block.with_image(output, edit(block.image(output)))
            outputs[index] = output
        # of the others nothing is used but the type, which is the same in all blocks of a stack
        of_stack = {self.anatomy.blocks[index].stack.path: output for index, output in outputs.items()}
        return [outputs.get(b.index, of_stack[b.stack.path]) for b in self.anatomy.blocks[:first_live]]

    def _kept_blocks(self, first_live: int) -> list[int]:
        """The last shared block, the last of each stack before its own, and those whose output is used again later."""
        shared = self.anatomy.blocks[:first_live]
        last_of_stack = {block.stack.path: block.index for block in shared}
        return sorted({*last_of_stack.values(), *(block.index for block in shared if block.stack.skips)})

    def _check(self, branch: Perturbation) -> None:
        blocks = self.anatomy.blocks
        for index in branch.skips:
            if index == 0 or blocks[index].stack is not blocks[index - 1].stack:
                raise DgkitError(f"block {index} cannot be skipped: it is the first of its stack")
        if self.sharing != "fork":
            return
        only_edits = branch.edits and not (branch.skips or branch.attention or branch.model)
        if not only_edits or not all(block.stack.fork for block in blocks[branch.shared - 1 :]):
            raise DgkitError(
                'sharing="fork" is only for branches that edit block outputs, and where the batch may grow between '
                'blocks: use "replay" or "none"'
            )

    # ---- taps: attached when first needed, taken off together; each looks up what the call under way wants of it

    def _place_taps(self) -> None:
        total = len(self.anatomy.blocks)
        for branch in self._now.branches:
            if branch.model is not None:
                continue
            if self.sharing == "fork":
                for index in range(branch.shared - 1, total):
                    self._tap("fork", index)
                for index in range(branch.shared, total):
                    self._tap("grow", index)
                for index in self._kept_blocks(total)[:-1]:
                    self._tap("keep", index)
            if self.sharing == "replay":
                for index in self._kept_blocks(branch.shared):
                    self._tap("keep", index)
            for index in branch.edits:
                self._tap("edit", index)
            for index in branch.skips:
                self._tap("before skip", index - 1)

    def _tap(self, kind: str, index: int) -> None:
        if (kind, index) in self._taps:
            return
        block = self.anatomy.blocks[index]
        if kind == "grow":
            self._taps[kind, index] = tap_before(block.module, self._grow(block))
            return
        make = {"keep": self._keep, "edit": self._edit, "before skip": self._remember, "fork": self._fork}[kind]
        # edits come before any other hook, so that `record` sees what the later blocks see
        self._taps[kind, index] = tap(block.module, make(block), first=kind in ("edit", "fork"))

    def _keep(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._now.call is not None and self._now.running is None:
                self._now.kept[block.index] = output

        return after

    def _edit(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if self._now.running is None:
                return None
            branch, first_live = self._now.running
            edit = branch.edits.get(block.index)
            if edit is None or block.index < first_live:
                return None
            return block.with_image(output, edit(block.image(output)))

        return after

    def _remember(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._now.running is not None:
                self._now.before_skip = output

        return after

    def _grow(self, block: Block) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if self._now.call is None or self._now.running is not None or not self._now.forked:
                return args, kwargs
            return self.anatomy.grow(block, args, kwargs, self._now.rows * len(self._now.forked), self._now.call.batch)

        return before

    def _fork(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            call = self._now.call
            if call is None or self._now.running is not None:
                return None
            count = len(self._now.rows)
            for number, branch in enumerate(self._now.branches):
                if branch.shared - 1 == block.index:
                    self._now.forked.append(number)
                    output = _each_tensor(output, lambda t: torch.cat([t, t[consecutive(self._now.rows)]]))
                if number in self._now.forked and block.index in branch.edits:
                    start = call.batch + self._now.forked.index(number) * count
                    image = block.image(output).clone()
                    image[start : start + count] = branch.edits[block.index](image[start : start + count])
                    output = block.with_image(output, image)
            if block.index < len(self.anatomy.blocks) - 1:
                joined = [call.timesteps[row] for row in self._now.rows] * len(self._now.forked)
                degraded_pass.set(Pass(call.labels + (DEGRADED,) * len(joined), call.timesteps + joined))
                return output
            degraded_pass.set(None)
            self._now.last = _each_tensor(output, lambda t: t[call.batch :])
            return _each_tensor(output, lambda t: t[: call.batch])

        return after


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _each_tensor(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of each tensor in a block's output, which is one or a tuple of tensors and None."""
    if isinstance(output, tuple):
        return tuple(_each_tensor(part, function) for part in output)
    return function(output) if isinstance(output, Tensor) else output
