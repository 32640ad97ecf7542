"""The adapters that a shard knows: added, checked, removed, kept while a request may name them."""

import gc
from types import SimpleNamespace

import pytest

from preft_core.format.adapter import AdapterError
from tests.tgi.server.small_model import CONFIG, ServedModel, adapter_in, model_of
from tgi_patch.server import known, shard
from tgi_patch.server.registry import AdapterTaken, Registry, UnknownAdapter
from tgi_patch.server.routing import PrefillRows, routed
from tgi_patch.server.target_modules import UnsupportedModel, find_target_modules
from tgi_patch.settings import Settings


@pytest.fixture
def served(tmp_path):
    return ServedModel(tmp_path)


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(known, "GRACE_S", 0.0)
    monkeypatch.setattr(known, "GRACE_REQUESTS", 0)


def test_a_removed_adapter_stays_for_requests_that_have_a_ticket(served, no_grace):
    ticket = served.registry.ticket("l0")
    served.registry.remove("l0")
    # another adapter of the same name does not touch it
    served.registry.add("l0", str(served.root / "l1"))
    again = served.registry.ticket("l0")
    assert again.key != ticket.key
    with routed(served.registry, [PrefillRows(ticket.key, 0, 2)], 2) as route:
        assert route.groups
    del ticket
    gc.collect()
    served.registry.ticket("l1")
    assert len(served.registry.pool.names()) == 4
    served.registry.remove("l2")
    with pytest.raises(UnknownAdapter, match="known are d, l0, l1"):
        served.registry.ticket("l2")


def test_a_removed_adapter_stays_for_requests_that_the_router_has_queued(served, monkeypatch):
    """An error in a Prefill fails all requests of the batch, so an id is known until no request can name it."""
    process, registry = shard.Shard(Settings()), served.registry
    process.registry = registry
    now = [100.0]
    monkeypatch.setattr(shard, "own_adapters", set)
    monkeypatch.setattr(known.time, "monotonic", lambda: now[0])

    def asked(name):
        return process.ticket(SimpleNamespace(adapter_id=name, cache_len=0))

    kept = asked("l0").key
    registry.remove("l0")
    assert "l0" not in registry.adapters()
    with pytest.raises(UnknownAdapter):
        registry.remove("l0")
    assert asked("l0").key == kept
    # an idle server's clock alone does not end it, nor do requests alone
    now[0] += 2 * known.GRACE_S
    assert asked("l0").key == kept
    registry.add("l0", str(served.root / "l1"))
    assert asked("l0").key != kept
    registry.remove("l0")
    for _ in range(known.GRACE_REQUESTS):
        asked("")
    assert kept not in {registry.ticket("l1").key, *registry.pool.names()}
    assert asked("l0").key in registry.pool.names()
    now[0] += 2 * known.GRACE_S
    with pytest.raises(UnknownAdapter, match="known are d, l1, l2"):
        asked("l0")
    assert len(registry.pool.names()) == 3


def test_removed_adapters_do_not_pile_up_where_no_request_comes(served, monkeypatch):
    monkeypatch.setattr(known, "GRACE_S", 0.0)
    settings = Settings(adapters={"x": "y"}, max_adapters=3)
    registry = Registry(served.targets, settings, "b", {"l0": served.sources["l0"]})
    for _ in range(8):
        registry.add("again", str(served.root / "l1"))
        registry.remove("again")
    assert len(registry.pool.names()) == 1 + 3


def test_a_place_given_again_is_the_same_only_with_the_same_content(served):
    registry, root = served.registry, served.root
    # a directory may have an @ in its name
    adapter_in(root / "acme@v2", served.targets, seed=5)
    adapter_in(root / "acme", served.targets, seed=6)
    registry.add("x", str(root / "acme@v2"))
    with pytest.raises(AdapterTaken, match="stands for"):
        registry.add("x", str(root / "acme"))
    registry.add("x", str(root / "acme@v2"))
    adapter_in(root / "acme@v2", served.targets, seed=7)
    with pytest.raises(AdapterTaken, match="other content than when it was added: remove it first"):
        registry.add("x", str(root / "acme@v2"))
    before = registry.adapters()["x"]["fingerprint"]
    registry.remove("x")
    registry.add("x", str(root / "acme@v2"))
    assert registry.adapters()["x"]["fingerprint"] not in (before, None)


def test_files_that_cannot_be_read_again_are_a_fault_that_is_told(served):
    settings = Settings(adapters={"x": "y"}, slots=1, host_bytes=0)
    registry = Registry(served.targets, settings, "b", {name: served.sources[name] for name in ("l0", "l1")})
    assert registry.faults() == {}
    (served.root / "l0" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        registry.ticket("l0")
    assert list(registry.faults()) == ["l0"]
    registry.ticket("l1")


def test_what_does_not_fit_is_refused_and_leaves_nothing(served):
    registry, root = served.registry, served.root
    registry.add("l1", str(root / "l1"))
    with pytest.raises(AdapterTaken, match="stands for"):
        registry.add("l1", str(root / "l2"))
    adapter_in(root / "wide", served.targets, r=20)
    with pytest.raises(AdapterError, match=r"slots for linear rank 32.*PREFT_RESERVE"):
        registry.add("wide", str(root / "wide"))
    adapter_in(root / "other", served.targets, base_model_name_or_path="org/other")
    with pytest.raises(AdapterError, match=r"trained on 'org/other'.*PREFT_BASE_MODEL"):
        registry.add("other", str(root / "other"))
    bigger = SimpleNamespace(**(vars(CONFIG) | {"hidden_size": 64, "intermediate_size": 48}))
    with pytest.raises(UnsupportedModel):
        find_target_modules(model_of(), bigger)
    source = adapter_in(root / "nan", served.targets)
    file = root / "nan" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    with pytest.raises(AdapterError):
        registry.add("nan", source.location)
    small = Registry(
        served.targets, Settings(adapters={"x": "y"}, max_bytes=100, reserve=tuple(registry.pool.buckets)), "b", {}
    )
    with pytest.raises(AdapterError, match="PREFT_MAX_ADAPTER_BYTES is 100"):
        small.add("l0", str(root / "l0"))
    assert sorted(registry.adapters()) == ["d", "l0", "l1", "l2"]
    assert len(registry.pool.names()) == 4
    with pytest.raises(AdapterError, match=r"'a'.*'b'"):
        Registry(
            served.targets,
            Settings(adapters={"x": "y"}, max_bytes=100),
            "b",
            {"a": served.sources["l0"], "b": served.sources["l1"]},
        )


def test_a_header_that_would_stop_the_event_loop_is_refused(served):
    """JSON is parsed under the interpreter lock, which the loop that serves gRPC needs."""
    source = adapter_in(served.root / "padded", served.targets)
    file = served.root / "padded" / "adapter_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" " * (2 << 20)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(AdapterError, match=r"has a header of .* bytes and a shard reads at most 1048576"):
        served.registry.add("padded", source.location)


def test_tensors_are_read_without_the_interpreter_lock(served, monkeypatch):
    """safetensors copies them under it."""

    def deserialize(data):
        raise AssertionError("copies all tensors under the interpreter lock")

    monkeypatch.setattr("safetensors.torch.deserialize", deserialize)
    served.registry.add("again", str(served.root / "l1"))
