"""One worker: blocks of a job to images in its store, whatever single images and the memory do.

Bytes. On one kind of device, with the same library versions (and on the CPU as many threads), an image depends on its
job and index alone: not on the number of workers, their order, or what was interrupted. After an out-of-memory error
the batch is halved, and across batch shapes libraries choose other algorithms; a value then differs by rounding, which
sampling may carry up. `tests/dgbook/test_generate_run.py` holds a small model in float32 to at most 1 of 255 in at most
0.1 % of the values. Shards made with a smaller batch say so in their provenance.
"""

import gc
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dgbook.claims.provenance import commit_and_changes
from dgbook.paper_scale.generate.job import Job, library_versions
from dgbook.paper_scale.generate.store import Image, Shard, Store
from dgkit.errors import DataError, DgkitError


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
class BlockReport:
    """What became of one block: how many of its images failed, and what there is to say of it."""

    block: int
    failed: int = 0
    remarks: tuple[str, ...] = ()


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
        self.commit = commit_and_changes()

    def run(self, block: int) -> BlockReport:
        """Make what is missing of a block, and keep it.

        Raises:
            DgkitError: a whole block fails before any image is there, not even one image fits into memory, the sampler
                cannot be called so, or the shard cannot be written.
            RuntimeError: the device is broken, and with it this process.
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
        if reasons and not made and self.store.count() == 0:
            first = next(iter(reasons.values()))
            raise DgkitError(f"the first {len(reasons)} images all failed, so it is not their prompts: {first}")
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
        return BlockReport(block, len(reasons), tuple(self.remarks))

    def _made(self, block: int, wanted: Sequence[int], reasons: dict[int, str]) -> dict[int, Image]:
        """Images of `wanted`; where that raises, of each half, down to single images, which get a reason instead.

        The others' rows stay what they are, so that a poisoned prompt costs its block little and the others nothing.
        """
        try:
            return self._computed(block, wanted)
        except DgkitError:
            raise
        except TypeError as error:  # no prompt's fault: they are all of one type
            raise DgkitError(f"the sampler cannot be called so: {error}") from error
        except Exception as error:
            if _broken_device(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        if len(wanted) == 1:
            reasons[wanted[0]] = reason
            self.remarks.append(f"image {wanted[0]} ({self.job.condition(wanted[0])!r}) failed: {reason}")
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


def _broken_device(error: Exception) -> bool:
    """After a device-side error nothing works in this process any more."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
