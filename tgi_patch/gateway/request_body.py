"""Which adapter a request's body names, as TGI's router reads it; a body that it may read otherwise is refused."""

import json
from typing import Any

from tgi_patch.gateway.errors import rejection

GENERATE = ("/", "/generate", "/generate_stream")
OPENAI = ("/v1/chat/completions", "/v1/completions")
EITHER = ("/invocations",)
"""SageMaker's route, which takes the bodies of all others."""


def adapter_of(path: str, text: bytes) -> str | None:
    """Returns the adapter's id in the body of a request, None where it names none.

    The router (serde) takes an array for an object, its fields in their order. Such a body is refused, as an id could
    stand anywhere in it.

    Raises:
        RequestRejected: 400 for what is no JSON, 422 for what may name an adapter in a way that is not read here.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise rejection(400, f"the request's body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise rejection(422, f"the request's body is {_kind(body)}: give an object")
    names = []
    if path not in OPENAI:
        parameters = body.get("parameters")
        if not isinstance(parameters, (dict, type(None))):
            raise rejection(422, f"parameters is {_kind(parameters)}: give an object")
        names.append((parameters or {}).get("adapter_id"))
    if path not in GENERATE:
        names.append(body.get("model"))
    for name in names:
        if not isinstance(name, (str, type(None))):
            raise rejection(422, f"the adapter's id is {name!r}: give a text")
    given = {name for name in names if name is not None}
    if len(given) > 1:
        both = " and ".join(map(repr, sorted(given)))
        raise rejection(422, f"the body names two adapters, {both}: name one")
    return given.pop() if given else None


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "an object")
