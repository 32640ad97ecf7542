"""Which adapters a request body names, as TGI's router reads it. A body that it may read differently is rejected."""

import json
from typing import Any

from tgi_patch.gateway.errors import rejection

GENERATE = ("/", "/generate", "/generate_stream")
OPENAI = ("/v1/chat/completions", "/v1/completions")
ANY = ("/invocations",)
"""SageMaker's route, which takes the bodies of all others."""
VERTEX = ("/vertex",)
"""Vertex AI's route: a list of instances, each a body of /generate or of /v1/chat/completions."""


def adapters_of(path: str, text: bytes) -> set[str]:
    """Returns the adapter ids in the body of a request; empty if it names none.

    The router (serde) takes an array for an object, its fields in their order. Such a body is rejected, as an id could
    stand anywhere in it.

    Raises:
        RequestRejected: 400 for invalid JSON, 422 for what may name an adapter in a way that is not read here.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise rejection(400, f"the request body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise rejection(422, f"the request body is {_kind(body)}: it must be an object")
    if path not in VERTEX:
        return _names(body, path not in OPENAI, path not in GENERATE)
    instances = body.get("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise rejection(422, "instances must be an array of objects")
    if any(_names(instance, True, False) for instance in instances):
        raise rejection(422, "TGI ignores adapter_id on /vertex: send messages, and the adapter's id as model")
    return set().union(*(_names(instance, False, True) for instance in instances))


def _names(body: dict[str, Any], in_parameters: bool, as_model: bool) -> set[str]:
    """Returns the one adapter id that an object names, or none."""
    names = []
    if in_parameters:
        parameters = body.get("parameters")
        if not isinstance(parameters, (dict, type(None))):
            raise rejection(422, f"parameters is {_kind(parameters)}: it must be an object")
        names.append((parameters or {}).get("adapter_id"))
    if as_model:
        names.append(body.get("model"))
    for name in names:
        if not isinstance(name, (str, type(None))):
            raise rejection(422, f"the adapter id is {name!r}: it must be a string")
    given = {name for name in names if name is not None}
    if len(given) > 1:
        both = " and ".join(map(repr, sorted(given)))
        raise rejection(422, f"the body names two adapters, {both}: name one")
    return given


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "an object")
