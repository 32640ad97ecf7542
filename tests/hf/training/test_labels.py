"""Empty batches are refused before the forward; unlabelled tokens inside a response are warned of once."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer

from preft_hf.forward.label_checks import gaps_in_responses
from tests.hf.cases import prompt
from tests.hf.training.test_trainers import arguments, samples, tokenizer
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EMPTY = r"rows \[0, 1\] of the batch have no label.*0 / 0.*raise max_length"


def empty_batch() -> dict[str, Tensor]:
    """Two rows whose responses were cut away. A row's first label is in no loss."""
    ids = prompt(2, 5)
    labels = torch.full_like(ids, -100)
    labels[1, 0] = ids[1, 0]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_batch_without_a_label_is_refused(explicit, mode):
    model, inputs = make_preft(make_base()).train(mode == "train"), empty_batch()
    given = {"prefill_mask": torch.ones_like(inputs["input_ids"], dtype=torch.bool)} if explicit else {}
    with pytest.raises(ValueError, match=EMPTY):
        model(**inputs, **given)
    with pytest.raises(ValueError, match=EMPTY):
        model(**inputs, **given, num_items_in_batch=torch.tensor(0))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_batch_without_a_label_is_refused_in_a_compiled_step(explicit, fresh_compiler):
    model, inputs = make_preft(make_base(num_hidden_layers=1)).train(), empty_batch()
    given = {"prefill_mask": torch.tensor([[True] * 3 + [False] * 2] * 2)} if explicit else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=EMPTY):
        compiled(**inputs, **given)


def test_a_trainer_stops_before_the_adapter_is_lost(tmp_path):
    rows = [{name: values[:5] for name, values in row.items()} for row in samples()]
    model = make_preft(make_base(), init_weights=True)
    args, collator = arguments(tmp_path), DataCollatorForSeq2Seq(tokenizer())
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3\] of the batch have no label"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_row_without_a_label_changes_nothing():
    """Neither in its batch, nor in a batch alone that shares its optimizer step with others."""
    model = make_preft(make_base()).train()
    row = samples(1)[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    inputs = {"input_ids": torch.cat([ids, ids]), "labels": torch.cat([labels, torch.full_like(labels, -100)])}
    expected = model(input_ids=ids, labels=labels).loss
    assert abs(model(**inputs).loss - expected) < 1e-6
    for count in (3, torch.tensor(3)):
        assert model(input_ids=ids, labels=inputs["labels"][1:], num_items_in_batch=count).loss == 0


def test_accumulated_batches_may_be_empty(tmp_path):
    rows = samples(8)
    for row in rows[::2]:
        row["labels"] = [-100] * len(row["labels"])
    model, collator = make_preft(make_base(), init_weights=True), DataCollatorForSeq2Seq(tokenizer())
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=2)
    Trainer(model, args, train_dataset=rows, data_collator=collator).train()  # type: ignore[arg-type]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


END, THOUGHT = 2, 9
"""The model's end-of-turn token, and another."""
# each: tokens, whether they have a label, and runs and tokens without one inside a response
GAPS: dict[str, tuple[list[int], list[int], tuple[int, int]]] = {
    "one response": ([5, 6, 7, 8, END], [0, 0, 1, 1, 1], (0, 0)),
    "a thought": ([5, 6, 7, THOUGHT, 8, END], [0, 0, 1, 0, 1, 1], (1, 1)),
    "two thoughts": ([5, 7, THOUGHT, 8, THOUGHT, 9, 8, END], [0, 1, 0, 1, 0, 0, 1, 1], (2, 3)),
    "two turns": ([5, 6, 7, END, 5, 6, 8, END], [0, 0, 1, 1, 0, 0, 1, 1], (0, 0)),
    "a newline ends a turn": ([5, 7, END, 3, 5, 6, 8, END, 3], [0, 1, 1, 1, 0, 0, 1, 1, 1], (0, 0)),
    "no loss on the end of a turn": ([5, 7, END, 5, 6, 8, END], [0, 1, 0, 0, 0, 1, 0], (0, 0)),
    "two turns and a thought": (
        [5, 7, THOUGHT, 8, END, 6, 7, THOUGHT, 8, END],
        [0, 1, 0, 1, 1, 0, 1, 0, 1, 1],
        (2, 2),
    ),
    "another end of a turn": ([5, 7, 4, 5, 6, 8, 4], [0, 1, 1, 0, 0, 1, 1], (0, 0)),
    "another end, without loss": ([5, 7, 4, 5, 6, 8, 4], [0, 1, 0, 0, 0, 1, 0], (0, 0)),
    "an end of text after turns that end otherwise": ([5, 7, 4, 5, 6, 8, 4, END], [0, 1, 1, 0, 0, 1, 1, 1], (0, 0)),
    "the same, end of text without loss": ([5, 7, 4, 5, 6, 8, 4, END], [0, 1, 1, 0, 0, 1, 1, 0], (0, 0)),
    "an end of text before such turns": ([END, 5, 7, 4, 5, 6, 8, 4], [0, 0, 1, 1, 0, 0, 1, 1], (0, 0)),
    "a thought between sentences": (
        [5, 7, 4, 8, 4, THOUGHT, 8, 4, END],
        [0, 1, 1, 1, 1, 0, 1, 1, 1],
        (1, 1),
    ),
    "no end": ([5, 7, 5, 6, 8], [0, 1, 0, 0, 1], (1, 2)),
}


def row_of(name: str, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Returns the named row, with padding on either side."""
    tokens, labelled, _ = GAPS[name]
    ids = torch.tensor([[END] * left + tokens + [END] * right])
    attended = torch.tensor([[0] * left + [1] * len(tokens) + [0] * right])
    has_label = torch.tensor([[0] * left + labelled + [0] * right]).bool()
    return {"input_ids": ids, "labels": ids.masked_fill(~has_label, -100), "attention_mask": attended}


def found(inputs: dict[str, Tensor], positions: Tensor | None = None) -> tuple[int, int, int] | None:
    mask = (inputs["labels"] == -100) & inputs["attention_mask"].bool()
    return gaps_in_responses(mask, inputs["labels"], positions, inputs["input_ids"], [END])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 3)])
@pytest.mark.parametrize("name", GAPS)
def test_unlabelled_tokens_inside_a_response_are_counted(name, left, right):
    runs, tokens = GAPS[name][2]
    assert found(row_of(name, left, right)) == ((1, runs, tokens) if runs else None)


def test_sequences_of_a_packed_row_are_told_apart():
    for first in GAPS:
        for second in GAPS:
            pair = [row_of(first), row_of(second)]
            whole = {name: torch.cat([row[name] for row in pair], 1) for name in pair[0]}
            positions = torch.cat([torch.arange(row["labels"].shape[1]) for row in pair])[None]
            if any("another" in name or "end of text" in name or name == "no end" for name in (first, second)):
                # beside a sequence whose turns have another end these look like thoughts
                continue
            runs, tokens = (a + b for a, b in zip(GAPS[first][2], GAPS[second][2], strict=True))
            assert found(whole, positions) == ((1, runs, tokens) if runs else None), (first, second)


def test_they_are_warned_of_once():
    model, other = make_preft(make_base()).train(), make_preft(make_base()).train()
    with pytest.warns(UserWarning, match=r"^2 runs \(3 tokens\) in 1 rows of a batch have label -100 .*prefill_mask"):
        model(**row_of("two thoughts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**row_of("a thought"))
        other(**row_of("two turns"))
        # said outright
        other(**row_of("a thought"), prefill_mask=torch.tensor([[True, True, False, False, False, False]]))


def test_they_are_warned_of_in_a_compiled_step(fresh_compiler):
    model: Any = make_preft(make_base(num_hidden_layers=1)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"^runs of tokens in a batch have label -100 .*prefill_mask"):
        compiled(**row_of("a thought"))
