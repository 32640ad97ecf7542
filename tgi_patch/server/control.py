"""The control protocol between gateway and shards: one JSON line each way over each rank's unix socket."""

import json
import os
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any

from preft_core.format.config import AdapterError, HubError
from tgi_patch.server.registry import AdapterTaken, Registry, UnknownAdapter
from tgi_patch.settings import private_directory

MAX_LINE = 1 << 20
MAX_PATH_BYTES = 107
KINDS = {HubError: "failed", AdapterError: "refused", AdapterTaken: "taken", UnknownAdapter: "unknown"}


def socket_path(directory: Path, rank: int) -> Path:
    """Returns the socket of a rank."""
    return directory / f"shard-{rank}.sock"


class ControlServer:
    """Serves a rank's unix socket, which only this user can open. Its threads end with the process.

    Requests: {"op": "add", "name": ..., "location": ...}, {"op": "remove", "name": ...}, {"op": "list"},
    {"op": "faults"}, {"op": "statistics"}. Responses: {"ok": true, ...} or {"ok": false, "kind": ..., "error": ...},
    where kind is "failed" (trying again may help), "refused", "taken" or "unknown".

    Args:
        directory: of the sockets; made if it does not exist
        rank: of this process
        registry: that adapters are added to and removed from
    Raises:
        ValueError: the socket's path is too long.
        SettingsError: others can write to the directory.
    """

    def __init__(self, directory: Path, rank: int, registry: Registry):
        self.path = socket_path(private_directory(directory), rank)
        self.path.unlink(missing_ok=True)
        length = len(os.fsencode(self.path))
        if length > MAX_PATH_BYTES:
            raise ValueError(
                f"PREFT_CONTROL_DIR: {self.path} has {length} bytes and a socket's path may have {MAX_PATH_BYTES}: "
                "choose a shorter directory"
            )
        self._server = _Server(str(self.path), _Handler, bind_and_activate=False)
        self._server.registry = registry
        self._server.server_bind()
        self.path.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, name="preft-control", daemon=True)

    def start(self) -> None:
        """Begins to serve. Until then connections are refused. Calling it again is a no-op."""
        if self._thread.ident is None:
            self._server.server_activate()
            self._thread.start()

    def close(self) -> None:
        """Stops serving and removes the socket."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    registry: Registry


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline(MAX_LINE):
            try:
                request = json.loads(line)
                if not isinstance(request, dict):
                    raise ValueError("a control request must be one JSON object")
                assert isinstance(self.server, _Server)
                response = {"ok": True, **respond(self.server.registry, request)}
            except tuple(KINDS) as error:
                kind = next(kind for of, kind in KINDS.items() if isinstance(error, of))
                response = {"ok": False, "kind": kind, "error": str(error)}
            except (ValueError, KeyError, TypeError) as error:
                response = {"ok": False, "kind": "refused", "error": f"{type(error).__name__}: {error}"}
            except OSError as error:
                # a full disk, a missing file
                response = {"ok": False, "kind": "failed", "error": str(error)}
            self.wfile.write(json.dumps(response).encode() + b"\n")


def respond(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out a request and returns the fields of its response.

    Raises:
        ValueError: no such operation, or what the registry raises.
        KeyError: a field is missing.
    """
    operation = request["op"]
    if operation == "add":
        registry.add(str(request["name"]), str(request["location"]))
        return {}
    if operation == "remove":
        registry.remove(str(request["name"]))
        return {}
    if operation == "list":
        return {"adapters": registry.adapters()}
    if operation == "faults":
        return {"faults": registry.faults()}
    if operation == "statistics":
        return {"statistics": registry.statistics()}
    raise ValueError(f"op is {operation!r}: must be add, remove, list, faults or statistics")


def ask(directory: Path, rank: int, request: dict[str, Any], timeout_s: float = 10.0) -> dict[str, Any]:
    """Sends one request to a rank and returns the response.

    Raises:
        OSError: the rank does not listen, as before its warm-up has ended, or does not respond in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(socket_path(directory, rank)))
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            return json.loads(stream.readline(64 * MAX_LINE))
