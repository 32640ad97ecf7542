"""The prefill mask of a training batch, read from its labels, and the check that each label has a prompt."""

import warnings
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


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


def check_prompts(
    mask: Tensor, labels: Tensor, attention_mask: Any, position_ids: Any, input_ids: Any = None
) -> Tensor:
    """Returns the mask, once every token in the loss is known to have a prompt token before it in its sequence.

    From a token that has none the adapter could never learn. A sequence is a row, or a part of it where the positions
    start anew. Padding-free rows have position ids instead of an attention mask, and trainers take the label off the
    first token of each sequence in them, so there a prompt token at position 0 does not count.

    Also under torch.compile, where it is one operation in the graph, which a compiled `fullgraph=True` step allows.

    Args:
        mask: bool, (batch, length), True on prompt tokens
        labels: int64, (batch, length)
        attention_mask: of the forward; None in padding-free rows
        position_ids: of the forward; of another shape than labels they are left out of account
        input_ids: of the forward, for the warning; None, or of another shape, leaves it out
    Returns:
        bool, (batch, length); the mask itself, under torch.compile a copy
    Raises:
        ValueError: naming the rows.
    Warns:
        if all prompt tokens are one and the same token that also follows labelled ones, as in plain text whose
        collator took the label off each end of text along with the padding.
    """
    positions = position_ids if isinstance(position_ids, Tensor) and position_ids.shape == mask.shape else None
    tokens = input_ids if isinstance(input_ids, Tensor) and input_ids.shape == mask.shape else None
    padding_free = attention_mask is None and positions is not None
    if torch.compiler.is_compiling():
        return _checked_in_graph(mask, labels, positions, tokens, padding_free)
    _check_prompts(mask, labels, positions, tokens, padding_free)
    return mask


def _check_prompts(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool
) -> None:
    # a row's first label is in no loss: nothing stands before it that could predict it
    scored = labels != IGNORED_LABEL
    scored[:, :1] = False
    prompts, starts = mask, torch.zeros_like(mask)
    if positions is not None:
        # a position repeated above 0 is a gap in the attention mask
        starts[:, 1:] = (positions[:, 1:] < positions[:, :-1]) | (positions[:, 1:] == 0)
        prompts = mask & (positions != 0) if padding_free else mask
    without = (scored & (_count_before(prompts, starts) == 0)).any(1)
    alike = without.new_zeros(1)
    if tokens is not None and tokens.numel():
        highest, lowest = tokens.where(prompts, tokens.amin()).amax(), tokens.where(prompts, tokens.amax()).amin()
        alike = ((highest == lowest) & (prompts & (_count_before(scored, starts) > 0)).any())[None]
    # one wait for the device
    *rows, is_alike = torch.cat([without, alike]).tolist()
    if any(rows):
        raise ValueError(
            f"rows {[i for i, fault in enumerate(rows) if fault]} of the batch have labels with no prompt token "
            f"(label {IGNORED_LABEL} and attended) before them in their sequence, and a prefill-only adapter acts on "
            "prompt tokens alone, so it would not learn from them: train on prompt and response pairs with label "
            f"{IGNORED_LABEL} on the prompt, packed whole if at all (packing_strategy='bfd'), or pass prefill_mask"
        )
    if is_alike and tokens is not None:
        warnings.warn(
            f"all prompt tokens of a batch are the token {int(tokens[prompts][0])}, and it follows labelled tokens "
            "too: if that is plain text, its collator took the label off the end-of-text token because pad_token is "
            "eos_token, and the adapter learns on that token alone; train on prompt and response pairs",
            stacklevel=2,
        )


def _count_before(counted: Tensor, starts: Tensor) -> Tensor:
    """Returns how many tokens up to and with each one are counted, from the start of its sequence in the row."""
    total = counted.cumsum(1)
    return total - (total - counted.long()).where(starts, 0).cummax(1).values


# it waits for the device, which a CUDA graph could not hold; torch 2.7 knows no such tag, nor tags here
_UNSAFE: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("preft_hf::checked_mask", mutates_args=(), **_UNSAFE)
def _checked_in_graph(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool
) -> Tensor:
    """Returns a copy of the mask, so that no compiler drops the check as dead code."""
    _check_prompts(mask, labels, positions, tokens, padding_free)
    return mask.clone()


@_checked_in_graph.register_fake
def _(mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool) -> Tensor:
    return torch.empty_like(mask)
