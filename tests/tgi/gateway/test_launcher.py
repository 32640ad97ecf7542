"""The launcher's command line and variables: read as the launcher reads them, and SageMaker's and the kill switch."""

import os
import subprocess
import sys

import pytest

from tests.interpreter import SOURCES
from tgi_patch.gateway.launcher import PAYLOAD_BYTES, make_plan, normalised
from tgi_patch.settings import Settings, SettingsError


def plan(*arguments, adapters=("acme",), **environment):
    return make_plan(Settings(adapters={name: f"/{name}" for name in adapters}), arguments, environment)


def test_the_launchers_arguments_are_read_as_the_launcher_reads_them():
    made = plan("--model-id", "org/m", "--lora-adapters", "a=org/x,org/y", LORA_ADAPTERS="z")
    assert made.others == {"a", "org/y"}
    assert made.command[1:5] == ["--model-id", "org/m", "--lora-adapters", "a=org/x,org/y"]
    assert plan(LORA_ADAPTERS="z").others == {"z"}
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert plan(**gpus).world_size == 2
    for form in (("--sharded", "false"), ("--sharded=false",)):
        assert plan(*form, **gpus).world_size == 1
    assert plan(SHARDED="false", **gpus).world_size == 1
    assert plan("--sharded", "false", "--num-shard", "2", **gpus).world_size == 2
    for form in (("-p8080",), ("-p", "8080"), ("-p=8080",), ("--port=8080",)):
        made = plan(*form)
        assert (made.port, made.command[1:]) == (8080, ["--port", "18080", "--hostname", "127.0.0.1"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("tgi", "stands for the base"), ("org/m", "stands for the base"), ("x", "x is in LORA_ADAPTERS too")],
)
def test_ids_that_stand_for_something_else_are_refused_at_the_start(name, said):
    with pytest.raises(SettingsError, match=f"{said}.*another id"):
        plan("--model-id", "org/m", adapters=("acme", name), LORA_ADAPTERS="x=org/x")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a directory of programs the only one on the PATH beside the system's."""

    def put(name, script):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return put


@pytest.mark.parametrize(
    ("variables", "smi", "shards"),
    [
        # without a variable the launcher starts one shard, on as many GPUs as there are
        ({}, "echo GPU-0; echo GPU-1", 1),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "echo GPU-0; echo GPU-1", 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "NVIDIA_VISIBLE_DEVICES": "all"}, "echo GPU-0", 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, "echo GPU-0; echo GPU-1", 1),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, "echo GPU-0; echo; echo GPU-1", 2),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, "echo GPU-0; echo GPU-1", 2),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, "echo GPU-0; echo GPU-1", 1),
        ({"ZE_AFFINITY_MASK": "0,1"}, None, 2),
        ({"NUM_SHARD": "4", "CUDA_VISIBLE_DEVICES": "0"}, None, 4),
        ({"SHARDED": "true", "CUDA_VISIBLE_DEVICES": "0,1"}, None, 2),
    ],
)
def test_as_many_shards_are_expected_as_the_launcher_starts(programs, variables, smi, shards):
    if smi is not None:
        programs("nvidia-smi", smi)
    assert plan(PATH=os.environ["PATH"], **variables).world_size == shards


def test_the_payload_limit_and_the_key_are_the_launchers():
    assert plan().body_bytes == int(PAYLOAD_BYTES)
    assert plan("--payload-limit", "9000000", PAYLOAD_LIMIT="5").body_bytes == 9_000_000
    assert plan(PAYLOAD_LIMIT="5000000").body_bytes == 5_000_000
    made = plan("--payload-limit=9000000", "--api-key", "key")
    assert made.command[1:5] == ["--payload-limit", "9000000", "--api-key", "key"]
    assert (made.api_key, plan(API_KEY="key").api_key, plan().api_key) == ("key", "key", "")
    assert "'key'" not in repr(made).replace(repr(made.command), "")
    with pytest.raises(SettingsError, match="--payload-limit is '2MB'"):
        plan("--payload-limit", "2MB")


def test_sagemaker_serves_on_8080_with_its_variables():
    variables = {
        "HF_MODEL_ID": "org/m",
        "HF_MODEL_REVISION": "v1",
        "SM_NUM_GPUS": "2",
        "HF_MODEL_QUANTIZE": "eetq",
        "HF_MODEL_TRUST_REMOTE_CODE": "true",
    }
    # its entry point in TGI's image overrides the launcher's variables too
    arguments, environment = normalised(["--", "serve"], variables | {"PORT": "80", "REVISION": "main"})
    made = make_plan(Settings(), arguments, environment)
    assert (made.port, made.world_size, made.base_ids) == (8080, 2, {"org/m"})
    assert "serve" not in made.command
    launcher = {"MODEL_ID": "org/m", "REVISION": "v1", "QUANTIZE": "eetq", "TRUST_REMOTE_CODE": "true"}
    assert launcher.items() <= made.environment.items()
    with pytest.raises(SettingsError, match="HF_MODEL_ID is not set"):
        normalised(["serve"], {})
    # other arguments are the launcher's, and its variables stay
    assert normalised(["--", "--model-id", "x"], variables) == (["--model-id", "x"], variables)


@pytest.mark.parametrize(
    "wrong", [{"PREFT_ADAPTERS_FILE": "gone.toml"}, {"PREFT_SLOTS": "many"}, {"PREFT_ADAPTERS": "a=/nowhere"}]
)
def test_the_kill_switch_starts_the_launcher_whatever_else_is_wrong(programs, tmp_path, wrong):
    programs("text-generation-launcher", 'echo "$MODEL_ID: $@"')
    # not even the gateway's packages are needed
    (tmp_path / "aiohttp.py").write_text("raise ImportError('no aiohttp')")
    command = [sys.executable, "-m", "tgi_patch", "serve", "--"]
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}:{SOURCES}", PREFT_DISABLE="1", MODEL_ID="m", **wrong)
    done = subprocess.run([*command, "--port", "80"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "m: --port 80\n"), done.stderr
    sagemaker = environment | {"HF_MODEL_ID": "org/m"}
    done = subprocess.run([*command, "serve"], env=sagemaker, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "org/m: --port 8080\n"), done.stderr
