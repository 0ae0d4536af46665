"""A stand-in for a pipeline: images from NumPy, and failures on demand. As a program it runs a job, to be killed.

    python -m tests.fake_images FOLDER ENGINE COUNT SECONDS

Environment: FAKE_LOG names a folder in which each process that samples keeps a file, named by its id, with a line per
image: its index, and whether it was there already in FAKE_FOLDER. Beside it, FAKE_LOG.address holds Ray's address.
"""

import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.run import run
from dgbook.paper_scale.generate.store import Image, Store
from dgkit.errors import DgkitError

SIZE = 8


def job(count: int = 10, block_size: int = 4, **change: Any) -> Job:
    """A job whose model is this stand-in, with words for prompts."""
    values = {"model": "fake", "conditions": ["one", "two", "three"], "dtype": "float32", "steps": 1} | change
    return Job(count=count, block_size=block_size, **values)


def image(condition: Any, seed: int) -> Image:
    """The image (SIZE, SIZE, 3) of one condition and seed."""
    generator = np.random.default_rng([seed, zlib.crc32(str(condition).encode())])
    return generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def expected(of: Job) -> Image:
    """All images of a job, without anything of the runner."""
    pairs = [(of.conditions[i % len(of.conditions)], 1_000_000 * of.seed + i) for i in range(of.count)]
    return np.stack([image(condition, seed) for condition, seed in pairs])


class Fake:
    """Sleeps, then makes images; `calls` are the seeds it was asked for.

    A condition can be a command: "poison" raises, "exit" ends the process, "oom N" has no memory for more than N
    images, "refuse" raises an error of dgkit.
    """

    device = "fake"

    def __init__(self, of: Job, seconds: float = 0.0) -> None:
        self.identity = {"weights_sha256": {"fake": "0"}}
        self.job, self.seconds = of, seconds
        self.calls: list[list[int]] = []
        self.log = Path(os.environ["FAKE_LOG"]) / str(os.getpid()) if "FAKE_LOG" in os.environ else None
        if self.log:
            import ray

            self.log.touch()
            self.log.parent.with_suffix(".address").write_text(ray.util.get_node_ip_address())

    def __call__(self, conditions: Sequence[Any], seeds: Sequence[int]) -> Image:
        assert len(conditions) == len(seeds)
        self.calls.append(list(seeds))
        self._note(seeds)
        time.sleep(self.seconds)
        for condition in map(str, conditions):
            if condition == "poison":
                raise ValueError("this prompt is poison")
            if condition == "exit":
                os._exit(1)
            if condition == "refuse":
                raise DgkitError("steps=0 is not allowed")
            if condition.startswith("oom ") and len(conditions) > int(condition.split()[1]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return np.stack([image(c, s) for c, s in zip(conditions, seeds, strict=True)])

    def _note(self, seeds: Sequence[int]) -> None:
        if self.log is None:
            return
        store, lines = Store(Path(os.environ["FAKE_FOLDER"])), ""
        for index in dict.fromkeys(seed - 1_000_000 * self.job.seed for seed in seeds):
            shard = store.read(index // self.job.block_size)
            lines += f"{index} {'again' if shard and index in shard.images else 'new'}\n"
        with open(self.log, "a") as file:
            file.write(lines)


def sleeping(seconds: float) -> Callable[[Job], Fake]:
    """Makes samplers that take as long for a batch."""
    return lambda of: Fake(of, seconds)


if __name__ == "__main__":
    folder, engine, count, seconds = sys.argv[1:]
    report = run(
        job(int(count), seed=3),
        Path(folder),
        engine=engine,
        workers=2 if engine == "ray" else None,
        sampler=sleeping(float(seconds)),
    )
    print(report)
    sys.exit(1 if report.failures else 0)
