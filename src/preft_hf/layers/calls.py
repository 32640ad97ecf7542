"""Running calls of a model, and the cleanup of those that a KeyboardInterrupt or SystemExit has ended.

PyTorch runs no hook after these two, not even with `always_call`: the phase would stay set, and a pool's adapters
pinned.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from preft_hf.layers.per_thread import PerThread, untraced
from preft_hf.layers.phase import ForwardPhase, Undecided


class Releasable(Protocol):
    """Adapters that a call has pinned."""

    def release(self) -> None: ...


class _ThreadState(PerThread):
    __slots__ = ()
    adapters: Releasable | None


class Calls:
    """Knows the running calls of one model, the phase they have set and the adapters they have pinned.

    A call whose hooks have not ended it is cleaned up as soon as its frame is freed, its thread calls the model again,
    or another thread waits for a slot.
    """

    def __init__(self, model: nn.Module, phase: ForwardPhase):
        self._model, self._phase = model, phase
        self._here = _ThreadState()
        self._holding: dict[int, tuple[int, Releasable]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "phase": self._phase}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["phase"])

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "CallArguments":
        """Returns the arguments as a tuple that PyTorch keeps until the call's frame is freed."""
        return CallArguments(args, kwargs, self._gone)

    def begin(self) -> None:
        """Cleans up after an earlier call of this thread that was interrupted.

        Raises:
            RuntimeError: that call is still running: the model was called inside its own forward.
        """
        if not self._left_over():
            return
        if num_calls(self._model, threading.get_ident()) > 1:
            raise RuntimeError(
                "the model was called inside its own forward, which would lose which of its tokens are prefill: make "
                "the inner call before or after, or on a copy of the model"
            )
        self._end()

    @untraced
    def hold(self, adapters: Releasable) -> None:
        """Records the adapters that this thread's call pins, until `unpin`."""
        self.unpin()
        self._here.adapters = adapters
        self._holding[id(adapters)] = threading.get_ident(), adapters

    @property
    def is_holding(self) -> bool:
        """True if this thread's call may have pinned adapters. torch.compile traces it."""
        return getattr(self._here, "adapters", None) is not None

    @untraced
    def unpin(self) -> None:
        """Unpins the adapters of this thread's call, if it has any."""
        adapters = getattr(self._here, "adapters", None)
        self._here.adapters = None
        if adapters is not None:
            self._holding.pop(id(adapters), None)
            adapters.release()

    def sweep(self) -> None:
        """Unpins the adapters of calls that are no longer running, in any thread."""
        for key, (thread, adapters) in list(self._holding.items()):
            if num_calls(self._model, thread) == 0:
                self._holding.pop(key, None)
                adapters.release()

    def _left_over(self) -> bool:
        return self.is_holding or not isinstance(self._phase.snapshot(), Undecided)

    def _end(self) -> None:
        self._phase.end()
        self._phase.reached = None
        self.unpin()

    def _gone(self, thread: int) -> None:
        if thread == threading.get_ident() and self._left_over() and num_calls(self._model, thread) == 0:
            self._end()


class CallArguments(tuple[tuple[Any, ...], dict[str, Any]]):
    """(args, kwargs) as a forward pre-hook returns them; calls `gone` when they are freed.

    PyTorch keeps what a pre-hook returns in a local variable of the call (2.7 to 2.13), so it is freed with the call's
    frame: at its end, or, after an error, with the traceback that keeps the frame. Another pre-hook's return value may
    replace it earlier, so `gone` has to ask whether the call is still running.
    """

    gone: Callable[[int], None]
    thread: int

    def __new__(cls, args: tuple[Any, ...], kwargs: dict[str, Any], gone: Callable[[int], None]) -> "CallArguments":
        made = super().__new__(cls, (args, kwargs))
        made.gone, made.thread = gone, threading.get_ident()
        return made

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.gone(self.thread)


def num_calls(model: nn.Module, thread: int) -> int:
    """Returns how many calls of the model are running in a thread, nested ones included."""
    frame, found = sys._current_frames().get(thread), 0
    while frame is not None:
        found += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model
        frame = frame.f_back
    return found
