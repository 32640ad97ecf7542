"""A cache under an unknown name, as when transformers renamed it: one that is not seen would leak into decoding."""

import pytest
import torch
from transformers import LlamaForCausalLM

from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.zoo import make_base, make_preft


class Renamed(LlamaForCausalLM):
    """A model that calls its cache `kv`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, kv=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, **cache_argument(kv), **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        (name,) = cache_argument(None)
        return inputs | {"kv": inputs.pop(name)}


class Boxed(Renamed):
    """One that also puts it in a class of its own."""

    def forward(self, input_ids=None, kv=None, **kwargs):
        return super().forward(input_ids, kv=kv and kv[0], **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"kv": [inputs["kv"]]}


def renamed(kind):
    base = make_base("llama")
    base.__class__ = kind
    return make_preft(base)


def test_a_cache_is_found_by_its_class():
    model, c, ids = renamed(Renamed), case("llama", "lora"), prompt(2)
    tokens, logits = c.oracle(ids)
    output = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(output.sequences[:, ids.shape[1] :], tokens)
    torch.testing.assert_close(torch.stack(output.logits, 1), logits)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        second = model(input_ids=tokens[:, :1], kv=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(second, logits[:, 1])


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_cache_that_is_not_seen_is_an_error(length):
    with pytest.raises(RuntimeError, match=rf"1 tokens, for a prompt of {length}, .*kv.*preft doctor"):
        renamed(Boxed).generate(input_ids=prompt(length=length), **GREEDY)
