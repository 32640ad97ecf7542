"""`preft doctor`."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from preft_cli import doctor
from preft_cli.app import app
from tests.conftest import VLLM_PYTHON

NOTHING = dict.fromkeys(("torch", "triton", "transformers", "peft", "trl", "preft-hf", "vllm", "tgi", "gpu"))
ALONE = NOTHING | {"modules": [], "plugin": False}


def test_this_environment_trains(capsys):
    with pytest.raises(SystemExit) as stop:
        app(["doctor", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert stop.value.code == 0
    assert findings["transformers"]["state"] == findings["torch"]["state"] == "ok"
    assert findings["vLLM"] == {
        "name": "vLLM",
        "found": "not installed",
        "state": "missing",
        "todo": "to serve with it: docs/how-to/vllm.md",
    }


def answers(monkeypatch, found, code=0, stderr=""):
    def run(command):
        probe = "-c" in command
        return subprocess.CompletedProcess(command, 0 if probe else code, json.dumps(found), "" if probe else stderr)

    monkeypatch.setattr(doctor, "_run", run)
    return {finding.name: finding for finding in doctor.examine("python")}


def test_an_engine_whose_seams_do_not_hold_is_a_fault(monkeypatch):
    engines = ALONE | {"torch": "2.13.0", "vllm": "0.33.0", "tgi": "2.0.5"}
    bare = answers(monkeypatch, engines)
    assert (bare["vLLM"].state, bare["TGI"].state, bare["transformers"].state) == ("fault", "fault", "missing")
    assert "entry point" in bare["vLLM"].todo
    engines |= {"modules": ["preft_vllm", "tgi_patch"], "plugin": True}
    assert answers(monkeypatch, engines)["vLLM"].state == "ok"
    refused = answers(monkeypatch, engines, 1, "noise\n- a.b:c has digest 1\n- d.e:f has digest 2\n")
    assert refused["vLLM"].todo.endswith("2 seams do not fit, the first: a.b:c has digest 1")
    assert refused["TGI"].state == "fault"


@pytest.mark.parametrize("version", ["5.18.0", "5.24.0"])
def test_other_libraries_beside_an_engine_are_no_fault(monkeypatch, version):
    found = answers(monkeypatch, ALONE | {"torch": "2.13.0", "transformers": version, "peft": "0.21.2"})
    assert found["transformers"].state == "missing"
    assert "transformers from 5.19 and below 5.24, in" in found["transformers"].todo
    assert answers(monkeypatch, ALONE)["torch"].state == "fault"


def test_doctor_and_pip_agree_on_versions():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, (least, bound) in doctor._TESTED.items():
        assert f"{name}>={least},<{bound}" in project["dependencies"]


def test_a_python_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--python is"):
        doctor.examine("/nowhere/python")


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    found = {finding.name: finding for finding in doctor.examine(str(VLLM_PYTHON))}
    assert (found["vLLM"].state, found["vLLM"].todo) == ("ok", "")
