"""A prefill_mask column reaches the model, or the first step says that it does not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import DataCollatorForSeq2Seq, DynamicCache, Trainer

from preft_hf import PrefillMaskCollator
from preft_hf.forward.caches import cache_argument
from preft_hf.layers.phase import ForwardPhase, PrefillRows
from preft_hf.training.trl import check_trainer
from tests.hf.cases import case
from tests.hf.training.test_trainers import arguments, tokenizer
from tests.hf.training.test_trl import settings
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
# prompts of 4 tokens, responses of which the loss leaves out the second and third token
IDS = [[5, 6, 7, 8, 9, 10, 11, 12, 2], [15, 16, 17, 18, 19, 20, 21, 2]]
ROWS: list[dict[str, list[int]]] = [
    {
        "input_ids": ids,
        "labels": [-100] * 4 + [ids[4]] + [-100] * 2 + ids[7:],
        "attention_mask": [1] * len(ids),
        "prefill_mask": [1] * 4 + [0] * (len(ids) - 4),
    }
    for ids in IDS
]
# the same, with labels on the whole responses
WITHOUT = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:], "attention_mask": [1] * len(ids)} for ids in IDS]
MESSAGE = r"has a column prefill_mask that \w*Trainer .*remove_unused_columns=False and data_collator=Prefill"


class Rows(TorchDataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return ROWS[i]


class Stream(TorchIterableDataset):
    """Has a length, and a __getitem__ of its base class that raises."""

    def __init__(self, rows: list[dict[str, list[int]]] = ROWS):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self.rows)


class Once(TorchIterableDataset):
    """Its rows can be read once."""

    def __init__(self, rows: list[dict[str, list[int]]]):
        self.rows = iter(rows)

    def __iter__(self) -> "Once":
        return self

    def __next__(self) -> dict[str, list[int]]:
        return next(self.rows)


def stream(rows: list[dict[str, list[int]]] = ROWS) -> IterableDataset:
    """As `load_dataset(streaming=True).map(tokenize)` is."""
    return Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)


DATASETS = {
    "Dataset": Dataset.from_list(ROWS),
    "list": ROWS,
    "torch": Rows(),
    "mapped stream": stream(),
    "generator": IterableDataset.from_generator(lambda: iter(ROWS)),
    "torch stream": Stream(),
}


def plain(path, dataset: Any, wrap: bool, **others: Any) -> Any:
    collator: Any = DataCollatorForSeq2Seq(tokenizer())
    args = arguments(path, max_steps=1, remove_unused_columns=not wrap, **others)
    how = {"train_dataset": dataset, "eval_dataset": dataset}
    return Trainer(
        make_preft(make_base()), args, data_collator=PrefillMaskCollator(collator) if wrap else collator, **how
    )


def sft(path, dataset: Any, wrap: bool, **others: Any) -> Any:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator: Any = DataCollatorForLanguageModeling(pad_token_id=0)
    args = SFTConfig(**settings(path) | {"max_steps": 1}, remove_unused_columns=not wrap, max_length=64, **others)
    return SFTTrainer(
        make_preft(make_base()),
        args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer(),
        data_collator=PrefillMaskCollator(collator) if wrap else collator,
    )


def two_phase_loss() -> Tensor:
    """The loss by hand: prompts adapted, every response token base, the loss on those that have a label."""
    c, losses = case("llama", "lora"), []
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        cache = DynamicCache(config=c.base.config)
        with torch.no_grad():
            first = c.adapted(input_ids=ids[:, :4], **cache_argument(cache), use_cache=True).logits[:, -1:]
            rest = c.base(input_ids=ids[:, 4:], **cache_argument(cache), use_cache=True).logits
        logits = torch.cat([first, rest[:, :-1]], 1)
        losses.append(cross_entropy(logits[0][labels[4:] >= 0], labels[4:][labels[4:] >= 0], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("make", "kind"), [(plain, kind) for kind in DATASETS] + [(sft, "Dataset"), (sft, "mapped stream")]
)
def test_a_dropped_mask_is_refused_and_a_kept_one_is_trained_with(make, kind, tmp_path):
    trainer = make(tmp_path, DATASETS[kind], wrap=False)
    for refused in (lambda: check_trainer(trainer), trainer.evaluate, trainer.train):
        with pytest.raises(ValueError, match=MESSAGE):
            refused()
    trainer = make(tmp_path, DATASETS[kind], wrap=True)
    check_trainer(trainer)
    assert abs(trainer.evaluate()["eval_loss"] - two_phase_loss()) < 1e-4
    trainer.train()


def test_streams_do_not_name_their_columns():
    assert [getattr(DATASETS[kind], "column_names", None) for kind in ("mapped stream", "generator")] == [None, None]


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_the_dataset_given_to_evaluate_or_predict_is_looked_at(method, tmp_path):
    trainer = plain(tmp_path, WITHOUT, wrap=False)
    run = getattr(trainer, method)
    for dataset in DATASETS.values():
        run(Dataset.from_list(WITHOUT))
        with pytest.raises(ValueError, match=MESSAGE):
            run(dataset)
    trainer.train()


def test_named_datasets_of_evaluate_are_looked_at(tmp_path):
    trainer = plain(tmp_path, WITHOUT, wrap=False)
    named = {"first": WITHOUT, "second": DATASETS["mapped stream"]}
    trainer.eval_dataset = named
    trainer.evaluate("first")
    for given in ("second", None, named):
        with pytest.raises(ValueError, match=MESSAGE):
            trainer.evaluate(given)


@pytest.mark.parametrize("kind", ["mapped stream", "torch stream", "once"])
def test_a_stream_without_the_column_keeps_its_rows(kind, tmp_path):
    make: Any = {"mapped stream": stream, "torch stream": Stream, "once": Once}[kind]
    args = {"max_steps": 4, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    expected, found = (
        Trainer(
            make_preft(make_base(), init_weights=True),
            arguments(tmp_path, **args),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer()),
        )
        for rows in (Stream(WITHOUT * 2), make(WITHOUT * 2))
    )
    expected.train()
    found.train()
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (expected, found)]
    assert losses[0] == losses[1]
    loss = expected.evaluate(Stream(WITHOUT))["eval_loss"]
    assert found.evaluate(make(WITHOUT))["eval_loss"] == loss


def test_a_collator_that_drops_the_mask_is_refused(tmp_path):
    """TRL's keeps the columns it knows, whatever remove_unused_columns is."""
    trainer = sft(tmp_path, DATASETS["Dataset"], wrap=False)
    trainer.args.remove_unused_columns = False
    with pytest.raises(ValueError, match="do not pass to the model"):
        trainer.train()


@pytest.mark.parametrize("padding", ["right", "left", "free"])
@pytest.mark.parametrize("column", ["prefill_mask", "assistant_masks", "completion_mask", "all"])
def test_the_collator_places_the_mask_where_the_tokens_are(column, padding):
    words = tokenizer()
    words.padding_side = "left" if padding == "left" else "right"
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        response = [1 - value for value in row["prefill_mask"]]
        masks = {"prefill_mask": row["prefill_mask"], "assistant_masks": response, "completion_mask": response}
        if column == "all":
            # a completion may have user turns in it
            masks |= {"completion_mask": [0] + [1] * (len(response) - 1)}
        else:
            masks = {column: masks[column]}
        rows.append({name: value for name, value in row.items() if name != "prefill_mask"} | masks)
    inner: Any = DataCollatorForSeq2Seq(words)
    if padding == "free":
        from transformers import DataCollatorWithFlattening

        inner = DataCollatorWithFlattening()
    batch = PrefillMaskCollator(inner)(rows)
    assert batch["prefill_mask"].dtype == torch.bool
    assert batch["input_ids"][batch["prefill_mask"]].tolist() == IDS[0][:4] + IDS[1][:4]
    assert rows[0].keys() & {"prefill_mask", "assistant_masks", "completion_mask"}


def test_a_column_that_does_not_fit_is_refused():
    collator = PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer()))
    short = [ROWS[0], ROWS[1] | {"prefill_mask": [1]}]
    with pytest.raises(ValueError, match=r"prefill_mask has \[9, 1\] tokens .*shape \(2, 9\) with \[9, 8\] attended"):
        collator(short)
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch have no prefill_mask"):
        collator([ROWS[0], {name: value for name, value in ROWS[1].items() if name != "prefill_mask"}])


def test_what_the_layers_see_is_the_column(tmp_path, monkeypatch):
    seen: list[Any] = []
    begin = ForwardPhase.begin
    monkeypatch.setattr(ForwardPhase, "begin", lambda self, phase: (seen.append(phase), begin(self, phase))[1])
    sft(tmp_path, DATASETS["Dataset"], wrap=True).evaluate()
    assert [phase.mask.sum().item() for phase in seen if isinstance(phase, PrefillRows)] == [8]
