"""The labels rule: which tokens of a training batch are prompt, and the checks that its labels can be learned from."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preft_hf.forward.label_checks import GAP, IGNORED_LABEL, check_loss, check_prompts, gaps_in_responses, shaped
from preft_hf.layers.phase import SharedPhase, declared_phase, phase_of_mask

STEPS = frozenset({"compute_loss", "prediction_step", "training_step"})


class GapWarning:
    """Warns once of unlabelled tokens inside a response, of which labels do not tell what they are.

    Args:
        ends: the known end-of-turn tokens
    """

    def __init__(self, ends: Sequence[int] = ()):
        self.ends = list(ends)
        self._is_given = False

    def check(self, mask: Tensor, labels: Tensor, position_ids: Any, input_ids: Any) -> None:
        """Warns if `gaps_in_responses` finds some. Arguments as of `check_prompts`."""
        if self._is_given:
            return
        counts = gaps_in_responses(mask, labels, shaped(position_ids, mask), shaped(input_ids, mask), self.ends)
        if counts is not None:
            self._is_given = True
            rows, runs, tokens = counts
            warnings.warn(f"{runs} runs ({tokens} tokens) in {rows} rows of a batch {GAP}", stacklevel=2)


class LabelsRule:
    """Reads the phase of one model's training batches from their labels.

    A token is prompt if its label is -100 and it is attended to. Unlabelled tokens between two labelled runs are
    either the next turn's prompt, or part of a response that is left out of the loss. They count as prompt, with one
    warning if no turn ends before them.
    """

    def __init__(self, model: nn.Module):
        self._gaps = GapWarning(end_tokens(model))

    def phase(self, values: Mapping[str, Any], shape: tuple[int, ...]) -> SharedPhase:
        """Returns the phase of a forward that was given labels and no prefill_mask.

        Args:
            values: the arguments of the forward, by name
            shape: (batch, length) of the tokens
        Raises:
            ValueError: labels of another shape, labels inside preft_phase, or labels that cannot be learned from.
        """
        labels, attention_mask = values["labels"], values.get("attention_mask")
        if tuple(labels.shape) != shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and the tokens {shape}: the prompt is read from labels of "
                f"the tokens' shape with {IGNORED_LABEL} on the prompt; pass prefill_mask for labels of another kind"
            )
        if not torch.compiler.is_compiling() and declared_phase() is not None:
            raise ValueError(
                "labels were given inside preft_phase: labels already tell prompt from response tokens; leave one out"
            )
        mask = mask_from_labels(labels, attention_mask if isinstance(attention_mask, Tensor) else None)
        positions, ids = values.get("position_ids"), values.get("input_ids")
        mask = check_prompts(check_loss(mask, values), labels, attention_mask, positions, ids, self._gaps.ends)
        if not torch.compiler.is_compiling():
            self._gaps.check(mask, labels, positions, ids)
        return phase_of_mask(mask)


def end_tokens(model: Any) -> list[int]:
    """Returns the end-of-text and end-of-turn tokens of a model's config and generation_config."""
    found: set[int] = set()
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        ends = getattr(config, "eos_token_id", None)
        found |= {token for token in (ends if isinstance(ends, (list, tuple)) else [ends]) if token is not None}
    return sorted(found)


def mask_from_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns bool (batch, length), True on prompt tokens: those that are attended to and carry no label.

        mask = (labels == -100) & (attention_mask != 0)

    Args:
        labels: int64, (batch, length), -100 where there is no loss
        attention_mask: (batch, length), 0 on padding; None, or any other shape, counts every token as attended
    """
    mask = labels == IGNORED_LABEL
    if attention_mask is not None and attention_mask.shape == labels.shape:
        mask = mask & attention_mask.to(device=labels.device, dtype=torch.bool)
    return mask


@torch.compiler.assume_constant_result
def trainer_of_step() -> str | None:
    """Returns the class of the transformers Trainer whose step runs in this thread; None outside of one.

    A Trainer has no argument, attribute or event that says so to a model, hence the look at the callers. Callbacks and
    metrics run outside of the steps. torch.compile takes the answer of the time when it traces.
    """
    trainers = sys.modules.get("transformers.trainer")
    if trainers is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in STEPS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, trainers.Trainer):
                return type(owner).__name__
        frame = frame.f_back
    return None
