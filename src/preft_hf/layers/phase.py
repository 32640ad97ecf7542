"""The phase of the current forward: which of its tokens are prefill, and the context that carries it to the layers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Literal

from torch import Tensor
from torch.compiler import is_compiling

from preft_core.pool.layout import Bucket
from preft_core.rule.tokens import Segments

_DECLARED_PHASE: ContextVar[str | None] = ContextVar("preft_phase", default=None)


class Undecided(Enum):
    """No forward is running, so no token has a phase."""

    UNSET = "unset"


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


class ForwardPhase:
    """The phase of the forward that is running on one model, kept apart for each thread.

    The model's pre-forward hook calls `begin`, the adapter layers ask `current`, the post-forward hook calls `end`.
    torch.compile traces all three. What it does not compile, after a graph break or because torch gave a layer up,
    finds the phase where the compiled part has left it, in the same thread.
    """

    def __init__(self) -> None:
        # torch.compile traces it. Of a subclass it loses what traced code writes, without an error, unless that has
        # __slots__, and fails on attributes of the class (torch 2.13).
        self._thread = threading.local()

    def __reduce__(self) -> tuple[type["ForwardPhase"], tuple[()]]:
        return ForwardPhase, ()

    @property
    def reached(self) -> set[int] | None:
        """The ids of the adapter layers that have run in this thread's forward, while somebody counts them."""
        return getattr(self._thread, "reached", None)

    @reached.setter
    def reached(self, reached: set[int] | None) -> None:
        self._thread.reached = reached

    def begin(self, phase: Phase) -> None:
        """Sets the phase of the forward that starts now in this thread."""
        self._thread.phase = phase

    def end(self) -> None:
        """Forgets the phase: until the next `begin`, adapter layers refuse to run in this thread."""
        self._thread.phase = Undecided.UNSET

    def current(self) -> SharedPhase:
        """Returns the phase of the running forward, else the one that `preft_phase` declares; no RoutedRows.

        Raises:
            RuntimeError: no forward of the model is running and nothing was declared.
        """
        phase = self.snapshot()
        if not isinstance(phase, Undecided):
            assert not isinstance(phase, RoutedRows)
            return phase
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
        return getattr(self._thread, "phase", Undecided.UNSET)

    @contextmanager
    def replay(self, phase: Phase | Undecided) -> Iterator[None]:
        """Runs a recomputation under the phase that its first computation had; then restores this thread's state."""
        before = self.snapshot()
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
