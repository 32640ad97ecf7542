"""A labelled token without a prompt token before it teaches the adapter nothing: refused, whoever made the labels."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, Trainer

from preft_hf.forward.labels import check_prompts, mask_from_labels
from tests.hf.cases import prompt
from tests.hf.training.test_trainers import arguments, samples, tokenizer
from tests.hf.zoo import VOCABULARY, make_base, make_preft

pytestmark = [
    # accelerate and transformers warn of what a CPU lacks and of their own old names
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # the patterns below have unlabelled tokens in every place
    pytest.mark.filterwarnings("ignore:.*between labelled tokens"),
    pytest.mark.filterwarnings("ignore:.*[tT]orch_?[dD]ynamo.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LENGTH = 5


def learns_from_all(model, ids: Tensor, labels: Tensor) -> bool:
    """Whether the loss of each labelled token of a sequence, alone, has a gradient in the adapter."""
    for i in range(1, ids.shape[1]):
        if labels[0, i] == -100:
            continue
        model.zero_grad()
        logits = model(input_ids=ids, prefill_mask=labels == -100).logits
        loss = cross_entropy(logits[:, i - 1], labels[:, i])
        # a row that is all labels has no adapted token at all
        if not loss.requires_grad:
            return False
        loss.backward()
        if not any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()):
            return False
    return True


def is_refused(model, **inputs: Tensor) -> bool:
    try:
        model(**inputs, use_cache=False)
    except ValueError as error:
        return "no prompt token" in str(error)
    return False


def patterns() -> list[Tensor]:
    """All ways to label five tokens."""
    return [torch.tensor([[bool(n >> i & 1) for i in range(LENGTH)]]) for n in range(1, 2**LENGTH)]


@pytest.fixture(scope="module")
def model():
    return make_preft(make_base()).train()


@pytest.fixture(scope="module")
def learned(model) -> list[bool]:
    ids = prompt(1, LENGTH)
    return [learns_from_all(model, ids, ids.masked_fill(~labelled, -100)) for labelled in patterns()]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_row_is_refused_iff_a_label_has_no_gradient(model, learned, padding):
    ids = prompt(1, LENGTH)
    assert True in learned
    assert False in learned
    for labelled, expected in zip(patterns(), learned, strict=True):
        inputs = {"input_ids": ids, "labels": ids.masked_fill(~labelled, -100), "attention_mask": torch.ones_like(ids)}
        if padding != "none":
            fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
            sides = (3, 0) if padding == "left" else (0, 3)
            inputs = {k: torch.nn.functional.pad(v, sides, value=fills[k]) for k, v in inputs.items()}
            if padding == "left":
                # the first token's label is in the loss there, and nothing stands before it
                inputs["labels"][0, 3] = -100
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
                if labelled[0, 0]:
                    continue
        assert is_refused(model, **inputs) != expected, labelled


def test_each_sequence_of_a_padding_free_row_needs_a_prompt(model, learned):
    """Beside a sequence with a prompt; the first token's label is off, as trainers have it, and makes no prompt."""
    ids = prompt(1, LENGTH)
    good = ids.masked_fill(torch.arange(LENGTH) < 3, -100)
    positions = torch.cat([torch.arange(LENGTH)] * 2)[None]
    for labelled, whole in zip(patterns(), learned, strict=True):
        if labelled[0, 0] or not labelled.any():
            continue
        # without its first token the prompt must still stand before every label
        later = labelled[:, 1:]
        expected = whole and not later[0, 0]
        labels = ids.masked_fill(~labelled, -100)
        for order in ([good, labels], [labels, good]):
            row = {"input_ids": torch.cat([ids, ids], 1), "labels": torch.cat(order, 1), "position_ids": positions}
            assert is_refused(model, **row) != expected, labelled


def test_a_gap_in_the_attention_mask_starts_no_sequence(model):
    ids, attended = prompt(1, 7), torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    labels = ids.masked_fill(torch.arange(7) < 5, -100)
    positions = attended.cumsum(-1) - 1
    assert not is_refused(model, input_ids=ids, labels=labels, attention_mask=attended, position_ids=positions)


def texts(ends: bool = True, starts: bool = False) -> list[dict[str, list[int]]]:
    source = torch.Generator().manual_seed(0)
    bodies = [torch.randint(4, VOCABULARY, (7,), generator=source).tolist() for _ in range(16)]
    return [{"input_ids": [2] * starts + body + [2] * ends} for body in bodies]


def grouped(rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": rows[i]["input_ids"] + rows[i + 1]["input_ids"]} for i in range(0, len(rows), 2)]


def train(path, rows: list[Any], pad_is_end: bool, **settings: Any) -> None:
    words = tokenizer()
    if pad_is_end:
        words.pad_token = words.eos_token
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    args = arguments(path, max_steps=2, **settings)
    Trainer(make_preft(make_base()), args, train_dataset=rows, data_collator=collator).train()


@pytest.mark.parametrize("pad_is_end", [True, False])
@pytest.mark.parametrize("rows", [texts(), grouped(texts())], ids=["one text a row", "grouped"])
def test_plain_text_is_refused(rows, pad_is_end, tmp_path):
    with pytest.raises(ValueError, match="no prompt token"):
        train(tmp_path, rows, pad_is_end)


def test_plain_text_is_refused_in_a_compiled_trainer(tmp_path):
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="no prompt token"):
        train(tmp_path, texts(), pad_is_end=True, torch_compile=True, torch_compile_backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [texts(starts=True), grouped(texts(ends=False, starts=True))])
def test_plain_text_that_begins_with_its_end_token_is_warned_of(rows, tmp_path):
    with pytest.warns(UserWarning, match=r"all prompt tokens of a batch are the token 2.*pad_token is eos_token"):
        train(tmp_path, rows, pad_is_end=True)


def test_rows_of_prompt_and_response_are_not_warned_of():
    """Not where the prompt is a single token, nor where several turns share their words."""
    response, turn = [7, 8, 2], [5, 3]
    for row in ([1, *response], [*turn, *response, *turn, *response], [4, 4, *response]):
        ids = torch.tensor([row])
        labels = ids.clone()
        for token in (1, *turn, 4):
            labels[ids == token] = -100
        for positions in (None, torch.arange(len(row))[None]):
            attention = torch.ones_like(ids)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                mask = mask_from_labels(labels, attention)
                assert check_prompts(mask, labels, attention, positions, ids) is mask


def test_the_check_is_one_operation_of_a_compiled_step():
    """Traced by autograd too, where an operation without effect on the result would be dropped."""
    torch._dynamo.reset()
    model = make_preft(make_base(num_hidden_layers=1)).train()
    row = samples(1)[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(input_ids=ids, labels=labels).loss
    assert abs(compiled(input_ids=ids, labels=labels).loss - expected) < 1e-5
    with pytest.raises(ValueError, match=r"rows \[0\] .* no prompt token"):
        compiled(input_ids=ids, labels=ids.masked_fill(ids == 2, -100))
    assert abs(compiled(input_ids=ids, labels=labels).loss - expected) < 1e-5
    torch._dynamo.reset()
