"""The study's batches: rows of like length go together, with the gradient of one batch. What its page recommends."""

import copy
import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality import sft
from benchmarks.quality.methods import adapted
from benchmarks.quality.report import PAGE
from benchmarks.quality.store import RESULTS
from preft_hf.training.data import collate
from tests.hf.zoo import make_base

LENGTHS = (5, 40, 7, 120, 6, 44, 118, 9)


def row(length, begin=2):
    ids = [3 + (7 * length + i) % 50 for i in range(length)]
    return {"input_ids": ids, "labels": [-100] * begin + ids[begin:]}


@given(st.lists(st.integers(3, 400), min_size=1, max_size=8))
def test_pieces_are_all_rows_at_no_more_cost_than_one_batch(lengths):
    rows = [row(length) for length in lengths]
    made = sft.pieces(rows)
    assert sorted(len(r["input_ids"]) for piece in made for r in piece) == sorted(lengths)

    def cost(pieces):
        return sum(sft.PIECE_TOKENS + len(piece) * max(len(r["input_ids"]) for r in piece) for piece in pieces)

    assert cost(made) <= min(cost([rows]), cost([[r] for r in rows]))


def test_the_gradient_is_that_of_one_padded_batch():
    rows = [row(length) for length in LENGTHS]
    model = adapted(make_base("llama"), "lora-p", 4, 0).train()
    for name, weight in model.named_parameters():
        if weight.requires_grad and name.endswith("preft_B"):
            torch.nn.init.normal_(weight, std=0.1)
    whole, parted = copy.deepcopy(model), copy.deepcopy(model)
    loss = whole(**collate(rows, 0)).loss
    loss.backward()
    assert len(sft.pieces(rows)) > 1
    found = sft._backward(parted, rows, 0, lambda model, batch: model(**batch).loss)
    torch.testing.assert_close(found, loss.item(), rtol=1e-5, atol=0)
    gradients = [weight.grad for weight in parted.parameters() if weight.requires_grad]
    expected = [weight.grad for weight in whole.parameters() if weight.requires_grad]
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_rows_are_evaluated_in_any_company_and_told_in_order():
    rows = [row(length) for length in LENGTHS] + [row(30, 4), row(8)]
    model = make_base("llama").eval()
    found = sft.evaluate(model, rows, 0)
    alone = [sft.evaluate(model, [one], 0)["loss"] for one in rows]
    torch.testing.assert_close(found["row_losses"], alone, rtol=1e-4, atol=1e-5)


def test_the_rates_that_the_page_recommends_are_those_that_the_search_found():
    runs = json.loads((RESULTS / "cpu.json").read_text())["runs"].values()
    found = {run["rank"]: run["lr"] for run in runs if run.get("method") == "lora-p" and run["task"] == "cities"}
    mantissas = {0.01: "1e-2", 0.003: "3e-3", 0.001: "1e-3"}
    said = ", ".join(f"{mantissas[found[rank]]} for r={rank}" for rank in (1, 16, 64))
    assert f"| a learning rate | {said}, as for LoRA;" in PAGE.with_name("quality.md").read_text()
