"""One adapter per row: a mixed batch gives each row what the row's adapter gives it alone, in every mode."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from preft_hf import PreftConfig
from preft_hf.forward.caches import cache_argument, cache_of
from preft_hf.forward.hooks import pool_of
from preft_hf.layers.linear import PreftLinear
from tests.hf.cases import GREEDY, NEW_TOKENS, prompt
from tests.hf.forward.test_decode_is_base import Operations
from tests.hf.many_adapters import BASE, KINDS, NAMES, prompts, saved_adapters
from tests.hf.zoo import ARCHITECTURES, make_base, make_preft

TOLERANCE = 1e-4


def check(output, expected: torch.Tensor, logits: torch.Tensor, length: int) -> None:
    assert torch.equal(output.sequences[:, length:], expected)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= TOLERANCE


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_each_row_alone(architecture, kind):
    c, ids = saved_adapters(architecture), prompts()
    expected = c.oracle_rows(NAMES, ids)
    model = c.model(kind)
    check(model.generate(input_ids=ids, adapter_names=NAMES, **GREEDY), *expected, ids.shape[1])
    # again, in another order, on the slots that the first batch left
    order = [3, 0, 6, 1, 5, 2, 4]
    output = model.generate(input_ids=ids[order], adapter_names=[NAMES[i] for i in order], **GREEDY)
    check(output, *(found[order] for found in expected), ids.shape[1])


def test_the_adapters_differ_from_each_other_and_from_the_base():
    c, ids = saved_adapters(), prompt(1)
    logits = [c.oracle(name, ids)[1] for name in c.adapted]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "falcon_h1"])
def test_left_padding(architecture, kind):
    c, ids = saved_adapters(architecture), prompts()
    mask = torch.ones_like(ids)
    for row, length in ((1, 4), (2, 8), (5, 1)):
        mask[row, :length] = 0
    output = c.model(kind).generate(input_ids=ids * mask, attention_mask=mask, adapter_names=NAMES, **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids, mask), ids.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 5},
        {"cache_implementation": "quantized", "cache_config": {"nbits": 16, "backend": "quanto"}},
    ][:5],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_modes(kind, options):
    c, ids = saved_adapters(), prompts()
    output = c.model(kind).generate(input_ids=ids, adapter_names=NAMES, **options, **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids), ids.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 10},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_beams_and_sampling_equal_each_prompt_alone(kind, options):
    """Sampling with its randomness taken off by a logits processor, so that a batch can be compared with its rows."""
    c, ids = saved_adapters(), prompts()
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False} | options
    copies = options.get("num_return_sequences", 1)
    if options["do_sample"]:
        options["logits_processor"] = [lambda ids, scores: scores.argsort(-1).argsort(-1) * 1e3]
    found = c.model(kind).generate(input_ids=ids, adapter_names=NAMES, **options)
    assert len(found) == len(ids) * copies
    for i, name in enumerate(NAMES):
        alone = make_alone(name).generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(found[i * copies : (i + 1) * copies], alone), name


def make_alone(name):
    """Returns the model with one adapter, without any routing: what other tests have compared with the oracle."""
    from peft import PeftModel

    c = saved_adapters()
    base = copy.deepcopy(c.base)
    return base if name == BASE else PeftModel.from_pretrained(base, c.paths[name]).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_of_one_name(kind):
    c, ids = saved_adapters(), prompts(4)
    model = c.model(kind)
    for name in [*c.paths, BASE]:
        output = model.generate(input_ids=ids, adapter_names=[name] * 4, **GREEDY)
        check(output, *c.oracle(name, ids), ids.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    c, ids = saved_adapters(), prompts()
    with torch.no_grad():
        found = c.model(kind)(input_ids=ids, adapter_names=NAMES).logits
        expected = torch.cat([c.adapted[n](input_ids=ids[i : i + 1]).logits for i, n in enumerate(NAMES)])
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_a_prefill_mask_and_with_labels(kind):
    c, ids = saved_adapters(), prompts(length=12)
    lengths = torch.tensor([4, 4, 6, 12, 0, 7, 1])
    mask = torch.arange(12) < lengths[:, None]
    expected = []
    for i, name in enumerate(NAMES):
        # what the two-phase loop says, for the tokens that the row has itself
        alone = make_alone(name)
        kwargs = {} if name == BASE else {"prefill_mask": mask[i : i + 1]}
        with torch.no_grad():
            expected.append(alone(input_ids=ids[i : i + 1], **kwargs).logits)
    model = c.model(kind)
    with torch.no_grad():
        found = model(input_ids=ids, prefill_mask=mask, adapter_names=NAMES).logits
    assert (found - torch.cat(expected)).abs().max() <= TOLERANCE
    rows = [0, 1, 2, 5]
    labels = ids.masked_fill(mask, -100)[rows]
    names = [NAMES[row] for row in rows]
    with torch.no_grad():
        found = model(input_ids=ids[rows], labels=labels, adapter_names=names).logits
    assert (found - torch.cat(expected)[rows]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_decode_runs_the_operations_of_the_base_model(kind):
    c, ids = saved_adapters(), prompts()

    def decode_counts(model, **kwargs):
        """Returns the operations of each forward of a generation."""
        found, mode = [], []

        def before(module, args, inputs):
            mode.append(Operations())
            mode[-1].__enter__()

        def after(module, args, output):
            mode[-1].__exit__(None, None, None)
            found.append(mode[-1].counts)

        inner(model).register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        inner(model).register_forward_hook(after)
        model.generate(input_ids=ids, **kwargs, **GREEDY)
        return found

    base = decode_counts(copy.deepcopy(c.base))
    found = decode_counts(c.model(kind), adapter_names=NAMES)
    assert len(found) == len(base) == NEW_TOKENS
    assert sum(found[0].values()) > sum(base[0].values())
    assert found[1:] == base[1:]


@pytest.mark.parametrize("kind", ["pooled", "both"])
def test_decode_forwards_hold_no_slot(kind):
    c, ids = saved_adapters(), prompts()
    model = c.model(kind)
    pool = inner(model)._preft_attachment.routing.pool
    seen = []
    inner(model).register_forward_hook(lambda module, args, output: seen.append(sum(pool.resident().values())))
    model.generate(input_ids=ids, adapter_names=NAMES, prefill_chunk_size=4, **GREEDY)
    # three chunks, and then nothing is pinned, from the first decode forward on
    assert all(seen[:3])
    assert not any(seen[3:])
    assert len(seen) == 3 + NEW_TOKENS - 1


def test_nothing_stays_pinned_after_an_error():
    c, ids = saved_adapters(), prompts()
    model = c.model("pooled")
    pool = model._preft_attachment.routing.pool

    def fail(*args):
        raise OSError("on the way")

    handle = model.model.norm.register_forward_hook(fail)
    for call, options in ((model.generate, GREEDY), (model, {})):
        with torch.no_grad(), pytest.raises(OSError, match="on the way"):
            call(input_ids=ids, adapter_names=NAMES, **options)
        assert not any(pool.resident().values())
    handle.remove()
    check(model.generate(input_ids=ids, adapter_names=NAMES, **GREEDY), *c.oracle_rows(NAMES, ids), ids.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_calls_without_names_are_as_before(kind):
    c, ids = saved_adapters(), prompts(3)
    model = c.model(kind)
    name = {"held": "wide", "pooled": BASE, "both": "few"}[kind]
    if kind != "pooled":
        model.set_adapter(name)
    model.generate(input_ids=ids, adapter_names=["turn", "edit", BASE], **GREEDY)
    check(model.generate(input_ids=ids, **GREEDY), *c.oracle(name, ids), ids.shape[1])


def test_the_active_adapter_does_not_leak_into_base_rows():
    c, ids = saved_adapters(), prompts(2)
    model = c.model("held")
    model.set_adapter("wide")
    output = model.generate(input_ids=ids, adapter_names=[BASE, BASE], **GREEDY)
    check(output, *c.oracle(BASE, ids), ids.shape[1])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_transformers_own_adapters():
    c, ids = saved_adapters(), prompts(3)
    model = copy.deepcopy(c.base)
    for name in ("wide", "edit"):
        model.load_adapter(str(c.paths[name]), adapter_name=name)
    model.eval()
    names = ["edit", BASE, "wide"]
    check(model.generate(input_ids=ids, adapter_names=names, **GREEDY), *c.oracle_rows(names, ids), ids.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_decode_has_one_graph_and_no_break(kind):
    """A generation whose decode steps are compiled, as transformers does for a static cache on a GPU."""
    c, ids = saved_adapters(), prompts()
    model = c.model(kind)
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    step = torch.compile(type(inner(model)).__call__, backend=backend, fullgraph=True)

    def generate(**kwargs):
        return model.generate(input_ids=ids, cache_implementation="static", **kwargs, **GREEDY)

    expected = c.oracle_rows(NAMES, ids)
    inner(model).get_compiled_call = lambda config: functools.partial(step, inner(model))
    inner(model)._valid_auto_compile_criteria = lambda *args: True
    check(generate(adapter_names=NAMES), *expected, ids.shape[1])
    first = list(graphs)
    assert first
    check(generate(adapter_names=NAMES), *expected, ids.shape[1])
    generate()
    assert graphs == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model(kind):
    c, ids = saved_adapters(), prompts()
    model = c.model(kind)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=NAMES).logits
        found = compiled(input_ids=ids, adapter_names=NAMES).logits
        again = compiled(input_ids=ids, adapter_names=NAMES[::-1]).logits
        other = model(input_ids=ids, adapter_names=NAMES[::-1]).logits
    assert (found - expected).abs().max() <= TOLERANCE
    assert (again - other).abs().max() <= TOLERANCE
    pool = pool_of(inner(model))
    assert not any(pool.resident().values() if pool is not None else ()), "an adapter that stays pinned"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_not_compiled_in_a_model_that_is(kind):
    """As after too many recompilations, when torch gives a function up."""
    c, ids = saved_adapters(), prompts()
    model = c.model(kind)
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=NAMES).logits
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(PreftLinear, "forward", torch.compiler.disable(PreftLinear.forward))
            found = torch.compile(model, backend="eager")(input_ids=ids, adapter_names=NAMES).logits
    assert (found - expected).abs().max() <= TOLERANCE


def test_a_static_cache_of_ones_own():
    c, ids = saved_adapters(), prompts()
    model = c.model("both")
    cache = StaticCache(config=c.base.config, max_cache_len=32)
    output = model.generate(input_ids=ids, adapter_names=NAMES, **cache_argument(cache), **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids), ids.shape[1])


def test_a_second_turn_on_a_kept_cache():
    """The cache of turn one holds prompt and response; turn two adapts its own tokens, of each row's adapter."""
    c, ids = saved_adapters(), prompts(3)
    names = ["turn", "few", BASE]
    model = c.model("both")
    first = model.generate(input_ids=ids, adapter_names=names, **GREEDY)
    row = torch.cat([first.sequences, prompt(3, 4, seed=7)], 1)
    second = model.generate(input_ids=row, adapter_names=names, **cache_argument(cache_of(first)), **GREEDY)
    for i, name in enumerate(names):
        alone = make_alone(name)
        one = alone.generate(input_ids=ids[i : i + 1], **GREEDY)
        two = alone.generate(input_ids=row[i : i + 1], **cache_argument(cache_of(one)), **GREEDY)
        assert torch.equal(second.sequences[i : i + 1], two.sequences)


def test_deepcopy_of_a_model_with_named_adapters():
    c, ids = saved_adapters(), prompts()
    model = copy.deepcopy(c.model("held"))
    check(model.generate(input_ids=ids, adapter_names=NAMES, **GREEDY), *c.oracle_rows(NAMES, ids), ids.shape[1])
    with pytest.raises(TypeError, match="slot pool cannot be copied"):
        copy.deepcopy(c.model("pooled"))


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_names(kind):
    model, ids = saved_adapters().model(kind), prompts(2)
    for call in (model.generate, model):
        with pytest.raises(ValueError, match=r"adapter 'wild' is not known; known are edit, few, stable, turn, wide"):
            call(input_ids=ids, adapter_names=["wild", "few"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["few"], ValueError, r"1 names for 2 prompts"),
        (["few"] * 3, ValueError, r"3 names for"),
        ([], ValueError, "adapter_names is empty"),
        ("few", TypeError, r"adapter_names is 'few'"),
        (["few", None], TypeError, "one name per prompt"),
    ],
)
def test_names_that_cannot_be(kind, names, error, message):
    model, ids = saved_adapters().model(kind), prompts(2)
    with pytest.raises(error, match=message):
        model.generate(input_ids=ids, adapter_names=names)


@pytest.mark.parametrize(("num_names", "num_rows"), [(3, 2), (2, 4), (1, 2), (4, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_with_a_wrong_number_of_names(kind, num_names, num_rows):
    """A forward does not repeat names, as generate does with its prompts for beams."""
    names = ["few", "edit", "few", "edit"][:num_names]
    for mask in (None, True, False):
        with pytest.raises(ValueError, match=f"{num_names} names for a batch of {num_rows} rows"):
            saved_adapters().model(kind)(input_ids=prompts(num_rows), adapter_names=names, prefill_mask=mask)


def test_train_mode():
    model = saved_adapters().model("held").train()
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="train mode"):
            call(input_ids=prompts(1), adapter_names=["few"])


def test_gradients_are_refused_where_the_pool_has_none():
    model = saved_adapters().model("pooled")
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad=True"):
        model(input_ids=prompts(1), adapter_names=["few"])


def test_a_linear_layer_that_sees_another_shape():
    """Rows cannot be told apart in a layer that sees tokens in an order of its own, so it refuses."""
    base = make_base()
    model = make_preft(base, target_modules=["q_proj"])
    layer = base.model.layers[0].self_attn.q_proj
    original = type(base.model.layers[0].self_attn).forward

    def pooled_tokens(self, hidden_states, *args, **kwargs):
        layer(hidden_states[:, ::2])
        return original(self, hidden_states, *args, **kwargs)

    attention = base.model.layers[0].self_attn
    attention.forward = pooled_tokens.__get__(attention)
    with pytest.raises(RuntimeError, match=r"cannot tell them apart: leave this layer out"):
        model(input_ids=prompts(2), adapter_names=["default", BASE])


def test_names_of_a_saved_base(tmp_path):
    make_base().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(input_ids=prompts(1), adapter_names=["few"])
    model.add_adapter(PreftConfig(), adapter_name="few")
    model.eval()
    assert model.generate(input_ids=prompts(1), adapter_names=["few"], max_new_tokens=2).shape == (1, 11)
