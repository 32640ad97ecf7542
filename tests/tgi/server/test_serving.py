"""The patched TGI 3.3.7 server against the two-phase loop, token for token, over its own gRPC."""

import copy
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from preft_core.format.adapter import load_adapter
from tests.hf.many_adapters import BASE, Crowd
from tests.hf.oracle import adapted_copy
from tests.hf.zoo import make_preft
from tests.tgi.server_process import make_tiny_model, request, serving, some_ids

pytestmark = pytest.mark.tgi
ADAPTERS = ["wide", "few", "stable", "edit", "turn"]
MODELS = {}


def tiny_model(architecture):
    if architecture not in MODELS:
        MODELS[architecture] = make_tiny_model(architecture)
    return MODELS[architecture]


def check(server, model, cases):
    """cases: (adapter, ids, new, other fields of a request)."""
    found = server.run([request(ids, name, new, **others) for name, ids, new, others in cases])
    for (name, ids, new, others), tokens in zip(cases, found, strict=True):
        expected = model.expected(name, ids, new)
        if "drop" in others:
            expected = expected[: len(tokens)]
        assert tokens == expected, (name, len(ids), others)


# TGI's paged attention has no softcap on a CPU, which gemma2 needs
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        (name, "flashdecoding-ipex")
        for name in ("llama", "mistral", "qwen2", "gemma2", "gemma3_text", "phi3", "granite")
    ]
    + [(name, "paged") for name in ("llama", "mistral", "qwen2")],
)
def test_every_way_a_batch_is_made(architecture, attention):
    model = tiny_model(architecture)
    # the adapters do change what is said
    ids = some_ids(11, 1)
    said = [tuple(model.expected(name, ids, 6)) for name in [None, *ADAPTERS]]
    assert len(set(said)) >= 5
    with serving(model, attention, prefill_tokens=24) as server:
        for name in [None, *ADAPTERS]:
            check(server, model, [(name, ids, 6, {})])
        # one batch of every adapter and base rows, then others join it, and some leave in the middle
        names = ["turn", None, "wide", "edit", "few", "wide", None, "stable"]
        cases = [(name, some_ids(5 + 3 * i, i), 7, {}) for i, name in enumerate(names)]
        cases += [("few", some_ids(9, 40), 5, {"arrive": 2}), ("edit", some_ids(17, 41), 6, {"arrive": 3})]
        cases += [("wide", some_ids(6, 42), 20, {"drop": 5}), (None, some_ids(6, 42), 20, {"drop": 6})]
        check(server, model, cases)
        assert server.chunks == (attention != "paged")
        if server.chunks:
            # a long prompt in chunks while others decode, with a request that begins as a chunk
            cases = [("wide", some_ids(6, 50), 12, {}), ("edit", some_ids(5, 51), 12, {})]
            cases += [("few", some_ids(70, 52), 5, {"arrive": 2, "chunk": 9})]
            cases += [
                ("turn", some_ids(40, 53), 5, {"arrive": 3, "chunk": 3}),
                (None, some_ids(33, 54), 5, {"chunk": 8}),
            ]
            check(server, model, cases)


def mixed(seed=0):
    """Requests of every adapter that arrive while others decode."""
    names = ["turn", None, "wide", "edit", "few", "stable"]
    cases = [(name, some_ids(4 + 3 * i, seed + i), 8, {}) for i, name in enumerate(names)]
    return [
        *cases,
        *[(name, some_ids(9 + i, seed + 20 + i), 6, {"arrive": 2 + i}) for i, name in enumerate(names[:4])],
    ]


def test_the_check_fails_without_the_position_rule():
    model = tiny_model("llama")
    with serving(model, "flashdecoding-ipex", PREFT_TEST_BREAK="rows") as server, pytest.raises(AssertionError):
        check(server, model, mixed())


@pytest.mark.parametrize("world_size", [1, 2])
def test_starcoder2_takes_lora(world_size):
    """Its MLP is not gated, its linear layers have biases, and it has no place for DiReFT-P."""
    model = tiny_model("starcoder2")
    some = {name: path for name, path in model.adapters.paths.items() if name not in ("edit", "turn")}
    ids = some_ids(11, 1)
    assert len({tuple(model.expected(name, ids, 6)) for name in [None, *some]}) == 4
    listed = ",".join(f"{name}={path}" for name, path in some.items())
    with serving(model, "flashdecoding-ipex", world_size, prefill_tokens=24, PREFT_ADAPTERS=listed) as server:
        cases = [(name, some_ids(4 + 3 * i, i), 8, {}) for i, name in enumerate([None, *some, "wide"])]
        cases += [("few", some_ids(9, 40), 5, {"arrive": 2}), (None, some_ids(70, 52), 5, {"arrive": 3, "chunk": 9})]
        check(server, model, [*cases, ("wide", some_ids(50, 9), 5, {"chunk": 16})])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "granite"])
def test_two_shards(architecture):
    model = tiny_model(architecture)
    with serving(model, "flashdecoding-ipex", world_size=2, prefill_tokens=24) as server:
        check(server, model, mixed())
        check(server, model, [("wide", some_ids(50, 9), 5, {"chunk": 16}), ("edit", some_ids(6, 8), 9, {})])


def test_speculation_verifies_with_the_base_model():
    model = tiny_model("llama")
    # a prompt that repeats itself, so that n-grams are found
    repeated = some_ids(5, 3) * 5
    cases = [(name, repeated, 14, {}) for name in [None, *ADAPTERS]]
    with serving(model, "paged", arguments=["--speculate", "2"]) as server:
        check(server, model, cases)
        assert server.most > 1, "no guess was ever accepted, so nothing was tested"


def test_adapters_come_and_go():
    model = tiny_model("llama")
    ids = some_ids(12, 4)
    with serving(model, "flashdecoding-ipex", prefill_tokens=16) as server:
        (listed,) = server.control(op="list")
        assert sorted(listed["adapters"]) == sorted(ADAPTERS)
        path = str(model.adapters.paths["wide"])
        assert server.control(op="add", name="late", location=path) == [{"ok": True}]
        assert server.control(op="add", name="late", location=path) == [{"ok": True}]
        (taken,) = server.control(op="add", name="late", location=str(model.adapters.paths["few"]))
        assert taken["kind"] == "taken"
        assert server.run([request(ids, "late")]) == [model.expected("wide", ids, 6)]
        assert server.control(op="remove", name="late") == [{"ok": True}]
        (unknown,) = server.control(op="remove", name="late")
        assert unknown["kind"] == "unknown"
        # a request that was queued before the removal does not fail its batch
        assert server.run([request(ids, "late"), request(ids)]) == [
            model.expected("wide", ids, 6),
            model.expected(None, ids, 6),
        ]
        # an unknown adapter is an error and not the base model, and the server lives on
        answer = server.ask({"op": "run", "requests": [request(ids, "never")]})
        assert "'never' is not known" in answer["error"]
        check(server, model, [(None, ids, 6, {}), ("few", ids, 6, {})])
        # a prompt from a prefix cache may hold another adapter's KV
        answer = server.ask({"op": "run", "requests": [request(ids, "few", cached=4)]})
        assert "prefix cache" in answer["error"]
        # the base model under its own names
        for name in ("tgi", str(model.directory), "__base_model__"):
            assert server.run([request(ids, name)]) == [model.expected(None, ids, 6)]


def test_many_adapters_in_few_slots():
    base = tiny_model("llama").adapters
    made = Crowd(base.base, {BASE: base.base}, {})
    root = Path(tempfile.mkdtemp(prefix="preft-many-"))
    for i in range(20):
        method = ["lora", "lora", "direft", "loreft"][i % 4]
        make_preft(copy.deepcopy(made.base), method, seed=100 + i, r=4).save_pretrained(root / f"a{i}")
        saved = load_adapter(root / f"a{i}")
        made.adapted[f"a{i}"] = adapted_copy(made.base, method, saved.tensors, saved.config.scaling)
        made.paths[f"a{i}"] = root / f"a{i}"
    model = make_tiny_model("llama", made)
    dice = random.Random(7)
    with serving(model, "flashdecoding-ipex", prefill_tokens=64, PREFT_SLOTS="4", PREFT_HOST_BYTES="100000") as server:
        for _ in range(4):
            cases = []
            for _ in range(50):
                name = dice.choice([None, *made.paths, *made.paths])
                ids = some_ids(dice.randint(1, 30), dice.randint(0, 1 << 30))
                cases.append((name, ids, dice.randint(1, 6), {"arrive": dice.randint(0, 8)}))
            check(server, model, cases)
        (answer,) = server.control(op="statistics")
        assert answer["statistics"]["evictions"] > 20
        # forwards with more adapters than slots
        assert answer["statistics"]["streamed"] > 5
        assert answer["statistics"]["slots"] == 8


@pytest.mark.parametrize(("architecture", "world_size"), [("llama", 1), ("gemma2", 1), ("mistral", 1), ("qwen2", 2)])
def test_a_prefix_cache_that_keeps_adapters_apart(architecture, world_size):
    model = tiny_model(architecture)
    shared = some_ids(130, 60)
    assert len({tuple(model.expected(name, shared, 5)) for name in [None, *ADAPTERS]}) >= 4
    variables = {"PREFT_PREFIX_CACHE": "1", "PREFT_PREFIX_TOKENS": "2048", "REQUEST_LOGPROBS": "1"}
    with serving(model, "flashdecoding-ipex", world_size, prefill_tokens=80, **variables) as server:
        # the same prompt by everybody: the base after an adapter, and each again
        for name in [None, *ADAPTERS, None, *ADAPTERS]:
            check(server, model, [(name, shared, 5, {})])
        counted = [answer["statistics"] for answer in server.control(op="statistics")]
        assert [one["prefix_hit_tokens"] for one in counted] == [6 * 128] * world_size
        # the same beginning and other ends, in chunks, while others decode
        cases = [(name, shared[:100] + some_ids(30, i), 5, {"arrive": i}) for i, name in enumerate([None, *ADAPTERS])]
        cases += [("few", shared[:64] + some_ids(90, 70), 5, {"arrive": 2, "chunk": 40}), ("turn", shared, 5, {})]
        check(server, model, cases)
        # prompts that push each other out
        for _ in range(2):
            for i in range(20):
                check(server, model, [(ADAPTERS[i % 5], some_ids(140, 100 + i), 3, {})])
            check(server, model, [(None, shared, 5, {}), ("edit", shared, 5, {"chunk": 50})])
        assert server.control(op="statistics")[0]["statistics"]["prefix_evictions"] > 0
        # the log-probabilities of a prompt need all of it computed
        answer = server.ask({"op": "run", "requests": [request(shared, "turn", 2, logprobs=True)]})
        assert answer["prompt_tokens"] == len(shared)


def test_the_check_fails_when_adapters_share_the_cache():
    model = tiny_model("llama")
    shared = some_ids(130, 60)
    with serving(model, "flashdecoding-ipex", PREFT_PREFIX_CACHE="1", PREFT_TEST_BREAK="owner") as server:
        check(server, model, [("turn", shared, 12, {})])
        with pytest.raises(AssertionError):
            for name in [None, *ADAPTERS]:
                check(server, model, [(name, shared, 12, {})])


def test_a_prefix_cache_needs_attention_that_reads_it():
    with (
        pytest.raises(AssertionError, match="ATTENTION is paged"),
        serving(tiny_model("llama"), "paged", PREFT_PREFIX_CACHE="1"),
    ):
        pass


@pytest.mark.parametrize("name", ["tgi", "org/base"])
def test_an_id_of_the_base_model_is_refused_at_the_start(name):
    model, variables = tiny_model("llama"), {"PREFT_ADAPTERS": "", "PREFT_BASE_MODEL": "org/base"}
    with (
        pytest.raises(AssertionError, match="stands for the base model"),
        serving(model, PREFT_ADAPTERS_FILE=manifest_of({name: model.adapters.paths["wide"]}), **variables),
    ):
        pass


def test_the_ranks_of_a_model_tell_what_they_hold():
    model = tiny_model("llama")
    path = Path(tempfile.mkdtemp(prefix="preft-r-")) / "turned"
    shutil.copytree(model.adapters.paths["wide"], path)
    with serving(model, "flashdecoding-ipex", world_size=2, PREFT_HOST_BYTES="0", PREFT_SLOTS="1") as server:
        assert server.control(op="add", name="turned", location=str(path)) == [{"ok": True}] * 2
        first, second = (answer["adapters"] for answer in server.control(op="list"))
        # the whole adapter's, though each rank has another part of it
        assert first == second
        assert first["turned"]["fingerprint"] == first["wide"]["fingerprint"] != first["few"]["fingerprint"]
        shutil.copytree(model.adapters.paths["stable"], path, dirs_exist_ok=True)
        for answer in server.control(op="add", name="turned", location=str(path)):
            assert "other content than when it was added" in answer["error"]
        ids = some_ids(9, 2)
        server.run([request(ids, "wide")])
        answer = server.ask({"op": "run", "requests": [request(ids, "turned")]})
        assert "has changed since it was added" in answer["error"]
        for answer in server.control(op="faults"):
            assert list(answer["faults"]) == ["turned"]


def manifest_of(places):
    file = Path(tempfile.mkdtemp(prefix="preft-m-")) / "adapters.json"
    file.write_text(json.dumps({"adapters": {name: str(path) for name, path in places.items()}}))
    return str(file)
