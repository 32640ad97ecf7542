"""The phase of the current forward: which of its tokens are prefill, and the context that carries it to the layers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Literal

from torch import Tensor
from torch.compiler import disable, is_compiling

from preft_core.layout import Bucket
from preft_core.tokens import Segments

_DECLARED_PHASE: ContextVar[str | None] = ContextVar("preft_phase", default=None)


class Undecided(Enum):
    """No forward is running (UNSET), or several threads run one at once (SHARED), so no token has a phase."""

    UNSET = "unset"
    SHARED = "shared"


class PrefillRows:
    """A forward in which some tokens are prefill and some are not.

    Attributes:
        mask: bool, (batch, length), True on prefill tokens
        index: int64, (rows,), positions of the prefill tokens in the flattened batch; None while torch.compile
            traces, where a size that depends on data would break the graph
    """

    __slots__ = ("index", "mask")

    def __init__(self, mask: Tensor, index: Tensor | None):
        self.mask = mask
        self.index = index


class RoutedRows:
    """A forward in which each row of the batch has an adapter of its own, or none.

    Attributes:
        shape: (batch, length)
        held: adapter name -> positions of its prefill tokens in the flattened batch, for adapters that the model's
            layers hold; a slice where they are consecutive, else int64 (rows,)
        pooled: bucket -> segments of the flattened batch, for adapters in the slots of a pool
    """

    __slots__ = ("held", "pooled", "shape")

    def __init__(self, shape: tuple[int, int], held: dict[str, slice | Tensor], pooled: dict[Bucket, Segments]):
        self.shape = shape
        self.held = held
        self.pooled = pooled


SharedPhase = bool | PrefillRows
"""All tokens prefill (True), none (False), or some; of the active adapters, for all rows the same."""
Phase = SharedPhase | RoutedRows


def phase_of_mask(mask: Tensor) -> SharedPhase:
    """Returns the phase for a bool mask (batch, length). Waits for the mask's device, except under torch.compile."""
    if is_compiling():
        return PrefillRows(mask, None)
    index = mask.flatten().nonzero().squeeze(1)
    if index.numel() == 0:
        return False
    if index.numel() == mask.numel():
        return True
    return PrefillRows(mask, index)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.phase: Phase | Undecided = Undecided.UNSET


class ForwardPhase:
    """The phase of the forward that is running on one model, kept apart for each thread.

    The model's pre-forward hook calls `begin`, the adapter layers ask `current`, the post-forward hook calls `end`.
    torch.compile can trace neither thread-local nor context variables, so traced code reads a plain attribute. It
    holds the phase while one thread is in a forward, and SHARED, which layers refuse, while several are.

    Attributes:
        reached: ids of the adapter layers that have run, while somebody counts them; else None
    """

    def __init__(self) -> None:
        self._thread = _ThreadState()
        self._lock = threading.Lock()
        self._threads_in_forward: set[int] = set()
        self._traced: Phase | Undecided = Undecided.UNSET
        self.reached: set[int] | None = None

    def __reduce__(self) -> tuple[type["ForwardPhase"], tuple[()]]:
        return ForwardPhase, ()

    def begin(self, phase: Phase) -> None:
        """Sets the phase of the forward that starts now in this thread."""
        if is_compiling() and not isinstance(phase, RoutedRows):
            self._traced = phase
        else:
            self._begin(phase)  # pyright: ignore[reportAttributeAccessIssue]

    # Rows of several adapters break the graph anyway, and a layer that gave up compiling reads the thread's phase.
    @disable
    def _begin(self, phase: Phase) -> None:
        self._thread.phase = phase
        with self._lock:
            self._threads_in_forward.add(threading.get_ident())
            self._traced = phase if len(self._threads_in_forward) == 1 else Undecided.SHARED

    def end(self) -> None:
        """Forgets the phase: until the next `begin`, adapter layers refuse to run in this thread."""
        if is_compiling() and not isinstance(self._traced, RoutedRows):
            self._traced = Undecided.UNSET
        else:
            self._end()  # pyright: ignore[reportAttributeAccessIssue]

    @disable
    def _end(self) -> None:
        self._thread.phase = Undecided.UNSET
        with self._lock:
            self._threads_in_forward.discard(threading.get_ident())
            self._traced = Undecided.SHARED if self._threads_in_forward else Undecided.UNSET

    def current(self) -> SharedPhase:
        """Returns the phase of the running forward, else the one that `preft_phase` declares; no RoutedRows.

        Raises:
            RuntimeError: no forward of the model is running and nothing was declared, or compiled code runs in
                several threads at once.
        """
        phase = self._traced if is_compiling() else self._thread.phase
        if not isinstance(phase, Undecided):
            assert not isinstance(phase, RoutedRows)
            return phase
        if phase is Undecided.SHARED:
            raise RuntimeError(
                "several threads run forwards of one compiled PreFT model at the same time, so its layers cannot tell "
                "whose tokens are prefill: give each thread its own copy of the model, or do not compile it"
            )
        declared = declared_phase()
        if declared is None:
            raise RuntimeError(
                "a PreFT adapter layer ran outside of its model's forward, so it cannot tell prefill from decode "
                "tokens: call the model that the adapter was attached to (not its inner backbone, nor model.forward), "
                'or wrap the call in preft_phase("prefill") or preft_phase("decode")'
            )
        return declared

    def snapshot(self) -> Phase | Undecided:
        """Returns this thread's state, for `replay`."""
        return self._traced if is_compiling() else self._thread.phase

    @contextmanager
    def replay(self, phase: Phase | Undecided) -> Iterator[None]:
        """Runs a recomputation under the phase that its first computation had; then restores this thread's state."""
        before = self._thread.phase
        self._thread.phase = phase
        try:
            yield
        finally:
            self._thread.phase = before


def declared_phase() -> bool | None:
    """Returns True inside preft_phase("prefill"), False inside preft_phase("decode"), None elsewhere."""
    phase = _DECLARED_PHASE.get()
    return None if phase is None else phase == "prefill"


@contextmanager
def preft_phase(phase: Literal["prefill", "decode"]) -> Iterator[None]:
    """Declares that every token of the forwards inside is prefill, or that every one is decode.

    For hand-written loops; `generate` and rows with labels know by themselves. Under torch.compile pass
    `prefill_mask=True` or `prefill_mask=False` to the model instead, which compiles without a graph break. From
    transformers 5.24 on the cache is called `cache`.

        with preft_phase("prefill"):
            output = model(input_ids=prompt)
        with preft_phase("decode"):
            output = model(input_ids=token, past_key_values=output.past_key_values)

    Args:
        phase: "prefill" (adapted) or "decode" (base model)
    Raises:
        ValueError: another phase, or a preft_phase inside a preft_phase.
    """
    if phase not in ("prefill", "decode"):
        raise ValueError(f'phase is {phase!r}: preft_phase takes "prefill" or "decode"')
    outer = _DECLARED_PHASE.get()
    if outer is not None:
        raise ValueError(f"preft_phase({phase!r}) inside preft_phase({outer!r}): leave the outer one first")
    token = _DECLARED_PHASE.set(phase)
    try:
        yield
    finally:
        _DECLARED_PHASE.reset(token)
