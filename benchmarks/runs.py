"""What is timed: the transformer calls of one sampling step, plain and guided; and how: paired, in turns."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch

from benchmarks.models import Arguments, Subject
from dgkit.anatomy import COND, UNCOND, Call, dissect
from dgkit.disruption import make_edit
from dgkit.guidance import Engine, Perturbation

ROUNDS = 11
SHARINGS = ("replay", "fork", "none")

# what has to be set up before the clock starts, and the run itself
Run = Callable[[], AbstractContextManager[Callable[[], Any]]]


def formula(guidance: str, total: int, depth: int) -> float:
    """Block evaluations over those of full passes, for "DG" and "CFG+DG" with N = total blocks and m = depth."""
    passes = {"DG": 2, "CFG+DG": 3}[guidance]
    return (passes * total - depth) / (passes * total)


def guided(subject: Subject, guidance: str, sharing: str) -> Run:
    """One step of "DG" or "CFG+DG": the pipeline's calls with a branch off the conditional row."""

    @contextmanager
    def run() -> Iterator[Callable[[], None]]:
        anatomy = dissect(subject.model)
        engine = Engine(anatomy, sharing)
        branch = [Perturbation(edits={subject.block: make_edit(anatomy, subject.dims)})]
        calls: list[tuple[Arguments, tuple[str, ...]]] = [(subject.cond, (COND,))]
        if guidance == "CFG+DG" and subject.both is not None:
            calls = [(subject.both, (COND, UNCOND) if subject.cond_row == 0 else (UNCOND, COND))]
        elif guidance == "CFG+DG":
            calls.append((subject.uncond, (UNCOND,)))

        def begin(arguments: Arguments, labels: tuple[str, ...]) -> None:
            engine.begin(branch if COND in labels else [], Call(anatomy, arguments, labels=labels))

        def step() -> None:
            for arguments, labels in calls:
                begin(arguments, labels)
                subject.model(**arguments)
                engine.finish((), arguments)

        with engine.attached():
            begin(*calls[0])  # attaches the engine's hooks, once for all steps of a sampling run
            yield step

    return run


def plain(subject: Subject, guidance: str = "") -> Run:
    """One step without dgkit: the conditional call, or with "CFG" both."""

    @contextmanager
    def run() -> Iterator[Callable[[], None]]:
        calls = [subject.cond]
        if guidance == "CFG":
            calls = [subject.both] if subject.both is not None else [subject.cond, subject.uncond]

        def step() -> None:
            for call in calls:
                subject.model(**call)

        yield step

    return run


def guided_runs(subject: Subject) -> dict[str, Run]:
    """Both guidances with every sharing; "none" is naive."""
    return {f"{g} {sharing}": guided(subject, g, sharing) for g in ("DG", "CFG+DG") for sharing in SHARINGS}


def seconds(run: Run) -> float:
    """One run by the wall clock."""
    with run() as step:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def interleaved(runs: Mapping[str, Run], count: int) -> dict[str, list[float]]:
    """Seconds of each run in `count` rounds A B C, A B C, ..., so that drift of the machine meets all alike.

    One more round comes first, to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for number in range(1 + count):
            for name, run in runs.items():
                taken = seconds(run)
                if number > 0:
                    times[name].append(taken)
    return times


def paired_ratio(times: list[float], reference: list[float]) -> float:
    """Median over rounds of the ratio of the two runs of one round."""
    return median(a / b for a, b in zip(times, reference, strict=True))


def spread(times: list[float], reference: list[float]) -> float:
    """Half the interquartile range of those ratios, in percent of their median: how noisy the machine was."""
    ratios = torch.tensor([a / b for a, b in zip(times, reference, strict=True)])
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return 50 * (high - low) / middle


def rounds(arguments: list[str] | None, doc: str | None) -> int:
    """The only option of a script whose docstring is `doc`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often every way runs (default: %(default)s)")
    return int(parser.parse_args(arguments).rounds)
