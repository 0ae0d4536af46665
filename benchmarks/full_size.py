"""Time and memory of guidance at the real sizes, on one GPU with 80 GB. Random weights: never for results about images.

The transformers of SD3-Medium, SD3.5-Large, Flux-dev (1024 x 1024) and DiT-XL/2 (256 x 256) from their public configs,
built on the GPU in bfloat16, for one image: the plain pass, CFG, DG and CFG + DG with every sharing, and `record`; then
all but `record` (whose gates are inside the blocks) with each block compiled. Needs no weights and no network. What the
time budget does not allow is named in the JSON, which is written anew after each model.

    python -m benchmarks.full_size --out full_size.json --commit $(git rev-parse HEAD)
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import ARCHITECTURES, Size, Subject, subject
from benchmarks.record import recorded
from benchmarks.runs import Run, formula, guided_runs, paired_ratio, plain, spread
from benchmarks.table import show
from dgkit.anatomy import dissect

TITLE = "random weights: time and memory only"
TOY = {
    "sd3": Size(heads=1, head_dim=32, side=4, text=2, embedding=16),
    "sd3.5-large": Size(heads=1, head_dim=32, side=4, text=2, embedding=16),
    "flux-dev": Size(heads=1, head_dim=32, side=4, text=2, embedding=16),
    "dit-xl-2": Size(heads=1, head_dim=32, side=4, text=0),
}
# the claims rest on the first two; shares of the time that is left are split by these weights
WEIGHTS = {"flux-dev": 4, "sd3.5-large": 3, "sd3": 2, "dit-xl-2": 1}
LEAST_SECONDS = {False: 20, True: 60}  # with less left, no model is started (eager, compiled)


@dataclass
class Device:
    """Where it runs, and how time and memory are taken there."""

    name: str
    dtype: torch.dtype

    @property
    def cuda(self) -> bool:
        return self.name != "cpu"

    def milliseconds(self, step: Callable[[], Any]) -> float:
        """Between two events of the GPU, launching included; on the CPU by the wall clock."""
        if not self.cuda:
            began = time.perf_counter()
            step()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def peak_gigabytes(self, step: Callable[[], Any]) -> float | None:
        """Most memory allocated at once during `step`, weights included; not known on the CPU."""
        if not self.cuda:
            step()
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9

    def matmul_tflops(self, size: int) -> float:
        """Median of 20 products of two random (size, size) matrices."""
        a, b = (torch.randn(size, size, device=self.name, dtype=self.dtype) for _ in range(2))
        times = [self.milliseconds(lambda: a @ b) for _ in range(25)][5:]
        return 2 * size**3 / median(times) / 1e9


@dataclass
class Report:
    """The JSON: everything measured so far."""

    path: Path
    facts: dict[str, Any]
    started: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def write(self, complete: bool = False) -> None:
        """Replace the file in one step: a process that is killed leaves the last whole one."""
        content = {
            "title": TITLE,
            **self.facts,
            "seconds_used": round(time.monotonic() - self.started, 1),
            "complete": complete,
            "skipped": self.skipped,
            "stages": self.stages,
            "rows": self.rows,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def table(self) -> pd.DataFrame:
        """The rows as printed."""
        return pd.DataFrame(self.rows).assign(compiled=lambda rows: rows["compiled"].map({True: "yes", False: "no"}))


@dataclass
class Times:
    """What one model's runs took, in rounds A B C, A B C, ..."""

    milliseconds: dict[str, list[float]]
    peaks: dict[str, float | None]
    flops: dict[str, int]
    warmup_seconds: float


def measure(
    built: Subject, compiled: bool, device: Device, rounds: int, share_ends: float, ends: float
) -> Times | None:
    """Time all runs of one model; rounds stop at `share_ends`, anything at `ends`; None without one whole round."""
    runs: dict[str, Run] = {"plain": plain(built), "CFG": plain(built, "CFG"), **guided_runs(built)}
    if not compiled:
        runs["record"] = recorded(built)
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float | None] = {}
    flops: dict[str, int] = {}
    start = time.monotonic()
    for name, run in runs.items():
        with run() as step, FlopCounterMode(display=False) as counter:
            step()
        flops[name] = counter.get_total_flops()
    if compiled:
        # one graph per kind of block and batch size, shared by the blocks of a kind
        torch._dynamo.config.recompile_limit = 64
        for block in dissect(built.model).blocks:
            block.module.compile(dynamic=False, backend="inductor" if device.cuda else "eager")
    for number in range(1 + rounds):  # the first warms up: compiles, and takes the peaks
        if number > 1 and time.monotonic() > share_ends:
            break
        for name, run in runs.items():
            if time.monotonic() > ends:
                break
            with run() as step:
                if number == 0:
                    peaks[name] = device.peak_gigabytes(step)
                else:
                    milliseconds[name].append(device.milliseconds(step))
        if number == 0:
            warmup_seconds = time.monotonic() - start
    whole = min(len(times) for times in milliseconds.values())
    if whole == 0:
        return None
    return Times({name: times[:whole] for name, times in milliseconds.items()}, peaks, flops, warmup_seconds)


def stage(
    name: str, compiled: bool, device: Device, sizes: dict[str, Size], rounds: int, share_ends: float, ends: float
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Build and measure one model: the stage's facts and its rows, None if there was no time for a whole round."""
    start = time.monotonic()
    built = subject(name, sizes.get(name), device.name, device.dtype)
    total, depth = len(dissect(built.model).blocks), built.block + 1
    output: Tensor = built.model(**built.cond)[0]
    build_seconds = time.monotonic() - start
    times = measure(built, compiled, device, rounds, share_ends, ends)
    if times is None:
        return None
    facts = {
        "model": name,
        "compiled": compiled,
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "blocks": total,
        "depth": depth,
        "call": {key: list(value.shape) for key, value in built.cond.items()},
        "output_finite": bool(output.isfinite().all()),
        "build_seconds": round(build_seconds, 1),
        "warmup_seconds": round(times.warmup_seconds, 1),
        "rounds": len(times.milliseconds["plain"]),
    }
    return facts, [_row(name, compiled, run, times, total, depth) for run in times.milliseconds]


def _row(name: str, compiled: bool, run: str, times: Times, total: int, depth: int) -> dict[str, Any]:
    """One run beside the one it is compared with: guidance with naive, the rest with the plain pass."""
    guidance, _, sharing = run.partition(" ")
    over = f"{guidance} none" if sharing else "plain"
    own, reference = times.milliseconds[run], times.milliseconds[over]
    ratio = paired_ratio(own, reference)
    expected = formula(guidance, total, depth) if sharing in ("replay", "fork") else None
    return {
        "model": name,
        "compiled": compiled,
        "run": run,
        "ms": median(own),
        "over": over,
        "ratio": ratio,
        "spread %": spread(own, reference),
        "expected": expected,
        "off %": 100 * (ratio / expected - 1) if expected else None,
        "peak GB": times.peaks[run],
        "TFLOP": times.flops[run] / 1e12,
        "TFLOP ratio": times.flops[run] / times.flops[over],
        "TFLOP/s": times.flops[run] / median(own) / 1e9,
    }


def measure_all(
    report: Report, device: Device, names: list[str], sizes: dict[str, Size], rounds: int, budget: float
) -> bool:
    """All models, first eager, then compiled, as far as the budget goes; whether nothing failed."""
    ends, succeeded = report.started + budget, True
    plan = [(name, compiled) for compiled in (False, True) for name in names]
    for number, (name, compiled) in enumerate(plan):
        skipped = {"model": name, "compiled": compiled}
        left = ends - time.monotonic()
        if left < LEAST_SECONDS[compiled]:
            report.skipped.append(skipped | {"reason": f"{max(left, 0):.0f} s of {budget:g} s were left"})
            report.write()
            continue
        # compiling takes as long as measuring
        weights = [WEIGHTS[other] * (1 + also) for other, also in plan[number:]]
        share_ends = time.monotonic() + left * weights[0] / sum(weights)
        try:
            with torch.no_grad():
                measured = stage(name, compiled, device, sizes, rounds, share_ends, ends)
        except Exception as error:  # the other models are worth having: told in the JSON and by the exit status
            traceback.print_exc()
            report.skipped.append(skipped | {"reason": f"failed: {error!r}"})
            succeeded = False
        else:
            if measured is None:
                report.skipped.append(skipped | {"reason": "the time was used up before one whole round"})
            else:
                facts, rows = measured
                report.stages.append(facts)
                for row in rows:
                    row["share of peak"] = row["TFLOP/s"] / report.facts["matmul_tflops"]
                report.rows.extend(rows)
        torch._dynamo.reset()
        gc.collect()
        if device.cuda:
            torch.cuda.empty_cache()
        report.write()
        print(f"{time.monotonic() - report.started:6.0f} s  {name}{', compiled' if compiled else ''}", file=sys.stderr)
    return succeeded


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("full_size.json"), help="the JSON (default: %(default)s)")
    parser.add_argument("--commit", help="git commit of the code, for the JSON")
    parser.add_argument("--budget", type=float, default=500, help="seconds in all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="at most so many (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="default: all")
    parser.add_argument("--toy", action="store_true", help="very small models on the CPU, to try the script")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        parser.error("torch finds no GPU: use --toy to try the script on the CPU")
    started = time.monotonic()
    device = Device("cpu", torch.float32) if options.toy else Device("cuda", torch.bfloat16)
    properties = torch.cuda.get_device_properties(0) if device.cuda else None
    facts = {
        "toy": options.toy,
        "device": properties.name if properties else "cpu",
        "device_gb": properties.total_memory / 1e9 if properties else None,
        "dtype": str(device.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.cuda else None,
        "diffusers": diffusers.__version__,
        "commit": options.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "budget_seconds": options.budget,
        "matmul_tflops": device.matmul_tflops(256 if options.toy else 8192),
    }
    report = Report(options.out, facts, started)
    sizes = TOY if options.toy else {name: ARCHITECTURES[name].size for name in options.models}
    succeeded = measure_all(report, device, options.models, sizes, options.rounds, options.budget)
    report.write(complete=succeeded and not report.skipped)
    if report.rows:
        show(report.table(), f"{facts['device']}, {facts['dtype']} ({TITLE})")
    for left_out in report.skipped:
        print(f"not measured: {left_out}")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
