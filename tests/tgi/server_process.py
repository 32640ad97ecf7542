"""A tiny model that TGI loads, its adapters, the two-phase loop as oracle, and a patched server that is running."""

import json
import os
import random
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.conftest import TGI_PYTHON
from tests.hf.many_adapters import BASE, Crowd, crowd
from tests.hf.oracle import two_phase_greedy
from tests.hf.zoo import VOCABULARY
from tests.interpreter import SOURCES
from tests.ports import free_port

# TGI's paged decode has no sliding window on a CPU
OVERRIDES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 4096},
    "gemma3_text": {"sliding_window": 4096},
}


@dataclass
class TinyModel:
    """directory: what TGI serves; adapters: where they are saved, and each merged into a copy of the base."""

    directory: Path
    adapters: Crowd

    def expected(self, name: str | None, ids: list[int], num_new: int) -> list[int]:
        """Returns the tokens of the two-phase loop."""
        adapted = self.adapters.adapted[name or BASE]
        return two_phase_greedy(adapted, self.adapters.base, torch.tensor([ids]), num_new)[0][0].tolist()


def make_tiny_model(architecture: str, made: Crowd | None = None) -> TinyModel:
    made = made or crowd(architecture, **OVERRIDES.get(architecture, {}))
    directory = Path(tempfile.mkdtemp(prefix="preft-tgi-"))
    made.base.save_pretrained(directory)
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<2>", "unk_token": "<0>"})
    )
    return TinyModel(directory, made)


def request(ids: list[int], adapter: str | None = None, new: int = 6, **others: int) -> dict:
    return {"text": " ".join(f"<{i}>" for i in ids), "adapter": adapter, "new": new, **others}


def some_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


class Server:
    """A driver in TGI's environment and the shards that it started."""

    def __init__(self, setting: dict, log: Path):
        environment = dict(os.environ, PYTHONPATH=SOURCES, HF_HUB_OFFLINE="1")
        environment.pop("TRITON_INTERPRET", None)
        driver = str(Path(__file__).with_name("driver.py"))
        self.log = log
        # most tokens of one request in one step: more than one if a speculated token was accepted
        self.most = 0
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(TGI_PYTHON), driver, json.dumps(setting)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.chunks = self._read()["chunks"]
        except BaseException:
            self.close()
            raise

    def run(self, requests: list[dict]) -> list[list[int]]:
        answer = self.ask({"op": "run", "requests": requests})
        assert "tokens" in answer, answer
        self.most = max(self.most, answer["most"])
        return answer["tokens"]

    def control(self, **request: str) -> list[dict]:
        """Returns the response of each rank."""
        return self.ask({"op": "control", "request": request})["ranks"]

    def ask(self, command: dict) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended:\n" + "\n".join(self.log.read_text().splitlines()[-25:])
        return json.loads(line)


@contextmanager
def serving(
    model: TinyModel, attention: str = "paged", world_size: int = 1, arguments=(), prefill_tokens=512, **variables
):
    """Runs a patched server that knows the model's adapters."""
    sockets = tempfile.mkdtemp(prefix="preft-s-")
    adapters = ",".join(f"{name}={path}" for name, path in model.adapters.paths.items())
    # tests of several shards may run side by side
    environment = {"ATTENTION": attention, "PREFIX_CACHING": "0", "PREFT_ADAPTERS": adapters}
    environment |= {"MASTER_PORT": str(free_port())} | variables
    setting = {
        "model": str(model.directory),
        "sockets": sockets,
        "world_size": world_size,
        "environment": environment,
        "arguments": list(arguments),
        "max_prefill_tokens": prefill_tokens,
    }
    server = Server(setting, Path(sockets) / "log")
    try:
        yield server
    finally:
        server.close()
