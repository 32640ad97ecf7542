"""Which adapter a body names: whatever the router may read as an adapter is checked, or the body is refused."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_patch.gateway.errors import RequestRejected
from tgi_patch.gateway.request_body import adapter_of
from tgi_patch.gateway.service import make_plan
from tgi_patch.settings import Settings, SettingsError, control_directory, private_directory

PATHS = ("/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations")
SECRET = "other-users-adapter"


def read(path, body):
    return adapter_of(path, json.dumps(body).encode())


def test_every_form_that_the_router_takes():
    assert read("/generate", {"inputs": "x", "parameters": {"adapter_id": "a"}}) == "a"
    assert read("/generate", {"inputs": "x", "parameters": None, "model": "not read there"}) is None
    assert read("/v1/completions", {"prompt": "x", "model": "a", "parameters": "not read there"}) == "a"
    # SageMaker's route takes the bodies of all others
    assert read("/invocations", {"inputs": "x", "parameters": {"adapter_id": "a"}}) == "a"
    assert read("/invocations", {"messages": [], "model": "a"}) == "a"
    assert read("/invocations", {"prompt": "x", "model": "a", "parameters": {"adapter_id": "a"}}) == "a"
    with pytest.raises(RequestRejected, match="names two adapters, 'a' and 'b'"):
        read("/invocations", {"prompt": "x", "model": "b", "parameters": {"adapter_id": "a"}})


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.just(SECRET) | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["parameters", "adapter_id", "model", "inputs"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(path=st.sampled_from(PATHS), body=values)
def test_no_array_stands_for_an_object(path, body):
    """serde reads an array as an object's fields in their order, so an id may stand at any place of one."""
    try:
        name = read(path, body)
    except RequestRejected:
        return
    assert isinstance(body, dict)
    seen = {body.get("model")} if path.startswith("/v1/") else set()
    if not path.startswith("/v1/"):
        assert isinstance(body.get("parameters"), (dict, type(None)))
        seen = {(body.get("parameters") or {}).get("adapter_id")}
    if path == "/invocations":
        seen.add(body.get("model"))
    assert seen - {None} == {name} - {None}


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


def test_the_control_directory_is_ones_own(tmp_path):
    assert control_directory(3000) != control_directory(3001)
    made = private_directory(tmp_path / "own")
    assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(made)
    with pytest.raises(SettingsError, match="only user"):
        private_directory(tmp_path / "link")
    made.chmod(0o777)
    with pytest.raises(SettingsError, match="drwxrwxrwx of user"):
        private_directory(made)
    if os.getuid() == 0:
        made.chmod(0o700)
        os.chown(made, 65534, 65534)
        with pytest.raises(SettingsError, match="of user 65534"):
            private_directory(made)
