"""Cards on a Hub on loopback: nobody's own words are lost, and what a card says to run runs."""

import re

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel

from preft_core.format.adapter import load_adapter
from preft_core.format.config import HubError
from preft_hf import PreftPool
from preft_hf.hub import push_adapter
from tests.hf.cases import prompt
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    # peft calls old names of transformers, huggingface_hub an old way of its transport
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning"),
]
OWN = "---\nlanguage: de\ntags: [cities]\n---\n# Mine\n\nMY OWN WORDS\n"
UNREADABLE = {
    "no YAML": b"---\na: [b\n---\nMY OWN WORDS",
    "a list": b"---\n- a\n---\nMY OWN WORDS",
    "a number for tags": b"---\ntags: 5\n---\nMY OWN WORDS",
    "a key that is no text": b"---\n1: 2\n---\nMY OWN WORDS",
    "Latin-1": "---\nlanguage: de\n---\nGrüße".encode("latin-1"),
}


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter without a card of its own."""
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink()
    return tmp_path / "a"


def files(hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return {file: blob.data for file, blob in repository.commits[repository.refs["main"]].items()}


@pytest.mark.parametrize("step", ["resolve", "download"])
@pytest.mark.parametrize("kind", ["401", "403", "404", "500", "reset"])
@pytest.mark.parametrize("way", ["push_adapter", "push_to_hub"])
def test_a_card_that_cannot_be_read_now_is_not_written_over(hub, adapter, monkeypatch, step, kind, way):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.put("org/mine", {"README.md": OWN.encode()})
    model = PeftModel.from_pretrained(make_base(), adapter)
    push = {
        "push_adapter": lambda: push_adapter(adapter, "org/mine"),
        "push_to_hub": lambda: model.push_to_hub("org/mine"),
    }
    hub.fault(step, kind, path="README.md")
    with pytest.raises((HubError, HfHubHTTPError)):
        push[way]()
    assert files(hub, "org/mine") == {"README.md": OWN.encode()}
    hub.faults.clear()
    push[way]()
    assert "MY OWN WORDS" in files(hub, "org/mine")["README.md"].decode()


def test_the_card_of_the_hub_counts_and_not_an_older_one_in_the_cache(hub, adapter, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_adapter(adapter, "org/mine")
    hub.put("org/mine", {"README.md": OWN.encode()})
    hub.fault("resolve", "500", path="README.md")
    with pytest.raises(HubError, match=r"Could not push to org/mine: its README\.md"):
        push_adapter(adapter, "org/mine")
    assert files(hub, "org/mine")["README.md"] == OWN.encode()


def test_a_folder_of_a_repository_has_a_card_of_its_own_that_loads_it(hub, adapter, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(make_base(), adapter).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "README.md").unlink()
    hub.put("org/many", {"README.md": b"ROOT WORDS", "x/y/README.md": b"---\ntags: [1, null]\n---\nFOLDER WORDS"})
    push_adapter(tmp_path / "b", "org/many", subfolder="x/y/")
    found = files(hub, "org/many")
    assert found["README.md"] == b"ROOT WORDS"
    card = found["x/y/README.md"].decode()
    assert "FOLDER WORDS" in card
    assert "ROOT WORDS" not in card

    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ids = prompt(1)
    names: dict = {"inputs": {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}}
    exec(blocks[0], names)
    expected = model.generate(**names["inputs"])
    assert torch.equal(names["model"].eval().generate(**names["inputs"]), expected)
    with PreftPool.from_pretrained(base, {"mine": names["folder"]}):
        assert torch.equal(base.generate(**names["inputs"], adapter_names=["mine"]), expected)
    assert 'PreftPool.from_pretrained(model, {"mine": folder})' in blocks[1]


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_card_of_the_folder_is_named_before_anything_is_sent(hub, adapter, content):
    (adapter / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(adapter / "README.md"))):
        push_adapter(adapter, "org/mine")
    assert hub.repositories == {}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_card_of_the_repository_is_named_and_stays(hub, adapter, content):
    hub.put("org/mine", {"README.md": content})
    with pytest.raises(ValueError, match=r"README\.md of org/mine"):
        push_adapter(adapter, "org/mine")
    assert files(hub, "org/mine") == {"README.md": content}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_an_adapter_is_saved_beside_an_unreadable_card(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    model = make_preft(make_base())
    with pytest.warns(UserWarning, match=r"left as it is: .*README\.md"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert load_adapter(tmp_path).config.fingerprint is not None
    assert not list(tmp_path.glob(".preft*"))


def test_a_connection_that_breaks_is_a_sentence(hub, adapter, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for step in ("create", "preupload", "lfs-batch", "commit"):
        hub.faults.clear()
        hub.fault(step, "reset")
        with pytest.raises(HubError, match=r"Could not push to org/mine: the connection to the Hub broke"):
            push_adapter(adapter, "org/mine")
