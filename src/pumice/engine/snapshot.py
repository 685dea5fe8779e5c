"""Notice that a model was edited: it has other modules, tensors, hooks or values than at a snapshot."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_MARK = "_pumice_keeps_results"


class Snapshot:
    """The modules of a model, with their tensors, hooks, functions and numbers.

    Values that change inside a tensor, and what a hook remembers, are not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = list(_parts(model))  # kept, so that no other object gets the identity of one of them

    def is_current(self) -> bool:
        """Return whether the model still has these modules, tensors, hooks and functions."""
        parts = list(_parts(self._model))
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))


def functions(module: nn.Module) -> dict[str, object]:
    """Return the functions that a module holds itself: `forward` if it was replaced in this module alone.

    Those that `keeps_results` marked are left out.
    """
    own = {name: value for name, value in vars(module).items() if callable(value)}
    return {name: value for name, value in own.items() if getattr(value, _MARK, None) is not value}


def keeps_results(function: Callable[..., Any]) -> None:
    """Mark a function that takes the place of a module's own and gives the same results."""
    setattr(function, _MARK, function)  # not True: functools.wraps copies the mark to other functions


def is_patched(kind: type) -> bool:
    """Return whether a class has functions that were written outside its own module."""
    own_names = vars(sys.modules[kind.__module__])
    return any(function.__globals__ is not own_names for function in _methods(kind))


def _methods(kind: type) -> Iterator[FunctionType]:
    return (value for value in vars(kind).values() if isinstance(value, FunctionType))


def _parts(model: nn.Module) -> Iterator[object]:
    for hooks in GLOBAL_HOOKS:
        yield from hooks.values()
    modules = list(model.modules())
    for kind in dict.fromkeys(map(type, modules)):
        yield from _methods(kind)
    for module in modules:
        yield module
        yield from module._parameters.values()
        yield from module._buffers.values()
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()
        yield from (value for name, value in vars(module).items() if name[0] != "_")  # such as a norm's eps
