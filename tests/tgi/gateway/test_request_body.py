"""Which adapter a body names: whatever the router may read as an adapter is checked, or the body is refused."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_patch.gateway.errors import RequestRejected
from tgi_patch.gateway.request_body import adapters_of
from tgi_patch.settings import SettingsError, control_directory, private_directory

PATHS = ("/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations")
SECRET = "other-users-adapter"


def read(path, body):
    names = adapters_of(path, json.dumps(body).encode())
    return names.pop() if names else None


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


def test_every_instance_of_vertex_is_read():
    chat = [{"messages": [], "model": name} for name in ("a", "b", "a")]
    plain = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
    assert adapters_of("/vertex", json.dumps({"instances": [*chat, plain]}).encode()) == {"a", "b"}
    # TGI drops it there, and would serve the base model
    with pytest.raises(RequestRejected, match="ignores adapter_id on /vertex"):
        read("/vertex", {"instances": [plain, {"inputs": "x", "parameters": {"adapter_id": "a"}}]})
    for instances in (None, {}, [["a"]], "a"):
        with pytest.raises(RequestRejected, match="instances must be an array of objects"):
            read("/vertex", {"instances": instances})


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
