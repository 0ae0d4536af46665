"""From a job to its folder: this process's share of the work, or all of it on a cluster."""

import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dgbook.paper_scale.generate import cluster
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.pipeline import PipelineSampler
from dgbook.paper_scale.generate.store import Store
from dgbook.paper_scale.generate.worker import BlockReport, MakeSampler, Worker
from dgbook.paths import build_dir
from dgkit import checks
from dgkit.errors import DgkitError

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Report:
    """What a run left behind.

    Attributes:
        folder: of the images.
        expected, present: how many there are to be, and are: of the whole job, other workers' share included.
        failures: why images could not be made, by index; a later run tries them again.
    """

    folder: Path
    expected: int
    present: int
    failures: dict[int, str]

    @property
    def complete(self) -> bool:
        """Whether all images are there."""
        return self.present == self.expected

    def __str__(self) -> str:
        lines = [f"{self.present} of {self.expected} images are in {self.folder}"]
        if self.failures:
            lines.append(f"{len(self.failures)} could not be made; the same command tries them again:")
            shown = list(self.failures.items())[:10]
            lines += [f"  image {index}: {reason}" for index, reason in shown]
            if len(self.failures) > len(shown):
                lines.append(f"  ... the rest is in {self.folder / 'failures'}")
        elif not self.complete:
            lines.append("the rest is other workers' share, or was left undone: the same command goes on")
        return "\n".join(lines)


def run(
    job: Job,
    folder: Path | None = None,
    *,
    engine: str = "local",
    workers: int | None = None,
    sampler: MakeSampler | None = None,
) -> Report:
    """Generate what is missing of `job`.

    A run that was interrupted or killed goes on where it was; nothing that is there is made again.

    Args:
        job: what to generate.
        folder: `_build/images/<job.name>` by default.
        engine: "local" makes, in this process, this process's share, which is all of it unless torchrun or Slurm have
            started several (see `share`). "ray" makes all of it on the cluster that RAY_ADDRESS names, or on this
            machine.
        workers: of "ray"; by default one per GPU, or one where there is none.
        sampler: makes the images; the job's pipeline by default. Called once in each worker.

    Raises:
        DgkitError: the folder is another job's or cannot be written, a model cannot be loaded, an argument is not
            allowed, or the worker fails whatever the image.
        RuntimeError: the device broke; another run goes on from there.
    """
    checks.one_of("engine", engine, ENGINES)
    if workers is not None:
        checks.integer("workers", workers, 1)
        if engine == "local":
            checks.refuse("workers", workers, "it is of engine='ray'")
    store = Store.create(build_dir() / "images" / job.name if folder is None else folder, job)
    make: MakeSampler = sampler or PipelineSampler
    rank, world = share(os.environ) if engine == "local" else (0, 1)
    missing: dict[int, int] = {}
    for block in blocks_of(rank, world, job.blocks):
        if wanted := store.missing(block):
            missing[block] = len(wanted)
        else:
            store.fail(block, {})  # of a worker that was killed between its shard and this
    if missing:
        blocks = list(missing)
        done = _outcomes(store, blocks, make) if engine == "local" else cluster.outcomes(store, blocks, make, workers)
        total = sum(len(job.block(block)) for block in blocks_of(rank, world, job.blocks))
        with (
            closing(done),
            tqdm(
                total=total,
                initial=total - sum(missing.values()),
                desc="images" if world == 1 else f"images of worker 1 of {world}",
                unit="img",
                mininterval=0.1 if sys.stderr.isatty() else 30,
                disable=rank > 0,
            ) as progress,
        ):
            for outcome in done:
                for remark in outcome.remarks:
                    logger.warning("%s", remark)
                progress.update(missing[outcome.block] - outcome.failed)
    report = Report(store.folder, job.count, store.count(), store.failures())
    if report.complete:
        store.tidy()
    return report


def _outcomes(store: Store, blocks: Sequence[int], make: MakeSampler) -> Generator[BlockReport, None, None]:
    worker = Worker(store, make(store.job))
    for block in blocks:
        yield worker.run(block)


def blocks_of(rank: int, world: int, blocks: int) -> range:
    """The blocks of worker `rank` of `world`: every `world`-th."""
    return range(rank, blocks, world)


def share(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) of this process by what torchrun or Slurm say; (0, 1) if it is alone.

    torchrun's RANK and WORLD_SIZE; else the tasks of an srun step (SLURM_PROCID of SLURM_STEP_NUM_TASKS) within the
    elements of a job array (SLURM_ARRAY_TASK_ID, counted from the array's first). SLURM_NTASKS is not asked: it is also
    set in a batch script that runs once.

    Raises:
        DgkitError: values that make no sense, or an array with gaps, whose elements cannot be counted.
    """

    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdecimal():
            checks.refuse(name, text, "give an integer, 0 or above")
        return int(text)

    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world = number("RANK"), number("WORLD_SIZE")
    else:
        rank, world = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environment:
            task, first, last = (number(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
            step, world = number("SLURM_ARRAY_TASK_STEP"), number("SLURM_ARRAY_TASK_COUNT")
            if step < 1 or (task - first) % step or last - first != (world - 1) * step:
                raise DgkitError("the job array has gaps: submit it with --array=0-N")
            rank = (task - first) // step
        if "SLURM_STEP_NUM_TASKS" in environment:
            tasks = number("SLURM_STEP_NUM_TASKS")
            rank, world = rank * tasks + number("SLURM_PROCID"), world * tasks
    if not 0 <= rank < world:
        raise DgkitError(f"rank {rank} of {world} is not allowed: ranks count from 0")
    return rank, world
