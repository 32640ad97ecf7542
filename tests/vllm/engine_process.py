"""A tiny model that vLLM loads, its adapters, what the two-phase loop says of them, and one engine's answers."""

import copy
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from preft_core.format.adapter import load_adapter
from tests.conftest import VLLM_PYTHON
from tests.hf.many_adapters import Crowd, crowd
from tests.hf.oracle import adapted_copy
from tests.hf.zoo import VOCABULARY, make_preft
from tests.interpreter import ROOT, SOURCES
from tests.ports import free_port
from tests.tgi.server_process import TinyModel

# vLLM's attention on a CPU takes heads of 32 and more
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


class ServedModel(TinyModel):
    """A model that vLLM serves."""

    def request(self, ids: list[int], name: str | None, new: int = 6) -> dict:
        names = list(self.adapters.paths)
        adapter = [name, names.index(name) + 1, str(self.adapters.paths[name])] if name else None
        return {"ids": ids, "adapter": adapter, "new": new, "name": name}


@functools.cache
def make_model(architecture: str) -> ServedModel:
    made = crowd(architecture, **SIZES)
    directory = Path(tempfile.mkdtemp(prefix="preft-vllm-"))
    make_preft(copy.deepcopy(made.base), "lora", r=8, seed=6).save_pretrained(directory / "sixth")
    saved = load_adapter(directory / "sixth")
    sixth = adapted_copy(made.base, saved.config.method, saved.tensors, saved.config.scaling)
    made = Crowd(made.base, made.adapted | {"sixth": sixth}, made.paths | {"sixth": directory / "sixth"})
    made.base.save_pretrained(directory)
    return ServedModel(directory, made)


def run(
    model: ServedModel,
    waves: list[list[dict]],
    broken: str | None = None,
    errors: bool = False,
    plugins: str | None = None,
    variables: dict[str, str] | None = None,
    job: dict | None = None,
    **engine,
) -> dict:
    """Returns what one engine answered to waves of requests, one wave after the other.

    Args:
        broken: a rule that is put in place of ours
        errors: a wave that fails is noted, and the next one begins
        plugins: VLLM_PLUGINS; "" loads none
        variables: more environment variables
        job: more for the driver
        engine: arguments of vLLM's LLM
    """
    folder = Path(tempfile.mkdtemp(prefix="preft-vllm-job-"))
    job = {"model": str(model.directory), "engine": engine, "waves": waves, "break": broken, "errors": errors} | (
        job or {}
    )
    job |= {"plugin": plugins is None}
    job |= {"environment": (variables or {}) | ({} if plugins is None else {"VLLM_PLUGINS": plugins})}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "log").touch()
    driver = driver_process()
    print(folder, file=driver.stdin, flush=True)
    status = driver.stdout.readline().strip()
    assert status == "0", f"status {status}: {(folder / 'log').read_text()[-4000:]}"
    return json.loads((folder / "result.json").read_text())


@functools.cache
def driver_process() -> subprocess.Popen:
    """Starts the process in vLLM's environment that forks one for each job. It ends when its input does."""
    return subprocess.Popen(
        [VLLM_PYTHON, Path(__file__).parent / "driver.py"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def environment() -> dict[str, str]:
    """Returns the variables of a process that finds the plugin by its entry point."""
    assert list(ROOT.glob("*.egg-info/entry_points.txt")), "pip install --editable . writes the entry point"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "TRITON"))}
    # nobind: two workers of one engine may share a NUMA node
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return clean | threads | {"PYTHONPATH": SOURCES, "HF_HUB_OFFLINE": "1"}


def check(model: ServedModel, waves: list[list[dict]], found: dict) -> None:
    """Compares an engine's answers with the two-phase loop, token for token."""
    for wave, answers in zip(waves, found["waves"], strict=True):
        for request, answer in zip(wave, answers, strict=True):
            expected = model.expected(request["name"], request["ids"], request["new"])
            assert answer["tokens"] == expected, (request["name"], len(request["ids"]), request["new"])


@contextmanager
def server(model: ServedModel, *arguments: str, **variables: str) -> Iterator[httpx.Client]:
    """Starts vLLM's OpenAI server, engine in a process of its own, and yields a client of it."""
    port = free_port()
    options = {
        "model": model.directory,
        "tokenizer": tokenizer_of(model),
        "served-model-name": "base",
        "port": port,
        "host": "127.0.0.1",
        "dtype": "float32",
        "max-model-len": 128,
        "max-loras": 4,
        "max-lora-rank": 16,
        "block-size": 32,
    }
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    log = model.directory / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], env=environment() | settings | variables, stdout=output, stderr=output
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_for(client, process, log)
                yield client
        finally:
            process.terminate()
            process.wait(60)


def wait_for(client: httpx.Client, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def tokenizer_of(model: ServedModel) -> Path:
    """Writes a tokenizer of words <0>, <1>, ... and returns its directory."""
    folder = model.directory / "tokenizer"
    folder.mkdir(exist_ok=True)
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<2>", "unk_token": "<0>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
