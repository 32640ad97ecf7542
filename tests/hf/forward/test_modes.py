"""generate in every mode equals the hand-written two-phase loop, token for token."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from preft_hf import preft_phase
from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, NEW_TOKENS, Case, case, prompt
from tests.hf.oracle import two_phase_greedy
from tests.hf.zoo import ARCHITECTURES, HYBRID, METHODS, STATE_SPACE, make_base

TOLERANCE = 1e-4
everywhere = pytest.mark.parametrize(
    ("architecture", "method"), [(a, m) for a in ARCHITECTURES for m in METHODS], ids=lambda v: v
)
# Modes that depend on the cache's class and not on the layers inside are run where caches differ.
caches = pytest.mark.parametrize(
    ("architecture", "method"),
    [(a, m) for a in ("llama", "mistral", "gemma3_text", "gpt2", "falcon_h1", "lfm2") for m in ("lora", "direft")],
    ids=lambda v: v,
)
two_methods = pytest.mark.parametrize(
    ("architecture", "method"),
    [(a, m) for a in ARCHITECTURES for m in ("lora", "direft")],
    ids=lambda v: v,
)

# transformers itself refuses these modes for models whose state cannot be rolled back.
CROPPABLE = [("llama", m) for m in METHODS] + [
    (a, m) for a in ("mistral", "gemma3_text", "gpt2", "lfm2") for m in ("lora", "direft")
]
croppable = pytest.mark.parametrize(("architecture", "method"), CROPPABLE, ids=lambda v: v)
TAKES_EMBEDS = [(a, m) for a in ARCHITECTURES if a != "falcon_h1" for m in METHODS]


def check(output, expected: torch.Tensor, logits: torch.Tensor, length: int) -> None:
    found = torch.stack(output.logits, 1)
    assert torch.equal(output.sequences[:, length:], expected)
    assert (found - logits).abs().max() <= TOLERANCE


@everywhere
def test_greedy(architecture, method):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, **GREEDY), tokens, logits, ids.shape[1])


@everywhere
def test_the_oracle_differs_from_adapter_on_and_off(architecture, method):
    c, ids = case(architecture, method), prompt()
    _, logits = c.oracle(ids)
    for model in (c.adapted, c.base):
        _, other = two_phase_greedy(model, model, ids, NEW_TOKENS)
        assert (other - logits).abs().amax(-1)[:, 1:].max() > 100 * TOLERANCE


@everywhere
def test_teacher_forced_logits_equal_incremental_logits(architecture, method):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    row = torch.cat([ids, tokens[:, :-1]], 1)
    mask = torch.zeros_like(row, dtype=torch.bool)
    mask[:, : ids.shape[1]] = True
    labels = row.masked_fill(mask, -100)
    with torch.no_grad():
        explicit = c.model(input_ids=row, prefill_mask=mask).logits
        from_labels = c.model(input_ids=row, labels=labels).logits
    assert (explicit[:, ids.shape[1] - 1 :] - logits).abs().max() <= TOLERANCE
    assert torch.equal(explicit, from_labels)


@everywhere
def test_left_padding(architecture, method):
    c, ids = case(architecture, method), prompt(3)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    tokens, logits = c.oracle(ids, mask)
    check(c.model.generate(input_ids=ids, attention_mask=mask, **GREEDY), tokens, logits, ids.shape[1])
    for row, start in ((1, 4), (2, 8)):
        alone, _ = c.oracle(ids[row : row + 1, start:])
        assert torch.equal(alone[0], tokens[row])


@everywhere
def test_prompt_of_one_token(architecture, method):
    c, ids = case(architecture, method), prompt(2, 1)
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, **GREEDY), tokens, logits, 1)


@everywhere
def test_without_cache(architecture, method):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, use_cache=False, **GREEDY), tokens, logits, ids.shape[1])


@pytest.mark.parametrize(("architecture", "method"), TAKES_EMBEDS, ids=lambda v: v)
def test_inputs_embeds(architecture, method):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    embeds = c.base.get_input_embeddings()(ids)
    check(c.model.generate(inputs_embeds=embeds, **GREEDY), tokens, logits, 0)
    if architecture not in HYBRID:
        check(c.model.generate(inputs_embeds=embeds, input_ids=ids, **GREEDY), tokens, logits, ids.shape[1])


@everywhere
def test_sampling_draws_from_the_two_phase_distribution(architecture, method):
    c, ids = case(architecture, method), prompt()
    torch.manual_seed(3)
    output = c.model.generate(input_ids=ids, **(GREEDY | {"do_sample": True, "top_k": 20}), num_return_sequences=2)
    rows = ids.repeat_interleave(2, 0)
    drawn = output.sequences[:, ids.shape[1] :]
    assert (drawn[0] != drawn[1]).any()
    logits = forced_logits(c, rows, drawn)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= TOLERANCE


@torch.no_grad()
def forced_logits(c: Case, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    output = c.adapted(input_ids=ids, **cache_argument(DynamicCache(config=c.base.config)), use_cache=True)
    logits = [output.logits[:, -1]]
    for i in range(tokens.shape[1] - 1):
        output = c.base(input_ids=tokens[:, i : i + 1], **cache_argument(cache_of(output)), use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@two_methods
def test_beam_search(architecture, method):
    c, ids = case(architecture, method), prompt()
    settings = {"max_new_tokens": NEW_TOKENS, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    found = c.model.generate(input_ids=ids, **settings)
    assert torch.equal(found, switching(c).generate(input_ids=ids, **settings))
    assert not torch.equal(found, c.adapted.generate(input_ids=ids, **settings))


def switching(c: Case):
    """The base model whose first forward is the adapted copy's: two phases, under transformers' own decoding loop."""
    model, calls = copy.copy(c.base), []
    model.__dict__ = dict(c.base.__dict__)

    def forward(*args, **kwargs):
        calls.append(1)
        return (c.adapted if len(calls) == 1 else c.base).forward(*args, **kwargs)

    model.forward = forward
    return model


@two_methods
@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 64])
def test_chunked_prefill(architecture, method, chunk):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, prefill_chunk_size=chunk, **GREEDY), tokens, logits, ids.shape[1])


@two_methods
def test_static_cache(architecture, method):
    c, ids = case(architecture, method), prompt()
    tokens, logits = c.oracle(ids)
    output = c.model.generate(input_ids=ids, cache_implementation="static", disable_compile=True, **GREEDY)
    check(output, tokens, logits, ids.shape[1])
    chunked = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    check(c.model.generate(input_ids=ids, **chunked, **GREEDY), tokens, logits, ids.shape[1])


@croppable
def test_prompt_lookup(architecture, method):
    c = case(architecture, method)
    ids = prompt(1, 4).repeat(1, 3)
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **GREEDY), tokens, logits, ids.shape[1])


@croppable
def test_assisted_generation(architecture, method):
    c, ids = case(architecture, method), prompt(1)
    tokens, logits = c.oracle(ids)
    # an assistant that is right now and then: the base model itself
    check(c.model.generate(input_ids=ids, assistant_model=c.base, **GREEDY), tokens, logits, ids.shape[1])


@pytest.mark.parametrize("method", METHODS)
def test_early_exit(method):
    c, ids = case("llama", method), prompt(1)
    tokens, logits = c.oracle(ids)
    check(c.model.generate(input_ids=ids, assistant_early_exit=1, **GREEDY), tokens, logits, ids.shape[1])


@caches
def test_continue_from_a_cache(architecture, method):
    """Turn 2 prefills the new tokens with the adapter; the first answer stays base, its last token too."""
    c, ids, more = case(architecture, method), prompt(1), prompt(1, 5, seed=4)
    first = c.model.generate(input_ids=ids, **GREEDY)
    answer = first.sequences[:, ids.shape[1] :]

    cache = DynamicCache(config=c.base.config)
    with torch.no_grad():
        c.adapted(input_ids=ids, **cache_argument(cache), use_cache=True)
        for i in range(NEW_TOKENS - 1):
            c.base(input_ids=answer[:, i : i + 1], **cache_argument(cache), use_cache=True)
        # the last generated token has not been through the model in turn 1
        c.base(input_ids=answer[:, -1:], **cache_argument(cache), use_cache=True)
        output = c.adapted(input_ids=more, **cache_argument(cache), use_cache=True)
        expected = []
        for _ in range(NEW_TOKENS):
            expected.append(output.logits[:, -1].argmax(-1, keepdim=True))
            output = c.base(input_ids=expected[-1], **cache_argument(cache), use_cache=True)
    expected = torch.cat(expected, 1)

    everything = torch.cat([first.sequences, more], 1)
    assert cache_of(first).get_seq_length() == everything.shape[1] - more.shape[1] - 1
    full = copy.deepcopy(cache_of(first))
    output = c.model.generate(input_ids=everything, **cache_argument(full), **GREEDY)
    assert torch.equal(output.sequences[:, everything.shape[1] :], expected)
    new = torch.cat([answer[:, -1:], more], 1)
    output = c.model.generate(
        input_ids=new,
        attention_mask=torch.ones_like(everything),
        **cache_argument(cache_of(first)),
        **GREEDY,
    )
    assert torch.equal(output.sequences[:, new.shape[1] :], expected)


@caches
def test_hand_written_loop_with_declared_phases(architecture, method):
    c, ids = case(architecture, method), prompt(1)
    tokens, _ = c.oracle(ids)
    cache = DynamicCache(config=c.base.config)
    found = []
    with torch.no_grad():
        with preft_phase("prefill"):
            c.model(input_ids=ids[:, :5], **cache_argument(cache), use_cache=True)
            output = c.model(input_ids=ids[:, 5:], **cache_argument(cache), use_cache=True)
        with preft_phase("decode"):
            for _ in range(NEW_TOKENS):
                found.append(output.logits[:, -1].argmax(-1, keepdim=True))
                output = c.model(input_ids=found[-1], **cache_argument(cache), use_cache=True)
    assert torch.equal(torch.cat(found, 1), tokens)


def test_hand_written_loop_by_the_cache():
    c, ids = case("llama", "lora"), prompt(1)
    tokens, _ = c.oracle(ids)
    output, found = c.model(input_ids=ids, use_cache=True), []
    for _ in range(NEW_TOKENS):
        found.append(output.logits[:, -1].argmax(-1, keepdim=True))
        output = c.model(input_ids=found[-1], **cache_argument(cache_of(output)), use_cache=True)
    assert torch.equal(torch.cat(found, 1), tokens)


@pytest.mark.parametrize("method", METHODS)
def test_streaming(method):
    class Words:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    c, ids, streamer = case("llama", method), prompt(1), Words()
    tokens, _ = c.oracle(ids)
    c.model.generate(input_ids=ids, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.tokens == ids[0].tolist() + tokens[0].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_compiled_decode_is_one_graph_without_breaks(method):
    c, ids = case("llama", method), prompt()
    tokens, logits = c.oracle(ids)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    inner = c.model.get_base_model()
    compiled = torch.compile(inner.__call__, fullgraph=True, backend=backend, dynamic=False)
    cache = StaticCache(config=inner.config, max_cache_len=32)
    with torch.no_grad():
        output = compiled(input_ids=ids, **cache_argument(cache), use_cache=True, prefill_mask=True)
        found = [output.logits[:, -1]]
        for _ in range(NEW_TOKENS - 1):
            token = found[-1].argmax(-1, keepdim=True)
            found.append(
                compiled(input_ids=token, **cache_argument(cache), use_cache=True, prefill_mask=False).logits[:, -1]
            )
    torch._dynamo.reset()
    assert len(graphs) == 2
    assert torch.equal(torch.stack(found, 1).argmax(-1), tokens)
    assert (torch.stack(found, 1) - logits).abs().max() <= TOLERANCE
    names = [
        {str(node.target) for node in graph.graph.nodes if node.op in ("get_attr", "placeholder")} for graph in graphs
    ]
    assert any("preft" in name for name in names[0])
    assert not any("preft" in name for name in names[1])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("architecture", "method"), [(a, m) for a in STATE_SPACE for m in ("lora", "direft")])
def test_state_space_models(architecture, method, use_cache):
    c, ids, tokens, logits = case(architecture, method), prompt(), [], []
    with torch.no_grad():
        output = c.adapted(input_ids=ids, use_cache=True)
        for _ in range(NEW_TOKENS):
            logits.append(output.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            name = next(name for name in ("cache", "cache_params") if name in output)
            output = c.base(input_ids=tokens[-1], **{name: output[name]}, use_cache=True)
    found = c.model.generate(input_ids=ids, use_cache=use_cache, **GREEDY)
    check(found, torch.cat(tokens, 1), torch.stack(logits, 1), ids.shape[1])


def test_a_second_model_as_assistant_keeps_its_own_phase():
    c = case("llama", "lora")
    assistant = AutoModelForCausalLM.from_config(make_base("llama").config).eval()
    ids = prompt(1)
    tokens, _ = c.oracle(ids)
    output = c.model.generate(input_ids=ids, assistant_model=assistant, **GREEDY)
    assert torch.equal(output.sequences[:, ids.shape[1] :], tokens)
