"""Cost of `dgkit.record` on the CPU: time over the plain forward, memory over keeping full tensors by hand.

All blocks and gates of SD3.5-Large and Flux, at the reduced width of `benchmarks.branches`. "by hand" is what a script
without dgkit does: hooks that keep every block's image tokens, without computing anything of them yet. MB is what the
record holds afterwards; the last rows record a very small model for 10 and for 1,000 prompts.

    python -m benchmarks.record
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import dgkit
from benchmarks.branches import REDUCED
from benchmarks.models import Size, Subject, subject
from benchmarks.runs import Run, interleaved, paired_ratio, plain, rounds, spread
from benchmarks.table import show
from dgkit.anatomy import Block, dissect

ALLOWED = 1.08  # record over plain forward
SIZES = {name: REDUCED[name] for name in ("sd3.5-large", "flux-dev")}
SMALL = Size(heads=1, head_dim=32, side=2, text=0)  # of DiT-XL/2


def recorded(built: Subject) -> Run:
    """The conditional call inside `record`."""

    @contextmanager
    def run() -> Iterator[Callable[[], Any]]:
        with dgkit.record(built.model):
            yield lambda: built.model(**built.cond)

    return run


def kept_by_hand(built: Subject) -> Run:
    """The conditional call with hooks that keep every block's image tokens."""

    @contextmanager
    def run() -> Iterator[Callable[[], Any]]:
        with _keeping(built):
            yield lambda: built.model(**built.cond)

    return run


@contextmanager
def _keeping(built: Subject) -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def keep(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(block.image(output))

        return hook

    with ExitStack() as stack:
        for block in dissect(built.model).blocks:
            stack.callback(block.module.register_forward_hook(keep(block)).remove)
        yield kept


def live_megabytes() -> float:
    """Memory of all tensors that are alive in this process."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)}
    return sum(storages.values()) / 1e6


def _is_tensor(value: Any) -> bool:
    # isinstance would wake up lazy objects; subclasses such as the fake tensors of torch.compile hold no memory
    return type(value) in (Tensor, nn.Parameter)


@torch.no_grad()
def held(built: Subject, context: Any, calls: int) -> float:
    """MB that is alive after `calls` calls inside `context` and was not before."""
    before = live_megabytes()
    with context:
        for _ in range(calls):
            built.model(**built.cond)
        return live_megabytes() - before


def measure_time(sizes: dict[str, Size], count: int) -> pd.DataFrame:
    """Per model: `record` and keeping by hand, ms, ratio to plain, MB held after one pass; the verdict on `record`."""
    rows = []
    for name, size in sizes.items():
        built = subject(name, size)
        runs = {"plain": plain(built), "record": recorded(built), "keep by hand": kept_by_hand(built)}
        times = interleaved(runs, count)
        for run, context in (("record", dgkit.record(built.model)), ("keep by hand", _keeping(built))):
            ratio = paired_ratio(times[run], times["plain"])
            rows.append(
                {
                    "model": name,
                    "run": run,
                    "over": "plain",
                    "ms": 1000 * median(times[run]),
                    "ratio": ratio,
                    "spread %": spread(times[run], times["plain"]),
                    "expected": ALLOWED if run == "record" else None,
                    "holds": ratio <= ALLOWED if run == "record" else None,
                    "MB": held(built, context, 1),
                }
            )
    return pd.DataFrame(rows)


def measure_memory(prompts: tuple[int, int] = (10, 1000)) -> pd.DataFrame:
    """MB held after few and after many prompts, for `record` (which has to stay constant) and by hand."""
    built = subject("dit-xl-2", SMALL)
    rows = []
    for run, context in (("record", lambda: dgkit.record(built.model)), ("keep by hand", lambda: _keeping(built))):
        amounts = [held(built, context(), count) for count in prompts]
        for count, amount in zip(prompts, amounts, strict=True):
            holds = amount == amounts[0] if run == "record" and count == max(prompts) else None
            rows.append({"model": "very small", "run": f"{run}, {count} prompts", "MB": amount, "holds": holds})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    show(
        pd.concat([measure_time(SIZES, rounds(arguments, __doc__)), measure_memory()]),
        f"record against the plain forward (random weights, reduced width, float32, {torch.get_num_threads()} threads)"
        f"; holds: at most {ALLOWED} of plain, and the same memory for 1,000 prompts as for 10",
    )


if __name__ == "__main__":
    main()
