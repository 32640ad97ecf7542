"""The quality study's results: written once, never half, and said with what they were made on."""

import json
from unittest.mock import Mock

import pytest

from benchmarks.quality.store import Store


def test_a_run_that_is_there_is_not_done_again(tmp_path):
    store = Store(tmp_path / "r.json", {})
    key = store.key(part="sft", rank=1)
    assert store.get(key) is None
    store.put(key, {"loss": 1.0})
    assert Store(tmp_path / "r.json", {}).get(key) == {"loss": 1.0, "dtype": "bfloat16"}
    assert not list(tmp_path.glob("*.partial"))
    # runs of one machine, then of another, then of the first again, then of it in the other dtype
    a, b, c = {"device": "a"}, {"device": "b"}, {"device": "a", "dtype": "float32"}
    for environment, earlier in ((a, []), (b, [a]), (a, [b]), (c, [b, a])):
        found = Store(tmp_path / "r.json", environment).put("key", {"loss": 2.0})
        data = json.loads((tmp_path / "r.json").read_text())
        assert (data["earlier"], data["environment"]) == (earlier, environment)
        assert data["runs"]["key"] == found == {"loss": 2.0, "dtype": environment.get("dtype", "bfloat16")}
        assert len(data["runs"]) == 2


def test_a_run_is_made_and_reported_once_and_not_kept_if_it_is_stopped(tmp_path):
    reported: list[str] = []
    facts = {"task": "cities", "seed": 0}
    store = Store(tmp_path / "r.json", {})
    with pytest.raises(KeyboardInterrupt):
        store.once("rl", facts, reported.append, Mock(side_effect=KeyboardInterrupt))
    made = Mock(return_value={"loss": 1.0})
    expected = facts | {"loss": 1.0, "dtype": "bfloat16"}
    assert store.once("rl", facts, reported.append, made) == expected
    assert Store(tmp_path / "r.json", {}).once("rl", facts, reported.append, made) == expected
    assert made.call_count == 1
    assert reported == ["part=rl task=cities seed=0"] * 2
