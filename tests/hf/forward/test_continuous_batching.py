"""Continuous batching: packed forwards, chunks, shared prefixes. Each request equals the two-phase loop."""

import copy
import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from preft_hf import PreftPool
from preft_hf.forward import continuous
from tests.hf.cases import NEW_TOKENS
from tests.hf.many_adapters import BASE, KINDS, NAMES, Crowd, saved_adapters

pytestmark = [
    # transformers' own: its page defaults, and a manager that stops
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers.*"),
]

GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "pad_token_id": 0}


def ragged(num_prompts: int, seed: int = 0, longest: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_prompts,), generator=generator).tolist()
    return [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]


def config(**changes) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=64, **changes)


def run(model, prompts, names=None, generation=None, settings=None, **arguments) -> list[list[int]]:
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY | (generation or {})),
        continuous_batching_config=settings or config(),
        **({} if names is None else {"adapter_names": names}),
        **arguments,
    )
    assert not [result.error for result in results.values() if result.error]
    return [result.generated_tokens for result in results.values()]


def expected(known: Crowd, prompts, names) -> list[list[int]]:
    rows = zip(prompts, names, strict=True)
    return [known.oracle(name, torch.tensor([prompt]))[0][0].tolist() for prompt, name in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_with_their_own_adapters(kind):
    known = saved_adapters()
    prompts = ragged(len(NAMES))
    prompts[1] = prompts[0]
    assert run(known.model(kind), prompts, NAMES) == expected(known, prompts, NAMES)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_other_architectures(architecture):
    known = saved_adapters(architecture)
    prompts = ragged(len(NAMES))
    assert run(known.model("both"), prompts, NAMES) == expected(known, prompts, NAMES)


def test_the_active_adapter_is_the_default():
    known = saved_adapters()
    model = known.model("held")
    prompts = ragged(5)
    for name in ("wide", "edit"):
        model.set_adapter(name)
        assert run(model, prompts) == expected(known, prompts, [name] * 5)
    with model.disable_adapter():
        assert run(model, prompts) == expected(known, prompts, [BASE] * 5)


@pytest.mark.parametrize("num_tokens", [1, 3, 7])
def test_prompts_in_chunks(num_tokens):
    known = saved_adapters()
    prompts = ragged(len(NAMES), longest=20)
    small = ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=num_tokens)
    assert run(known.model("both"), prompts, NAMES, settings=small) == expected(known, prompts, NAMES)


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_little_memory_puts_requests_back(scheduler, monkeypatch):
    # generated tokens of a request that was put back are computed again, and stay decode tokens
    put_back = []
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: put_back.append(state) or again(state)
    )
    known = saved_adapters()
    prompts, names = ragged(12, longest=10), (NAMES * 2)[:12]
    small = ContinuousBatchingConfig(page_size=4, num_blocks=16, max_batch_tokens=16, scheduler_type=scheduler)
    assert run(known.model("both"), prompts, names, settings=small) == expected(known, prompts, names)
    assert any(state.generated_tokens for state in put_back)


def test_more_adapters_than_slots():
    known = saved_adapters()
    names = [name for name in known.paths for _ in range(3)]
    prompts = ragged(len(names))
    model = known.model("pooled", num_slots=1)
    assert run(model, prompts, names) == expected(known, prompts, names)
    assert run(model, prompts[::-1], names[::-1]) == expected(known, prompts[::-1], names[::-1])


def test_returned_sequences_have_their_prompts_adapter():
    known = saved_adapters()
    prompts = ragged(4)
    names = NAMES[:4]
    found = run(known.model("both"), prompts, names, {"num_return_sequences": 3, "do_sample": True, "top_k": 1})
    assert found == [row for row in expected(known, prompts, names) for _ in range(3)]


def second_turns(known: Crowd, model, names: list[str]) -> tuple[list[list[int]], list[list[int]], int]:
    """Asks the same long prompt of each adapter, then once more with the answer and new tokens behind it."""
    prompt = ragged(1, seed=3)[0] * 3 + list(range(10, 22))
    reused = 0
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config()
    ) as manager:

        def ask(prompts: list[list[int]], names: list[str]) -> list[list[int]]:
            ids = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS, adapter_names=names)
            found: dict[str, list[int]] = {}
            while len(found) < len(ids):
                result = manager.get_result(timeout=30)
                assert result is not None
                assert result.error is None, result.error
                found[result.request_id] = result.generated_tokens
            return [found[name] for name in ids]

        first = [ask([prompt], [name])[0] for name in names]
        # the prompt's last block is then full of base-computed tokens, or holds some
        longer = [[*prompt, *answer, *answer, 7, 8, 9] for answer in first]
        seen = manager.batch_processor.cache.search_prefix_match
        matched: list[int] = []
        manager.batch_processor.cache.search_prefix_match = lambda *args: matched.append(seen(*args)) or matched[-1]
        second = [ask([text], [name])[0] for text, name in zip(longer, names, strict=True)]
        reused = sum(matched)
    right = expected(known, [prompt] * len(names), names) + expected(known, longer, names)
    return first + second, right, reused


@pytest.mark.parametrize("kind", ["held", "pooled"])
def test_shared_prefixes_are_an_adapters_own(kind):
    known = saved_adapters()
    found, right, reused = second_turns(known, known.model(kind), [*known.paths, BASE])
    assert found == right
    assert reused > 0


def test_that_test_can_fail(monkeypatch):
    known = saved_adapters()
    monkeypatch.setattr(continuous, "SaltedTokens", lambda tokens, key, prompt_length: list(tokens))
    found, right, _ = second_turns(known, known.model("pooled"), [*known.paths, BASE])
    assert found != right


def test_decoding_calls_no_adapter(monkeypatch):
    known = saved_adapters()
    model = known.model("both")
    phases = []
    begin = type(model.get_base_model()._preft_attachment.phase).begin
    monkeypatch.setattr(
        type(model.get_base_model()._preft_attachment.phase),
        "begin",
        lambda self, phase: (phases.append(phase), begin(self, phase))[1],
    )
    run(model, ragged(3), NAMES[:3])
    assert [phase is False for phase in phases] == [False] + [True] * (NEW_TOKENS - 1)


def test_a_changed_adapter_makes_new_prefixes():
    known = saved_adapters()
    model = known.model("held")
    model.set_adapter("wide")
    prompt = ragged(1, seed=5)[0] * 4
    base = copy.deepcopy(model.get_base_model())
    before = run(model, [prompt], persistent_manager=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "preft_B" in name and "wide" in name:
                parameter.mul_(-3)
    after = run(model, [prompt], persistent_manager=True)
    del base
    fresh = run(model, [prompt], settings=config(allow_block_sharing=False))
    model.get_base_model().destroy_cached_continuous_batching_manager()
    assert run(model, [prompt]) == fresh == after != before


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_requests(data):
    known = saved_adapters()
    choice = st.sampled_from([*known.paths, BASE])
    names = data.draw(st.lists(choice, min_size=1, max_size=9))
    prompts = ragged(len(names), seed=data.draw(st.integers(0, 99)), longest=data.draw(st.integers(1, 24)))
    tokens = data.draw(st.integers(1, 40))
    chosen = ContinuousBatchingConfig(
        page_size=data.draw(st.sampled_from([4, 8, 16])), num_blocks=128, max_batch_tokens=tokens
    )
    model = known.model("pooled", num_slots=data.draw(st.integers(1, 3)))
    assert run(model, prompts, names, settings=chosen) == expected(known, prompts, names)


def test_wrong_names_are_refused():
    known = saved_adapters()
    model = known.model("both")
    with pytest.raises(ValueError, match=r"adapter 'nobody' is not known; known are .*wide"):
        run(model, ragged(2), ["wide", "nobody"])
    with pytest.raises(ValueError, match="adapter_names has 1 names for 2 prompts"):
        run(model, ragged(2), ["wide"])
    model.base_model.set_adapter(["few", "stable"])
    with pytest.raises(ValueError, match=r"few, stable are active at once.*adapter_names"):
        run(model, ragged(2))
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config()
    ) as manager:
        with pytest.raises(ValueError, match="adapter 'nobody'"):
            manager.add_request([1, 2], adapter_name="nobody")
        with pytest.raises(ValueError, match="request ids"):
            manager.add_request([1, 2], request_id="__warmup_1", adapter_name="wide")
    model.train()
    with pytest.raises(ValueError, match="train mode"):
        run(model, ragged(1), ["wide"])


def test_what_continuous_batching_does_not_take():
    from transformers import CompileConfig

    known = saved_adapters()
    model = known.model("held")
    with pytest.raises(ValueError, match="call generate_batch"):
        model.generate(input_ids=torch.tensor([[3, 4]]), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="compile config"):
        run(model, ragged(1), ["wide"], settings=config(varlen_compile_config=CompileConfig()))
    base = copy.deepcopy(known.base)
    base.generate_batch(
        ragged(1),
        generation_config=GenerationConfig(**GREEDY),
        continuous_batching_config=config(),
        persistent_manager=True,
    )
    with PreftPool.from_pretrained(base, {"wide": known.paths["wide"]}):
        with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
            run(base, ragged(1), ["wide"])
        base.destroy_cached_continuous_batching_manager()
        assert run(base, [[3, 4, 5]], ["wide"]) == expected(known, [[3, 4, 5]], ["wide"])
    gc.collect()


def test_an_adapter_that_is_removed_fails_its_own_request_alone():
    known = saved_adapters()
    model = copy.deepcopy(known.base)
    names = ["wide", "few", "edit"]
    pool = PreftPool.from_pretrained(model, {name: known.paths[name] for name in names})
    prompts = ragged(3)
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config()
    ) as manager:
        with manager.pause():
            ids = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS, adapter_names=names)
            pool.remove("few")
        found = {}
        while len(found) < 3:
            result = manager.get_result(timeout=30)
            assert result is not None
            found[result.request_id] = result
    assert "adapter 'few' is not known" in found[ids[1]].error
    for i in (0, 2):
        assert found[ids[i]].error is None
        assert [found[ids[i]].generated_tokens] == expected(known, prompts[i : i + 1], names[i : i + 1])
