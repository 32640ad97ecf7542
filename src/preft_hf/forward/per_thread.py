"""State that each thread has of its own."""

import threading
from typing import Any


class PerThread(threading.local):
    """Base of state that each thread has of its own: a copy of the object that holds it starts without any.

    It has no attributes in the class: torch.compile (2.13) loses what traced code writes into a subclass that has.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type["PerThread"], tuple[Any, ...]]:
        return type(self), ()
