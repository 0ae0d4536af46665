"""From a job to its folder: one worker, its failures, its share of the work, and its progress.

Bytes. On one kind of device, with the same library versions (and on the CPU as many threads), an image depends on its
job and index alone: not on the number of workers, their order, or what was interrupted. After an out-of-memory error
the batch is halved, and across batch shapes libraries choose other algorithms; a value then differs by rounding, which
sampling may carry up. `tests/test_generate_run.py` holds a small model in float32 to at most 1 of 255 in at most 0.1 %
of the values. Shards made with a smaller batch say so in their provenance.
"""

import gc
import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from dgbook.claims import provenance
from dgbook.paper_scale.generate.job import Job, canonical, library_versions
from dgbook.paper_scale.generate.store import Image, Shard, Store
from dgbook.paths import build_dir
from dgkit.errors import DataError, DgkitError

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
HOPELESS = 8  # images that fail before a worker's first success, after which it is not the images' fault


class Sampler(Protocol):
    """What makes images: a pipeline, or a stand-in in tests.

    Attributes:
        identity: what it is made of, JSON-able; it has to be the same for all workers of a job.
        device: where, for provenance.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def device(self) -> str: ...

    def __call__(self, conditions: Sequence[Any], seeds: Sequence[int]) -> Image:
        """uint8 images (B, H, W, 3), one per condition and seed."""
        ...


MakeSampler = Callable[[Job], Sampler]


@dataclass(frozen=True)
class Outcome:
    """What became of one block: how many of its images failed, and what there is to say of it."""

    block: int
    failed: int = 0
    remarks: tuple[str, ...] = ()


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
        DgkitError: the folder is another job's, the disk is full, a model cannot be loaded, an argument is not allowed,
            or the worker fails whatever the image.
    """
    if engine not in ENGINES:
        raise DgkitError(f"engine={engine!r} is not allowed: use one of {', '.join(ENGINES)}")
    if workers is not None and (engine == "local" or type(workers) is not int or workers < 1):
        raise DgkitError(f"workers={workers!r} is not allowed: give an integer, 1 or above, with engine='ray' only")
    store = Store.create(build_dir() / "images" / job.name if folder is None else folder, job)
    make: MakeSampler = sampler or PipelineSampler
    rank, world = share(os.environ) if engine == "local" else (0, 1)
    missing: dict[int, int] = {}
    for block in blocks_of(rank, world, job.blocks):
        if wanted := store.missing(block):
            missing[block] = len(wanted)
        else:
            store.fail(block, {})  # of a worker that was killed between its shard and this
    total = sum(len(job.block(block)) for block in blocks_of(rank, world, job.blocks))
    if missing:
        if engine == "ray":
            from dgbook.paper_scale.generate.cluster import outcomes

            done = outcomes(store, list(missing), make, workers)
        else:
            done = _outcomes(store, list(missing), make)
        with closing(done), Progress(total, total - sum(missing.values()), rank, world) as progress:
            for outcome in done:
                for remark in outcome.remarks:
                    logger.warning("%s", remark)
                progress.add(missing[outcome.block] - outcome.failed)
    report = Report(store.folder, job.count, store.count(), store.failures())
    if report.complete:
        store.tidy()
    return report


def _outcomes(store: Store, blocks: Sequence[int], make: MakeSampler) -> Generator[Outcome, None, None]:
    worker = Worker(store, make(store.job))
    for block in blocks:
        try:
            outcome = worker.run(block)
        except RuntimeError as error:
            if not _broken_device(error):
                raise
            raise DgkitError(
                f"the device broke at block {block}; the same command goes on from there: {error}"
            ) from error
        yield outcome


# ---------------------------------------------------------------------------------------------------- dividing the work


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

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if not text.isdecimal():
            raise DgkitError(f"{name}={text!r} is not allowed: give an integer, 0 or above")
        return int(text)

    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world = number("RANK"), number("WORLD_SIZE")
    else:
        rank, world = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environment:
            first, step = number("SLURM_ARRAY_TASK_MIN"), number("SLURM_ARRAY_TASK_STEP", 1)
            past, world = number("SLURM_ARRAY_TASK_ID") - first, number("SLURM_ARRAY_TASK_COUNT")
            last = number("SLURM_ARRAY_TASK_MAX") - first
            if step < 1 or past % step or last != (world - 1) * step:
                raise DgkitError("the job array has gaps: submit it with --array=0-N")
            rank = past // step
        if "SLURM_STEP_NUM_TASKS" in environment:
            tasks = number("SLURM_STEP_NUM_TASKS")
            rank, world = rank * tasks + number("SLURM_PROCID"), world * tasks
    if not 0 <= rank < world:
        raise DgkitError(f"rank {rank} of {world} is not allowed: ranks count from 0")
    return rank, world


# ----------------------------------------------------------------------------------------------------------- one worker


class Worker:
    """Makes blocks with one sampler.

    Raises:
        DgkitError: the sampler is not what made the images that are there, or other library versions are installed than
            the job says.
    """

    def __init__(self, store: Store, sampler: Sampler) -> None:
        self.store, self.job, self.sampler = store, store.job, sampler
        here = library_versions()
        if here != dict(self.job.versions):
            differ = ", ".join(f"{k} {self.job.versions.get(k)}" for k in here if here[k] != self.job.versions.get(k))
            raise DgkitError(f"this job was begun with {differ}: install that, or begin anew with another folder")
        store.pin(sampler.identity)
        self.batch = self.job.block_size
        self.remarks: list[str] = []
        self.known = store.failures().keys()  # of earlier runs
        self.failed = 0  # others, before the first success
        self.succeeded = False
        self.commit = provenance.commit_and_changes()

    def run(self, block: int) -> Outcome:
        """Make what is missing of a block, and keep it.

        Raises:
            DgkitError: as for `run`.
        """
        self.remarks = []
        try:
            before = self.store.read(block)
        except DataError:  # said when the work was divided
            before = None
        there = {} if before is None else before.images
        wanted = [i for i in self.job.block(block) if i not in there]
        reasons: dict[int, str] = {}
        started, clock = time.time(), time.perf_counter()
        made = self._made(block, wanted, reasons) if wanted else {}
        if made:
            provenance = {
                "device": self.sampler.device,
                "batch": self.batch,
                "threads": torch.get_num_threads(),
                "host": socket.gethostname(),
                "process": os.getpid(),
                "commit": self.commit[0],
                "dirty": self.commit[1],
                "started": started,
                "seconds": time.perf_counter() - clock,
            }
            if before is not None:
                provenance["earlier"] = before.provenance  # of the images that were there
            self.store.write(block, Shard({**there, **made}, provenance))
        self.store.fail(block, reasons)
        return Outcome(block, len(reasons), tuple(self.remarks))

    def _made(self, block: int, wanted: Sequence[int], reasons: dict[int, str]) -> dict[int, Image]:
        """Images of `wanted`; where that raises, of each half, down to single images, which get a reason instead.

        The others' rows stay what they are, so that a poisoned prompt costs its block little and the others nothing.
        """
        try:
            made = self._computed(block, wanted)
            self.succeeded = True
            return made
        except DgkitError:
            raise
        except Exception as error:
            if _broken_device(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        if len(wanted) == 1:
            reasons[wanted[0]] = reason
            self.remarks.append(f"image {wanted[0]} ({self.job.condition(wanted[0])!r}) failed: {reason}")
            self.failed += wanted[0] not in self.known
            if self.failed >= HOPELESS and not self.succeeded:
                raise DgkitError(f"the first {self.failed} images all failed, so it is not their prompts: {reason}")
            return {}
        half = len(wanted) // 2
        return self._made(block, wanted[:half], reasons) | self._made(block, wanted[half:], reasons)

    def _computed(self, block: int, wanted: Sequence[int]) -> dict[int, Image]:
        """Images of `wanted` in the block's batch shape, or where that does not fit, in halves of it."""
        while True:
            try:
                return self._in_batches(block, wanted)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # not before here: the traceback holds the tensors
            if self.batch == 1:
                raise DgkitError(f"not even one image at a time fits into memory: {reason}")
            self.batch = -(-self.batch // 2)
            self.remarks.append(
                f"out of memory: from block {block} on this worker makes {self.batch} images at a time instead of "
                f"{self.job.block_size}; they may differ by rounding"
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _in_batches(self, block: int, wanted: Sequence[int]) -> dict[int, Image]:
        first, rows = block * self.job.block_size, self.job.rows(block, wanted)
        made: dict[int, Image] = {}
        for start in range(0, len(rows), self.batch):
            batch = rows[start : start + self.batch]
            own = [row for row, index in enumerate(batch) if index == first + start + row]
            if not own:
                continue
            batch += batch[-1:] * (self.batch - len(batch))
            out = self.sampler([self.job.condition(i) for i in batch], [self.job.image_seed(i) for i in batch])
            if out.dtype != np.uint8 or out.ndim != 4 or len(out) != len(batch):
                raise DgkitError(f"the sampler made {out.dtype} {out.shape} for {len(batch)} images")
            made |= {batch[row]: out[row] for row in own}
        return made


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    )


def _broken_device(error: BaseException) -> bool:
    """After a device-side error nothing works in this process any more."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


# ----------------------------------------------------------------------------------------------------------- a pipeline


class PipelineSampler:
    """The pipeline of a job on this process's device.

    Raises:
        LoadError: it cannot be loaded.
        DgkitError: a guidance method does not fit it.
    """

    def __init__(self, job: Job) -> None:
        # here, so that what needs no model starts at once
        from dgkit import disrupt, guide, zoo

        self.job = job
        self.pipe = zoo.load(job.model, device=own_device(), dtype=getattr(torch, job.dtype))
        # with CPU offload the weights rest elsewhere than where they compute
        device = torch.device(getattr(self.pipe, "_execution_device", self.pipe.device))
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._guide, self._disrupt = guide, disrupt
        with self._changed() as (methods, edit):
            self.identity: Mapping[str, Any] = _identity(self.pipe, job, methods)
            if edit:
                self.identity = {**self.identity, "disruption": {**job.disruption, "dims": edit.dims}}

    def __call__(self, conditions: Sequence[Any], seeds: Sequence[int]) -> Image:
        from dgkit.sampling import generate

        with self._changed():
            return generate(
                self.pipe,
                conditions,
                seeds,
                num_inference_steps=self.job.steps,
                guidance_scale=self.job.guidance_scale,
                batch_size=len(conditions),
                **self.job.call,
            )

    @contextmanager
    def _changed(self) -> Iterator[tuple[list[Any], Any]]:
        """The pipeline with the job's guidance, yielded as methods, and its disruption, yielded as `disruption.Edit`."""
        methods = self.job.guidance()
        with ExitStack() as stack:
            if methods:
                methods = stack.enter_context(self._guide(self.pipe, *methods)).methods
            edit = stack.enter_context(self._disrupt(self.pipe, **self.job.disruption)) if self.job.disruption else None
            yield methods, edit


def own_device() -> str:
    """This process's GPU, by its place among those of torchrun or Slurm on this machine; or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    place = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{place % torch.cuda.device_count()}"


def _identity(pipe: Any, job: Job, methods: Sequence[Any]) -> dict[str, Any]:
    """What decides the images beside the job: weights, scheduler, and what the zoo and presets filled in."""
    from dgkit.zoo import row_of

    row, settings = row_of(pipe), {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    return {
        "pipeline": type(pipe).__name__,
        "weights_sha256": {
            name: provenance.weights_sha256(part)
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        },
        "scheduler": {"class": type(pipe.scheduler).__name__, "sha256": _sha256(settings)},
        "call": {**(row.call if row else {}), **job.call},
        "methods": {
            method.name: {
                f.name: value if isinstance(value, int | float | str | list | tuple | None) else repr(value)
                for f in fields(method)
                if f.init
                for value in [getattr(method, f.name)]
            }
            for method in methods
        },
    }


def _sha256(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({key: repr(value) for key, value in settings.items()}).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- progress


class Progress:
    """A bar with the time left on a terminal, a line every half minute elsewhere; of the first worker only."""

    def __init__(self, total: int, present: int, rank: int, world: int) -> None:
        self.shown = rank == 0
        self.label = "images" if world == 1 else f"images of worker 1 of {world}"
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=present,
            desc=self.label,
            unit="img",
            file=sys.stderr,
            disable=not (self.shown and self.terminal),
        )
        self.total, self.initial, self.present = total, present, present
        self.start = self.last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, made: int) -> None:
        """Count images."""
        self.bar.update(made)
        self.present += made
        now = time.monotonic()
        if self.shown and not self.terminal and (now - self.last >= 30 or self.present == self.total):
            self.last = now
            rate = (self.present - self.initial) / (now - self.start)
            left = tqdm.format_interval((self.total - self.present) / rate) if rate else "?"
            print(f"{self.label}: {self.present} of {self.total}, {left} left", file=sys.stderr, flush=True)
