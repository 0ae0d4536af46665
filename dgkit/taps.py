"""Attach to a module's calls, whether it is compiled in place or not; copies of the module are without it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

AfterBlock = Callable[[nn.Module, tuple[Any, ...], Any], Any]
BeforeBlock = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
BeforeCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
Answer = Callable[[tuple[Any, ...], dict[str, Any]], Any]
AfterCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]

_lock = threading.RLock()  # modules may be shared by threads

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class _State:
    """Stands in for the `__getstate__` of a module with something attached: what `copy` and `pickle` take is without.

    Attributes:
        hooks: numbers of the hooks that dgkit registered.
        attributes: what the instance's attributes were that dgkit has set; None: the class's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hooks: set[int] = set()
        self.attributes: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        state = type(self.module).__getstate__(self.module)  # type: ignore[attr-defined]
        state.pop("__getstate__", None)
        for name, own in self.attributes.items():
            state.pop(name, None)
            if own is not None and name != "_compiled_call_impl":  # which torch leaves out
                state[name] = own
        for name in (*_HOOKS, *_HOOK_OPTIONS):
            kept = ((number, hook) for number, hook in state[name].items() if number not in self.hooks)
            state[name] = type(state[name])(kept)
        return state

    @classmethod
    def of(cls, module: nn.Module) -> "_State":
        """That of the module, from now on if it has none."""
        return vars(module).setdefault("__getstate__", cls(module))

    def done(self) -> None:
        """Leave the module if nothing is attached any more."""
        if not self.hooks and not self.attributes:
            vars(self.module).pop("__getstate__", None)


def hook(module: nn.Module, register: str, function: Callable[..., Any], **options: Any) -> Callable[[], None]:
    """Register a hook by the module's method of that name; returns what takes it off again."""
    with _lock:
        handle = getattr(module, register)(function, **options)
        state = _State.of(module)
        state.hooks.add(handle.id)

    def remove() -> None:
        with _lock:
            handle.remove()
            state.hooks.discard(handle.id)
            state.done()

    return remove


class StandIn:
    """A function in place of an attribute of a module's instance, as long as it has users.

    Attributes:
        original: what it stands in for.
        module: the module.
        users: how many have asked for it and not yet gone.
    """

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        self.original = original
        self.module = module
        self.users = 0


Kind = TypeVar("Kind", bound=StandIn)


@contextmanager
def standing_in(module: nn.Module, name: str, kind: type[Kind]) -> Iterator[Kind]:
    """Inside, a stand-in of this kind is the module's attribute `name`, one for all users.

    An instance's own attribute (accelerate's `forward`) comes back after the last.
    """
    attributes = vars(module)
    with _lock:
        state = _State.of(module)
        made = attributes.get(name)
        if not isinstance(made, kind):
            state.attributes[name] = made
            attributes[name] = made = kind(getattr(module, name), module)
        made.users += 1
    try:
        yield made
    finally:
        with _lock:
            made.users -= 1
            if not made.users:
                own = state.attributes.pop(name)
                if attributes.get(name) is made:
                    if own is None:
                        del attributes[name]
                    else:
                        attributes[name] = own
                state.done()


class Watched(StandIn):
    """A forward with functions before and after it, for models whose `forward` is called past their hooks."""

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        super().__init__(original, module)
        self.watchers: list[tuple[BeforeCall | None, AfterCall | None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watchers = list(self.watchers)
        for before, _ in watchers:
            changed = None if before is None else before(self.module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        output = self.original(*args, **kwargs)
        for _, after in watchers:
            other = None if after is None else after(self.module, args, kwargs, output)
            output = output if other is None else other
        return output

    @contextmanager
    def watched(self, before: BeforeCall | None, after: AfterCall | None) -> Iterator[None]:
        """Inside, they run around each call; what they return, if anything, takes the arguments' or output's place."""
        watcher = (before, after)
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)


class _Answered(StandIn):
    """A call that functions may answer in the module's place, before any of its hooks."""

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        super().__init__(original, module)
        self.answers: list[Answer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for answer in list(self.answers):
            if (output := answer(args, kwargs)) is not None:
                return output
        return self.original(*args, **kwargs)


@contextmanager
def answered(module: nn.Module, answer: Answer) -> Iterator[None]:
    """Inside, what `answer(args, kwargs)` returns for a call of `module`, if anything, is its output, and nothing runs.

    It stands before the whole call, not at `forward`, which offloading restores.
    """
    with standing_in(module, "_call_impl", _Answered) as call:  # torch's `__call__` looks it up on the instance
        call.answers.append(answer)
        try:
            yield
        finally:
            call.answers.remove(answer)


class _Replaceable(StandIn):
    """A call that each thread can let another function make, for itself alone."""

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        super().__init__(original, module)
        self.functions: dict[int, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.functions.get(threading.get_ident(), self.original)(*args, **kwargs)

    @contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        here = threading.get_ident()
        before = self.functions.get(here)
        self.functions[here] = function
        try:
            yield
        finally:
            if before is None:
                del self.functions[here]
            else:
                self.functions[here] = before


class _Compiled(_Replaceable):
    """The compiled call of a module, with functions before and after it that stay outside the compiled graph.

    torch compiles hooks of an in-place compiled module (`module.compile()`) into its graph, so that each new hook
    compiles the module anew.
    """

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        super().__init__(original, module)
        self.before: list[BeforeBlock] = []
        self.after: list[AfterBlock] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for before in list(self.before):
            args, kwargs = before(self.module, args, kwargs)
        output = super().__call__(*args, **kwargs)
        for after in list(self.after):
            changed = after(self.module, args, output)
            output = output if changed is None else changed
        return output


def compiled(module: nn.Module) -> bool:
    """Whether calls of `module` run a compiled graph, which hides what is inside."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, past any stand-in of dgkit's."""
    own = module.forward
    return own.original if isinstance(own, StandIn) else own


def tap_before(module: nn.Module, function: BeforeBlock) -> Callable[[], None]:
    """Let `function(module, args, kwargs)` replace the arguments of every call; returns what takes it off again."""
    if module._compiled_call_impl is None:
        return hook(module, "register_forward_pre_hook", function, with_kwargs=True)
    return _attached(module, lambda call: call.before, function, first=False)


def tap(module: nn.Module, function: AfterBlock, *, first: bool = False) -> Callable[[], None]:
    """Call `function(module, args, output)` after every call of `module`; what it returns, if anything, is the output.

    With `first` it runs before functions attached earlier. Returns what takes it off again.
    """
    if module._compiled_call_impl is None:
        return hook(module, "register_forward_hook", function, prepend=first)
    return _attached(module, lambda call: call.after, function, first)


def _attached(
    module: nn.Module, functions: Callable[[_Compiled], list[Any]], function: Any, first: bool
) -> Callable[[], None]:
    stack = ExitStack()
    call = stack.enter_context(_compiled_call(module))
    functions(call).insert(0 if first else len(functions(call)), function)
    stack.callback(functions(call).remove, function)
    return stack.close


def _compiled_call(module: nn.Module) -> AbstractContextManager[_Compiled]:
    return standing_in(module, "_compiled_call_impl", _Compiled)


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` in this thread run `function` in place of its forward; taps and hooks still see them."""
    by_graph = module._compiled_call_impl is not None
    stand_in = _compiled_call(module) if by_graph else standing_in(module, "forward", _Replaceable)
    with stand_in as call, call.replaced(function):
        yield
