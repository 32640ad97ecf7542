"""Caches that hold fewer tokens than the request has had: generate counts tokens and adapts the prompt alone."""

import functools
from contextlib import contextmanager

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteriaList

from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, NEW_TOKENS, case, prompt
from tests.hf.oracle import two_phase_greedy

LENGTH = 20
methods = pytest.mark.parametrize("method", ["lora", "direft", "loreft"])


class SinkLayer(DynamicLayer):
    """Keeps the first 2 and the last 6 tokens."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if keys.shape[-2] > 8:
            self.keys, self.values = (torch.cat([x[..., :2, :], x[..., -6:, :]], -2) for x in (keys, values))
        return keys, values


class SinkCache(Cache):
    """A cache class that is not transformers' own."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=SinkLayer)


class Uncounted(SinkCache):
    """One that does not say how many tokens it holds, and hides them from the mask of a decode forward."""

    def get_seq_length(self, layer_idx=0):
        return 0

    def get_mask_sizes(self, query_length, layer_idx):
        held = self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0
        return held + query_length, 0


@contextmanager
def press(model, keep=lambda x: x[..., ::2, :]):
    """As KV-cache compression by hooks does: drops keys and values of the prompt after each attention layer."""

    def hook(module, args, kwargs, output):
        layer = cache_of(kwargs).layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] > 1:
            layer.keys, layer.values = keep(layer.keys), keep(layer.values)

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in inner.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check(output, expected, length=LENGTH):
    tokens, logits = expected
    assert torch.equal(output.sequences[:, length:], tokens)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= 1e-4


@methods
@pytest.mark.parametrize("kind", [SinkCache, Uncounted])
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_a_cache_that_evicts(method, kind, length):
    c, ids = case("llama", method), prompt(2, length)
    expected = two_phase_greedy(c.adapted, c.base, ids, NEW_TOKENS, cache=kind())
    check(c.model.generate(input_ids=ids, **cache_argument(kind()), **GREEDY), expected, length)


@methods
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_cache_that_evicts_under_chunked_prefill(method, chunk):
    c, ids, cache = case("llama", method), prompt(2, LENGTH), SinkCache()
    with torch.no_grad():
        for first in range(0, LENGTH - chunk, chunk):
            positions = torch.arange(first, first + chunk)[None]
            c.adapted(input_ids=ids[:, first : first + chunk], position_ids=positions, **cache_argument(cache))
    done = (LENGTH - 1) // chunk * chunk
    expected = two_phase_greedy(c.adapted, c.base, ids[:, done:], NEW_TOKENS, cache=cache, first=done)
    output = c.model.generate(input_ids=ids, prefill_chunk_size=chunk, **cache_argument(SinkCache()), **GREEDY)
    check(output, expected)


@methods
@pytest.mark.parametrize("length", [2, LENGTH])
def test_a_hook_that_compresses_the_prompt(method, length):
    c, ids = case("llama", method), prompt(2, length)
    with press(c.adapted):
        expected = two_phase_greedy(c.adapted, c.base, ids, NEW_TOKENS)
    with press(c.model):
        check(c.model.generate(input_ids=ids, **GREEDY), expected, length)


def shorten(cache, keep=5):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., -keep:, :], layer.values[..., -keep:, :]


@methods
def test_a_cache_that_is_shortened_from_outside_between_tokens(method):
    c, ids = case("llama", method), prompt(2, LENGTH)
    expected = two_phase_greedy(c.adapted, c.base, ids, NEW_TOKENS, before_decode=shorten)
    cache = DynamicCache(config=c.base.config)

    def criterion(input_ids, scores, **kwargs):
        shorten(cache)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    output = c.model.generate(
        input_ids=ids, **cache_argument(cache), stopping_criteria=StoppingCriteriaList([criterion]), **GREEDY
    )
    check(output, expected)


@methods
def test_beams_over_a_cache_that_evicts(method):
    c, ids = case("llama", method), prompt(1, LENGTH)
    settings = {name: value for name, value in GREEDY.items() if "output" not in name and "return" not in name}
    found = c.model.generate(input_ids=ids, num_beams=3, **cache_argument(SinkCache()), **settings)
    calls = []
    base = c.base
    original = base.forward

    # transformers reads the signature, and gives no positions where it has none
    @functools.wraps(original)
    def forward(*args, **kwargs):
        calls.append(1)
        return c.adapted(*args, **kwargs) if len(calls) == 1 else original(*args, **kwargs)

    base.forward = forward
    try:
        expected = base.generate(input_ids=ids, num_beams=3, **cache_argument(SinkCache()), **settings)
    finally:
        del base.forward
    assert torch.equal(found, expected)


def test_assisted_decoding_over_a_cache_that_evicts_is_an_error():
    """Rejected tokens are cropped off a cache that no longer holds all others: nothing says what is left."""
    c, ids = case("llama", "lora"), prompt(1, LENGTH)
    with pytest.raises(RuntimeError, match=r"position .*counted.*cache holds"):
        c.model.generate(input_ids=ids, assistant_model=c.base, **cache_argument(SinkCache()), **GREEDY)


OPTIONS = [
    {"cache_implementation": "dynamic"},
    {"cache_implementation": "static", "disable_compile": True},
    {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 6},
    {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    {"prefill_chunk_size": 6},
]


@pytest.mark.parametrize("method", ["lora", "direft"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "falcon_h1", "lfm2"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(str(v) for v in options.values()))
def test_no_forward_of_generated_tokens_is_adapted(architecture, method, options):
    """Every cache class of transformers that runs on a CPU; what it does to the values is the base model's too."""
    c, ids = case(architecture, method), prompt(2, LENGTH)
    inner = c.model.get_base_model()
    if options.get("cache_implementation") == "quantized" and architecture != "llama":
        pytest.skip("transformers quantises caches of full attention layers alone")
    phases = []
    handle = inner.model.layers[0].register_forward_hook(
        lambda *args: phases.append(inner._preft_attachment.phase.snapshot())
    )
    c.model.generate(input_ids=ids, **options, **GREEDY)
    handle.remove()
    num_chunks = -(-LENGTH // options.get("prefill_chunk_size", LENGTH))
    assert phases == [True] * num_chunks + [False] * (NEW_TOKENS - 1)


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_wrapped_cache(method):
    """GPT-2 takes transformers' wrapper of a cache for itself and one for an encoder."""
    c, ids = case("gpt2", method), prompt(2, LENGTH)
    expected = two_phase_greedy(c.adapted, c.base, ids, NEW_TOKENS, cache=SinkCache())
    wrapper = EncoderDecoderCache(SinkCache(), DynamicCache())
    check(c.model.generate(input_ids=ids, **cache_argument(wrapper), **GREEDY), expected)
