"""`preft-tgi serve` is stopped: requests in flight finish, whoever else gets the signal. The launcher is a script."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.interpreter import SOURCES
from tests.ports import free_port

LAUNCHER = """#!{python}
import os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Router(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        open("received", "w").close()
        while not os.path.exists("respond"):
            time.sleep(0.01)
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{{}}")
    def log_message(self, *args):
        pass
open("pid", "w").write(str(os.getpid()))
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Router).serve_forever()
"""


class Service:
    def __init__(self, root, **variables):
        self.root, self.port = root, free_port()
        launcher = root / "text-generation-launcher"
        launcher.write_text(LAUNCHER.format(python=sys.executable))
        launcher.chmod(0o755)
        environment = dict(os.environ, PATH=f"{root}:{os.environ['PATH']}", PYTHONPATH=SOURCES, **variables)
        command = [sys.executable, "-m", "tgi_patch", "serve", "--", "--port", str(self.port)]
        self.log = (root / "log").open("w+")
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.wait_for(lambda: self.status("/health") == 200)

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def status(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def text(self):
        self.log.seek(0)
        return self.log.read()


@pytest.fixture
def service(tmp_path):
    made = Service(tmp_path, PREFT_ACCESS_LOG="1")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait(timeout=10)
    made.log.close()


def test_a_signal_to_the_process_group_lets_requests_finish(service):
    found = []
    running = threading.Thread(target=lambda: found.append(service.status("/generate", b'{"inputs": "x"}')))
    running.start()
    service.wait_for((service.root / "received").exists)
    os.killpg(service.process.pid, signal.SIGTERM)
    service.wait_for(lambda: service.status("/preft/ready") == 503)
    (service.root / "respond").touch()
    running.join()
    assert found == [200], service.text()
    assert service.process.wait(timeout=30) == 0
    lines = [json.loads(line) for line in service.text().splitlines() if '"request"' in line]
    assert [line["status"] for line in lines if line["path"] == "/generate"] == [200]


def test_a_launcher_that_has_the_signal_too_is_no_error(service):
    """systemd sends SIGTERM to every process of a unit: TGI may exit before the gateway stops it."""
    found = []
    running = threading.Thread(target=lambda: found.append(service.status("/generate", b'{"inputs": "x"}')))
    running.start()
    service.wait_for((service.root / "received").exists)
    service.process.terminate()
    service.wait_for(lambda: service.status("/preft/ready") == 503)
    os.kill(int((service.root / "pid").read_text()), signal.SIGTERM)
    running.join()
    assert found == [502]
    assert service.process.wait(timeout=30) == 0, service.text()
    assert "Traceback" not in service.text()
