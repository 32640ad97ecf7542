"""preft_scoring: one forward over context and continuation gives the two-phase log-likelihood of the continuation."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache

from preft_hf import preft_phase, preft_scoring
from preft_hf.forward.caches import cache_argument
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.many_adapters import BASE, KINDS, saved_adapters
from tests.hf.zoo import HYBRID

LENGTHS = [4, 9, 1]
CONTINUATION = 5
ROWS = [(prompt(1, n, seed=n), prompt(1, CONTINUATION, seed=20 + n)) for n in LENGTHS]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def likelihood(logits, continuation):
    return log_softmax(logits, -1).gather(-1, continuation[..., None]).sum()


def two_phases(adapted, base, context, continuation):
    """Returns the log-likelihood that decoding gives the continuation."""
    cache = DynamicCache(config=base.config)
    logits = [adapted(input_ids=context, **cache_argument(cache), use_cache=True).logits[:, -1:]]
    for i in range(CONTINUATION - 1):
        logits.append(base(input_ids=continuation[:, i : i + 1], **cache_argument(cache), use_cache=True).logits)
    return likelihood(torch.cat(logits, 1), continuation)


def batch(side):
    """Returns the padded rows, their mask and the place of each row's first continuation token."""
    longest = max(LENGTHS) + CONTINUATION
    ids, mask, firsts = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long), []
    for i, row in enumerate(ROWS):
        row = torch.cat(row, 1)[0]
        begin = longest - len(row) if side == "left" else 0
        ids[i, begin : begin + len(row)], mask[i, begin : begin + len(row)] = row, 1
        firsts.append(begin + LENGTHS[i])
    return ids, mask, firsts


def scores(model, side, with_mask=True, **kwargs):
    ids, mask, firsts = batch(side)
    if with_mask:
        kwargs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with preft_scoring(LENGTHS):
        logits = model(input_ids=ids, **kwargs).logits
    spans = zip(logits, firsts, ROWS, strict=True)
    return [likelihood(row[first - 1 :][:CONTINUATION][None], both[1]) for row, first, both in spans]


@pytest.mark.parametrize(("side", "with_mask"), [("right", True), ("right", False), ("left", True)])
@pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon_h1"])
def test_scores_are_those_of_two_phases(architecture, method, side, with_mask):
    if side == "left" and architecture in HYBRID:
        pytest.skip("a state runs through left padding unless transformers prepares the mask")
    c = case(architecture, method)
    expected = torch.stack([two_phases(c.adapted, c.base, *row) for row in ROWS])
    torch.testing.assert_close(torch.stack(scores(c.model, side, with_mask)), expected, rtol=1e-5, atol=1e-4)
    for model in (c.adapted, c.base):
        assert (torch.stack([two_phases(model, model, *row) for row in ROWS]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_adapter(kind):
    c = saved_adapters()
    names = ["wide", BASE, "turn"]
    expected = [two_phases(c.adapted[name], c.base, *row) for name, row in zip(names, ROWS, strict=True)]
    found = scores(c.model(kind), "right", adapter_names=names)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_one_length_stands_for_all_rows():
    c = case("llama", "lora")
    ids = torch.cat([prompt(2, 6), prompt(2, CONTINUATION, seed=3)], 1)
    with preft_scoring(6):
        logits = c.model(inputs_embeds=c.base.get_input_embeddings()(ids)).logits
    for row, found in zip(ids, logits, strict=True):
        expected = two_phases(c.adapted, c.base, row[None, :6], row[None, 6:])
        assert (likelihood(found[None, 5:-1], row[None, 6:]) - expected).abs() < 1e-4


@pytest.mark.parametrize("lengths", [0, [], [3, 0], -1])
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(ValueError, match=r"context_lengths is .*1 or more"), preft_scoring(lengths):
        pass


def test_what_scoring_refuses():
    model, ids = case("llama", "lora").model, prompt(2)
    with preft_scoring([3, 4, 5]), pytest.raises(ValueError, match="3 context lengths and the forward 2 rows"):
        model(input_ids=ids)
    cache = DynamicCache()
    model(input_ids=ids, **cache_argument(cache))
    with preft_scoring(3), pytest.raises(ValueError, match="cache that is not empty"):
        model(input_ids=ids, **cache_argument(cache))
    with preft_scoring(3), pytest.raises(ValueError, match="labels were given inside preft_phase or preft_scoring"):
        model(input_ids=ids, labels=ids)
    with preft_scoring(3), pytest.raises(ValueError, match="generate was called inside preft_phase or preft_scoring"):
        model.generate(input_ids=ids, **GREEDY)
    with preft_scoring(3), pytest.raises(ValueError, match="inside preft_scoring: leave"), preft_phase("decode"):
        pass
    with preft_phase("decode"), pytest.raises(ValueError, match=r"inside preft_phase\('decode'\)"), preft_scoring(3):
        pass
