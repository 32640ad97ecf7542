"""What ends a set of downloads before its time: Ctrl-C, or an error that is no adapter's own."""

import threading
import time

import pytest

from preft_core.format.config import AdapterError
from preft_core.hub import push_pull as hub
from preft_core.hub import source

NUM_ADAPTERS = 60
PLACES = {f"a{i}": f"org/a{i}" for i in range(NUM_ADAPTERS)}


class Slow:
    """In the place of find_adapter and pull_adapter: counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, *place: object, **options: object) -> object:
        with self._lock:
            self.calls += 1
        time.sleep(0.02)
        raise AdapterError("not today")


def test_ctrl_c_ends_a_pull_without_the_rest_of_the_queue(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(hub, "pull_adapter", slow)
    ended = []

    def progress(one):
        ended.append(one)
        if len(ended) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull_adapters(PLACES, max_workers=2, progress=progress)
    time.sleep(0.3)
    assert slow.calls < NUM_ADAPTERS / 2


def test_ctrl_c_ends_a_look_up_without_waiting_for_the_others(monkeypatch):
    over = threading.Event()

    def find(location):
        if location == "org/a0":
            raise KeyboardInterrupt
        over.wait(10)
        raise AdapterError("not today")

    monkeypatch.setattr(source, "find_adapter", find)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        source.find_all(PLACES)
    took = time.perf_counter() - start
    over.set()
    assert took < 5


def test_without_it_every_one_has_its_turn(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(hub, "pull_adapter", slow)
    monkeypatch.setattr(source, "find_adapter", slow)
    assert [one.error for one in hub.pull_adapters(PLACES)] == ["not today"] * NUM_ADAPTERS
    with pytest.raises(AdapterError, match=r"'a0': not today; 'a1'"):
        source.find_all(PLACES)
    assert slow.calls == 2 * NUM_ADAPTERS
