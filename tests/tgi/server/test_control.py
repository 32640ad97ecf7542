"""The control socket: adapters are added and removed while the shard's event loop serves requests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from preft_core.hub.source import AdapterSource
from tests.tgi.server.small_model import ServedModel
from tgi_patch.server import layers
from tgi_patch.server.control import ControlServer, ask
from tgi_patch.server.routing import PrefillRows, routed
from tgi_patch.server.shard import Shard
from tgi_patch.settings import Settings


@pytest.fixture
def served(tmp_path):
    return ServedModel(tmp_path)


@pytest.fixture
def directory():
    # the path of a unix socket has to be short
    with TemporaryDirectory(prefix="preft-") as root:
        yield Path(root) / "c"


@pytest.fixture
def control(served, directory):
    server = ControlServer(directory, 0, served.registry)
    server.start()
    yield lambda **request: ask(directory, 0, request, timeout_s=60)
    server.close()


def test_requests_are_served_while_an_adapter_is_checked(served, control, monkeypatch):
    """Whatever a forward calls takes no lock that a check holds."""
    begun, may_end = threading.Event(), threading.Event()
    load = AdapterSource.load

    def slow(source):
        begun.set()
        assert may_end.wait(60)
        return load(source)

    monkeypatch.setattr(AdapterSource, "load", slow)
    registry = served.registry

    def serve():
        tickets = [registry.ticket(name) for name in ("l0", "d")]
        rows = [PrefillRows(ticket.key, i, i + 1) for i, ticket in enumerate(tickets)]
        with routed(registry, rows, 2):
            registry.remove("l2")
        assert control(op="list")["adapters"].keys() == {"l0", "l1", "d"}
        assert control(op="statistics")["statistics"]["adapters"] == 3

    with ThreadPoolExecutor(2) as threads:
        adding = threads.submit(control, op="add", name="late", location=str(served.root / "l2"))
        try:
            assert begun.wait(60)
            threads.submit(serve).result(timeout=60)
            assert not adding.done()
        finally:
            may_end.set()
        assert adding.result(timeout=60) == {"ok": True}
    assert "late" in control(op="list")["adapters"]


def test_no_adapter_is_added_while_tgi_warms_up(served, directory):
    """TGI captures CUDA graphs then, and pinned memory that another thread allocates breaks a capture."""
    shard = Shard(Settings())
    shard.registry = served.registry
    shard._control = ControlServer(directory, 0, served.registry)

    def tgis_warmup(model):
        with pytest.raises(ConnectionRefusedError):
            ask(directory, 0, {"op": "add", "name": "late", "location": str(served.root / "l2")})
        return "warm"

    try:
        assert layers.warmup(shard, tgis_warmup)(None) == "warm"
        assert ask(directory, 0, {"op": "list"})["ok"]
        assert layers.warmup(shard, lambda model: "again")(None) == "again"
        assert ask(directory, 0, {"op": "list"})["ok"]
    finally:
        shard.close()
    assert not list(directory.iterdir())


def test_a_control_socket_that_was_never_served_is_closed(served, directory):
    ControlServer(directory, 0, served.registry).close()
    assert not list(directory.iterdir())
