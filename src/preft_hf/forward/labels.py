"""The labels rule: which tokens of a training batch are prompt, and the checks that its labels can be learned from."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from preft_hf.forward.label_checks import GAP, IGNORED_LABEL, check_loss, check_prompts, gaps_in_responses, shaped
from preft_hf.layers.phase import SharedPhase, declared, phase_of_mask

MASK_COLUMN = "prefill_mask"
STEPS = frozenset({"compute_loss", "prediction_step", "training_step"})
# methods of a Trainer that take a dataset, and the name of the argument
DATASET_ARGUMENTS = {"evaluate": "eval_dataset", "predict": "test_dataset"}


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
        self._known_datasets: set[int] = set()

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
        if not torch.compiler.is_compiling():
            if declared() is not None:
                raise ValueError(
                    "labels were given inside preft_phase or preft_scoring: labels already tell prompt from response "
                    "tokens; leave one out"
                )
            self._check_column()
        mask = mask_from_labels(labels, attention_mask if isinstance(attention_mask, Tensor) else None)
        positions, ids = values.get("position_ids"), values.get("input_ids")
        mask = check_prompts(check_loss(mask, values), labels, attention_mask, positions, ids, self._gaps.ends)
        if not torch.compiler.is_compiling():
            self._gaps.check(mask, labels, positions, ids)
        return phase_of_mask(mask)

    def _check_column(self) -> None:
        """Raises a ValueError if a Trainer dropped the mask that its dataset has. Reads a row of a dataset once."""
        step = _step()
        if step is None:
            return
        trainer, dataset = step
        if id(dataset) in self._known_datasets:
            return
        if has_mask_column(dataset):
            raise ValueError(dropped_column(trainer))
        if not isinstance(dataset, Sequence) and getattr(dataset, "column_names", None) is None:
            self._known_datasets.add(id(dataset))


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

    torch.compile keeps what it finds when it traces.
    """
    step = _step()
    return None if step is None else type(step[0]).__name__


def _step() -> tuple[Any, Any] | None:
    """Returns the Trainer whose step runs in this thread and the dataset of the step; None outside of one.

    A Trainer has no argument, attribute or event that says so to a model, hence the look at the callers. Callbacks and
    metrics run outside of the steps. Nor does it keep the dataset given to `evaluate` or `predict`, and its dataloader
    has the dataset without the columns that it removed.
    """
    trainers = sys.modules.get("transformers.trainer")
    frame, trainer, step, given = sys._getframe(1), None, "", None
    while trainers is not None and frame is not None:
        name = frame.f_code.co_name
        if name in STEPS or name in DATASET_ARGUMENTS:
            caller = frame.f_locals.get("self")
            if isinstance(caller, trainers.Trainer):
                if name in STEPS:
                    # compute_loss runs in both kinds of step
                    trainer, step = caller, name
                elif given is None:
                    given = frame.f_locals.get(DATASET_ARGUMENTS[name])
        frame = frame.f_back
    if trainer is None:
        return None
    is_evaluation = step == "prediction_step"
    dataset = (trainer.eval_dataset if given is None else given) if is_evaluation else trainer.train_dataset
    if isinstance(dataset, str):
        # evaluate takes the name of one of its datasets
        dataset = trainer.eval_dataset[dataset]
    if dataset is None:
        # a subclass has dataloaders without a dataset of the Trainer
        loaders = trainer.callback_handler
        dataset = getattr(loaders.eval_dataloader if is_evaluation else loaders.train_dataloader, "dataset", None)
    return trainer, dataset


def has_mask_column(dataset: Any) -> bool:
    """Returns whether a dataset, or one of a dict of datasets, has a column prefill_mask.

    A dataset that does not name its columns is asked for its first row.
    """
    if isinstance(dataset, Mapping):
        return any(has_mask_column(part) for part in dataset.values())
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        columns = _first_row(dataset)
    return isinstance(columns, (Mapping, Sequence)) and MASK_COLUMN in columns


def _first_row(dataset: Any) -> Any:
    """Returns the first row of a dataset; None without one, and for an iterator, which would lose the row."""
    # torch's base class has a __getitem__ that raises
    if isinstance(dataset, IterableDataset):
        rows = iter(dataset)
        return None if rows is dataset else next(rows, None)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        return dataset[0]
    return None


def dropped_column(trainer: Any) -> str:
    """Returns what is said of a prefill_mask column that does not reach the model."""
    kind, collator = type(trainer).__name__, type(trainer.data_collator).__name__
    return (
        f"the dataset has a column {MASK_COLUMN} that {kind} and its {collator} do not pass to the model: set "
        "remove_unused_columns=False and data_collator=PrefillMaskCollator(collator), around a collator for the other "
        "columns; or remove the column, to train by the labels"
    )
