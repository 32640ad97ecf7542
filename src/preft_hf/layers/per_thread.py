"""State kept per thread, and functions that torch.compile must not trace."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Decorator: torch.compile leaves the graph for a call of the function."""
    disabled: Any = torch.compiler.disable(function)
    return disabled


class PerThread(threading.local):
    """Base of per-thread state. A copy of the object that has it starts without any.

    It has no attributes in the class: torch.compile (2.13) loses what traced code writes into a subclass that has.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type["PerThread"], tuple[Any, ...]]:
        return type(self), ()
