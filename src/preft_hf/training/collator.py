"""A data collator that adds the prefill mask, for trainers that withhold labels from the model."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from preft_hf.forward.labels import IGNORED_LABEL, check_prompts, mask_from_labels


class PrefillMaskCollator:
    """Adds `prefill_mask`, bool (batch, length), to the batches of another collator.

    For the cases where labels do not reach the model: label smoothing, `compute_loss_func`, losses of your own, and
    `compute_metrics` in TRL's SFTTrainer and DPOTrainer. The prompt is read from `labels`, or from the
    `completion_mask` of TRL's preference collators.

        Trainer(..., data_collator=PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer)))
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Returns the inner collator's batch with its mask.

        Raises:
            ValueError: the batch has nothing to read the prompt from, or a label without a prompt.
        """
        batch = dict(self.collator(features))
        labels, completion = batch.get("labels"), batch.get("completion_mask")
        if not isinstance(labels, Tensor) and isinstance(completion, Tensor):
            labels = batch["input_ids"].masked_fill(completion == 0, IGNORED_LABEL)
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"the batch has {', '.join(sorted(batch))} but no labels tensor, nor completion_mask: "
                f"PrefillMaskCollator takes the prompt from labels that are {IGNORED_LABEL} there; give it a collator "
                "that pads labels, such as DataCollatorForSeq2Seq"
            )
        attended, positions = batch.get("attention_mask"), batch.get("position_ids")
        mask = mask_from_labels(labels, attended)
        batch["prefill_mask"] = check_prompts(mask, labels, attended, positions, batch.get("input_ids"))
        return batch
