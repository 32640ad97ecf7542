"""A decode forward is the base model: the same operations, the same bits, whatever the adapter holds."""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from preft_hf import preft_phase
from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.zoo import ARCHITECTURES, METHODS, make_base, make_preft


class Operations(TorchDispatchMode):
    """Counts every operation that reaches the dispatcher, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(model, **inputs) -> collections.Counter:
    with torch.no_grad(), Operations() as counted:
        model(**inputs, use_cache=True)
    return counted.counts


def filled_cache(c, ids):
    cache = DynamicCache(config=c.base.config)
    with torch.no_grad():
        c.adapted(input_ids=ids, **cache_argument(cache), use_cache=True)
    return cache


@pytest.mark.parametrize(("architecture", "method"), [(a, m) for a in ARCHITECTURES for m in METHODS])
def test_decode_runs_the_operations_of_the_base_model(architecture, method):
    c, ids, token = case(architecture, method), prompt(), prompt(2, 1, seed=5)
    cache = filled_cache(c, ids)
    base = operations(c.base, input_ids=token, **cache_argument(copy.deepcopy(cache)))
    with preft_phase("decode"):
        found = operations(c.model, input_ids=token, **cache_argument(copy.deepcopy(cache)))
    assert found == base
    with preft_phase("prefill"):
        prefill = operations(c.model, input_ids=token, **cache_argument(cache))
    assert sum(prefill.values()) > sum(base.values())


@pytest.mark.parametrize("method", METHODS)
def test_generate_decodes_with_the_operations_of_the_base_model(method):
    c, ids = case("llama", method), prompt()
    counts = []

    def count(model):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        found: list[collections.Counter] = []
        handles = []
        mode: list[Operations] = []

        def before(module, args, kwargs):
            mode.append(Operations())
            mode[-1].__enter__()

        def after(module, args, output):
            mode[-1].__exit__(None, None, None)
            found.append(mode[-1].counts)

        handles.append(inner.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(inner.register_forward_hook(after))
        model.generate(input_ids=ids, **GREEDY)
        for handle in handles:
            handle.remove()
        return found

    counts = count(c.model), count(c.base)
    assert counts[0][1:] == counts[1][1:]
    assert counts[0][0] != counts[1][0]


@pytest.mark.parametrize(("architecture", "method"), [(a, m) for a in ("llama", "gpt2", "falcon_h1") for m in METHODS])
def test_decode_is_the_base_model_bit_for_bit_and_reads_nothing_of_the_adapter(architecture, method):
    c, ids, token = case(architecture, method), prompt(), prompt(2, 1, seed=5)
    model = copy.deepcopy(c.model)
    for name, parameter in model.named_parameters():
        if "preft_" in name:
            parameter.data.fill_(float("nan"))
    with torch.no_grad(), preft_phase("decode"):
        found = model(input_ids=token, **cache_argument(filled_cache(c, ids)), use_cache=True).logits
    with torch.no_grad():
        expected = c.base(input_ids=token, **cache_argument(filled_cache(c, ids)), use_cache=True).logits
    assert torch.equal(found, expected)


def test_the_adapter_reaches_decode_through_the_cache_alone():
    """Two adapters, one cache: what is decoded depends on the cache and not on the adapter that is attached."""
    ids, token = prompt(), prompt(2, 1, seed=5)
    first = make_preft(make_base(), "lora", seed=1)
    second = make_preft(make_base(), "lora", seed=2)
    with torch.no_grad():
        cache = cache_of(first(input_ids=ids, use_cache=True))
        other = cache_of(second(input_ids=ids, use_cache=True))
        with preft_phase("decode"):
            a = first(input_ids=token, **cache_argument(copy.deepcopy(cache))).logits
            b = second(input_ids=token, **cache_argument(copy.deepcopy(cache))).logits
            c = first(input_ids=token, **cache_argument(other)).logits
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_output_hidden_states_show_the_edit(method):
    c, ids = case("llama", method), prompt()
    with torch.no_grad():
        found = c.model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = c.adapted(input_ids=ids, output_hidden_states=True).hidden_states
        base = c.base(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for i, (one, other, untouched) in enumerate(zip(found, expected, base, strict=True)):
        assert torch.allclose(one, other, atol=1e-4)
        if i > 0:
            assert not torch.allclose(one, untouched, atol=1e-3)
