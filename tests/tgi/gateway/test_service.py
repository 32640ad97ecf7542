"""`python -m tgi_patch serve` whole: gateway, patched server, clients over HTTP. The launcher is a stand-in."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import TGI_PYTHON
from tests.core.hub.server import Hub
from tests.interpreter import SOURCES
from tests.ports import free_port
from tests.tgi.server_process import make_tiny_model, some_ids

pytestmark = pytest.mark.tgi
TOKEN = "let me in"


class Service:
    def __init__(self, model, port=None, **variables):
        self.model = model
        self.root = Path(tempfile.mkdtemp(prefix="preft-e-"))
        launcher = self.root / "text-generation-launcher"
        launcher.write_text(f'#!/bin/sh\nexec {TGI_PYTHON} {Path(__file__).parents[1] / "router.py"} "$@"\n')
        launcher.chmod(0o755)
        self.port = port or free_port()
        adapters = ",".join(f"{name}={path}" for name, path in model.adapters.paths.items())
        environment = dict(
            os.environ,
            PATH=f"{self.root}:{os.environ['PATH']}",
            PYTHONPATH=SOURCES,
            ATTENTION="flashdecoding-ipex",
            PREFT_ADAPTERS=adapters,
            PREFT_CONTROL_DIR=str(self.root / "c"),
            PREFT_ADMIN_TOKEN=TOKEN,
            PREFT_RESERVE="lora:4",
        )
        environment.pop("TRITON_INTERPRET", None)
        command = [
            str(TGI_PYTHON),
            "-m",
            "tgi_patch",
            "serve",
            "--",
            "--model-id",
            str(model.directory),
            "--num-shard",
            "1",
        ]
        command += ["--num-shard", "1", "--port", str(self.port), "--hostname", "127.0.0.1"]
        self.log = self.root / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def get(self, path, **headers):
        return self.call("GET", path, None, headers)

    def call(self, method, path, body=None, headers=()):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers), method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers
        except (urllib.error.URLError, ConnectionError) as error:
            return 0, str(error), {}

    def admin(self, method, path="", body=None):
        return self.call(method, "/preft/adapters" + path, body, {"Authorization": f"Bearer {TOKEN}"})

    def generate(self, ids, adapter, new=6):
        parameters = {"max_new_tokens": new, "details": True} | ({} if adapter is None else {"adapter_id": adapter})
        status, text, _ = self.call(
            "POST", "/generate", {"inputs": " ".join(f"<{i}>" for i in ids), "parameters": parameters}
        )
        answer = json.loads(text)
        return status, [token["id"] for token in answer["details"]["tokens"]] if status == 200 else answer

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def service():
    made = Service(make_tiny_model("llama"))
    yield made
    assert made.close() == 0, made.log.read_text()[-3000:]


def test_many_requests_at_once(service):
    names = [None, *service.model.adapters.paths]
    cases = [(names[i % len(names)], some_ids(3 + i % 11, i), 1 + i % 9) for i in range(48)]
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda case: service.generate(case[1], case[0], case[2]), cases))
    assert found == [(200, service.model.expected(*case)) for case in cases]


def test_clients_that_people_use(service):
    ids = some_ids(9, 77)
    text = " ".join(f"<{i}>" for i in ids)
    models = ["wide", "edit", "tgi", str(service.model.directory)]
    task = json.dumps({"url": service.url, "text": text, "models": models})
    script = str(Path(__file__).parents[1] / "clients.py")
    # huggingface_hub's client refuses loopback too where it is told to be offline
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [str(TGI_PYTHON), script, task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for model in models:
        adapter = model if model in service.model.adapters.paths else None
        expected = "".join(f"<{i}>" for i in service.model.expected(adapter, ids, 6))
        assert found[model] == [expected] * 3, model
    assert "'nobody' is not known" in found["nobody"]
    assert set(service.model.adapters.paths) < set(found["models"])


def test_bad_requests_are_answered_and_others_go_on(service):
    ids = some_ids(8, 5)
    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(service.generate, ids, "wide", 20) for _ in range(3)]
        status, answer = service.generate(ids, "nobody")
        assert status == 404
        assert "known are edit, few, stable" in answer["error"]
        assert service.call("POST", "/generate", {"inputs": "<3>", "parameters": {"adapter_id": 7}})[0] == 422
        assert service.call("POST", "/v1/chat/completions", {"model": "x", "messages": []})[0] == 404
        assert all(f.result() == (200, service.model.expected("wide", ids, 20)) for f in good)
    text = service.get("/metrics")[1]
    assert "tgi_request_count" in text
    assert 'preft_requests_total{adapter="wide"}' in text
    assert "preft_slots_used" in text


def test_adapters_by_the_admin_route(service):
    path = str(service.model.adapters.paths["few"])
    assert service.get("/preft/adapters")[0] == 401
    assert service.admin("POST", "", {"id": "late", "location": path})[0] == 201
    ids = some_ids(10, 6)
    assert service.generate(ids, "late") == (200, service.model.expected("few", ids, 6))
    assert service.admin("POST", "", {"id": "late", "location": str(service.model.adapters.paths["wide"])})[0] == 409
    status, text, _ = service.admin("POST", "", {"id": "bad", "location": str(service.model.directory)})
    assert status == 422, text
    assert service.generate(ids, "bad")[0] == 422
    # removed while it is in use: the request ends as it began, new ones are refused
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(service.generate, ids, "late", 60)
        while not json.loads(service.get("/info")[1])["in_flight"]:
            time.sleep(0.01)
        status, _, _ = service.admin("DELETE", "/late")
        assert status in (200, 202)
        assert service.generate(ids, "late")[0] == 404
        assert running.result() == (200, service.model.expected("few", ids, 60))


def test_a_client_that_goes_away_frees_its_request(service):
    body = json.dumps({"inputs": "<5> <6>", "parameters": {"max_new_tokens": 100, "adapter_id": "wide"}})
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall((head + body).encode())
        assert b"data:" in client.recv(65536) + client.recv(65536)
    deadline = time.monotonic() + 10
    while json.loads(service.get("/info")[1])["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    ids = some_ids(8, 9)
    assert service.generate(ids, "edit") == (200, service.model.expected("edit", ids, 6))


def test_a_stop_lets_requests_end():
    service = Service(make_tiny_model("llama"))
    ids = some_ids(8, 9)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(service.generate, ids, "edit", 40)
        while not json.loads(service.get("/info")[1])["in_flight"]:
            time.sleep(0.01)
        service.process.send_signal(signal.SIGTERM)
        assert running.result() == (200, service.model.expected("edit", ids, 40))
    assert service.process.wait(timeout=30) == 0


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_adapters_from_the_hub(tmp_path):
    model = make_tiny_model("llama")
    ids = some_ids(8, 15)
    with Hub() as hub:
        for name in ("wide", "edit", "few"):
            hub.put(f"acme/{name}", files_of(model.adapters.paths[name]))
        hub.put("other/wide", files_of(model.adapters.paths["wide"]))
        broken = files_of(model.adapters.paths["wide"]) | {"adapter_model.safetensors": b"not a tensor"}
        hub.put("acme/broken", broken)
        service = Service(
            model,
            HF_ENDPOINT=hub.endpoint,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HOME=str(tmp_path / "home"),
            PREFT_ADAPTERS="tone=acme/wide@main,acme/edit",
            PREFT_RESERVE="lora:16,lora:8",
            PREFT_ADAPTER_SOURCE="hub",
            PREFT_ALLOWED_ORGS="acme",
        )
        try:
            assert service.generate(ids, "tone") == (200, service.model.expected("wide", ids, 6))
            assert service.generate(ids, "acme/edit") == (200, service.model.expected("edit", ids, 6))
            # nobody named it before: it is loaded, and then it is there
            deadline = time.monotonic() + 20
            while (answer := service.generate(ids, "acme/few"))[0] == 503 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert answer == (200, service.model.expected("few", ids, 6))
            assert service.generate(ids, "other/wide")[0] == 404
            for name, status in (("acme/broken", 422), ("acme/nothing", 404)):
                while (answer := service.generate(ids, name))[0] == 503 and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert answer[0] == status, answer
            # the Hub goes away: what is known is served, what is not is said
            hub.fault("resolve", "500")
            status, answer = service.generate(ids, "acme/late")
            assert status == 503
            assert service.generate(ids, "tone") == (200, service.model.expected("wide", ids, 6))
        finally:
            assert service.close() == 0, service.log.read_text()[-3000:]


def test_bad_adapters_are_refused_and_others_go_on(service, tmp_path):
    """NaN weights; weights above the limit; each through the admin route and with a request under way."""
    from safetensors.torch import load_file, save_file

    ids = some_ids(8, 21)
    good = service.model.adapters.paths["few"]
    for name in ("nan", "big"):
        shutil.copytree(good, tmp_path / name)
    weights = load_file(good / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] * float("nan")}, tmp_path / "nan" / "adapter_model.safetensors")
    with (tmp_path / "big" / "adapter_model.safetensors").open("ab") as file:
        file.truncate(9 << 30)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(service.generate, ids, "wide", 60)
        for name, said in (("nan", "finite"), ("big", "bytes")):
            status, text, _ = service.admin("POST", "", {"id": name, "location": str(tmp_path / name)})
            assert (status, said in text) == (422, True), text
            assert service.generate(ids, name)[0] == 422
        result = running.result()
        assert result == (200, service.model.expected("wide", ids, 60)), result


def test_killed_and_started_again():
    """The gateway is killed with no time to clean up: TGI ends with it, and the same command serves again."""
    model = make_tiny_model("llama")
    ids = some_ids(8, 22)
    first = Service(model)
    assert first.generate(ids, "edit") == (200, model.expected("edit", ids, 6))
    first.process.kill()
    first.process.wait(timeout=10)
    inner = first.port + 10_000 if first.port < 50_000 else first.port - 10_000
    deadline = time.monotonic() + 20
    while _listens(inner):
        assert time.monotonic() < deadline, "TGI outlived its gateway"
        time.sleep(0.1)
    second = Service(model, port=first.port, PREFT_CONTROL_DIR=str(first.root / "c"))
    try:
        assert second.generate(ids, "edit") == (200, model.expected("edit", ids, 6))
    finally:
        assert second.close() == 0


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
