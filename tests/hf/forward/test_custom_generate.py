"""A decoding loop of the user's own inside generate: right by position, or an error, whatever it does to the cache."""

import pytest
import torch

from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, NEW_TOKENS, case, prompt
from tests.hf.zoo import make_base, make_preft

SETTINGS = {name: value for name, value in GREEDY.items() if "output" not in name and "return" not in name}
methods = pytest.mark.parametrize("method", ["lora", "direft"])
cache_kinds = pytest.mark.parametrize("kind", ["static", "dynamic"])


def decode(model, ids, cache, says_first=True):
    """Fills a cache with the prompt and decodes, as generate does."""
    length = None
    for i in range(NEW_TOKENS):
        first = {"is_first_iteration": i == 0} if says_first else {}
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=length, **first, **cache_argument(cache), use_cache=True
        )
        ids = torch.cat([ids, model(**inputs).logits[:, -1:].argmax(-1)], 1)
        length = 1
    return ids


@cache_kinds
@methods
@pytest.mark.parametrize("says_first", [True, False])
def test_a_cache_that_is_emptied_and_filled_again(method, kind, says_first):
    c = case("llama", method)

    def twice(model, input_ids, **kwargs):
        cache = cache_of(kwargs)
        for _ in range(2):
            cache.reset()
            output = decode(model, input_ids, cache, says_first)
        return output

    for length in (1, 9):
        ids = prompt(2, length)
        for model, expected in (
            (c.model.get_base_model(), c.oracle(ids)[0]),
            (c.base, c.base.generate(input_ids=ids, **SETTINGS)[:, length:]),
        ):
            found = model.generate(
                input_ids=ids, custom_generate=twice, cache_implementation=kind, disable_compile=True, **SETTINGS
            )
            assert torch.equal(found[:, length:], expected)


@cache_kinds
@methods
@pytest.mark.parametrize("length", [1, 9])
def test_arguments_of_the_prompt_are_not_taken_for_a_generated_token(method, kind, length):
    c, ids = case("llama", method), prompt(2, length)

    def by_hand(model, input_ids, is_right, **kwargs):
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, **cache_argument(cache_of(kwargs)), use_cache=True
        )
        for _ in range(NEW_TOKENS):
            input_ids = torch.cat([input_ids, model(**inputs).logits[:, -1:].argmax(-1)], 1)
            inputs |= {"input_ids": input_ids[:, -1:]} | ({"prefill_mask": False} if is_right else {})
            inputs = {name: value for name, value in inputs.items() if name not in ("position_ids", "attention_mask")}
        return input_ids

    def run(is_right):
        return c.model.get_base_model().generate(
            input_ids=ids,
            custom_generate=lambda model, input_ids, **kwargs: by_hand(model, input_ids, is_right, **kwargs),
            cache_implementation=kind,
            disable_compile=True,
            **SETTINGS,
        )

    with pytest.raises(
        RuntimeError, match=rf"prefill_mask is from .* 1 tokens after {length} in the cache.*every forward"
    ):
        run(is_right=False)
    assert torch.equal(run(is_right=True)[:, length:], c.oracle(ids)[0])


@methods
@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_is_compiled_with_its_hooks(method):
    """One graph for prompts of any length, and one for decoding."""
    c, graphs = case("llama", method), []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    model = make_preft(make_base(), method).get_base_model()
    model.compile(backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9, 11, 7):
        ids = prompt(2, length)
        found = model.generate(input_ids=ids, **SETTINGS)
        assert torch.equal(found[:, length:], c.oracle(ids)[0])
    assert len(graphs) <= 4
