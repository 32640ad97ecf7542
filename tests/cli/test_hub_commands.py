"""`preft push | pull | inspect | verify | convert | export`, as commands in a process of their own or in this one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import preft_cli
from preft_cli.app import app, main
from preft_core.format.adapter import load_adapter
from preft_core.hub.source import find_adapter
from tests.conftest import TGI_PYTHON
from tests.core.hub.conftest import hub  # noqa: F401
from tests.core.hub.server import TOKEN
from tests.hf.zoo import make_base, make_preft

SOURCE = Path(preft_cli.__file__).parents[1]
pytestmark = [
    # peft calls old names of transformers, huggingface_hub an old way of its transport
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning"),
]


def run(*arguments: object, capsys, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments])
    found = capsys.readouterr()
    assert stop.value.code == code, found.err
    return found.out


def test_the_way_there_and_back(hub, tmp_path, capsys):  # noqa: F811
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    for seed in range(2):
        make_preft(make_base(), seed=seed).save_pretrained(tmp_path / f"a{seed}")
    made = json.loads(run("push", tmp_path / "a0", tmp_path / "a1", "--to", "org", "--json", capsys=capsys))
    assert [one["repository"] for one in made] == ["org/a0", "org/a1"]
    assert "org/mine@" in run("push", tmp_path / "a0", "--to", "org/mine", "--create-pr", capsys=capsys)
    assert hub.repositories["org/mine"].pull_requests == 1

    manifest = tmp_path / "preft.toml"
    manifest.write_text('[adapters]\nfirst = "org/a0"\nsecond = "org/a1"\n')
    out, pin = tmp_path / "out", tmp_path / "pinned.toml"
    shown = run("pull", manifest, "--output", out, "--pin", pin, capsys=capsys)
    assert f"first  org/a0@{made[0]['commit']}" in shown
    assert made[1]["commit"] in pin.read_text()
    assert load_adapter(out / "second").fingerprint == load_adapter(tmp_path / "a1").fingerprint
    run("pull", "org/a1", "--output", tmp_path / "single", capsys=capsys)
    assert load_adapter(tmp_path / "single").fingerprint == load_adapter(tmp_path / "a1").fingerprint

    before = len(hub.seen("download"))
    facts = json.loads(run("inspect", "org/a0", "--json", capsys=capsys))
    assert facts["fingerprint"] == load_adapter(tmp_path / "a0").fingerprint
    local = json.loads(run("inspect", tmp_path / "a0", "--json", capsys=capsys))
    assert {name: facts[name] for name in facts if name != "location"} == {n: local[n] for n in local if n != "norms"}
    ranges = [headers.get("Range") for headers in hub.seen("download")[before:]]
    assert None not in ranges
    assert "org/a0@" in run("inspect", "org/a0", capsys=capsys)

    found = json.loads(run("verify", pin, "--base", tmp_path / "base", "--json", capsys=capsys))
    assert [one["ok"] for one in found] == [True, True]
    assert found[0]["largest_change_of_a_logit"] > 0.01
    weights = tmp_path / "a0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "BAD" in run("verify", tmp_path / "a0", capsys=capsys, code=1)


def test_faults_are_said(hub, tmp_path, capsys):  # noqa: F811
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    hub.put("org/bad", {"adapter_config.json": b"{}"})
    assert run("pull", "org/bad", "org/missing", capsys=capsys, code=1) == ""
    with pytest.raises(ValueError, match="give the org alone"):
        app(["push", str(tmp_path / "a"), str(tmp_path / "a"), "--to", "org/name"])
    with pytest.raises(ValueError, match="named twice"):
        app(["pull", "org/bad", "org/bad@main"])


@pytest.mark.parametrize(
    ("place", "kind", "code"),
    [("org/mine", "reset", 1), ("org/mine", "500", 1), ("org/mine", None, 2), ("org/no/id", None, 2)],
)
def test_a_hub_that_fails_is_no_mistake_of_the_user(hub, capsys, monkeypatch, place, kind, code):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if kind is not None:
        hub.fault("any", kind)
    for command in (["inspect", place], ["plan", "--model", place]):
        monkeypatch.setattr(sys, "argv", ["preft", *command])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code, capsys.readouterr().err
        assert "preft: " in capsys.readouterr().err


def test_a_token_is_in_no_repr(hub, tmp_path):  # noqa: F811
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    hub.put("org/mine", {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()})
    source = find_adapter("org/mine", token=TOKEN)
    assert source.options["token"] == TOKEN
    assert TOKEN not in repr(source)


def test_convert_and_export(tmp_path, capsys):
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    run("export", tmp_path / "a", "--output", tmp_path / "lora", capsys=capsys)
    mark = run("convert", tmp_path / "lora", "--output", tmp_path / "back", capsys=capsys).strip()
    one, two = load_adapter(tmp_path / "a"), load_adapter(tmp_path / "back")
    assert mark == two.fingerprint == one.fingerprint
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_a_leak_is_found(tmp_path, monkeypatch):
    from preft_core.format.config import AdapterError
    from preft_hf.forward import positions
    from preft_hf.verify import try_adapter

    make_preft(make_base()).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(positions, "prefill_span", lambda first, count, length, start=0: (0, count))
    with pytest.raises(AdapterError, match="acts on decode tokens"):
        try_adapter(tmp_path / "a", make_base())


ASKED_FOR = [
    {"repetition_penalty": 1.1, "do_sample": True, "top_k": 20, "temperature": 0.7},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": list(range(20, 64))},
]


@pytest.mark.parametrize("asked_for", ASKED_FOR, ids=lambda asked_for: next(iter(asked_for)))
def test_what_the_base_model_asks_of_generate_is_no_leak(tmp_path, asked_for):
    from preft_hf.verify import try_adapter

    make_preft(make_base(), seed=3).save_pretrained(tmp_path / "a")
    plain = try_adapter(tmp_path / "a", make_base())
    base = make_base()
    base.generation_config.update(**asked_for)
    before = base.generation_config
    assert try_adapter(tmp_path / "a", base) == plain
    assert base.generation_config is before


@pytest.mark.parametrize(
    "python", [Path(sys.executable), pytest.param(TGI_PYTHON, marks=pytest.mark.tgi)], ids=["ours", "tgi"]
)
def test_a_process_of_its_own_that_imports_no_model_library(hub, tmp_path, python):  # noqa: F811
    make_preft(make_base()).save_pretrained(tmp_path / "a")
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(SOURCE)}
    for arguments in (["push", str(tmp_path / "a"), "--to", "org/mine"], ["pull", "org/mine"], ["verify", "org/mine"]):
        done = subprocess.run(
            [str(python), "-c", "from preft_cli.app import main; main()", *arguments],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "org/mine" in done.stdout
        imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
        assert "huggingface_hub" in imported
        assert not imported & {"peft", "transformers"}
