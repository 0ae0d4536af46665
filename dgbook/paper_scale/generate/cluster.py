"""The work of a job on Ray: plain actors, each with a GPU if there are any; Ray decides where they run.

What is finished is on disk, so nothing here has to outlive anything: an actor that dies is replaced and its block tried
once more, and when this process is killed, the next run goes on from the shards.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from dgbook.paper_scale.generate.store import Store
from dgbook.paper_scale.generate.worker import BlockReport, MakeSampler, Worker
from dgkit.errors import DgkitError

logger = logging.getLogger(__name__)

ATTEMPTS = 2  # of a block, or of a start, that ends the worker
WAIT = 60.0  # seconds between remarks that no worker starts


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, folder: Path, make: MakeSampler) -> None:
        self.folder, self.make = folder, make

    def start(self) -> None:
        """Load the model: not in `__init__`, whose errors Ray passes on as text only."""
        store = Store(self.folder)
        self.worker = Worker(store, self.make(store.job))

    def run(self, block: int) -> BlockReport:
        return self.worker.run(block)


def outcomes(
    store: Store, blocks: Sequence[int], make: MakeSampler, workers: int | None
) -> Generator[BlockReport, None, None]:
    """Make blocks on the cluster that RAY_ADDRESS names, or on this machine; each as it gets done.

    A block that ends its worker twice is given up, with its reason kept in the store; the others go on.

    Raises:
        DgkitError: Ray is not installed or not there, workers end while they start, or as for `Worker`.
    """
    ray = _connected(workers)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actor_class = ray.remote(**({"num_gpus": 1} if gpus else {"num_cpus": 1}))(_Actor)
        queue, ended, failed_starts = deque(blocks), Counter[int](), 0
        at_work: dict[Any, tuple[Any, int | None]] = {}  # by Ray's promise: an actor and its block, None to start
        idle: list[Any] = []

        def start() -> None:
            actor = actor_class.remote(store.folder.absolute(), make)
            at_work[actor.start.remote()] = (actor, None)

        def feed(actor: Any) -> None:
            if queue:
                block = queue.popleft()
                at_work[actor.run.remote(block)] = (actor, block)
            else:
                idle.append(actor)

        for _ in range(min(workers or gpus or 1, len(blocks))):
            start()
        while queue or any(block is not None for _, block in at_work.values()):
            promise = _next(ray, at_work)
            actor, block = at_work.pop(promise)
            try:
                outcome = ray.get(promise)
            except ray.exceptions.RayError as error:
                reason = _reason(error)
                ray.kill(actor)
                if block is None:
                    failed_starts += 1
                    if failed_starts == ATTEMPTS:
                        raise DgkitError(f"workers end while they start: {reason}") from error
                else:
                    ended[block] += 1
                    if ended[block] == ATTEMPTS:
                        yield _given_up(store, block, reason)
                    else:
                        logger.warning("a worker ended at block %d, another tries again: %s", block, reason)
                        queue.appendleft(block)
                if queue and idle:  # which hold what a new worker would need
                    feed(idle.pop())
                elif queue:
                    start()
                continue
            feed(actor)
            if block is None:
                failed_starts = 0
            else:
                yield outcome
    finally:
        ray.shutdown()


def _connected(workers: int | None) -> Any:
    """The module `ray`, connected to the cluster of RAY_ADDRESS or to one of this process's own, which ends with it."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    if not address:
        # what keeps a cluster of one machine to the loopback address, read when Ray is imported; not on Linux by itself
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise DgkitError('engine="ray" needs Ray: pip install "dgkit[cluster]"') from error
    own = {
        "address": "local",
        "num_cpus": max(workers or 1, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": 100_000_000,  # nothing but block numbers is passed around
    }
    try:
        ray.init(**({} if address else own), log_to_driver=False, logging_level=logging.ERROR)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        hint = "" if "RAY_AUTH_MODE" in os.environ else " (one with a password needs RAY_AUTH_MODE=token)"
        raise DgkitError(f"Ray does not answer at {address or 'this machine'}{hint}: {error}") from error
    return ray


def _next(ray: Any, at_work: dict[Any, tuple[Any, int | None]]) -> Any:
    """The next promise that is kept or broken."""
    while True:
        ready, _ = ray.wait(list(at_work), num_returns=1, timeout=WAIT)
        if ready:
            return ready[0]
        if all(block is None for _, block in at_work.values()):
            logger.warning("no worker has started yet: %d wait for Ray to find a place for them", len(at_work))


def _reason(error: Exception) -> str:
    """What ended a worker, in a sentence; an error that dgkit raised on purpose there is raised here."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, DgkitError):
        raise cause
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def _given_up(store: Store, block: int, reason: str) -> BlockReport:
    wanted = store.missing(block)  # it may have kept its shard before it ended
    store.fail(block, dict.fromkeys(wanted, f"its block ended its worker {ATTEMPTS} times: {reason}"))
    return BlockReport(block, len(wanted), (f"block {block} ended {ATTEMPTS} workers and is given up: {reason}",))
