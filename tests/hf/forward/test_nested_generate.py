"""A generate inside a generate has a prompt and adapters of its own, and leaves those of the outer one alone."""

import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from preft_hf import PreftPool
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.many_adapters import BASE, KINDS, saved_adapters
from tests.hf.oracle import two_phase_greedy
from tests.hf.zoo import VOCABULARY

OUTER = prompt(2)
NAMES = ["wide", "edit"]


class Judge(StoppingCriteria):
    """Calls something once, after the outer generate's first token, and never stops it."""

    def __init__(self, call):
        self.call, self.result = call, None

    def __call__(self, input_ids, scores, **kwargs):
        if self.result is None:
            self.result = self.call()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def run(model, inner, **outer):
    """Returns what the outer generate and the call inside it return."""
    judge = Judge(inner)
    output = model.generate(input_ids=OUTER, stopping_criteria=StoppingCriteriaList([judge]), **outer, **GREEDY)
    return output.sequences[:, OUTER.shape[1] :], judge.result


@pytest.mark.parametrize("length", [1, 3, 9, 20])
@pytest.mark.parametrize("method", ["lora", "direft"])
def test_the_prompt_is_the_inner_ones(method, length):
    c, ids = case("llama", method), prompt(1, length, seed=7)
    outer, inner = run(c.model, lambda: c.model.generate(input_ids=ids, **GREEDY).sequences[:, length:])
    assert torch.equal(inner, c.oracle(ids)[0])
    assert torch.equal(outer, c.oracle(OUTER)[0])


@pytest.mark.parametrize("name", ["few", "turn", BASE])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_are_the_inner_ones(kind, name):
    c, ids = saved_adapters(), prompt(1, 20, seed=7)
    model = c.model(kind)
    outer, inner = run(
        model,
        lambda: model.generate(input_ids=ids, adapter_names=[name], **GREEDY).sequences[:, 20:],
        adapter_names=NAMES,
    )
    assert torch.equal(inner, c.oracle_rows([name], ids)[0])
    assert torch.equal(outer, c.oracle_rows(NAMES, OUTER)[0])


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_the_only_slot_goes_to_the_inner_call(call):
    c, ids = saved_adapters(), prompt(1)
    model = copy.deepcopy(c.base)
    pool = PreftPool.from_pretrained(model, {name: c.paths[name] for name in ("wide", "stable")}, num_slots=1)

    @torch.no_grad()
    def inner():
        if call == "generate":
            return model.generate(input_ids=ids, adapter_names=["stable"], **GREEDY).sequences[:, 9:]
        return model(input_ids=ids, adapter_names=["stable"], prefill_mask=True).logits[:, -1:].argmax(-1)

    results = []
    thread = threading.Thread(
        target=lambda: results.extend(run(model, inner, adapter_names=["wide", "wide"])), daemon=True
    )
    thread.start()
    thread.join(60)
    assert results, "the inner call waits for the slot that its own thread has pinned"
    outer, found = results
    assert torch.equal(found, c.oracle_rows(["stable"], ids)[0][:, : found.shape[1]])
    assert torch.equal(outer, c.oracle_rows(["wide", "wide"], OUTER)[0])
    assert set(pool.slots.resident().values()) == {0}


def healing_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which the token w1 may be healed to w10 up to w19, w2 to w20 up to w29, and so on."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i - 2}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def healed_by(adapted, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Returns the prompt with the most likely of the words that begin as its last one does."""
    last = tokenizer.convert_ids_to_tokens(ids[0, -1].item())
    words = {word: number for word, number in tokenizer.get_vocab().items() if word.startswith(last)}
    logits = adapted(input_ids=ids[:, :-1]).logits[0, -1].clone()
    logits[list(words.values())] += 10.0
    logits[ids[0, -1]] += 1.0
    return torch.cat([ids[:, :-1], logits.argmax()[None, None]], 1)


@pytest.mark.parametrize("name", [None, "few", "edit"])
def test_token_healing_adapts_the_healed_prompt(name):
    # transformers drops the <s> when it heals, so the healed prompt is shorter than the one that was given
    c, tokenizer = saved_adapters(), healing_tokenizer()
    model = c.model("held")
    adapted = c.adapted["wide" if name is None else name]
    names = {} if name is None else {"adapter_names": [name]}
    for number in (3, 4, 5):
        given = torch.cat([torch.ones(1, 1, dtype=torch.long), prompt(1), torch.tensor([[number]])], 1)
        expected = healed_by(adapted, given[:, 1:], tokenizer)
        output = model.generate(input_ids=given, token_healing=True, tokenizer=tokenizer, **names, **GREEDY).sequences
        assert torch.equal(output[:, :10], expected)
        new = two_phase_greedy(adapted, c.base, expected, output.shape[1] - 10)[0]
        assert torch.equal(output[:, 10:], new)


def test_token_healing_with_several_adapters_is_refused():
    model, tokenizer = saved_adapters().model("held"), healing_tokenizer()
    ids = torch.full((2, 4), 3)
    with pytest.raises(ValueError, match=r"token_healing with adapter_names edit, wide.*once for each adapter"):
        model.generate(input_ids=ids, adapter_names=NAMES, token_healing=True, tokenizer=tokenizer, **GREEDY)


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_drafting_with_itself_keeps_the_outer_prompt(method):
    c = case("llama", method)
    expected = c.oracle(prompt(1))[0]
    for how in ({"assistant_early_exit": 1}, {"assistant_model": c.model.get_base_model()}):
        output = c.model.generate(input_ids=prompt(1), **how, **GREEDY)
        assert torch.equal(output.sequences[:, 9:], expected)


def test_drafting_with_itself_keeps_the_outer_adapters():
    # a judge, too, that is called between the drafts
    c, ids = saved_adapters(), prompt(1)
    model = c.model("both")
    judge = Judge(lambda: model.generate(input_ids=OUTER, adapter_names=["few", "turn"], **GREEDY).sequences[:, 9:])
    output = model.generate(
        input_ids=ids,
        adapter_names=["stable"],
        assistant_model=model.get_base_model(),
        stopping_criteria=StoppingCriteriaList([judge]),
        **GREEDY,
    )
    assert torch.equal(output.sequences[:, 9:], c.oracle_rows(["stable"], ids)[0])
    assert torch.equal(judge.result, c.oracle_rows(["few", "turn"], OUTER)[0])
