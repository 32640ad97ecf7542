"""Activation checkpointing: a recomputation runs under the phase of the first computation."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from preft_hf.layers.phase import ForwardPhase


class CheckpointWithPhase:
    """A layer's checkpointing function that recomputes under the phase of the first computation.

    transformers checkpoints a layer's `forward`, so the recomputation runs no module hook and would meet the phase of
    whichever forward came last.
    """

    def __init__(self, checkpoint: Callable[..., Any], phase: ForwardPhase):
        self.checkpoint = checkpoint
        self.phase = phase

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        phase, first = self.phase, self.phase.snapshot()

        def computation(*inputs: Any) -> Any:
            with phase.replay(first):
                return function(*inputs)

        return self.checkpoint(computation, *args)


def keep_phase_in_checkpoints(modules: Sequence[nn.Module], phase: ForwardPhase) -> None:
    """Wraps the checkpointing function of each module that has checkpointing switched on. Idempotent."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointWithPhase):
            module._gradient_checkpointing_func = CheckpointWithPhase(function, phase)  # type: ignore[assignment]


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that can checkpoint their activations, whether or not they do now."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
