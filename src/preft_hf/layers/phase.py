"""The phase of the current forward: which of its tokens are prefill, and the context that carries it to the layers."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Literal

from torch import Tensor
from torch.compiler import is_compiling

from preft_core.pool.layout import Bucket
from preft_core.rule.tokens import Segments

_DECLARED: ContextVar[bool | tuple[int, ...] | None] = ContextVar("preft_declared", default=None)


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
    """A forward whose rows have different adapters, or none.

    Attributes:
        shape: (batch, length)
        held: adapter name -> positions of its prefill tokens in the flattened batch, for adapters in the model's
            layers; a slice where they are consecutive, else int64 (rows,)
        pooled: bucket -> segments of the flattened batch, for adapters in the slots of a pool
    """

    __slots__ = ("held", "pooled", "shape")

    def __init__(self, shape: tuple[int, int], held: dict[str, slice | Tensor], pooled: dict[Bucket, Segments]):
        self.shape = shape
        self.held = held
        self.pooled = pooled


SharedPhase = bool | PrefillRows
"""All tokens are prefill (True), none (False), or some. The active adapters act on every row."""
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
    """The phase of the forward that is running on one model, per thread.

    The model's pre-forward hook calls `begin`, the adapter layers ask `current`, the post-forward hook calls `end`.
    torch.compile traces all three. Code that it does not compile, after a graph break or at a recompile limit, reads
    the phase that the compiled part has set in the same thread.
    """

    def __init__(self) -> None:
        # torch.compile traces it. With a subclass it drops what traced code writes, without an error, unless the
        # subclass has __slots__, and it fails on class attributes (torch 2.13).
        self._thread = threading.local()

    def __reduce__(self) -> tuple[type["ForwardPhase"], tuple[()]]:
        return ForwardPhase, ()

    @property
    def reached(self) -> set[int] | None:
        """The ids of the adapter layers that have run in this thread's forward; None while reach checking is off."""
        return getattr(self._thread, "reached", None)

    @reached.setter
    def reached(self, reached: set[int] | None) -> None:
        self._thread.reached = reached

    def begin(self, phase: Phase) -> None:
        """Sets the phase of the forward that starts in this thread."""
        self._thread.phase = phase

    def end(self) -> None:
        """Clears the phase; adapter layers raise in this thread until the next `begin`."""
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
        declaration = declared()
        if not isinstance(declaration, bool):
            raise RuntimeError(
                "a PreFT adapter layer ran outside of its model's forward, so it cannot tell prefill from decode "
                "tokens: call the model that the adapter was attached to (not its inner backbone, nor model.forward), "
                'or wrap the call in preft_phase("prefill") or preft_phase("decode")'
            )
        return declaration

    def snapshot(self) -> Phase | Undecided:
        """Returns this thread's state, for `replay`."""
        return getattr(self._thread, "phase", Undecided.UNSET)

    @contextmanager
    def replay(self, phase: Phase | Undecided) -> Iterator[None]:
        """Runs a recomputation under the phase of the first computation, then restores this thread's state."""
        before = self.snapshot()
        self._thread.phase = phase
        try:
            yield
        finally:
            self._thread.phase = before


def declared() -> bool | tuple[int, ...] | None:
    """Returns what is declared for forwards in this context.

    Returns:
        True inside preft_phase("prefill"), False inside preft_phase("decode"), the context lengths inside
        preft_scoring, None elsewhere.
    """
    return _DECLARED.get()


@contextmanager
def preft_phase(phase: Literal["prefill", "decode"]) -> Iterator[None]:
    """Declares that every token of the forwards inside is prefill, or that every one is decode.

    For custom loops; `generate` and rows with labels need no declaration. Under torch.compile pass `prefill_mask=True`
    or `prefill_mask=False` to the model instead, which compiles without a graph break. From transformers 5.24 on the
    cache is called `cache`.

        with preft_phase("prefill"):
            output = model(input_ids=prompt)
        with preft_phase("decode"):
            output = model(input_ids=token, past_key_values=output.past_key_values)

    Args:
        phase: "prefill" (adapted) or "decode" (base model)
    Raises:
        ValueError: another phase, or inside another preft_phase or preft_scoring.
    """
    if phase not in ("prefill", "decode"):
        raise ValueError(f'phase is {phase!r}: preft_phase takes "prefill" or "decode"')
    with _declare(phase == "prefill", f"preft_phase({phase!r})"):
        yield


@contextmanager
def preft_scoring(context_lengths: int | Sequence[int]) -> Iterator[None]:
    """Declares for the forwards inside that each row is a context and a continuation that is scored.

    The context is prefill and the continuation is decode, so one forward gives the log-likelihood that generation
    would give the continuation: logits at the last context token predict its first token. Rows that hold labels need
    no declaration.

        with preft_scoring([len(context) for context in contexts]):
            logits = model(input_ids=rows, attention_mask=mask).logits

    Args:
        context_lengths: tokens of each row's context, >= 1, padding not counted; one number stands for all rows
    Raises:
        ValueError: a length below 1, no length, or inside another preft_scoring or preft_phase.
    """
    lengths = (context_lengths,) if isinstance(context_lengths, int) else tuple(int(n) for n in context_lengths)
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"context_lengths is {context_lengths!r}: give each row's number of context tokens, 1 or more; a row "
            "without context takes the beginning-of-text token as its context"
        )
    with _declare(lengths, "preft_scoring"):
        yield


@contextmanager
def _declare(declaration: bool | tuple[int, ...], name: str) -> Iterator[None]:
    outer = _DECLARED.get()
    if outer is not None:
        kind = "preft_scoring" if isinstance(outer, tuple) else f"preft_phase({'prefill' if outer else 'decode'!r})"
        raise ValueError(f"{name} inside {kind}: leave the outer one first")
    token = _DECLARED.set(declaration)
    try:
        yield
    finally:
        _DECLARED.reset(token)
