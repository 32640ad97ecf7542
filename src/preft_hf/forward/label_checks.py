"""Checks that a training batch's labels can be learned from by an adapter that acts on the prompt alone."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
# between a turn's end-of-turn token and the next turn, chat templates write a newline at most
TOKENS_AFTER_TURN = 2
GAP = (
    f"have label {IGNORED_LABEL} between labelled tokens, and no end-of-turn token before them: they count as prompt, "
    "so they are adapted; if they are response tokens that only the loss leaves out, serving runs them without the "
    "adapter: pass prefill_mask (PrefillMaskCollator reads it from a column prefill_mask, assistant_masks or "
    "completion_mask)"
)
REMEDY = (
    f"train on prompt and response pairs with label {IGNORED_LABEL} on the prompt: prompt and completion columns or "
    "assistant_only_loss=True in TRL, expand_turns(messages) for chats, rows packed whole if at all "
    "(packing_strategy='bfd'); or pass prefill_mask"
)


def check_loss(mask: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Returns the mask, once some token of the batch is known to be in the loss, which would be 0 / 0 without.

    A row's first label is in no loss: nothing stands before it that could predict it. Rows without a label are
    accepted beside rows with labels, and beside other batches of the same optimizer step (`num_items_in_batch`).

    Args:
        mask: bool, (batch, length), True on prompt tokens
        values: the arguments of the forward, by name; without labels of the mask's shape there is no check
    Raises:
        ValueError: naming the rows.
    """
    labels, num_items = shaped(values.get("labels"), mask), values.get("num_items_in_batch")
    if labels is None:
        return mask
    if num_items is not None:
        num_items = torch.as_tensor(num_items)
    if torch.compiler.is_compiling():
        return _loss_checked_in_graph(mask, labels, num_items)
    _check_loss(labels, num_items)
    return mask


def _check_loss(labels: Tensor, num_items: Tensor | None) -> None:
    if (labels[:, 1:] != IGNORED_LABEL).any() or (num_items is not None and bool((num_items > 0).all())):
        return
    raise ValueError(
        f"rows {list(range(len(labels)))} of the batch have no label but {IGNORED_LABEL}, and it has no other rows: "
        "its loss is 0 / 0, which would make the adapter NaN. A response is cut away where its prompt alone fills the "
        "maximum length: raise max_length, shorten the prompts, or leave these rows out of the data"
    )


def check_prompts(
    mask: Tensor,
    labels: Tensor,
    attention_mask: Any,
    position_ids: Any,
    input_ids: Any = None,
    ends: Sequence[int] = (),
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
        position_ids: of the forward; ignored if their shape is not that of labels
        input_ids: of the forward, for the warnings; ignored if None or of another shape
        ends: the known end-of-turn tokens, for the warning of `gaps_in_responses` under torch.compile
    Returns:
        bool, (batch, length); the mask itself, under torch.compile a copy
    Raises:
        ValueError: naming the rows.
    Warns:
        if all prompt tokens are one and the same token that also follows labelled ones, as in plain text whose
        collator took the label off each end of text along with the padding.
    """
    positions, tokens = shaped(position_ids, mask), shaped(input_ids, mask)
    padding_free = attention_mask is None and positions is not None
    if torch.compiler.is_compiling():
        return _checked_in_graph(mask, labels, positions, tokens, padding_free, list(ends))
    _check_prompts(mask, labels, positions, tokens, padding_free)
    return mask


def shaped(given: Any, mask: Tensor) -> Tensor | None:
    return given if isinstance(given, Tensor) and given.shape == mask.shape else None


def _check_prompts(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool
) -> None:
    scored = labels != IGNORED_LABEL
    scored[:, :1] = False
    starts = _starts(mask, positions)
    prompts = mask & (positions != 0) if padding_free and positions is not None else mask
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
            f"prompt tokens alone, so it would not learn from them: {REMEDY}"
        )
    if is_alike and tokens is not None:
        warnings.warn(
            f"all prompt tokens of a batch are the token {int(tokens[prompts][0])}, and it follows labelled tokens "
            "too: if that is plain text, its collator took the label off the end-of-text token because pad_token is "
            "eos_token, and the adapter learns on that token alone; train on prompt and response pairs",
            stacklevel=2,
        )


def gaps_in_responses(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, ends: Sequence[int]
) -> tuple[int, int, int] | None:
    """Returns how many rows, runs and tokens are unlabelled inside a response; None if there are none.

    A run between two labelled tokens of a sequence begins a turn if an end-of-turn token is in it or among the last
    two tokens before it. If no run of the batch does, the known tokens may be the end of text alone. The tokens that
    end its sequences then count as end-of-turn tokens, provided that each run begins a turn by them or that the batch
    has no known one.

    Args:
        mask, labels, positions, tokens: as of `check_prompts`, of one shape; None for positions or tokens: not known
        ends: the known end-of-turn tokens
    """
    labelled, starts = labels != IGNORED_LABEL, _starts(mask, positions)
    last = torch.zeros_like(mask)
    # where a sequence stops, seen from its end
    last[:, -1:], last[:, :-1] = True, starts[:, 1:]
    later = _count_before(labelled.flip(1), last.flip(1)).flip(1)
    gap = mask & (_count_before(labelled, starts) > 0) & (later > 0)
    if not gap.any():
        return None
    begins = gap & ~_moved(gap, 1)
    run = begins.flatten().cumsum(0).view_as(mask)
    if tokens is None:
        is_open = torch.ones(int(run.max()) + 1, dtype=torch.bool, device=mask.device)
    else:
        known = torch.isin(tokens, torch.tensor(ends, device=tokens.device, dtype=tokens.dtype)) & (mask | labelled)
        is_open = _open_runs(known, gap, begins, run)
        if is_open[1:].all():
            final = labelled & (later == 1)
            is_end = torch.isin(tokens, _closing_tokens(tokens, labelled, final, known, mask & ~starts))
            inferred = _open_runs(is_end & (mask | labelled), gap, begins, run)
            if not known.any() or not inferred[1:].any():
                is_open = inferred
    found = gap & is_open[run]
    if not found.any():
        return None
    return int(found.any(1).sum()), int((begins & found).sum()), int(found.sum())


def _open_runs(is_end: Tensor, gap: Tensor, begins: Tensor, run: Tensor) -> Tensor:
    """Returns bool (runs + 1,), True on the runs that begin no turn. Runs are counted from 1."""
    is_open = torch.ones(int(run.max()) + 1, dtype=torch.bool, device=run.device)
    is_open[run[gap & is_end]] = False
    for distance in range(1, TOKENS_AFTER_TURN + 1):
        is_open[run[begins & _moved(is_end, distance)]] = False
    return is_open


def _closing_tokens(tokens: Tensor, labelled: Tensor, final: Tensor, known: Tensor, prompt: Tensor) -> Tensor:
    """Returns the tokens that end the sequences of a batch.

    Those are the last labelled token, the prompt token after it, and the token before a known end, which may be an
    end of text appended to the last turn. The latter counts only if no response has it elsewhere, as a full stop would
    be.
    """
    before = labelled & _moved(final & known, -1)
    inside = labelled & _moved(labelled & ~known, -1)
    before = before & ~torch.isin(tokens, tokens[inside])
    return tokens[final | (_moved(final, 1) & prompt) | before]


def _starts(mask: Tensor, positions: Tensor | None) -> Tensor:
    """Returns bool (batch, length), True on the first token of each sequence in a row after the first sequence."""
    starts = torch.zeros_like(mask)
    if positions is not None:
        # a position repeated above 0 is a gap in the attention mask
        starts[:, 1:] = (positions[:, 1:] < positions[:, :-1]) | (positions[:, 1:] == 0)
    return starts


def _moved(flags: Tensor, distance: int) -> Tensor:
    """Returns the flags of the tokens that stand so many tokens before in the row; after, if negative."""
    return functional.pad(flags, (distance, -distance))


def _count_before(counted: Tensor, starts: Tensor) -> Tensor:
    """Returns how many tokens up to and with each one are counted, from the start of its sequence in the row."""
    total = counted.cumsum(1)
    return total - (total - counted.long()).where(starts, 0).cummax(1).values


# it waits for the device, which a CUDA graph could not hold; torch 2.7 knows no such tag, nor tags here
_UNSAFE: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("preft_hf::loss_checked_mask", mutates_args=(), **_UNSAFE)
def _loss_checked_in_graph(mask: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
    """Returns a copy of the mask, so that no compiler drops the check as dead code."""
    _check_loss(labels, num_items)
    return mask.clone()


@_loss_checked_in_graph.register_fake
def _(mask: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
    return torch.empty_like(mask)


@torch.library.custom_op("preft_hf::checked_mask", mutates_args=(), **_UNSAFE)
def _checked_in_graph(
    mask: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    padding_free: bool,
    ends: list[int],
) -> Tensor:
    """Returns a copy of the mask, so that no compiler drops the check as dead code."""
    _check_prompts(mask, labels, positions, tokens, padding_free)
    if gaps_in_responses(mask, labels, positions, tokens, ends) is not None:
        # without counts: Python shows the same text once
        warnings.warn(f"runs of tokens in a batch {GAP}", stacklevel=2)
    return mask.clone()


@_checked_in_graph.register_fake
def _(
    mask: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    padding_free: bool,
    ends: list[int],
) -> Tensor:
    return torch.empty_like(mask)
