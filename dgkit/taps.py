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


def compiled(module: nn.Module) -> bool:
    """Whether calls of `module` run a compiled graph, which hides what is inside."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def tap_before(module: nn.Module, function: BeforeCall) -> Callable[[], None]:
    """Let `function(module, args, kwargs)` replace the arguments of every call; returns what takes it off again."""
    if module._compiled_call_impl is None:
        return module.register_forward_pre_hook(function, with_kwargs=True).remove
    return _attached(module, lambda wrapped: wrapped.before, function, first=False)


def tap(module: nn.Module, function: AfterCall, *, first: bool = False) -> Callable[[], None]:
    """Call `function(module, args, output)` after every call of `module`; what it returns, if anything, is the output.

    With `first` it runs before functions attached earlier. Returns what takes it off again.
    """
    if module._compiled_call_impl is None:
        return module.register_forward_hook(function, prepend=first).remove
    return _attached(module, lambda wrapped: wrapped.after, function, first)


def _attached(
    module: nn.Module, functions: Callable[[_Compiled], list[Any]], function: Any, first: bool
) -> Callable[[], None]:
    if not isinstance(module._compiled_call_impl, _Compiled):
        module._compiled_call_impl = _Compiled(module)
    wrapped: _Compiled = module._compiled_call_impl
    functions(wrapped).insert(0 if first else len(functions(wrapped)), function)

    def remove() -> None:
        functions(wrapped).remove(function)
        if not wrapped.before and not wrapped.after:
            module._compiled_call_impl = wrapped.call

    return remove


@contextmanager
def replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` run `function` in place of its forward; taps and hooks still see them.

    An instance's own `forward` (accelerate's offloading) and the compiled call come back afterwards.
    """
    call = module._compiled_call_impl
    if isinstance(call, _Compiled):
        own_call, call.call = call.call, function
        try:
            yield
        finally:
            call.call = own_call
        return
    own = module.__dict__.get("forward")
    module.forward = function
    if call is not None:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        if call is not None:
            module._compiled_call_impl = call
        if own is None:
            del module.forward
        else:
            module.forward = own
