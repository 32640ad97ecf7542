"""`preft push | pull | verify` of several adapters: each has its turn, and is named by what it can be named by."""

import json
import os
import shutil
import sys

import pytest

from preft_cli.app import app, main
from preft_core.format.adapter import load_adapter
from preft_core.hub.manifest import read_manifest
from tests.cli.test_hub_commands import pytestmark, run  # noqa: F401
from tests.core.hub.conftest import hub  # noqa: F401
from tests.hf.zoo import make_base, make_preft


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, adapters a0 and a1 for it, one for a deeper model, one for another, and a folder that is none."""
    path = tmp_path_factory.mktemp("sets")
    make_base().save_pretrained(path / "base")
    for seed in range(2):
        make_preft(make_base(), seed=seed).save_pretrained(path / f"a{seed}")
    deep = make_base(num_hidden_layers=3)
    make_preft(deep, "direft", layers_to_transform=[2]).save_pretrained(path / "deep")
    make_preft(make_base("gpt2")).save_pretrained(path / "other")
    (path / "bad").mkdir()
    (path / "bad" / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of them, with its folder `here` as working directory."""
    shutil.copytree(made, tmp_path / "p")
    (tmp_path / "p" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "p" / "here")
    return tmp_path / "p"


def mark(folder) -> str:
    return load_adapter(folder).fingerprint


def test_a_push_that_fails_is_named_and_the_others_are_done(hub, place, capsys, monkeypatch):  # noqa: F811
    (place / "a1" / "README.md").write_text("---\na: [b\n---\n")
    given = ["push", place / "a0", place / "bad", place / "nowhere", place / "a1", place / "deep", "--to", "org"]
    with pytest.raises(SystemExit) as stop:
        app([*map(str, given), "--json"])
    shown = capsys.readouterr()
    assert stop.value.code == 1
    found = {one["repository"]: one for one in json.loads(shown.out)}
    assert list(found) == ["org/a0", "org/bad", "org/nowhere", "org/a1", "org/deep"]
    for name in ("org/a0", "org/deep"):
        assert found[name]["error"] is None
        assert hub.repositories[name].refs["main"] == found[name]["commit"]
    for name, fault in {"bad": "peft_type", "nowhere": "cannot be read", "a1": "README.md"}.items():
        assert fault in found[f"org/{name}"]["error"]
        assert str(place / name) in shown.err
        assert f"org/{name}" not in hub.repositories
    with pytest.raises(ValueError, match="would go to one repository"):
        app(["push", str(place / "a0"), str(place / "here" / ".." / "a0"), "--to", "org"])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("preupload", "500", path="org/deep")
    shown = run("push", place / "deep", place / "a0", "--to", "org", capsys=capsys, code=1)
    assert shown.startswith("org/a0@")


def test_an_adapter_that_does_not_fit_is_named_and_the_others_are_tried(place, capsys):
    given = [place / name for name in ("deep", "other", "nowhere", "a0")]
    found = json.loads(run("verify", *given, "--base", place / "base", "--json", capsys=capsys, code=1))
    assert [one["ok"] for one in found] == [False, False, False, True]
    assert "layers_to_transform" in found[0]["error"]
    assert "target_modules" in found[1]["error"]
    # folders of one name are told apart by their paths
    shutil.copytree(place / "a1", place / "here" / "a0")
    assert "BAD" not in run("verify", place / "a0", "a0", capsys=capsys)


@pytest.mark.parametrize("way", ["absolute", "up"])
def test_several_folders_are_copied_into_the_output(place, capsys, way):
    folders = [place / "a0", place / "a1"] if way == "absolute" else ["../a0", "../a1"]
    run("pull", *folders, "--output", "out", "--pin", "pinned.toml", capsys=capsys)
    assert sorted(os.listdir("out")) == ["a0", "a1"]
    assert [mark(f"out/a{i}") for i in range(2)] == [mark(place / f"a{i}") for i in range(2)]
    assert read_manifest("pinned.toml") == {f"a{i}": str(place / f"a{i}") for i in range(2)}
    assert "BAD" not in run("verify", "pinned.toml", capsys=capsys)


def test_every_name_can_be_written_and_read_again(hub, place, capsys):  # noqa: F811
    run("push", place / "a0", "--to", "org/mine", capsys=capsys)
    run("pull", "org/mine", "--output", ".", "--pin", "one.toml", capsys=capsys)
    assert mark(".") == mark(place / "a0")
    assert list(read_manifest("one.toml")) == ["here"]
    run("pull", place / "a0", "--pin", "two.toml", capsys=capsys)
    assert read_manifest("two.toml") == {"a0": str(place / "a0")}
    run("pull", ".", "--pin", "../three.toml", capsys=capsys)
    assert read_manifest("../three.toml") == {"here": str(place / "here")}
    for manifest in ("one.toml", "two.toml", "../three.toml"):
        assert "BAD" not in run("verify", manifest, capsys=capsys)
    # a name that no manifest can hold is no fault of a copy
    run("pull", "org/mine", "--output", "two words", capsys=capsys)
    assert mark("two words") == mark(place / "a0")
    before = sorted(os.listdir())
    for faulty in (
        ["pull", "two words", "--pin", "four.toml"],
        ["pull", "org/mine", "--output", "my words", "--pin", "four.toml"],
        ["pull", str(place / "a0"), "../here/../a0", "--output", "out"],
    ):
        with pytest.raises(ValueError, match=r"letters, digits|named twice"):
            app(faulty)
    assert sorted(os.listdir()) == before


def test_a_pinned_set_of_folders_is_the_same_set_elsewhere(hub, place, capsys, monkeypatch):  # noqa: F811
    """A stranger's repository of the folder's name is not asked for."""
    monkeypatch.chdir(place.parent)
    run("push", place / "a1", "--to", "p/tax", capsys=capsys)
    (place / "a0").rename(place / "tax")
    (place / "preft.toml").write_text('[adapters]\ntax = "tax"\n')
    run("pull", "p/preft.toml", "--pin", "p/pinned.toml", capsys=capsys)
    run("pull", "p/tax", "--pin", "direct.toml", capsys=capsys)
    monkeypatch.chdir(place / "here")
    asked = len(hub.requests)
    for manifest in (place / "pinned.toml", place.parent / "direct.toml"):
        (found,) = json.loads(run("verify", manifest, "--json", capsys=capsys))
        assert (found["ok"], found["location"]) == (True, str(place / "tax"))
    (place / "tax").rename(place / "gone")
    for manifest in (place / "pinned.toml", place.parent / "direct.toml"):
        (found,) = json.loads(run("verify", manifest, "--json", capsys=capsys, code=1))
        assert not found["ok"]
    assert len(hub.requests) == asked


def test_a_manifest_is_not_written_when_an_adapter_failed(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preft", "pull", str(place / "a0"), str(place / "bad"), "--pin", "p.toml"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "p.toml is not written" in capsys.readouterr().err
    assert os.listdir() == []
