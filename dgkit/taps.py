"""Attach to a module's calls, whether it is compiled in place or not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

AfterCall = Callable[[nn.Module, tuple[Any, ...], Any], Any]
BeforeCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class _Compiled:
    """The compiled call of a module, with functions before and after it that stay outside the compiled graph.

    torch compiles hooks of an in-place compiled module (`module.compile()`) into its graph, so that each new hook
    compiles the module anew.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.call: Any = module._compiled_call_impl
        self.before: list[BeforeCall] = []
        self.after: list[AfterCall] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for before in list(self.before):
            args, kwargs = before(self.module, args, kwargs)
        output = self.call(*args, **kwargs)
        for after in list(self.after):
            changed = after(self.module, args, output)
            output = output if changed is None else changed
        return output


def tap_before(module: nn.Module, function: BeforeCall) -> Callable[[], None]:
    """Let `function(module, args, kwargs)` replace the arguments of every call; returns what takes it off again."""
    if module._compiled_call_impl is None:
        return module.register_forward_pre_hook(function, with_kwargs=True).remove
    return _attached(module, lambda compiled: compiled.before, function, first=False)


def tap(module: nn.Module, function: AfterCall, *, first: bool = False) -> Callable[[], None]:
    """Call `function(module, args, output)` after every call of `module`; what it returns, if anything, is the output.

    With `first` it runs before functions attached earlier. Returns what takes it off again.
    """
    if module._compiled_call_impl is None:
        return module.register_forward_hook(function, prepend=first).remove
    return _attached(module, lambda compiled: compiled.after, function, first)


def _attached(
    module: nn.Module, functions: Callable[[_Compiled], list[Any]], function: Any, first: bool
) -> Callable[[], None]:
    if not isinstance(module._compiled_call_impl, _Compiled):
        module._compiled_call_impl = _Compiled(module)
    compiled: _Compiled = module._compiled_call_impl
    functions(compiled).insert(0 if first else len(functions(compiled)), function)

    def remove() -> None:
        functions(compiled).remove(function)
        if not compiled.before and not compiled.after:
            module._compiled_call_impl = compiled.call

    return remove


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` run `function` in place of its forward; taps and hooks still see them.

    An instance's own `forward` (accelerate's offloading) and the compiled call come back afterwards.
    """
    compiled = module._compiled_call_impl
    if isinstance(compiled, _Compiled):
        call, compiled.call = compiled.call, function
        try:
            yield
        finally:
            compiled.call = call
        return
    own = module.__dict__.get("forward")
    module.forward = function
    if compiled is not None:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        if compiled is not None:
            module._compiled_call_impl = compiled
        if own is None:
            del module.forward
        else:
            module.forward = own
