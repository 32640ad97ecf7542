"""A Hub on loopback: the HTTP routes that huggingface_hub uses for models, over memory, with faults on demand.

The client is huggingface_hub as it is installed. Large files take the LFS route (batch, PUT, verify), as on the
real Hub where HF_HUB_DISABLE_XET is set.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
USER = "org"


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0


@dataclass
class Fault:
    """What happens to a request of this kind ("resolve", "lfs-upload", ...), for the next `times` of them."""

    step: str
    kind: str
    times: int = 10**9
    path: str = ""


class Hub:
    """The server and what it holds. `with Hub() as hub` starts it on a free port and stops it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(HubHandler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, step: str, kind: str, times: int = 10**9, path: str = "") -> None:
        self.faults.append(Fault(step, kind, times, path))

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commits files as if they had been pushed; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(private))
            return self.commit(repository, {name: Blob(d, name.endswith(".safetensors")) for name, d in files.items()})

    def commit(self, repository: Repository, changes: dict[str, Blob], ref: str = "main", base: str = "main") -> str:
        files = dict(repository.commits.get(repository.refs.get(base, ""), {})) | changes
        label = json.dumps([len(repository.commits), sorted((n, b.sha256) for n, b in files.items())])
        sha = hashlib.sha1(label.encode()).hexdigest()
        repository.commits[sha] = files
        repository.refs[ref] = sha
        return sha

    def seen(self, step: str) -> list[dict[str, str]]:
        return [headers for name, _, headers in self.requests if name == step]


ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs-batch"),
    ("PUT", r"/lfs-upload/(?P<oid>[0-9a-f]{64})", "lfs-upload"),
    ("POST", r"/lfs-verify", "lfs-verify"),
    ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunked()
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is not None and method == self.command:
                with self.hub.lock:
                    self.hub.requests.append((name, url.path, dict(self.headers)))
                self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
                if not self._faulty(name, unquote(url.path)):
                    found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, "_" + name.replace("-", "_"))(**found)
                return
        self._error(404, "EntryNotFound", f"no route for {self.command} {self.path}")

    def _chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # faults

    def _faulty(self, step: str, path: str) -> bool:
        with self.hub.lock:
            fault = next(
                (f for f in self.hub.faults if f.step in (step, "any") and f.times > 0 and f.path in path), None
            )
            if fault is None:
                self.truncate = self.slow = self.wrong_etag = False
                return False
            fault.times -= 1
        self.truncate, self.slow = fault.kind == "truncate", fault.kind == "slow"
        self.wrong_etag = fault.kind == "etag"
        if self.truncate or self.slow or self.wrong_etag:
            return False
        if fault.kind == "reset":
            # RST instead of FIN
            import socket
            import struct

            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return True
        status = int(fault.kind)
        code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(status, "ServerError")
        self._error(status, code, f"fault {status} on purpose", {"Retry-After": "1"} if status == 429 else None)
        return True

    # answers

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        marks = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(json.dumps({"error": message}).encode(), status, marks)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, data: bytes, status: int, headers: dict[str, str], size: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if self.slow:
                for i in range(0, len(data), 1 << 14):
                    self.wfile.write(data[i : i + (1 << 14)])
                    time.sleep(0.02)
            else:
                self.wfile.write(data[: len(data) // 2] if self.truncate and status < 300 else data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        if self.truncate:
            self.close_connection = True

    slow = truncate = wrong_etag = False

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo: str, write: bool = False) -> Repository | None:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self._authorized()):
            self._error(404 if self._authorized() else 401, "RepoNotFound", "Repository Not Found")
            return None
        if write and not self._authorized():
            self._error(401, "Unauthorized", "Invalid username or password.")
            return None
        return repository

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, Blob]] | None:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repository.commits[sha]

    # routes

    def _whoami(self) -> None:
        if not self._authorized():
            self._error(401, "Unauthorized", "Invalid username or password.")
            return
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        wrong = not content.startswith("---\n")
        self._json({"errors": [{"message": "no metadata"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def _create(self) -> None:
        if not self._authorized():
            self._error(401, "Unauthorized", "Invalid username or password.")
            return
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                self._json({"error": "You already created this model repo", **url}, 409)
                return
            repository = Repository(bool(wanted.get("private")) or wanted.get("visibility") == "private")
            self.hub.commit(repository, {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
            self.hub.repositories[repo_id] = repository
        self._json(url)

    def _preupload(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        if repository is None:
            return
        files = repository.commits.get(repository.refs.get(revision, ""), {})
        answer = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            large = path.endswith(".safetensors")
            oid = files[path].etag if path in files else None
            answer.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answer})

    def _lfs_batch(self, repo: str) -> None:
        if self._repository(repo, write=True) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/lfs-upload/{oid}", "header": {}},
                "verify": {"href": f"{self.hub.endpoint}/lfs-verify", "header": {}},
            }
            objects.append({"oid": oid, "size": size} | ({} if oid in self.hub.large else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "BadRequest", "the object is not what its hash says")
            return
        with self.hub.lock:
            self.hub.large[oid] = self.body
        self._json({})

    def _lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        have = len(self.hub.large.get(wanted["oid"], b"")) == wanted["size"]
        self._json({} if have else {"error": "no such object"}, 200 if have else 404)

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        if repository is None:
            return
        changes: dict[str, Blob] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    self._error(400, "BadRequest", "an LFS object of the commit was not uploaded")
                    return
                changes[value["path"]] = Blob(self.hub.large[value["oid"]], True)
        with self.hub.lock:
            ref = revision
            if self.query.get("create_pr"):
                repository.pull_requests += 1
                ref = f"refs/pr/{repository.pull_requests}"
            sha = self.hub.commit(repository, changes, ref, revision)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}
        if ref != revision:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{repository.pull_requests}"
        self._json(answer)

    def _info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        found = None if repository is None else self._files(repository, revision)
        if repository is None or found is None:
            return
        sha, files = found
        info = {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "private": repository.private, "tags": []}
        self._json(info | {"siblings": [{"rfilename": name} for name in sorted(files)]})

    def _refs(self, repo: str) -> None:
        repository = self._repository(repo)
        if repository is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def _entries(self, files: dict[str, Blob]) -> list[dict[str, Any]]:
        entries = []
        for name, blob in sorted(files.items()):
            entry = {"type": "file", "path": name, "size": len(blob.data), "oid": blob.etag}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _tree(self, repo: str, revision: str, path: str = "") -> None:
        repository = self._repository(repo)
        found = None if repository is None else self._files(repository, revision)
        if found is not None:
            self._json(self._entries({n: b for n, b in found[1].items() if n.startswith(path)}))

    def _paths(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        found = None if repository is None else self._files(repository, revision)
        if found is not None:
            wanted = json.loads(self.body) if self.body.startswith(b"{") else {"paths": parse_qs(self.body.decode())}
            self._json(self._entries({n: b for n, b in found[1].items() if n in wanted["paths"]}))

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        found = None if repository is None else self._files(repository, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        blob = files[path]
        etag = "0" * 64 if self.wrong_etag else blob.etag
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(blob.data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or self.command == "HEAD":
            self._send(blob.data, 200, headers)
            return
        begin, end = int(span[1]), min(int(span[2] or len(blob.data) - 1), len(blob.data) - 1)
        if begin > end:
            self._send(b"", 416, headers | {"Content-Range": f"bytes */{len(blob.data)}"})
            return
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(blob.data)}"
        self._send(blob.data[begin : end + 1], 206, headers)

    _download: Callable[..., None] = _resolve
