"""The logic of the vLLM seams, without vLLM."""

import asyncio
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preft_core.format.adapter import AdapterError, load_adapter, save_adapter
from preft_core.rule.tokens import prefill_span
from preft_vllm import api_server as front
from preft_vllm import blocks, stamp, steps
from preft_vllm.files import OpenFiles
from preft_vllm.rule import prefill_rows, sampled_ids, token_ids
from preft_vllm.stamp import Directory, Stamp, stamp_of
from tests.hf.zoo import make_base, make_preft


class Request:
    """As vLLM's LoRARequest."""

    def __init__(self, name, number, path):
        self.lora_name, self.lora_int_id, self.lora_path = name, number, str(path)
        self.load_inplace = False

    def __eq__(self, other):
        return isinstance(other, Request) and self.lora_name == other.lora_name

    def __hash__(self):
        return hash(self.lora_name)


MARK = Stamp("sha256:" + "ab" * 32, "acme/tone@" + "c" * 40)
STAMPED = Request("tone", 3, MARK.path)
LORA = Request("plain", 4, "some/lora")

steps_of_a_batch = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(steps_of_a_batch)
def test_ids_of_rows_follow_the_position_rule(batch):
    computed, scheduled, prompt, ids = (np.array(column) for column in list(zip(*batch, strict=True))[:4])
    only = [row[4] for row in batch]
    prefill = prefill_rows(scheduled, computed, prompt)
    sampled = np.minimum(scheduled, 2)
    tokens = token_ids(ids, only, scheduled, prefill).tolist()
    rows = sampled_ids(ids, only, scheduled, prefill, sampled).tolist()
    expected, expected_sampled = [], []
    for first, count, length, number, prefill_only in batch:
        _, end = prefill_span(first, count, length)
        own = [number if i < end or not prefill_only else 0 for i in range(count)]
        expected += own
        expected_sampled += own[-min(count, 2) :]
    assert tokens == expected
    assert rows == expected_sampled


def v1_batch(computed):
    return SimpleNamespace(
        num_reqs=3,
        request_lora_mapping=np.array([3, 4, 0, 99]),
        lora_id_to_lora_request={3: STAMPED, 4: LORA},
        num_computed_tokens_cpu=np.array([computed, 5, 5, 0]),
        num_prompt_tokens=np.array([6, 6, 6, 0]),
    )


def test_the_v1_batch_of_a_decode_step_needs_only_the_all_token_lora():
    inputs = steps.make_lora_inputs_v1(lambda *_: pytest.fail("vLLM's own rule"))
    batch = v1_batch(computed=6)
    assert inputs(batch, np.array([1, 1, 1]), np.array([1, 1, 1])) == ((0, 4, 0), (0, 4, 0), [LORA])
    assert getattr(batch, steps.ACTIVE) == 1
    batch = v1_batch(computed=4)
    assert inputs(batch, np.array([3, 1, 1]), np.array([1, 1, 1]))[:2] == ((0, 4, 0), (3, 3, 0, 4, 0))
    assert getattr(batch, steps.ACTIVE) == 2


def test_a_v1_batch_without_preft_adapters_is_vllms_own():
    batch = v1_batch(computed=6)
    del batch.lora_id_to_lora_request[3]
    assert steps.make_lora_inputs_v1(lambda *_: "stock")(batch, None, None) == "stock"
    runner = SimpleNamespace(input_batch=batch, compilation_config=SimpleNamespace(cudagraph_specialize_lora=True))
    assert steps.dispatch_v1(lambda self, **given: given)(runner, num_tokens=1) == {"num_tokens": 1}


@pytest.mark.parametrize(("separate", "given", "expected"), [(True, None, 0), (False, None, None), (True, 5, 5)])
def test_a_v1_decode_step_takes_the_graph_without_lora(separate, given, expected):
    batch = SimpleNamespace(**{steps.ACTIVE: 0})
    config = SimpleNamespace(cudagraph_specialize_lora=separate)
    runner = SimpleNamespace(input_batch=batch, compilation_config=config)
    found = steps.dispatch_v1(lambda self, **given: given)(runner, force_num_active_loras=given)
    assert found["force_num_active_loras"] == expected


def add_to_v2(state, req_id, index, lora_request):
    state.lora_ids[index] = 0
    if lora_request is not None:
        state.lora_requests[req_id], state.lora_ids[index] = lora_request, lora_request.lora_int_id


def v2_state(computed):
    class State:
        make_lora_inputs = steps.make_lora_inputs_v2(lambda *_: "stock")
        get_activate_loras = steps.active_loras_v2(lambda *_: pytest.fail("vLLM's own set"))
        add_request = steps.add_request_v2(add_to_v2)

    state = State()
    state.lora_requests, state.lora_ids = {}, np.zeros(4, int)
    for index, (req_id, lora_request) in enumerate({"a": STAMPED, "b": LORA, "c": None}.items(), 1):
        state.add_request(req_id, index, lora_request)
    states = SimpleNamespace(
        req_id_to_index={"a": 1, "b": 2, "c": 3},
        num_computed_tokens_np=np.array([0, computed, 5, 5]),
        # a request that goes on after a preemption: its prefill is longer than its prompt
        prompt_len=SimpleNamespace(np=np.array([0, 6, 6, 6])),
        prefill_len=SimpleNamespace(np=np.array([0, 12, 6, 6])),
    )
    setattr(state, steps.STATES, states)
    return state


def test_the_v2_runner_goes_by_the_prompts_length_and_not_by_what_it_prefills():
    ids, index = ["a", "b", "c"], np.array([1, 2, 3])
    prompt, tokens, active = v2_state(4).make_lora_inputs(ids, index, np.array([4, 1, 1]))
    assert (prompt, tokens, active) == ((0, 4, 0), (3, 3, 0, 0, 4, 0), [STAMPED, LORA])
    assert v2_state(6).get_activate_loras(ids) == [LORA]
    assert v2_state(6).make_lora_inputs(["b", "c"], index[1:], np.array([1, 1])) == "stock"


def test_a_name_that_comes_to_stand_for_other_content_is_two_adapters_of_a_step():
    newer = Request(STAMPED.lora_name, 4, Stamp("sha256:" + "cd" * 32, "acme/tone@" + "d" * 40).path)
    batch = v1_batch(computed=4)
    batch.lora_id_to_lora_request[4] = newer
    inputs = steps.make_lora_inputs_v1(lambda *_: pytest.fail("vLLM's own rule"))
    active = inputs(batch, np.array([2, 1, 1]), np.array([1, 1, 1]))[2]
    assert [request.lora_int_id for request in active] == [3, 4]
    assert getattr(batch, steps.ACTIVE) == 2
    state = v2_state(4)
    state.add_request("b", 2, newer)
    assert [request.lora_int_id for request in state.get_activate_loras(["a", "b", "c"])] == [3, 4]


def test_a_v2_runner_whose_states_are_not_known_is_an_error():
    state = v2_state(4)
    delattr(state, steps.STATES)
    with pytest.raises(RuntimeError, match="end of a prompt"):
        state.get_activate_loras(["a"])


@given(steps_of_a_batch, st.randoms())
def test_the_v2_runner_follows_the_position_rule_in_any_batch(batch, random):
    """Requests come and go: an index is given again to a request with another adapter, or with none."""
    state, states = v2_state(0), SimpleNamespace()
    state.lora_requests, state.lora_ids = {}, np.zeros(len(batch), int)
    delattr(state, steps.PREFILL_ONLY)
    setattr(state, steps.STATES, states)
    adapters = [None, STAMPED, LORA, Request("newer", 5, Stamp("sha256:" + "cd" * 32, "acme/b@" + "d" * 40).path)]
    for index in range(len(batch)):
        state.add_request("before", index, random.choice(adapters))
    state.lora_requests.clear()
    names, order = [f"r{i}" for i in range(len(batch))], list(range(len(batch)))
    random.shuffle(order)
    states.req_id_to_index = dict(zip(names, order, strict=True))
    states.num_computed_tokens_np, prompt = np.zeros(len(batch), int), np.zeros(len(batch), int)
    states.prompt_len = SimpleNamespace(np=prompt)
    tokens, sampled, active = [], [], {}
    for name, index, (computed, count, length, number, _) in zip(names, order, batch, strict=True):
        adapter = adapters[number]
        state.add_request(name, index, adapter)
        states.num_computed_tokens_np[index], prompt[index] = computed, length
        _, end = prefill_span(computed, count, length)
        rows = [adapter.lora_int_id if adapter and (adapter is LORA or i < end) else 0 for i in range(count)]
        tokens, sampled = tokens + rows, [*sampled, rows[-1]]
        active |= {adapter.lora_int_id: adapter} if adapter and (adapter is LORA or end) else {}
    found = state.get_activate_loras(names) if any(steps.is_stamped(r) for r in state.lora_requests.values()) else None
    assert found is None or {request.lora_int_id: request for request in found} == active
    found = state.make_lora_inputs(names, np.array(order), np.array([row[1] for row in batch]))
    if found != "stock":
        assert (list(found[0]), list(found[1])) == (sampled, tokens)
        assert {request.lora_int_id: request for request in found[2]} == active
        assert len(found[2]) == len(active)
    else:
        assert not any(steps.is_stamped(request) for request in state.lora_requests.values())


def test_a_decode_step_looks_at_no_request_of_the_v2_runner_on_its_own(monkeypatch):
    state = v2_state(6)
    state.lora_requests = SimpleNamespace(__getitem__=lambda name: pytest.fail("a look at one request"))
    monkeypatch.setattr(steps, "is_stamped", lambda request: pytest.fail("a look at one request"))
    monkeypatch.setattr(steps, "stamp_of", lambda request: pytest.fail("a look at one request"))
    assert state.make_lora_inputs(["a", "c"], np.array([1, 3]), np.array([1, 1])) == ((0, 0), (0, 0), [])
    assert state.get_activate_loras(["a", "c"]) == []


def test_only_prompts_being_computed_count_against_max_loras():
    running = [
        SimpleNamespace(lora_request=lora, num_computed_tokens=computed, num_prompt_tokens=6)
        for lora, computed in [(STAMPED, 6), (STAMPED, 5), (LORA, 9), (None, 9)]
    ]
    seen, names = [], []

    def schedule(self, throttle):
        seen.append([request.lora_request and request.lora_request.lora_int_id for request in self.running])
        names.append([request.lora_request and request.lora_request.lora_name for request in self.running])
        raise KeyError(throttle)

    scheduler = SimpleNamespace(running=running)
    with pytest.raises(KeyError):
        steps.schedule(schedule)(scheduler, True)
    # vLLM counts ids above 0; what KV events say is said of the adapter, also of blocks that decoding fills
    assert seen == [[0, 3, 4, None]]
    assert names == [["tone", "tone", "plain", None]]
    for request, lora in zip(running, [STAMPED, STAMPED, LORA, None], strict=True):
        assert request.lora_request is lora


def stock_keys(request, start, end, mm):
    lora = request.lora_request
    keys = [] if lora is None else [("lora", lora.lora_name, lora.lora_path)]
    return (*keys, ("cache_salt", "s")), mm + 1


def test_blocks_are_keyed_by_content_and_by_their_prefill_rows():
    keys = steps.block_keys(stock_keys)
    request = SimpleNamespace(lora_request=STAMPED, num_prompt_tokens=20)
    own = ("lora", "tone", MARK.fingerprint)
    assert keys(request, 0, 16, 0) == ((own, ("cache_salt", "s")), 1)
    assert keys(request, 16, 32, 0)[0] == (own, ("preft", "4 prefill rows"), ("cache_salt", "s"))
    assert keys(request, 32, 48, 0)[0] == (own, ("preft", "0 prefill rows"), ("cache_salt", "s"))
    # also while the scheduler does not count it
    request.num_computed_tokens, found = 20, []
    counting = steps.schedule(lambda self: found.append(keys(self.running[0], 16, 32, 0)[0]))
    counting(SimpleNamespace(running=[request]))
    assert found == [(own, ("preft", "4 prefill rows"), ("cache_salt", "s"))]
    assert keys(SimpleNamespace(lora_request=LORA, num_prompt_tokens=4), 0, 16, 0) == (
        (("lora", "plain", "some/lora"), ("cache_salt", "s")),
        1,
    )


def test_the_key_of_compiled_graphs_says_that_the_plugin_is_there(monkeypatch):
    key = blocks.config_hash(lambda config: config.stock)
    first, second = SimpleNamespace(stock="a"), SimpleNamespace(stock="b")
    assert key(first) == key(first)
    assert len({key(first), key(second), "a", "b"}) == 4
    before = key(first)
    monkeypatch.setattr(blocks, "_identity", lambda: "another version of the plugin")
    assert key(first) != before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["one", "two"]):
        make_preft(make_base(), "lora", seed=seed).save_pretrained(root / name)
    return root


def test_a_request_is_stamped_with_its_adapters_content(saved):
    directory, request = Directory(), Request("one", 1, saved / "one")
    stamped = directory.stamped(request)
    assert request.lora_path == str(saved / "one")
    stamp = stamp_of(stamped)
    assert stamp is not None
    assert stamp.location == str(saved / "one")
    assert stamp.path == stamped.lora_path
    assert stamp_of(directory.stamped(Request("two", 2, saved / "two"))) != stamp
    assert directory.stamped(None) is None
    assert directory.is_preft(request)
    assert directory.is_preft(stamped)
    assert not directory.is_preft(LORA)


@pytest.fixture
def files():
    opened = OpenFiles(limit=2)
    yield opened
    opened.close()


def test_a_loaded_adapter_is_read_again_after_its_files_were_deleted_or_replaced(files, saved, tmp_path):
    marks = []
    for name in ("one", "two"):
        shutil.copytree(saved / name, tmp_path / name)
        mark = stamp_of(Directory().stamped(Request(name, 1, tmp_path / name)))
        marks.append(mark)
        assert files.load(mark).fingerprint == mark.fingerprint
    shutil.rmtree(tmp_path / "one")
    other = load_adapter(saved / "one")
    save_adapter(tmp_path / "two", other.config, other.tensors)
    for mark, name in zip(marks, ("one", "two"), strict=True):
        again = files.load(mark)
        assert again.fingerprint == mark.fingerprint
        for key, tensor in load_adapter(saved / name).tensors.items():
            assert torch.equal(again.tensors[key], tensor)
    with pytest.raises(AdapterError, match="has changed: its fingerprint is"):
        OpenFiles(limit=2).load(marks[1])
    with pytest.raises(AdapterError, match="neither a directory nor a Hub id"):
        OpenFiles(limit=2).load(marks[0])


def test_files_overwritten_in_place_are_refused_and_the_number_of_open_ones_is_limited(files, saved, tmp_path):
    marks = []
    for name, source in (("a", "one"), ("b", "two"), ("c", "one")):
        shutil.copytree(saved / source, tmp_path / name)
        marks.append(Stamp(load_adapter(saved / source).fingerprint, str(tmp_path / name)))
        files.load(marks[-1])
    shutil.copytree(saved / "one", tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(AdapterError, match="not in place"):
        files.load(marks[1])
    # the least recently loaded were closed, so they are looked for in their directory
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "c")
    assert files.load(marks[2]).fingerprint == marks[2].fingerprint
    with pytest.raises(AdapterError, match="neither a directory nor a Hub id"):
        files.load(marks[0])


def test_an_id_stands_for_one_content(saved, tmp_path):
    directory, place = Directory(), tmp_path / "moving"
    place.symlink_to(saved / "one")
    directory.stamped(Request("moving", 1, place))
    place.unlink()
    place.symlink_to(saved / "two")
    with pytest.raises(ValueError, match="lora_int_id 1 stands for"):
        directory.stamped(Request("moving", 1, place))
    with pytest.raises(ValueError, match="lora_int_id 1 stands for"):
        directory.stamped(Request("plain", 1, "some/lora"))
    assert stamp_of(directory.stamped(Request("moving", 2, place))) is not None


def test_an_id_keeps_its_commit_when_the_repository_is_looked_up_again(monkeypatch):
    commits = ["a" * 40]

    def find(place):
        adapter = SimpleNamespace(fingerprint=f"sha256:{commits[-1]}")
        config = SimpleNamespace(base_model_name_or_path=None)
        return SimpleNamespace(config=config, location=f"{place}@{commits[-1]}", load=lambda: adapter)

    monkeypatch.setattr(stamp, "find_adapter", find)
    monkeypatch.setattr(stamp, "_peft_type", lambda place: "PREFT")
    directory, first = Directory(), Request("tone", 1, "acme/tone")
    before = directory.stamped(first, fresh=True).lora_path
    commits.append("b" * 40)
    again = Request("tone", 1, "acme/tone")
    again.load_inplace = True
    with pytest.raises(ValueError, match="lora_int_id 1 stands for"):
        directory.stamped(again, fresh=True)
    assert directory.stamped(first).lora_path == before
    assert directory.stamped(Request("newer", 2, "acme/tone"), fresh=True).lora_path != before
    assert directory.stamped(first).lora_path == before


def test_what_cannot_be_served_is_refused_where_requests_come_in(saved, tmp_path):
    with pytest.raises(ValueError, match="is reserved for the plugin"):
        Directory().stamped(STAMPED)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFT"}')
    with pytest.raises(ValueError, match="method"):
        Directory().stamped(Request("bad", 1, tmp_path))
    processor = SimpleNamespace(**{front.DIRECTORY: Directory()})
    processed = front.process_inputs(lambda self, *given, **named: given[5])
    request = Request("one", 1, saved / "one")
    assert stamp_of(processed(processor, "r", [], None, (), None, request)) is not None
    with pytest.raises(ValueError, match="resumable"):
        processed(processor, "r", [], None, (), None, request, resumable=True)
    with pytest.raises(ValueError, match="beam search"):
        front.beam_search(lambda *_: None)(None, [], None, [request])
    assert front.beam_search(lambda *_: "done")(None, [], None, LORA) == "done"


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    model = make_preft(make_base(), "lora")
    model.peft_config["default"].base_model_name_or_path = "acme/base"
    model.save_pretrained(tmp_path)
    request = Request("one", 1, tmp_path)
    with pytest.raises(ValueError, match="PREFT_BASE_MODEL"):
        Directory(["acme/other"]).stamped(request)
    assert stamp_of(Directory(["acme/other", "acme/base"]).stamped(request)) is not None


def test_a_kv_connector_that_may_mix_adapters_is_refused(saved):
    def directory(connector):
        transfer = connector and SimpleNamespace(kv_connector=connector)
        config = SimpleNamespace(model_config=SimpleNamespace(model="base"), kv_transfer_config=transfer)
        return front.directory_of(SimpleNamespace(vllm_config=config))

    request = Request("one", 1, saved / "one")
    for connector in (None, *stamp.KV_CONNECTORS):
        assert stamp_of(directory(connector).stamped(request)) is not None
    for connector in ("LMCacheConnectorV1", "MultiConnector"):
        with pytest.raises(ValueError, match=f"KV connector is {connector}: .*OffloadingConnector"):
            directory(connector).stamped(request)
        assert directory(connector).stamped(LORA) is LORA


@pytest.mark.parametrize(
    ("served", "trained", "allowed"),
    [
        ("acme/base", "acme/base", True),
        ("acme/base", "acme/other", False),
        ("{hub}/models--acme--base/snapshots/{commit}", "acme/base", True),
        ("{hub}/models--acme--base/snapshots/{commit}", "acme/other", False),
        ("acme/base", "{hub}/models--acme--base/snapshots/{commit}", True),
        ("acme/base", "{hub}/models--acme--other/snapshots/{commit}", False),
        ("{hub}/models/llama", "acme/base", True),
        ("acme/base", "{hub}/training/llama", True),
        ("{hub}/models/llama", "{hub}/training/llama", True),
    ],
)
def test_the_same_base_model_has_many_names(tmp_path, caplog, served, trained, allowed):
    """A directory other than a snapshot of the Hub's cache does not say which model is in it."""
    served, trained = (name.format(hub=tmp_path, commit="c" * 40) for name in (served, trained))
    model = make_preft(make_base(), "lora")
    model.peft_config["default"].base_model_name_or_path = trained
    model.save_pretrained(tmp_path / "one")
    request = Request("one", 1, tmp_path / "one")
    if not allowed:
        with pytest.raises(ValueError, match="PREFT_BASE_MODEL"):
            Directory([served]).stamped(request)
        return
    assert stamp_of(Directory([served]).stamped(request)) is not None
    unknown = any(name.startswith(str(tmp_path)) and "snapshots" not in name for name in (served, trained))
    assert ("only shapes are compared" in caplog.text) == unknown


def test_a_name_given_for_a_served_directory_is_compared(tmp_path):
    model = make_preft(make_base(), "lora")
    model.peft_config["default"].base_model_name_or_path = "acme/base"
    model.save_pretrained(tmp_path / "one")
    request = Request("one", 1, tmp_path / "one")
    assert stamp_of(Directory([str(tmp_path), "acme/base"]).stamped(request)) is not None
    with pytest.raises(ValueError, match=r"trained on acme/base and the server has .*, acme/named"):
        Directory([str(tmp_path), "acme/named"]).stamped(request)


def test_an_adapter_is_loaded_ahead_aside_of_the_event_loop(tmp_path, monkeypatch):
    make_preft(make_base()).save_pretrained(tmp_path / "one")
    processor = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(model="base")))
    engine = SimpleNamespace(input_processor=processor)
    threads, stamped = [], Directory.stamped

    def noting(self, request, **options):
        threads.append(threading.current_thread())
        return stamped(self, request, **options)

    async def load(self, request):
        return request

    monkeypatch.setattr(Directory, "stamped", noting)
    request = Request("one", 1, tmp_path / "one")
    found = asyncio.run(front.add_lora(load)(engine, request))
    assert stamp_of(found) is not None
    assert stamp_of(front.add_lora(lambda self, request: request)(engine, request)) == stamp_of(found)
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()
    other = Request("other", 1, tmp_path / "one")
    make_preft(make_base(), seed=5).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="lora_int_id 1 stands for"):
        asyncio.run(front.add_lora(load)(engine, other))


@pytest.mark.parametrize("aside", [False, True])
def test_an_adapter_is_loaded_when_first_named_and_a_failure_frees_its_id(aside, tmp_path, monkeypatch):
    class Refusal(Exception):
        """As vLLM's error of a client, which is no ValueError."""

    monkeypatch.setitem(sys.modules, "vllm.exceptions", SimpleNamespace(VLLMValidationError=Refusal))
    for name in ("one", "two"):
        make_preft(make_base(), seed=len(name) + ord(name[0])).save_pretrained(tmp_path / name)
    processor = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(model="base")))
    loads, fails = [], [True]

    def load(request):
        loads.append(request.lora_path)
        if fails:
            raise RuntimeError(fails.pop())

    async def load_aside(request):
        load(request)

    async def take_aside(self, *given, **named):
        return "taken"

    core = SimpleNamespace(add_lora=load, add_lora_async=load_aside)
    engine = SimpleNamespace(input_processor=processor, engine_core=core)
    added = front.add_request(take_aside if aside else lambda self, *given, **named: "taken")

    def ask(*given, **named):
        found = added(engine, "id", "prompt", "params", *given, **named)
        return asyncio.run(found) if aside else found

    with pytest.raises(RuntimeError):
        ask(lora_request=Request("one", 1, tmp_path / "one"))
    two = Request("two", 1, tmp_path / "two")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    plain = Request("plain", 4, tmp_path / "plain")
    assert [ask(lora_request=two), ask(None, two), ask(), ask(lora_request=plain)] == ["taken"] * 4
    assert len(loads) == 2
    # of what nothing can be read vLLM's own loading says what is wrong, before a step
    nowhere = Request("nowhere", 5, tmp_path / "nowhere")
    fails.append("no adapter there")
    with pytest.raises(RuntimeError, match="no adapter there"):
        ask(lora_request=nowhere)
    assert loads[2:] == [nowhere.lora_path]
    # the server answers with the message of an error that it knows
    with pytest.raises(Refusal if aside else ValueError, match="lora_int_id 1 stands for"):
        ask(lora_request=Request("one", 1, tmp_path / "one"))
