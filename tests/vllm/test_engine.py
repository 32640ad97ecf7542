"""vLLM's real engine with the plugin against the two-phase loop, token for token, on a CPU."""

import copy
import shutil

import pytest
import torch

from benchmarks import vllm_engine
from preft_core.format.plain_lora import to_lora
from tests.hf.many_adapters import BASE
from tests.hf.oracle import two_phase_greedy
from tests.hf.zoo import make_base, make_preft
from tests.tgi.server_process import some_ids
from tests.vllm.engine_process import check, make_model, run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
NAMES = ["turn", None, "wide", "edit", "few", "sixth", None, "stable"]
MIXED = {"max_num_batched_tokens": 24, "max_num_seqs": 16, "enable_chunked_prefill": True}


def mixed_wave(model, lengths, new=8, seed=0):
    return [
        model.request(some_ids(n, seed + i), name, new)
        for i, (n, name) in enumerate(zip(lengths, NAMES, strict=False))
    ]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_six_adapters_and_base_rows_in_one_batch_in_chunks(architecture):
    model = make_model(architecture)
    ids = some_ids(11, 1)
    # the adapters do change what is said
    assert len({tuple(model.expected(name, ids, 6)) for name in set(NAMES)}) >= 5
    waves = [[model.request(ids, name) for name in NAMES]]
    # 24 tokens a step: prompts come in chunks, beside rows of decoding
    waves.append(mixed_wave(model, [40, 5, 61, 33, 90, 27, 70, 9], new=9, seed=20))
    found = run(model, waves, **MIXED)
    check(model, waves, found)


@pytest.mark.parametrize("broken", ["always", "chunk"])
def test_the_check_fails_without_the_position_rule(broken):
    model = make_model("llama")
    waves, engine = preempted(model)
    found = run(model, waves, broken, **engine)
    with pytest.raises(AssertionError):
        check(model, waves, found)


def preempted(model):
    """Requests that do not fit the cache together: 9 blocks of 32 tokens, of which each ends with 3."""
    wave = [model.request(some_ids(18 + i, 60 + i), name, 60) for i, name in enumerate(NAMES[:6])]
    return [wave], {"num_gpu_blocks_override": 9, "max_num_seqs": 6, "enable_prefix_caching": False}


def test_preempted_requests_compute_their_answers_again_as_base():
    model = make_model("llama")
    waves, engine = preempted(model)
    found = run(model, waves, **engine)
    assert found["counters"]["vllm:num_preemptions"] >= 3
    check(model, waves, found)


def conversation(model):
    """A first turn, the same prompts by other adapters, then a second turn that quotes the answers."""
    names = ["wide", "edit", None, "few"]
    first = [model.request(some_ids(40, 80 + i), name, 40) for i, name in enumerate(names)]
    others = [
        model.request(request["ids"], name, 6)
        for request, name in zip(first, ["few", None, "wide", "edit"], strict=False)
    ]
    second = []
    for i, request in enumerate(first):
        answer = model.expected(request["name"], request["ids"], request["new"])
        second.append(model.request([*request["ids"], *answer, *some_ids(5, 90 + i)], request["name"], 6))
    return [first, others, second, second], {"enable_prefix_caching": True}


def test_a_second_turn_with_a_prefix_cache():
    model = make_model("llama")
    waves, engine = conversation(model)
    found = run(model, waves, **engine)
    check(model, waves, found)
    # the blocks of the first prompt are taken, those that decoding wrote are not; asked again, all of them
    assert [answer["cached"] for answer in found["waves"][2]] == [32, 32, 64, 32]
    assert [answer["cached"] for answer in found["waves"][3]] == [64] * 4
    assert [answer["cached"] for answer in found["waves"][1]] == [0] * 4


def test_the_check_fails_with_vllms_own_block_hashes():
    model = make_model("llama")
    waves, engine = conversation(model)
    found = run(model, waves, "hash", **engine)
    with pytest.raises(AssertionError):
        check(model, waves, found)


def test_two_slots_serve_six_adapters_that_decode_at_once():
    model = make_model("llama")
    names = ["turn", "wide", "edit", "few", "sixth", "stable"]
    waves = [[model.request(some_ids(9 + i, 100 + i), name, 30) for i, name in enumerate(names)] for _ in range(2)]
    found = run(model, waves, max_loras=2, max_cpu_loras=3)
    check(model, waves, found)
    assert found["peak"] == 6


def test_a_name_whose_content_is_replaced_stands_for_both_until_the_first_has_ended():
    model = make_model("llama")
    old, new = model.request(some_ids(9, 110), "wide"), model.request(some_ids(10, 111), "few")
    for request in (old, new):
        request["adapter"][0] = "tone"
    others = [model.request(some_ids(9, 112), name) for name in ("edit", "stable")]
    # the others have the two slots when both are asked again, so both have to be loaded in one step
    waves = [[old, new], others, [old, new]]
    check(model, waves, run(model, waves, max_loras=2, max_cpu_loras=8))


def test_speculation_verifies_with_the_base_model():
    model = make_model("llama")
    waves = [mixed_wave(model, [20, 12, 25, 30, 17, 22, 9, 14], new=40, seed=120)]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    found = run(model, waves, speculative_config=speculation)
    check(model, waves, found)
    assert found["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_logprobs_of_prompts_beside_other_adapters():
    model = make_model("llama")
    wave = mixed_wave(model, [2, 12, 40, 30, 17, 3, 9, 14], seed=130)
    for request in wave[::2] + wave[5:6]:
        request["params"] = {"prompt_logprobs": 0}
    found = run(model, [wave], **MIXED)
    check(model, [wave], found)
    for request, answer in zip(wave, found["waves"][0], strict=True):
        assert ("scores" in answer) == ("params" in request)
        if "scores" in answer:
            ids = torch.tensor(request["ids"])
            logits = model.adapters.adapted[request["name"] or BASE](ids[None]).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer["scores"]), expected, rtol=1e-3, atol=1e-3)


def test_asynchronous_scheduling():
    model = make_model("llama")
    waves = [mixed_wave(model, [20, 12, 65, 30, 17, 22, 9, 14], new=12, seed=140)]
    check(model, waves, run(model, waves, async_scheduling=True, **MIXED))


def test_without_the_plugin_an_adapter_is_refused():
    model = make_model("llama")
    waves = [[model.request(some_ids(9, 1), "wide")]]
    found = run(model, waves, errors=True, plugins="")
    assert found["waves"] == [None]
    assert "preft_A" in found["errors"][0] or "required configuration fields" in found["errors"][0]


def test_a_graph_compiled_before_the_plugin_was_installed_is_not_used(tmp_path):
    """vLLM's cache of compiled graphs, cold, then warm: an edit of the residual stream is in the second graph."""
    model = make_model("llama")
    ids = some_ids(11, 1)
    options = {"variables": {"VLLM_CACHE_ROOT": str(tmp_path)}, "enforce_eager": False}
    base, edits = [[model.request(ids, None)]], [[model.request(ids, "edit"), model.request(ids, None)]]
    check(model, base, run(model, base, job={"compiled": True, "installed": False}, **options))
    graphs = set(tmp_path.glob("torch_compile_cache/torch_aot_compile/*"))
    assert graphs
    for _ in range(2):
        check(model, edits, run(model, edits, job={"compiled": True}, **options))
        assert len(set(tmp_path.glob("torch_compile_cache/torch_aot_compile/*")) - graphs) == 1


def test_bad_adapters_are_refused_before_they_reach_the_engine(tmp_path):
    model = make_model("llama")
    good = model.request(some_ids(9, 1), "wide")
    torn = tmp_path / "torn"
    shutil.copytree(model.adapters.paths["few"], torn)
    (torn / "adapter_model.safetensors").write_bytes(b"no weights")
    reused = good | {"adapter": ["other", good["adapter"][1], str(model.adapters.paths["few"])]}
    nowhere = good | {"adapter": ["nowhere", 31, str(tmp_path / "nowhere")]}
    waves = [[good], [reused], [good | {"adapter": ["torn", 30, str(torn)]}], [nowhere], [good]]
    found = run(model, waves, errors=True)
    check(model, [waves[0], waves[4]], {"waves": [found["waves"][0], found["waves"][4]]})
    assert found["waves"][3] is None
    assert "No adapter found" in found["errors"][2]
    assert found["waves"][1] is None
    assert "lora_int_id" in found["errors"][0]
    assert found["waves"][2] is None
    assert "safetensors" in found["errors"][1]


def test_an_adapter_that_does_not_fit_is_refused_with_its_faults_and_the_engine_goes_on(tmp_path):
    model = make_model("llama")
    make_preft(make_base("llama"), "lora").save_pretrained(tmp_path / "small")
    good, other = model.request(some_ids(9, 1), "wide"), model.request(some_ids(9, 2), "few")
    small = good | {"adapter": ["small", 9, str(tmp_path / "small")]}
    high = make_preft(copy.deepcopy(model.adapters.base), "lora", r=24)
    high.save_pretrained(tmp_path / "high")
    # the id of what could not be loaded is free
    other["adapter"][1] = 9
    waves = [[good], [good, small], [good | {"adapter": ["high", 10, str(tmp_path / "high")]}], [good, other]]
    found = run(model, waves, errors=True)
    assert found["waves"][1] is found["waves"][2] is None
    assert "features and the model has" in found["errors"][0]
    assert "r is 24, above max_lora_rank=16" in found["errors"][1]
    check(model, [waves[0], waves[3]], {"waves": [found["waves"][0], found["waves"][3]]})


def test_an_adapter_whose_directory_is_gone_is_loaded_again(tmp_path):
    """Three requests share a slot and a place in host memory; preempted or queued, their adapters are read again."""
    model = make_model("llama")
    waves, engine = preempted(model)
    for request in waves[0]:
        if request["adapter"]:
            name, number, path = request["adapter"]
            request["adapter"] = [name, number, str(shutil.copytree(path, tmp_path / "adapters" / name))]
    job = {"swap": [str(tmp_path / "adapters"), None]}
    found = run(model, waves, job=job, max_loras=1, max_cpu_loras=1, **engine)
    assert not (tmp_path / "adapters").exists()
    assert found["counters"]["vllm:num_preemptions"] >= 1
    check(model, waves, found)


def test_a_worker_refuses_content_that_changed_after_a_request_was_taken(tmp_path):
    model = make_model("llama")
    place = shutil.copytree(model.adapters.paths["wide"], tmp_path / "wide")
    request = model.request(some_ids(9, 1), "wide") | {"adapter": ["wide", 9, str(place)]}
    swap = [str(place), str(model.adapters.paths["few"])]
    # one adapter is kept, so the first has to be read again
    waves = [[request], [model.request(some_ids(9, 2), "edit")], [request]]
    found = run(model, waves, errors=True, job={"swap": swap}, max_loras=1, max_cpu_loras=1)
    check(model, waves[:2], {"waves": found["waves"][:2]})
    assert found["waves"][2] is None
    assert "has changed: its fingerprint is" in found["errors"][0]


def test_a_worker_refuses_an_id_that_two_front_processes_use(tmp_path):
    model = make_model("llama")
    wide = model.request(some_ids(9, 1), "wide")
    few = model.request(some_ids(9, 1), "few") | {
        "adapter": ["few", *wide["adapter"][1:2], str(model.adapters.paths["few"])]
    }
    found = run(model, [[wide], [few]], errors=True, job={"forget": True})
    check(model, [[wide]], {"waves": found["waves"][:1]})
    assert found["waves"][1] is None
    assert "one id is one adapter" in found["errors"][0]


def test_all_token_lora_beside_prefill_only_adapters(tmp_path):
    model = make_model("llama")
    for name in ("wide", "stable"):
        to_lora(model.adapters.paths[name], tmp_path / name)
    waves = [
        [model.request(some_ids(9 + i, 160 + i), name, 12) for i, name in enumerate(["wide", "edit", None, "few"])]
    ]
    plain = [(name, some_ids(10 + i, 170 + i)) for i, name in enumerate(["wide", "stable"])]
    given = [
        {"ids": ids, "adapter": [f"plain {name}", 20 + i, str(tmp_path / name)], "new": 12}
        for i, (name, ids) in enumerate(plain)
    ]
    # all slots are taken, which vLLM's own kernels for the CPU get wrong
    found = run(model, [waves[0] + given], max_loras=5)
    check(model, waves, {"waves": [found["waves"][0][:4]]})
    for (name, ids), answer in zip(plain, found["waves"][0][4:], strict=True):
        adapted = model.adapters.adapted[name]
        assert answer["tokens"] == two_phase_greedy(adapted, adapted, torch.tensor([ids]), 12)[0][0].tolist()
        assert answer["tokens"] != model.expected(name, ids, 12)


def test_where_a_seam_does_not_hold_preft_is_refused_and_lora_served(tmp_path):
    model = make_model("llama")
    to_lora(model.adapters.paths["wide"], tmp_path / "plain")
    ids = some_ids(10, 180)
    waves = [
        [{"ids": ids, "adapter": ["plain", 1, str(tmp_path / "plain")], "new": 8}],
        [model.request(ids, "edit") | {"adapter": ["edit", 2, str(model.adapters.paths["edit"])]}],
    ]
    found = run(model, waves, "seam", errors=True)
    adapted = model.adapters.adapted["wide"]
    expected = two_phase_greedy(adapted, adapted, torch.tensor([ids]), 8)[0][0].tolist()
    assert [answer["tokens"] for answer in found["waves"][0]] == [expected]
    assert found["waves"][1] is None
    assert "prefill-only" in found["errors"][0]
    assert "Scheduler.schedule has digest" in found["errors"][0]


def test_the_benchmark_in_small():
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    report = vllm_engine.measure(vllm_engine.random_model(**shape), 2, 8, 12, 8, 5)
    assert list(report["systems"]) == [*vllm_engine.SYSTEMS, vllm_engine.STOCK]
    assert all(one["decode_tokens_per_s"] > 0 for one in report["systems"].values())
