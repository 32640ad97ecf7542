"""Error responses: why the gateway rejects a request."""

from dataclasses import dataclass
from typing import Any

from aiohttp import web
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from preft_core.format.config import AdapterError

RETRY_AFTER_S = 2


@dataclass(frozen=True)
class ErrorResponse:
    """Why a request is rejected: an HTTP status and a message."""

    status: int
    message: str
    retry_after_s: int | None = None


class RequestRejected(Exception):
    """A request that the gateway does not forward. `response` is its response."""

    def __init__(self, response: ErrorResponse):
        super().__init__(response.message)
        self.response = response


def http_response(error: ErrorResponse, path: str, request_id: str) -> web.Response:
    """Returns an error in the format of the route: OpenAI's, or TGI's."""
    kinds = {401: "authentication", 404: "not_found", 422: "validation", 429: "overloaded", 503: "overloaded"}
    kind = kinds.get(error.status, "generation")
    if path.startswith("/v1/"):
        body: dict[str, Any] = {"error": {"message": error.message, "type": kind, "code": error.status}}
    else:
        body = {"error": error.message, "error_type": kind}
    headers = {"X-Request-Id": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return web.json_response(body, status=error.status, headers=headers)


def rejection(status: int, message: str, retry_after_s: int | None = None) -> RequestRejected:
    """Returns the exception of an error response."""
    return RequestRejected(ErrorResponse(status, message, retry_after_s))


def shard_error(name: str, refusal: dict[str, Any]) -> ErrorResponse:
    """Returns the response to requests for an adapter that a shard did not take."""
    status = {"taken": 409, "unknown": 404, "refused": 422}.get(refusal["kind"], 503)
    retry = RETRY_AFTER_S if status == 503 else None
    return ErrorResponse(status, f"adapter {name!r}: {refusal['error']}", retry)


def load_error(name: str, error: Exception) -> ErrorResponse:
    """Returns 404 for what the Hub does not have, 503 for a Hub that cannot be reached, 422 for a bad adapter."""
    if isinstance(error, RequestRejected):
        return error.response
    if not isinstance(error, AdapterError):
        return ErrorResponse(503, f"adapter {name!r} cannot be loaded now: {error}", RETRY_AFTER_S)
    cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    # huggingface_hub raises a subclass of EntryNotFoundError too when it cannot reach the Hub
    offline = isinstance(cause, LocalEntryNotFoundError)
    missing = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, GatedRepoError))
    if not offline and (missing or status in {401, 403}):
        return ErrorResponse(404, f"adapter {name!r}: {error}")
    passing = not isinstance(cause, (ValueError, KeyError, UnicodeError, FileNotFoundError, NotADirectoryError))
    if offline or (cause is not None and passing):
        return ErrorResponse(503, f"adapter {name!r} cannot be loaded now: {error}", RETRY_AFTER_S)
    return ErrorResponse(422, f"adapter {name!r}: {error}")
