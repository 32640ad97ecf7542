"""Push, pull and load through huggingface_hub, unmodified, and a Hub on loopback: bit for bit, and through faults."""

import json
import threading

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftModel

from preft_core.format.adapter import AdapterError, load_adapter
from preft_core.format.config import HubError
from preft_core.hub.manifest import read_manifest, write_manifest
from preft_core.hub.source import find_adapter
from preft_hf import PreftPool
from preft_hf.hub import pinned, pull_adapter, pull_adapters, push_adapter
from tests.hf.cases import prompt
from tests.hf.zoo import METHODS, make_base, make_preft

pytestmark = [
    # peft calls old names of transformers, huggingface_hub an old way of its transport
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning"),
]
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def saved(folder, method="lora", seed=0, **settings):
    model = make_preft(make_base(), method, seed=seed, **settings)
    model.save_pretrained(folder)
    return model


def answers(model) -> torch.Tensor:
    return model.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two adapters of one shape."""
    folder = tmp_path_factory.mktemp("two")
    saved(folder / "a")
    saved(folder / "b", seed=5)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_bit_identical(hub, tmp_path, method):
    model = make_preft(make_base(), method)
    pushed = model.push_to_hub("org/mine", token="hf_right")
    assert set(hub.repositories["org/mine"].commits[pushed.commit]) == FILES | {".gitattributes"}
    pulled = PeftModel.from_pretrained(make_base(), "org/mine").eval()
    for (name, one), (other, two) in zip(
        sorted(model.state_dict().items()), sorted(pulled.state_dict().items()), strict=True
    ):
        assert name == other
        assert torch.equal(one, two)
    assert torch.equal(answers(model), answers(pulled))
    with PreftPool.from_pretrained(base := make_base(), {"mine": "org/mine"}):
        found = base.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False, adapter_names=["mine"] * 2)
    assert torch.equal(found, answers(model))


def test_transformers_and_peft_ways_to_load(hub, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    first = make_preft(make_base(), seed=1)
    first.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    one = first.push_to_hub("org/mine")
    second = make_preft(make_base(), seed=2)
    second.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    second.push_to_hub("org/mine", revision="main")
    assert torch.equal(answers(AutoPeftModelForCausalLM.from_pretrained("org/mine").eval()), answers(second))
    old = AutoPeftModelForCausalLM.from_pretrained("org/mine", revision=one.commit).eval()
    assert torch.equal(answers(old), answers(first))
    loaded = make_base()
    loaded.load_adapter("org/mine")
    assert torch.equal(answers(loaded), answers(second))


def test_subfolders_and_pull_requests(hub, tmp_path):
    model = saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/many", subfolder="x/y")
    loaded = PeftModel.from_pretrained(make_base(), "org/many", subfolder="x/y").eval()
    assert torch.equal(answers(model), answers(loaded))
    saved(tmp_path / "b", seed=3)
    main = hub.repositories["org/many"].refs["main"]
    pushed = push_adapter(tmp_path / "b", "org/many", create_pr=True)
    assert pushed.pull_request is not None
    assert hub.repositories["org/many"].refs["main"] == main
    assert find_adapter("org/many@refs/pr/1").location == f"org/many@{pushed.commit}"


def test_private_repositories_need_the_token(hub, tmp_path, monkeypatch):
    saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/secret", private=True)
    assert hub.repositories["org/secret"].private
    pull_adapter("org/secret", tmp_path / "out", token="hf_right")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="Could not download org/secret@main"):
        pull_adapter("org/secret", tmp_path / "other", cache_dir=tmp_path / "empty")
    assert not (tmp_path / "other").exists()
    with pytest.raises(HfHubHTTPError):
        push_adapter(tmp_path / "a", "org/secret", token="hf_wrong")


def test_offline_the_cache_answers(hub, tmp_path, monkeypatch):
    saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/mine")
    source, directory = pull_adapter("org/mine")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_adapter("org/mine")[0].location == source.location
    assert pull_adapter(source.location)[1] == directory
    with pytest.raises(HubError, match=r"org/other@main: adapter_config\.json is not in the cache"):
        pull_adapter("org/other")


def test_a_failed_download_names_the_repository_and_the_reason(hub, tmp_path, monkeypatch):
    saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/mine")
    hub.put("org/empty", {"README.md": b"nothing"})
    for location, kind, reason in (
        ("org/gone", AdapterError, "org/gone@main: the Hub has no such repository, or your token cannot access it"),
        ("org/mine@v9", AdapterError, "org/mine@v9: the repository has no such revision"),
        ("org/empty", AdapterError, r"org/empty@main: the repository has no adapter_config\.json"),
    ):
        with pytest.raises(kind, match=f"Could not download {reason}") as caught:
            pull_adapter(location)
        assert not isinstance(caught.value, HubError)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("resolve", "500")
    with pytest.raises(HubError, match=r"Could not download org/new@main: the Hub returned an error \(.*500"):
        pull_adapter("org/new")
    hub.faults.clear()
    hub.fault("resolve", "reset")
    with pytest.raises(HubError, match=r"Could not download org/new@main: the Hub does not answer \(\S.*\); check"):
        pull_adapter("org/new")


def test_the_card(hub, tmp_path):
    model = make_preft(make_base(), "direft", r=3)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    hub.put("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("---\nlanguage: de\ntags: [cities]\n---\n# Mine\n\nMy words.\n")
    push_adapter(tmp_path / "a", "org/mine", facts={"training data": "1000 | rows", "loss": 0.5})
    text = hub.repositories["org/mine"].commits[hub.repositories["org/mine"].refs["main"]]["README.md"].data.decode()
    card = ModelCard(text)
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"preft", "peft", "cities"} <= set(card.data.tags)
    assert (card.data.language, card.data.pipeline_tag, card.data.library_name) == ("de", "text-generation", "peft")
    assert "My words." in card.text
    assert "import preft_hf" in card.text
    assert '"org/mine"' in card.text
    assert "1000 \\| rows" in card.text
    assert load_adapter(tmp_path / "a").fingerprint in card.text
    push_adapter(tmp_path / "a", "org/mine")
    again = hub.repositories["org/mine"].commits[hub.repositories["org/mine"].refs["main"]]["README.md"].data.decode()
    assert again.count("<!-- preft -->") == 1


@pytest.mark.parametrize("step", ["create", "preupload", "lfs-batch", "lfs-upload", "lfs-verify", "commit"])
@pytest.mark.parametrize("kind", ["401", "403", "404", "500", "reset"])
def test_a_push_that_fails_leaves_the_old_state(hub, two, step, kind, monkeypatch):
    if step == "create" and kind in ("401", "403"):
        pytest.skip("whoever may not make repositories may write to one that is there")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_adapter(two / "a", "org/mine")
    before = hub.repositories["org/mine"].refs["main"]
    hub.fault(step, kind)
    with pytest.raises(Exception, match=r".+") as caught:
        push_adapter(two / "b", "org/mine")
    assert isinstance(caught.value, (HfHubHTTPError, HubError, OSError, RuntimeError))
    assert hub.repositories["org/mine"].refs["main"] == before
    hub.faults.clear()
    push_adapter(two / "b", "org/mine")
    assert pull_adapter("org/mine")[0].config.fingerprint == load_adapter(two / "b").fingerprint


@pytest.mark.parametrize("step", ["resolve", "download"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["401", "403", "404", "500", "reset", "truncate", "etag"])
def test_a_pull_that_fails_leaves_the_old_state(hub, two, tmp_path, step, file, kind, monkeypatch):
    if step == "download" and kind == "etag":
        pytest.skip("the etag is read from the HEAD request alone")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push_adapter(two / "a", "org/mine")
    pull_adapter("org/mine", tmp_path / "out")
    before = load_adapter(tmp_path / "out").fingerprint
    push_adapter(two / "b", "org/mine")
    after = load_adapter(two / "b").fingerprint
    hub.fault(step, kind, path=file)
    try:
        pull_adapter("org/mine", tmp_path / "out")
    except AdapterError:
        assert load_adapter(tmp_path / "out").fingerprint == before
    else:
        # an answer from the cache of the last pull, or, for an etag that nobody can check, the right bytes
        assert load_adapter(tmp_path / "out").fingerprint in (before, after)
    hub.faults.clear()
    assert not list((tmp_path / "out").glob(".preft*"))
    pull_adapter("org/mine", tmp_path / "out")
    assert load_adapter(tmp_path / "out").fingerprint == after


def test_a_busy_hub_is_asked_again(hub, tmp_path):
    saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/mine")
    hub.fault("download", "429", times=1)
    assert pull_adapter("org/mine")[1].is_dir()
    hub.fault("preupload", "429", times=1)
    saved(tmp_path / "b", seed=2)
    push_adapter(tmp_path / "b", "org/mine")


def test_a_slow_stream_is_waited_for(hub, tmp_path):
    saved(tmp_path / "a", r=64)
    push_adapter(tmp_path / "a", "org/mine")
    hub.fault("download", "slow")
    assert load_adapter(pull_adapter("org/mine")[1]).fingerprint == load_adapter(tmp_path / "a").fingerprint


def test_too_large_a_file_is_not_downloaded(hub, tmp_path, monkeypatch):
    saved(tmp_path / "a")
    push_adapter(tmp_path / "a", "org/mine")
    monkeypatch.setattr("preft_core.hub.source.MAX_FILE_BYTES", 1000)
    with pytest.raises(AdapterError, match=r"the maximum is 1000; nothing was downloaded"):
        pull_adapter("org/mine")
    assert not any(path.endswith("safetensors") for name, path, _ in hub.requests if name == "download")
    hub.put("org/long", {"adapter_config.json": b" " * (2 << 20)})
    with pytest.raises(AdapterError, match="the maximum is 1048576"):
        pull_adapter("org/long")


def test_what_strangers_push_is_refused(hub, tmp_path):
    saved(tmp_path / "a")
    config = (tmp_path / "a" / "adapter_config.json").read_bytes()
    weights = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    hub.put("org/changed", {"adapter_config.json": config, "adapter_model.safetensors": weights[:-4] + b"\0\0\0\1"})
    with pytest.raises(AdapterError, match="fingerprint"):
        pull_adapter("org/changed", tmp_path / "out")
    bomb = json.dumps(json.loads(config) | {"target_modules": "(.*a)*x"}).encode()
    hub.put("org/bomb", {"adapter_config.json": bomb, "adapter_model.safetensors": weights})
    with pytest.raises(AdapterError, match="repeats inside repeats"):
        pull_adapter("org/bomb", tmp_path / "out")
    hub.put("org/pickle", {"adapter_config.json": config, "adapter_model.bin": b"cos\nsystem\n"})
    with pytest.raises(AdapterError, match=r"org/pickle@.* has no adapter_model\.safetensors"):
        pull_adapter("org/pickle", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_files(hub, two, tmp_path, monkeypatch):
    push_adapter(two / "a", "org/mine")
    pull_adapter("org/mine", tmp_path / "out")
    push_adapter(two / "b", "org/mine")

    def full(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    (failed,) = pull_adapters({"out": "org/mine"}, tmp_path)
    assert failed.error is not None
    assert "No space left on device" in failed.error
    assert load_adapter(tmp_path / "out").fingerprint == load_adapter(two / "a").fingerprint
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES - {"README.md"}


def test_two_pulls_at_once(hub, tmp_path):
    model = saved(tmp_path / "a", r=32)
    push_adapter(tmp_path / "a", "org/mine")
    errors = []

    def pull():
        try:
            pull_adapter("org/mine", tmp_path / "out")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=pull) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "out").eval()
    assert torch.equal(answers(loaded), answers(model))


def test_many_adapters_and_their_manifest(hub, tmp_path):
    for seed in range(5):
        saved(tmp_path / str(seed), seed=seed)
        push_adapter(tmp_path / str(seed), f"org/a{seed}")
    manifest = tmp_path / "preft.toml"
    write_manifest(manifest, {f"a{seed}": f"org/a{seed}" for seed in range(5)} | {"here": "3"})
    ended = []
    found = pull_adapters(read_manifest(manifest), tmp_path / "out", progress=ended.append)
    assert [one.name for one in found] == ["a0", "a1", "a2", "a3", "a4", "here"]
    assert len(ended) == 6
    assert not [one.error for one in found if one.error]
    write_manifest(tmp_path / "pinned.toml", pinned(found))
    places = read_manifest(tmp_path / "pinned.toml")
    assert all(len(place.split("@")[1]) == 40 for name, place in places.items() if name != "here")
    saved(tmp_path / "other", seed=9)
    push_adapter(tmp_path / "other", "org/a2")
    with PreftPool.from_pretrained(base := make_base(), tmp_path / "pinned.toml") as pool:
        assert pool.names() == sorted(places)
        found = base.generate(input_ids=prompt(), max_new_tokens=6, do_sample=False, adapter_names=["a2", "a2"])
    old = PeftModel.from_pretrained(make_base(), tmp_path / "2").eval()
    assert torch.equal(found, answers(old))
    hub.fault("resolve", "500", path="org/a1")
    before = len(hub.seen("download"))
    again = pull_adapters(read_manifest(tmp_path / "pinned.toml"))
    assert [one.error for one in again] == [None] * 6  # commits in the cache need no answer
    assert len(hub.seen("download")) == before
    (failed,) = [one for one in pull_adapters({"x": "org/nothing", "a0": "org/a0"}) if one.error]
    assert failed.name == "x"


def test_the_header_alone_is_read(hub, tmp_path):
    saved(tmp_path / "a", r=32)
    push_adapter(tmp_path / "a", "org/mine")
    source = find_adapter("org/mine")
    header = source.header()
    assert set(header) == set(load_adapter(tmp_path / "a").tensors)
    asked = [headers["Range"] for headers in hub.seen("download") if headers.get("Range", "").startswith("bytes=")]
    assert asked[0] == "bytes=0-7"
    assert len(asked) == 2
    hub.fault("download", "truncate", path="safetensors")
    with pytest.raises(AdapterError):
        find_adapter("org/mine").header()
