"""A chat that continues a cache: served as it is trained on whole conversations, and by one adapter alone."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from preft_hf import preft_phase
from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, NEW_TOKENS, case, prompt
from tests.hf.forward.test_evicting_caches import SinkCache, Uncounted, shorten
from tests.hf.many_adapters import BASE, KINDS, saved_adapters
from tests.hf.oracle import greedy_from, two_phase_greedy
from tests.hf.zoo import make_base, make_preft

# answers of random tokens do not end with an end-of-turn token, which the labels rule asks for
pytestmark = pytest.mark.filterwarnings("ignore:.* have label -100 between labelled tokens")
methods = pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
QUESTION, MORE = prompt(2), prompt(2, 5, seed=4)


def new_part(sequences, more, with_last=True):
    """Returns the arguments that give only the tokens that are not in the cache."""
    ids = torch.cat([sequences[:, -1:], more], 1) if with_last else more
    return {"input_ids": ids, "attention_mask": torch.ones(len(ids), sequences.shape[1] - 1 + ids.shape[1])}


def whole(ids):
    """Returns the arguments that give all tokens; without a mask transformers would mask pad tokens in an answer."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def trained(model, conversation, spans):
    """Returns the logits of a training forward whose labels are the answers."""
    labels = torch.full_like(conversation, -100)
    for begin, end in spans:
        labels[:, begin:end] = conversation[:, begin:end]
    return model(input_ids=conversation, labels=labels).logits


@methods
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "falcon_h1", "lfm2"])
@pytest.mark.parametrize("how", ["all-ids", "new-ids", "embeds", "static"])
def test_a_chat_is_served_as_it_is_trained(architecture, method, how):
    c = case(architecture, method)
    if how == "embeds" and architecture in ("falcon_h1", "lfm2"):
        pytest.skip("transformers refuses embeddings with a cache that is not empty for hybrid models")
    kwargs = cache_argument(StaticCache(config=c.base.config, max_cache_len=64)) if how == "static" else {}
    output = c.model.generate(input_ids=QUESTION, **kwargs, **GREEDY)
    conversation, spans = output.sequences, [(9, 17)]
    for turn in range(2):
        more = prompt(2, 5, seed=4 + turn)
        longer = torch.cat([conversation, more], 1)
        kwargs = cache_argument(cache_of(output))
        if how == "new-ids":
            kwargs |= new_part(conversation, more)
        elif how == "embeds":
            kwargs["inputs_embeds"] = c.base.get_input_embeddings()(longer)
        else:
            kwargs |= whole(longer)
        output = c.model.generate(**kwargs, **GREEDY)
        begin = longer.shape[1]
        conversation = torch.cat([longer, output.sequences[:, -NEW_TOKENS:]], 1)
        spans.append((begin, conversation.shape[1]))
        logits = trained(c.model, conversation, spans)[:, begin - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, rtol=1e-5, atol=1e-5)


def continued(c, answered, more):
    """Returns the oracle's answer to a second question: the first answer is base, in the cache and out of it."""
    cache = DynamicCache(config=c.base.config)
    with torch.no_grad():
        c.adapted(input_ids=QUESTION, **cache_argument(cache), use_cache=True)
        c.base(input_ids=answered[:, 9:], **cache_argument(cache), use_cache=True)
        return greedy_from(c.adapted(input_ids=more, **cache_argument(cache), use_cache=True), c.base, NEW_TOKENS)


def check(output, expected):
    tokens, logits = expected
    assert torch.equal(output.sequences[:, -NEW_TOKENS:], tokens)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= 1e-4


@methods
def test_the_last_token_counts_as_prompt_if_the_model_did_not_generate_it(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **GREEDY)
    more = MORE.clone()
    more[:, 0] = (first.sequences[:, -1] + 1) % 64
    # new tokens alone, without the one that is not in the cache
    kwargs = new_part(first.sequences, more, with_last=False) | cache_argument(copy.deepcopy(cache_of(first)))
    check(c.model.generate(**kwargs, **GREEDY), continued(c, first.sequences[:, :-1], more))
    # one row goes on with what was generated, the other with another token
    ids = torch.cat([first.sequences, MORE], 1)
    ids[1, 16] = (ids[1, 16] + 1) % 64
    output = c.model.generate(**whole(ids), **cache_argument(cache_of(first)), **GREEDY)
    own, other = continued(c, first.sequences, MORE), continued(c, first.sequences[:, :-1], ids[:, 16:])
    check(output, [torch.stack([a[0], b[1]]) for a, b in zip(own, other, strict=True)])


@methods
def test_a_cache_that_is_copied_repeated_and_cropped(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **GREEDY)
    ids = torch.cat([first.sequences, MORE], 1)
    expected = continued(c, first.sequences, MORE)
    kept = cache_of(first)
    check(c.model.generate(**whole(ids), **cache_argument(copy.deepcopy(kept)), **GREEDY), expected)
    # into the answer: what is fed again is still the model's own
    cache = copy.deepcopy(kept)
    cache.crop(-3)
    check(c.model.generate(**whole(ids), **cache_argument(cache), **GREEDY), expected)
    # one row of it, three times
    cache = copy.deepcopy(kept)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    output = c.model.generate(**whole(ids[1:].repeat(3, 1)), **cache_argument(cache), **GREEDY)
    check(output, [found[1:].repeat_interleave(3, 0) for found in expected])
    # to the prompt, for another question
    cache = copy.deepcopy(kept)
    cache.crop(-(NEW_TOKENS - 1))
    other = torch.cat([QUESTION, MORE], 1)
    check(c.model.generate(**whole(other), **cache_argument(cache), **GREEDY), c.oracle(other))
    # emptied: a request of its own
    kept.reset()
    check(c.model.generate(input_ids=MORE, **cache_argument(kept), **GREEDY), c.oracle(MORE))


@methods
@pytest.mark.parametrize("options", [{"assistant": True}, {"prompt_lookup_num_tokens": 3}])
def test_the_cache_that_assisted_decoding_leaves(method, options):
    c, ids = case("llama", method), QUESTION[:1]
    options = {"assistant_model": c.base} if "assistant" in options else options
    first = c.model.generate(input_ids=ids, **options, **GREEDY)
    kwargs = cache_argument(cache_of(first))
    output = c.model.generate(**new_part(first.sequences, MORE[:1]), **kwargs, **options, **GREEDY)
    conversation = torch.cat([first.sequences[:, :-1], output.sequences], 1)
    logits = trained(c.model, conversation, [(9, 17), (22, 30)])[:, 21:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, rtol=1e-5, atol=1e-5)
    # transformers would feed what is in the cache again
    with pytest.raises(RuntimeError, match=r"position .*counted.*give only the new ids"):
        c.model.generate(**whole(conversation), **kwargs, **options, **GREEDY)


@methods
def test_a_second_turn_on_a_cache_that_was_compressed_after_the_first(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **GREEDY)
    cache = DynamicCache(config=c.base.config)
    positions = torch.arange(9, 22)[None]
    with torch.no_grad():
        c.adapted(input_ids=QUESTION, **cache_argument(cache))
        c.base(input_ids=first.sequences[:, 9:16], **cache_argument(cache))
        shorten(cache)
        last = first.sequences[:, 16:]
        c.base(input_ids=last, position_ids=positions[:, 7:8], **cache_argument(cache))
    expected = two_phase_greedy(c.adapted, c.base, MORE, NEW_TOKENS, cache=cache, first=17)
    shorten(cache_of(first))
    check(c.model.generate(**new_part(first.sequences, MORE), **cache_argument(cache_of(first)), **GREEDY), expected)


@methods
def test_a_second_turn_on_a_cache_that_evicts(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **cache_argument(SinkCache()), **GREEDY)
    cache = SinkCache()
    tokens, _ = two_phase_greedy(c.adapted, c.base, QUESTION, NEW_TOKENS, cache=cache)
    assert torch.equal(first.sequences[:, 9:], tokens)
    kwargs = cache_argument(cache_of(first))
    with pytest.raises(ValueError, match=r"cache holds 8 tokens of a request that has had 16.*only the new ids"):
        c.model.generate(**whole(torch.cat([first.sequences, MORE], 1)), **kwargs, **GREEDY)
    phases = []
    inner = c.model.get_base_model()
    handle = inner.model.layers[0].register_forward_hook(
        lambda *args: phases.append(inner._preft_attachment.phase.snapshot())
    )
    c.model.generate(**new_part(first.sequences, MORE), **kwargs, **GREEDY)
    handle.remove()
    assert phases[0].mask.tolist() == [[False] + [True] * 5] * 2
    assert phases[1:] == [False] * (NEW_TOKENS - 1)


def two_adapters():
    c = saved_adapters()
    return c, c.model("held")


def test_a_cache_belongs_to_one_adapter():
    c, model = two_adapters()
    model.set_adapter("wide")
    first = model.generate(input_ids=QUESTION, **GREEDY)
    longer = torch.cat([first.sequences, MORE], 1)

    def go_on(**kwargs):
        return model.generate(**whole(longer), **cache_argument(copy.deepcopy(cache_of(first))), **kwargs, **GREEDY)

    expected = go_on()
    assert torch.equal(go_on(adapter_names=["wide", "wide"]).sequences, expected.sequences)
    foreign = pytest.raises(ValueError, match=r"rows \[.*another adapter.*leave past_key_values out")
    for names in (["edit"] * 2, ["wide", "edit"], [BASE] * 2, [BASE, "wide"]):
        with foreign:
            go_on(adapter_names=names)
    with foreign, model.disable_adapter():
        go_on()
    model.set_adapter("edit")
    with foreign:
        go_on()
    with foreign, torch.no_grad(), preft_phase("prefill"):
        model(input_ids=MORE, **cache_argument(copy.deepcopy(cache_of(first))))
    # decode forwards have no adapter, and an emptied cache no owner
    with torch.no_grad(), preft_phase("decode"):
        model(input_ids=MORE[:, :1], **cache_argument(copy.deepcopy(cache_of(first))))
    cache = copy.deepcopy(cache_of(first))
    cache.reset()
    tokens, _ = c.oracle("edit", QUESTION)
    assert torch.equal(model.generate(input_ids=QUESTION, **cache_argument(cache), **GREEDY).sequences[:, 9:], tokens)
    model.set_adapter("wide")
    assert torch.equal(go_on().sequences, expected.sequences)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "preft_B.wide" in name).mul_(2)
    with foreign:
        go_on()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_cache_keep_their_adapters(kind):
    c = saved_adapters()
    model = c.model(kind)
    names = ["turn", "few"]
    first = model.generate(input_ids=QUESTION, adapter_names=names, **GREEDY)
    longer = torch.cat([first.sequences, MORE], 1)

    def go_on(names, rows=(0, 1), **kwargs):
        cache = copy.deepcopy(cache_of(first))
        if rows != (0, 1):
            cache.batch_select_indices(torch.tensor(rows))
        ids = longer[list(rows)]
        return model.generate(**whole(ids), adapter_names=names, **cache_argument(cache), **kwargs, **GREEDY)

    assert go_on(names).sequences.shape == (2, 22 + NEW_TOKENS)
    for swapped in (["few", "turn"], ["turn", "turn"], ["turn", BASE]):
        with pytest.raises(ValueError, match="another adapter"):
            go_on(swapped)
    # rows are known again after they were selected, repeated or reordered
    whole_batch = go_on(names).sequences
    assert torch.equal(go_on(["few"], rows=(1,)).sequences, whole_batch[1:])
    assert torch.equal(go_on(["few", "turn"], rows=(1, 0)).sequences, whole_batch[[1, 0]])
    for other in (["turn", "few"], ["few", "few"]):
        with pytest.raises(ValueError, match="another adapter"):
            go_on(other, rows=(1, 0))
    with pytest.raises(ValueError, match="another adapter"):
        go_on(["turn"], rows=(1,))
    # keys that are not those of the prompts tell nothing
    changed = copy.deepcopy(cache_of(first))
    changed.layers[-1].keys.add_(1)
    with pytest.raises(ValueError, match="nothing tells which row"):
        model.generate(**whole(longer), adapter_names=names, **cache_argument(changed), **GREEDY)


def test_a_pool_beside_adapters_that_are_active():
    """Layers that a pool has made have no adapter under the active name."""
    c = saved_adapters()
    model = c.model("both")
    first = model.generate(input_ids=QUESTION, **GREEDY)
    assert torch.equal(first.sequences[:, 9:], c.oracle("few", QUESTION)[0])
    longer = whole(torch.cat([first.sequences, MORE], 1))
    kept = cache_argument(copy.deepcopy(cache_of(first)))
    expected = model.generate(**longer, **cache_argument(cache_of(first)), **GREEDY)
    found = model.generate(**longer, **kept, adapter_names=["few", "few"], **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)


def test_any_adapter_goes_on_from_a_context_that_the_base_model_has_read():
    c, model = two_adapters()
    context = torch.cat([QUESTION, MORE], 1)
    cache = DynamicCache(config=c.base.config)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=QUESTION, **cache_argument(cache))
    for name in ("wide", "edit"):
        model.set_adapter(name)
        kwargs = cache_argument(copy.deepcopy(cache))
        output = model.generate(input_ids=context, **kwargs, **GREEDY)
        with torch.no_grad():
            prefilled = c.adapted[name](input_ids=MORE, **cache_argument(copy.deepcopy(cache)), use_cache=True)
        check(output, greedy_from(prefilled, c.base, NEW_TOKENS))


def test_a_cache_that_a_forward_has_filled_has_an_owner():
    _, model = two_adapters()
    model.set_adapter("wide")
    with torch.no_grad():
        cache = cache_of(model(input_ids=QUESTION, use_cache=True))
    model.set_adapter("edit")
    with pytest.raises(ValueError, match="another adapter"):
        model.generate(input_ids=torch.cat([QUESTION, MORE], 1), **cache_argument(cache), **GREEDY)


def test_a_model_loaded_under_inference_mode():
    with torch.inference_mode():
        model = make_preft(make_base())
        first = model.generate(input_ids=QUESTION, **GREEDY)
    assert torch.equal(first.sequences[:, 9:], case("llama", "lora").oracle(QUESTION)[0])


def test_a_custom_loop_over_a_cache_that_does_not_count():
    model, cache = case("llama", "lora").model, Uncounted()
    with torch.no_grad():
        model(input_ids=QUESTION, **cache_argument(cache))
        with pytest.raises(ValueError, match=r"1 tokens on a cache without a length.*preft_phase"):
            model(input_ids=QUESTION[:, :1], **cache_argument(cache))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_emptied_and_filled_again_has_its_new_owner(kind):
    c, model = two_adapters()
    cache = DynamicCache(config=c.base.config) if kind == "dynamic" else StaticCache(c.base.config, max_cache_len=64)
    model.set_adapter("wide")
    model.generate(input_ids=QUESTION, **cache_argument(cache), **GREEDY)
    cache.reset()
    model.set_adapter("edit")
    first = model.generate(input_ids=QUESTION, **cache_argument(cache), **GREEDY)
    longer = whole(torch.cat([first.sequences, MORE], 1))
    mine = cache_argument(copy.deepcopy(cache_of(first)))
    model.set_adapter("wide")
    with pytest.raises(ValueError, match="another adapter"):
        model.generate(**longer, **cache_argument(cache), **GREEDY)
    model.set_adapter("edit")
    fresh = model.generate(input_ids=QUESTION, **GREEDY)
    expected = model.generate(**longer, **cache_argument(cache_of(fresh)), **GREEDY)
    assert torch.equal(model.generate(**longer, **mine, **GREEDY).sequences, expected.sequences)
    # filled by the base model
    cache.reset()
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=QUESTION, **cache_argument(cache))
    model.set_adapter("wide")
    model.generate(**whole(torch.cat([QUESTION, MORE], 1)), **cache_argument(cache), **GREEDY)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_changes_whose_a_cache_is(fused):
    model = make_preft(make_base())
    first = model.generate(input_ids=QUESTION, **GREEDY)
    labels = QUESTION.clone()
    labels[:, :4] = -100
    model.train()(input_ids=QUESTION, labels=labels).loss.backward()
    trained_ones = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained_ones, lr=0.1, fused=fused).step()
    longer = torch.cat([first.sequences, MORE], 1)
    with pytest.raises(ValueError, match="before its weights changed"):
        model.eval().generate(**whole(longer), **cache_argument(cache_of(first)), **GREEDY)


@methods
def test_a_cache_that_is_cropped_to_an_earlier_turn(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **GREEDY)
    longer = torch.cat([first.sequences, MORE + 1], 1)
    second = c.model.generate(**whole(longer), **cache_argument(cache_of(first)), **GREEDY)
    cache = cache_of(second)
    cache.crop(first.sequences.shape[1] - second.sequences.shape[1])
    other = whole(torch.cat([first.sequences, MORE], 1))
    check(c.model.generate(**other, **cache_argument(cache), **GREEDY), continued(c, first.sequences, MORE))


@methods
def test_reordered_rows_know_their_own_answers(method):
    c = case("llama", method)
    first = c.model.generate(input_ids=QUESTION, **GREEDY)
    cache = cache_of(first)
    cache.batch_select_indices(torch.tensor([1, 0]))
    ids = torch.cat([first.sequences, MORE], 1)[[1, 0]]
    output = c.model.generate(**whole(ids), **cache_argument(cache), **GREEDY)
    check(output, [found[[1, 0]] for found in continued(c, first.sequences, MORE)])
