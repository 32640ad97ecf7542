"""vLLM's plugin names adapters of a Hub by their commit and content."""

import pytest

from preft_core.format.adapter import load_adapter
from preft_hf.hub import push_adapter
from preft_vllm.stamp import Directory, stamp_of
from tests.hf.zoo import make_base, make_preft
from tests.vllm.test_logic import Request

# huggingface_hub hands a file to httpx under a name that httpx wants no more
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")


def test_an_id_is_pinned_to_the_commit_that_it_was_loaded_at(hub, tmp_path):
    for seed, name in enumerate(["one", "two"]):
        make_preft(make_base(), seed=seed).save_pretrained(tmp_path / name)
    push_adapter(tmp_path / "one", "acme/tone")
    directory = Directory()
    first = stamp_of(directory.stamped(Request("tone", 1, "acme/tone")))
    assert first is not None
    assert first.fingerprint == load_adapter(tmp_path / "one").fingerprint
    name, _, commit = first.location.partition("@")
    assert (name, len(commit)) == ("acme/tone", 40)

    push_adapter(tmp_path / "two", "acme/tone")
    assert stamp_of(directory.stamped(Request("tone", 1, "acme/tone"))) == first
    assert stamp_of(directory.stamped(Request("tone", 2, f"acme/tone@{commit}"))) == first
    second = stamp_of(directory.stamped(Request("tone", 3, "acme/tone"), fresh=True))
    assert second is not None
    assert second.fingerprint == load_adapter(tmp_path / "two").fingerprint
    assert stamp_of(directory.stamped(Request("tone", 1, "acme/tone"))) == first
    with pytest.raises(ValueError, match="lora_int_id 1 stands for"):
        directory.stamped(Request("tone", 1, "acme/tone"), fresh=True)
    assert stamp_of(directory.stamped(Request("tone", 1, "acme/tone"))) == first


def test_a_hub_that_was_away_is_asked_again(hub, tmp_path, monkeypatch):
    make_preft(make_base()).save_pretrained(tmp_path / "one")
    push_adapter(tmp_path / "one", "acme/tone")
    directory, request = Directory(), Request("tone", 1, "acme/tone")
    with monkeypatch.context() as away:
        away.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}{revision}{filename}"
        )
        # huggingface_hub asks again and again, for 23 seconds
        away.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        assert directory.stamped(request) is request
    assert stamp_of(directory.stamped(Request("tone", 2, "acme/tone"))) is not None
