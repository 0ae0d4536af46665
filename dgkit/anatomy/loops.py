"""The sampling loop under way, as the frame of the pipeline's `__call__` tells; no pipeline says more elsewhere."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import Any, Generic, TypeVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dgkit.taps import StandIn, standing_in

State = TypeVar("State")


@dataclass(frozen=True)
class Loop:
    """Where the sampling loop of a pipeline is.

    Attributes:
        pipe: the pipeline.
        caller: the class whose `__call__` it is: the pipeline's or, where that hands on to it, one above.
        run: the same number in all calls of one run, and another in those of runs inside it or in another thread.
        index, count: the step (of `for i, t in enumerate(timesteps)`), zero-based, of how many; None where the pipeline
            does not count.
        images: rows of the latents, before they are doubled for classifier-free guidance.
        tokens: image tokens that are generated, where the latents are tokens (B, T, C).
    """

    pipe: DiffusionPipeline
    caller: type
    run: int
    index: int | None
    count: int | None
    images: int | None
    tokens: int | None


def loop_under_way() -> Loop | None:
    """The innermost loop of this thread; None where no pipeline's `__call__` is under way."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            names = frame.f_locals
            if isinstance(names.get("self"), DiffusionPipeline):
                return _loop(names, _caller(names["self"], frame.f_code), id(frame))
        frame = frame.f_back
    return None


def _caller(pipe: Any, code: CodeType) -> type:
    """The class that defines the `__call__` under way."""
    for c in type(pipe).__mro__:
        if getattr(inspect.unwrap(vars(c).get("__call__", _caller)), "__code__", None) is code:
            return c
    return type(pipe)


def _loop(names: dict[str, Any], caller: type, run: int) -> Loop:
    pipe, index, latents = names["self"], names.get("i"), names.get("latents")
    schedule = next((s for s in (names.get("timesteps"), pipe.scheduler.timesteps) if _holds(s, index)), None)
    counted = schedule is not None
    return Loop(
        pipe,
        caller,
        run,
        index if counted else None,
        len(schedule) if schedule is not None else None,
        len(latents) if isinstance(latents, Tensor) else None,
        latents.shape[1] if isinstance(latents, Tensor) and latents.ndim == 3 else None,
    )


def _holds(schedule: Any, index: Any) -> bool:
    """Whether `schedule` is one of timesteps, and `index` a place in it."""
    return isinstance(schedule, Tensor | list) and isinstance(index, int) and index < len(schedule)


class Runs(Generic[State]):
    """Something for each run of a pipeline, made when the run is met for the first time.

    Runs may go on inside one another or in several threads. A run is known by its frame and by the schedule that it
    made for itself.
    """

    def __init__(self, make: Callable[[], State]) -> None:
        self._make = make
        self._known: dict[int, tuple[int, Any, State]] = {}
        self._lock = threading.Lock()

    def of(self, loop: Loop | None) -> State:
        """What belongs to the run of `loop`, or to all calls of this thread without one."""
        by_hand = -threading.get_ident()  # frames have positive numbers
        run, schedule = (by_hand, None) if loop is None else (loop.run, loop.pipe.scheduler.timesteps)
        with self._lock:
            known = self._known.get(run)
            if known is None or known[1] is not schedule:
                self._forget_ended()
                self._known[run] = known = (threading.get_ident(), schedule, self._make())
            return known[2]

    def all(self) -> list[State]:
        """Those of the runs that were not yet forgotten."""
        return [state for _, _, state in self._known.values()]

    def _forget_ended(self) -> None:
        """Runs of this thread whose frame is no longer on its stack have ended."""
        here, frame = threading.get_ident(), inspect.currentframe()
        alive = {-here}
        while frame is not None:
            alive.add(id(frame))
            frame = frame.f_back
        self._known = {run: known for run, known in self._known.items() if known[0] != here or run in alive}


# what pipelines say of a call by `with transformer.cache_context("cond"):` around it
_context: ContextVar[str | None] = ContextVar("context", default=None)


def context_name() -> str | None:
    """The name of the `cache_context` around the call under way, inside `contexts_noted`; None without one."""
    return _context.get()


class _Noting(StandIn):
    @contextmanager
    def __call__(self, name: str, **options: Any) -> Iterator[None]:
        token = _context.set(name)
        try:
            with self.original(name, **options):
                yield
        finally:
            _context.reset(token)


def contexts_noted(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, `context_name` knows the contexts of `model`."""
    return standing_in(model, "cache_context", _Noting) if hasattr(model, "cache_context") else nullcontext()
