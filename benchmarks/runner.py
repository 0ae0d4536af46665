"""Efficiency of the generation runner itself: two workers with a stand-in for the model that only sleeps.

Per-worker efficiency is the time that the workers slept over the time that they had, each from its first batch's start
to its last shard's end: what checking and writing shards, and Ray, cost. Loading is left out.

    python -m benchmarks.runner
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.table import show
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.run import run
from dgbook.paper_scale.generate.store import Image, Store

ALLOWED = 0.95
WORKERS, BLOCKS, BLOCK, SECONDS, SIDE = 2, 32, 8, 0.5, 256  # a batch takes a GPU at least as long


class Sleeper:
    """Images of the size that DiT-XL/2 makes, from nothing."""

    device = "none"

    def __init__(self, job: Job) -> None:
        self.identity: dict[str, Any] = {"sleeps": SECONDS}

    def __call__(self, conditions: Sequence[Any], seeds: Sequence[int]) -> Image:
        time.sleep(SECONDS)
        return np.zeros((len(seeds), SIDE, SIDE, 3), np.uint8)


def sleepy(blocks: int) -> Job:
    """A job of so many blocks."""
    return Job(model="sleeper", conditions=(0,), count=blocks * BLOCK, block_size=BLOCK, steps=1, dtype="float32")


def rank(number: int, blocks: int, folder: Path) -> None:
    """One of `WORKERS` processes, as torchrun would start it."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(WORKERS)}
    run(sleepy(blocks), folder, sampler=Sleeper)


def efficiency(folder: Path) -> float:
    """Of a finished run."""
    store = Store(folder)
    times: dict[int, list[float]] = {}  # by worker
    for block in range(store.job.blocks):
        shard = store.read(block)
        assert shard is not None, "the run is finished"
        written = (folder / "shards" / f"{block:06d}.safetensors").stat().st_mtime
        times.setdefault(shard.provenance["process"], []).extend([shard.provenance["started"], written])
    return SECONDS * store.job.blocks / sum(max(own) - min(own) for own in times.values())


def measure(blocks: int = BLOCKS) -> pd.DataFrame:
    """One row per way to run: one process, ranks without Ray, Ray."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for way in ("1 process", f"{WORKERS} ranks", f"Ray, {WORKERS} workers"):
            folder = Path(name) / way.partition(" ")[0]
            if way == "1 process":
                run(sleepy(blocks), folder, sampler=Sleeper)
            elif way.endswith("ranks"):
                context = multiprocessing.get_context("spawn")
                processes = [context.Process(target=rank, args=(i, blocks, folder)) for i in range(WORKERS)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
            else:
                run(sleepy(blocks), folder, engine="ray", workers=WORKERS, sampler=Sleeper)
            value = efficiency(folder)
            holds = value >= ALLOWED
            rows.append({"model": "sleeper", "run": way, "ratio": value, "expected": ALLOWED, "holds": holds})
    return pd.DataFrame(rows)


def main() -> None:
    show(
        measure(),
        f"The runner with a model that sleeps {SECONDS} s per batch of {BLOCK} images ({SIDE} pixels); ratio: time "
        f"slept over the workers' time; holds: at least {ALLOWED}",
    )


if __name__ == "__main__":
    main()
