"""Two processes train the adapter that one process trains: DDP, FSDP2 and DeepSpeed, over gloo."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from preft_core.format.adapter import load_adapter
from preft_hf.tuner.saving import check_gathered
from tests.hf.zoo import make_base, make_preft
from tests.interpreter import ROOT, SOURCES
from tests.ports import free_port

METHODS = ("lora", "direft")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
MODES = ["ddp", "fsdp", *(pytest.param(mode, marks=needs_deepspeed) for mode in ("zero2", "zero3"))]


def run(base: Path, output: Path, mode: str, methods: Sequence[str], *launcher: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = SOURCES
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.hf.training.distributed", str(base), str(output), mode, *methods],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process trains, and the base model beside it."""
    output = tmp_path_factory.mktemp("alone")
    make_base().save_pretrained(output / "base")
    run(output / "base", output, "ddp", METHODS)
    return output


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_what_one_does(mode, alone, tmp_path):
    # DeepSpeed fills its settings in once a process
    for methods in [[method] for method in METHODS] if mode.startswith("zero") else [METHODS]:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        run(alone / "base", tmp_path, mode, methods, *launcher)
    for method in METHODS:
        expected, found = (json.loads((path / method / "facts.json").read_text()) for path in (alone, tmp_path))
        assert (expected["processes"], found["processes"]) == (1, 2)
        assert found["sharded"] == (mode in ("fsdp", "zero3"))
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-5)
        if found["losses_resumed"] is not None:
            assert found["losses_resumed"] == pytest.approx(expected["losses"], abs=2e-5)
        assert abs(found["losses"][-1] - found["losses"][0]) > 0.01
        one, two = (load_adapter(path / method / "final") for path in (alone, tmp_path))
        assert one.tensors.keys() == two.tensors.keys()
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[name], tensor, rtol=0, atol=2e-5)
        if found["sharded"]:
            assert ("FSDP" if mode == "fsdp" else "ZeRO-3") in found["refusal"]
            assert not (tmp_path / method / "direct").exists()
        else:
            assert found["refusal"] is None


def test_weights_that_are_not_there_are_not_saved(tmp_path):
    model = make_preft(make_base())
    key = "base_model.model.model.layers.0.self_attn.q_proj.preft_A.default"
    whole = model.state_dict()
    check_gathered(model, ["default"], None)
    check_gathered(model, ["default"], whole)
    with pytest.raises(ValueError, match=r"are empty.*ZeRO-3"):
        model.save_pretrained(tmp_path / "a", state_dict=whole | {key: torch.empty(0)})
    with pytest.raises(ValueError, match="no weight of adapter 'default'"):
        model.save_pretrained(tmp_path / "a", state_dict={})
    assert not (tmp_path / "a").exists()
    # what every process but the first does, which has gathered nothing
    model.save_pretrained(tmp_path / "a", state_dict={}, is_main_process=False)
    assert not list((tmp_path / "a").iterdir())
