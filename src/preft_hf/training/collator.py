"""A data collator that adds the prefill mask, for trainers that withhold labels from the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from preft_hf.forward.labels import (
    IGNORED_LABEL,
    MASK_COLUMN,
    GapWarning,
    check_prompts,
    mask_from_labels,
)

# columns of tokenized rows that tell prompt from response, best first; 1 on the prompt, or 1 on the response
COLUMNS = {MASK_COLUMN: True, "assistant_masks": False, "completion_mask": False}


class PrefillMaskCollator:
    """Adds `prefill_mask`, bool (batch, length), to the batches of another collator.

    For labels that do not reach the model (label smoothing, `compute_loss_func`, custom losses, `compute_metrics` in
    TRL's SFTTrainer and DPOTrainer), and for labels that do not tell prompt from response, as where the loss leaves
    out a part of the response. The prompt is read from a column of the rows: `prefill_mask` (1 on the prompt),
    `assistant_masks` (1 on the response, as `apply_chat_template(return_assistant_tokens_mask=True)` returns it) or
    `completion_mask` (1 on the response). Otherwise it is read from `labels`, or from the `completion_mask` of TRL's
    preference collators.

        Trainer(..., data_collator=PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer)))

    A Trainer keeps these columns with `remove_unused_columns=False`.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator
        self._gaps = GapWarning()

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Returns the inner collator's batch with its mask.

        Raises:
            ValueError: the batch has nothing to read the prompt from, a label without a prompt, or a column that does
                not fit its tokens.
        """
        features, column, masks = _split(features)
        batch = dict(self.collator(features))
        if column is not None:
            batch[MASK_COLUMN] = _placed(masks, batch, column)
            return batch
        labels, completion = batch.get("labels"), batch.get("completion_mask")
        if not isinstance(labels, Tensor) and isinstance(completion, Tensor):
            labels = batch["input_ids"].masked_fill(completion == 0, IGNORED_LABEL)
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"the batch has {', '.join(sorted(batch))} but no labels tensor, nor completion_mask: "
                f"PrefillMaskCollator takes the prompt from labels that are {IGNORED_LABEL} there; give it a collator "
                f"that pads labels, such as DataCollatorForSeq2Seq, or rows with a column {MASK_COLUMN}"
            )
        attended, positions, ids = batch.get("attention_mask"), batch.get("position_ids"), batch.get("input_ids")
        mask = mask_from_labels(labels, attended)
        batch[MASK_COLUMN] = check_prompts(mask, labels, attended, positions, ids)
        self._gaps.check(mask, labels, positions, ids)
        return batch


def _split(features: list[Any]) -> tuple[list[Any], str | None, list[Tensor]]:
    """Returns the rows without the columns that tell prompt from response, which column was read, and its masks."""
    if not features or not isinstance(features[0], Mapping) or "input_ids" not in features[0]:
        return features, None, []
    column = next((name for name in COLUMNS if name in features[0]), None)
    if column is None:
        return features, None, []
    rest = [{name: value for name, value in row.items() if name not in COLUMNS} for row in features]
    lacking = [i for i, row in enumerate(features) if column not in row]
    if lacking:
        raise ValueError(f"rows {lacking} of the batch have no {column} and row 0 has one: give it to all rows")
    masks = [torch.as_tensor(row[column]).bool() for row in features]
    return rest, column, masks if COLUMNS[column] else [~mask for mask in masks]


def _placed(masks: Sequence[Tensor], batch: Mapping[str, Any], column: str) -> Tensor:
    """Returns the rows' masks where the collator put their tokens: padded on either side, or one after the other."""
    ids, attended = batch["input_ids"], batch.get("attention_mask")
    lengths = [len(mask) for mask in masks]
    if len(ids) == 1 and ids.numel() == sum(lengths):
        return torch.cat(list(masks)).view_as(ids)
    placed = torch.zeros(ids.shape, dtype=torch.bool)
    if isinstance(attended, Tensor) and attended.shape == ids.shape:
        if attended.sum(1).tolist() == lengths:
            placed[attended.bool()] = torch.cat(list(masks))
            return placed
    elif len(ids) == len(masks) and all(length == ids.shape[1] for length in lengths):
        return torch.stack(list(masks))
    raise ValueError(
        f"{column} has {lengths} tokens in the rows of a batch whose input_ids have shape {tuple(ids.shape)}"
        + ("" if attended is None else f" with {attended.sum(1).tolist()} attended")
        + f": give one {column} value for each token of input_ids, and a collator that pads with attention_mask 0"
    )
