"""The branch engine: a second pass that differs from the first only after one block shares all before it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy import DEGRADED, Anatomy, select_rows
from dgkit.errors import DgkitError
from dgkit.hooks import Pass, degraded_pass

SHARING = ("replay", "none")


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


class Branch:
    """A degraded pass of one transformer: `edit` changes the image tokens that block `block` puts out.

    Sharing:
        "replay": the first pass keeps the output of `block`; in the degraded pass the blocks up to it return at once,
            `block` with the edited copy. Extra memory: that one output (and one per earlier stack of blocks). For the
            same batch rows the result is bitwise that of "none".
        "none": a full second pass, the reference.
    """

    def __init__(self, anatomy: Anatomy, block: int, edit: Callable[[Tensor], Tensor], sharing: str = "replay") -> None:
        if sharing not in SHARING:
            raise DgkitError(f"sharing={sharing!r} is not allowed: use one of {', '.join(SHARING)}")
        self.anatomy = anatomy
        self.block = anatomy.block(block)
        self.edit = edit
        self.sharing = sharing
        self.cost = Cost()
        self._kept: dict[int, Any] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the transformer's passes are ready for `degraded`; afterwards no hook is left."""
        with ExitStack() as stack:
            if self.sharing == "none":
                handle = self.block.module.register_forward_hook(self._edit_in_degraded_pass, prepend=True)
                stack.callback(handle.remove)
            else:
                for index in self._kept_blocks():
                    module = self.anatomy.blocks[index].module
                    stack.callback(module.register_forward_hook(self._keep(index)).remove)
            stack.callback(self._kept.clear)
            yield

    def degraded(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[int], timesteps: list[float]) -> Any:
        """The degraded output for `rows` of the transformer call (args, kwargs) that has just been made.

        Calls `transformer.forward`, past the transformer's own hooks; `timesteps` (one per row of the full batch) are
        for the records.
        """
        batch, picked = len(timesteps), torch.tensor(rows)
        args, kwargs = select_rows(args, kwargs, picked, batch)
        token = degraded_pass.set(Pass((DEGRADED,) * len(rows), [timesteps[r] for r in rows], self.block.index))
        try:
            with self._stand_ins(picked, batch):
                output = self.anatomy.model.forward(*args, **kwargs)
        finally:
            degraded_pass.reset(token)
            self._kept.clear()
        total = len(self.anatomy.blocks)
        self.cost.block_evaluations += (total if self.sharing == "none" else total - 1 - self.block.index) * len(rows)
        self.cost.naive_block_evaluations += total * len(rows)
        return output

    def count_pass(self, batch: int) -> None:
        """Count an ordinary pass of `batch` rows, whether a degraded one follows or not."""
        self.cost.block_evaluations += len(self.anatomy.blocks) * batch
        self.cost.naive_block_evaluations += len(self.anatomy.blocks) * batch

    def _kept_blocks(self) -> list[int]:
        """The edited block, and the last block of each stack before its own (whose output type may differ)."""
        earlier = [b for b in self.anatomy.blocks[: self.block.index] if b.stack is not self.block.stack]
        last_of_stack = {b.stack.path: b.index for b in earlier}
        return [*last_of_stack.values(), self.block.index]

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if degraded_pass.get() is None:
                self._kept[index] = output

        return hook

    def _edit_in_degraded_pass(self, module: nn.Module, args: Any, output: Any) -> Any:
        if degraded_pass.get() is not None:
            return self.block.with_image(output, self.edit(self.block.image(output)))
        return output

    @contextmanager
    def _stand_ins(self, rows: Tensor, batch: int) -> Iterator[None]:
        """Under "replay", let the blocks up to the edited one return what is already known."""
        if self.sharing == "none":
            yield
            return
        kept = {
            index: select_rows((output if isinstance(output, tuple) else (output,)), {}, rows, batch)[0]
            for index, output in self._kept.items()
        }
        edited = self.anatomy.blocks[self.block.index]
        outputs = {i: o if self.anatomy.blocks[i].stack.image is not None else o[0] for i, o in kept.items()}
        outputs[edited.index] = edited.with_image(outputs[edited.index], self.edit(edited.image(outputs[edited.index])))
        by_stack = {self.anatomy.blocks[i].stack.path: output for i, output in outputs.items()}
        with ExitStack() as stack:
            for block in self.anatomy.blocks[: edited.index + 1]:
                stack.enter_context(_replaced_forward(block.module, by_stack[block.stack.path]))
            yield


@contextmanager
def _replaced_forward(module: nn.Module, output: Any) -> Iterator[None]:
    """Let `module` return `output` at once; an instance's own `forward` (accelerate's offloading) comes back after."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
