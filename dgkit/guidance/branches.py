"""The branch engine: passes that differ from the ordinary one only after some block share all blocks before it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgkit.anatomy import DEGRADED, Anatomy, Block, dissect
from dgkit.anatomy.transformers import consecutive, named
from dgkit.errors import DgkitError, ModelError
from dgkit.hooks import Pass, degraded_pass
from dgkit.taps import compiled, replaced, tap, tap_before

SHARING = ("replay", "fork", "none", "auto")

# attention(attend, image, query, key, value, **options): `attend` is scaled_dot_product_attention, `image` the slice of
# the image tokens among the queries and keys
Attention = Callable[..., Tensor]


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


@dataclass
class _Call:
    """The transformer call under way: what branches off it, for which of its rows, and what they need of it."""

    perturbations: Sequence[Perturbation]
    labels: tuple[str, ...]
    timesteps: list[float]
    rows: list[int]
    sharing: str
    kept: dict[int, Any] = field(default_factory=dict)  # outputs of blocks
    forked: list[int] = field(default_factory=list)  # perturbations that have joined the batch, in that order
    last: Any = None  # their rows of the last block's output

    @property
    def batch(self) -> int:
        return len(self.labels)

    @cached_property
    def index(self) -> slice | list[int]:
        return consecutive(self.rows)


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
        "auto": "replay" or "fork", whichever is faster at the first call of its shape (`chosen` says which).
    """

    def __init__(self, anatomy: Anatomy, sharing: str = "replay") -> None:
        if sharing not in SHARING:
            raise DgkitError(f"sharing={sharing!r} is not allowed: use one of {', '.join(SHARING)}")
        _refuse_caches(anatomy.model)
        self.anatomy = anatomy
        self.sharing = sharing
        self.chosen: dict[tuple[int, ...], str] = {}  # by shape of the latents
        self.cost = Cost()
        self._call: _Call | None = None
        self._running: tuple[Perturbation, int] | None = None  # the branch's pass under way, and its first live block
        self._before_skip: Any = None
        self._taps: dict[tuple[str, int], Callable[[], None]] = {}
        self._quiet = False

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

    def begin(
        self,
        perturbations: Sequence[Perturbation],
        rows: list[int],
        labels: tuple[str, ...],
        timesteps: list[float],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Prepare for the transformer's call with `args` and `kwargs`, whose `rows` the perturbations are to repeat.

        `labels` and `timesteps`, one per row of the batch, are for the records.

        Raises:
            DgkitError: a perturbation that "fork" cannot run, or that skips the first block of a stack.
            ModelError: a transformer with a cache, or with gradients by checkpointing.
        """
        self.forget()
        _refuse_caches(self.anatomy.model)
        if torch.is_grad_enabled() and getattr(self.anatomy.model, "gradient_checkpointing", False):
            raise ModelError(
                "gradient checkpointing runs blocks again in the backward pass, where they are not guided: use "
                "`torch.no_grad()`, or call `transformer.disable_gradient_checkpointing()`"
            )
        call = _Call(perturbations, labels, timesteps, rows, self.sharing)
        for p in perturbations:
            self._check(p)
        if self.sharing == "auto":
            call.sharing = self._measured(call, args, kwargs)
        self._call = call
        self._place_taps(call)

    def finish(self, args: tuple[Any, ...], kwargs: dict[str, Any], reused: int = 0) -> list[Any]:
        """The branches' outputs for the call just made, in order; `reused` counts branches a caller did not repeat."""
        call = self._call
        assert call is not None, "begin comes first"
        total, rows = len(self.anatomy.blocks), len(call.rows)
        try:
            outputs = self._branch_outputs(call, args, kwargs)
        finally:
            self.forget()
        self.cost.add(total * call.batch, total * call.batch + reused * total * rows)
        for p in call.perturbations:
            blocks = total if p.model is None else len(dissect(p.model).blocks)
            naive = blocks - len(p.skips)
            self.cost.add((naive if call.sharing == "none" else naive - p.shared) * rows, naive * rows)
        return outputs

    def _branch_outputs(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if not call.perturbations:
            return []
        args, kwargs = self.anatomy.select_rows(args, kwargs, torch.tensor(call.rows), call.batch)
        return [self._branch_output(call, number, args, kwargs) for number in range(len(call.perturbations))]

    def _branch_output(self, call: _Call, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        p = call.perturbations[number]
        if p.model is not None:
            return p.model(*args, **kwargs)
        total = len(self.anatomy.blocks)
        # with "fork" only what follows the blocks is left to do
        first_live = {"replay": p.shared, "fork": total, "none": 0}[call.sharing]
        edited = p.shared - 1 if call.sharing != "fork" else total - 1
        rows = [call.timesteps[row] for row in call.rows]
        self._announce(Pass((DEGRADED,) * len(rows), rows, edited))
        self._running = (p, first_live)
        try:
            with ExitStack() as stack:
                outputs = self._known_outputs(call, number, first_live)
                for block in self.anatomy.blocks[:first_live]:
                    stack.enter_context(replaced(block.module, _returning(outputs[block.stack.path])))
                for index in sorted(p.skips):
                    stack.enter_context(replaced(self.anatomy.blocks[index].module, lambda *a, **k: self._before_skip))
                stack.enter_context(_offloaded_groups_loaded(self.anatomy.blocks, {*range(first_live), *p.skips}))
                for index, attention in p.attention.items():
                    stack.enter_context(_attention_replaced(self.anatomy.blocks[index], attention))
                return self.anatomy.model.forward(*args, **kwargs)
        finally:
            self._running = None
            self._announce(None)

    def _known_outputs(self, call: _Call, number: int, first_live: int) -> dict[str, Any]:
        """What blocks before `first_live` return in the branch's pass, by stack; only a stack's last one matters."""
        if not first_live:
            return {}
        outputs: dict[str, Any] = {}
        for index in self._kept_blocks(first_live):
            block = self.anatomy.blocks[index]
            if call.sharing == "fork" and index == first_live - 1:
                start = call.forked.index(number) * len(call.rows)
                own = slice(start, start + len(call.rows))
                output = _each_tensor(call.last, itemgetter(own))
            else:
                output = _each_tensor(call.kept[index], itemgetter(call.index))  # after a fork the own rows come first
                edit = call.perturbations[number].edits.get(index)
                if edit and call.sharing == "replay":
                    output = block.with_image(output, edit(block.image(output)))
            outputs[block.stack.path] = output
        return outputs

    def _kept_blocks(self, first_live: int) -> list[int]:
        """The last shared block, and the last block of each stack before its own (whose output type may differ)."""
        own = self.anatomy.blocks[first_live - 1].stack
        last_of_stack = {b.stack.path: b.index for b in self.anatomy.blocks[:first_live] if b.stack is not own}
        return [*last_of_stack.values(), first_live - 1]

    def forget(self) -> None:
        """Drop the call under way, of which an exception may have left something."""
        self._call = None
        self._before_skip = None
        self._announce(None)

    def _announce(self, current: Pass | None) -> None:
        degraded_pass.set(_UNSEEN if self._quiet else current)

    def _check(self, p: Perturbation) -> None:
        blocks = self.anatomy.blocks
        for index in p.skips:
            if index == 0 or blocks[index].stack is not blocks[index - 1].stack:
                raise DgkitError(f"block {index} cannot be skipped: it is the first of its stack")
        if self.sharing == "fork" and not self._forkable(p):
            raise DgkitError(
                'sharing="fork" is only for branches that edit block outputs, and where the batch may grow between '
                'blocks: use "replay" or "none"'
            )

    def _forkable(self, p: Perturbation) -> bool:
        if not p.edits or p.skips or p.attention or p.model:
            return False
        return all(block.stack.fork for block in self.anatomy.blocks[p.shared - 1 :])

    # ---- taps: attached when first needed, taken off together; each looks up what the call under way wants of it

    def _place_taps(self, call: _Call) -> None:
        for p in call.perturbations:
            if p.model is not None:
                continue
            if call.sharing == "fork":
                for block in self.anatomy.blocks[p.shared - 1 :]:
                    self._tap("fork", block.index)
                for block in self.anatomy.blocks[p.shared :]:
                    self._tap("grow", block.index)
                for index in self._kept_blocks(len(self.anatomy.blocks))[:-1]:
                    self._tap("keep", index)
            if call.sharing == "replay" and p.shared:
                for index in self._kept_blocks(p.shared):
                    self._tap("keep", index)
            for index in p.edits:
                self._tap("edit", index)
            for index in p.skips:
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
            if self._call is not None and self._running is None:
                self._call.kept[block.index] = output

        return after

    def _edit(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if self._running is None:
                return None
            p, first_live = self._running
            edit = p.edits.get(block.index)
            if edit is None or block.index < first_live:
                return None
            return block.with_image(output, edit(block.image(output)))

        return after

    def _remember(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._running is not None:
                self._before_skip = output

        return after

    def _grow(self, block: Block) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            call = self._call
            if call is None or self._running is not None or not call.forked:
                return args, kwargs
            return self.anatomy.grow(block, args, kwargs, torch.tensor(call.rows * len(call.forked)), call.batch)

        return before

    def _fork(self, block: Block) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            call = self._call
            if call is None or self._running is not None or call.sharing != "fork":
                return None
            count = len(call.rows)
            for number, p in enumerate(call.perturbations):
                if p.shared - 1 == block.index:
                    call.forked.append(number)
                    output = _each_tensor(output, lambda t: torch.cat([t, t[call.index]]))
                if number in call.forked and block.index in p.edits:
                    start = call.batch + call.forked.index(number) * count
                    image = block.image(output).clone()
                    image[start : start + count] = p.edits[block.index](image[start : start + count])
                    output = block.with_image(output, image)
            joined = len(call.forked) * count
            if block.index < len(self.anatomy.blocks) - 1:
                times = call.timesteps + [call.timesteps[row] for row in call.rows] * len(call.forked)
                self._announce(Pass(call.labels + (DEGRADED,) * joined, times))
                return output
            self._announce(None)
            call.last = _each_tensor(output, lambda t: t[call.batch :])
            return _each_tensor(output, lambda t: t[: call.batch])

        return after

    # ---- auto

    def _measured(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The faster of "replay" and "fork", timed once per shape of the latents: best of three guided calls each."""
        if not all(self._forkable(p) for p in call.perturbations):
            return "replay"
        latents = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        shape = (*latents.shape, len(call.rows), *(p.shared for p in call.perturbations))
        if shape not in self.chosen and call.perturbations:
            seconds = {way: min(self._seconds(call, way, args, kwargs) for _ in range(3)) for way in ("replay", "fork")}
            # "replay" is the exact one, so "fork" has to be clearly faster
            self.chosen[shape] = "fork" if seconds["fork"] < 0.95 * seconds["replay"] else "replay"
        return self.chosen.get(shape, "replay")

    def _seconds(self, call: _Call, sharing: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        trial = _Call(call.perturbations, call.labels, call.timesteps, call.rows, sharing)
        everything = torch.arange(call.batch)
        self._quiet, self._call = True, trial
        self._announce(None)
        self._place_taps(trial)
        try:
            _synchronize()
            start = time.perf_counter()
            copied = self.anatomy.select_rows(args, kwargs, everything, call.batch)
            self.anatomy.model.forward(*copied[0], **copied[1])
            self._branch_outputs(trial, args, kwargs)
            _synchronize()
            return time.perf_counter() - start
        finally:
            self._quiet = False
            self.forget()


_UNSEEN = Pass((), [], edited_block=1 << 30)  # a pass that no record takes in


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _each_tensor(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of each tensor in a block's output, which is one or a tuple of tensors and None."""
    if isinstance(output, tuple):
        return tuple(_each_tensor(part, function) for part in output)
    return function(output) if isinstance(output, Tensor) else output


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# ----------------------------------------------------------------------------------- what diffusers does to the blocks


def _diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry.hooks if registry else {}


def _refuse_caches(model: nn.Module) -> None:
    """diffusers' caches (`enable_cache`) keep what blocks put out from call to call, and would mix up the branches."""
    if any(hook._is_stateful for module in model.modules() for hook in _diffusers_hooks(module).values()):
        raise ModelError(
            "the transformer has one of diffusers' caches, which take the passes of guidance for sampling steps: call "
            "`transformer.disable_cache()`, and use `Reuse` to skip passes"
        )


@contextmanager
def _offloaded_groups_loaded(blocks: Sequence[Block], standing_in: set[int]) -> Iterator[None]:
    """Load the groups of group offloading that would not be: the first block of a group loads all, but may stand in."""
    members: dict[Any, set[int]] = {}
    for block in blocks:
        if hook := _diffusers_hooks(block.module).get("group_offloading"):
            members.setdefault(hook.group, set()).add(block.index)
    split = [group for group, indices in members.items() if indices & standing_in and indices - standing_in]
    try:
        for group in split:
            group.onload_()
        yield
    finally:
        for group in split:
            group.offload_()


# ---------------------------------------------------------------------------------------------------- inside attention


class _AttentionMode(TorchFunctionMode):
    """Sends each self-attention over all image tokens (text beside them or not) to a replacement."""

    def __init__(self, attention: Attention, image_tokens: int, text_first: bool) -> None:
        super().__init__()
        self.attention = attention
        self.image_tokens = image_tokens
        self.text_first = text_first
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key = options["query"], options["key"]
        tokens, extra = query.shape[2], query.shape[2] - self.image_tokens
        if key.shape[2] != tokens or extra < 0:  # cross-attention
            return func(**options)
        self.seen += 1
        image = slice(extra, tokens) if self.text_first else slice(0, self.image_tokens)
        return self.attention(func, image, **options)


@contextmanager
def _attention_replaced(block: Block, attention: Attention) -> Iterator[None]:
    module = block.module
    if compiled(module):
        raise ModelError(
            "this guidance changes the attention inside blocks, which compiled blocks hide: do not compile"
        )
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # where the image shares its tensor with text, its size is read from the transformer's call
        in_text = block.layout.tokens if block.stack.text else None
        tokens = in_text or named(module, args, kwargs)["hidden_states"].shape[1]
        mode = _AttentionMode(attention, tokens, bool(block.stack.text_first))
        with mode:
            output = original(*args, **kwargs)
        if not mode.seen:
            raise ModelError("no attention was seen inside the block: use the native attention backend")
        return output

    with replaced(module, forward):
        yield
