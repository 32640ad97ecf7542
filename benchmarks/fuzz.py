"""Mutated adapters through the reader: `python -m benchmarks.fuzz [--files N] [--seed S]`.

Every file is a valid one with a few mutations of its bytes, its JSON or its header. The reader may accept it, or
refuse it with an AdapterError. Anything else, more than a second of CPU time, or more than 64 MiB is a fault.
"""

import argparse
import json
import random
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, load_adapter, save_adapter
from preft_core.format.config import AdapterConfig

MAX_SECONDS = 1.0
MAX_TRACED_BYTES = 64 << 20
ODD = [
    0,
    1,
    -1,
    2**31,
    2**48,
    2**63,
    2**64,
    1e308,
    "",
    "x" * 5000,
    None,
    True,
    [],
    {},
    [[]],
    "(a+)+x",
    "../..",
    "\0",
    "é",
    [2**70],
]


@dataclass
class Report:
    files: int = 0
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


class Fuzzer:
    """Mutates valid adapters of each method, and reads them.

    Args:
        folder: for the files, one adapter at a time
        seed: of all random choices; a fault names it and the number of the file
    """

    def __init__(self, folder: Path, seed: int = 0):
        self.random, self.seed, self.folder = random.Random(seed), seed, folder / "fuzz"
        self.good: list[tuple[bytes, bytes]] = []
        for method in ("lora", "direft", "loreft"):
            place = folder / method
            leaves = (
                {"preft_A": (2, 6), "preft_B": (6, 2)}
                if method != "loreft"
                else {"preft_A": (2, 6), "preft_R": (2, 6)}
            )
            leaves |= {} if method == "lora" else {"preft_bias": (2,)}
            path = "model.layers.0.mlp.up_proj" if method == "lora" else "model.layers.0.preft"
            generator = torch.Generator().manual_seed(0)
            tensors = {
                f"base_model.model.{path}.{leaf}": torch.randn(shape, generator=generator)
                for leaf, shape in leaves.items()
            }
            targets = ("up_proj",) if method == "lora" else None
            alpha = None if method == "loreft" else 4.0
            save_adapter(place, AdapterConfig(method, 2, alpha, target_modules=targets), tensors)
            self.good.append(((place / CONFIG_NAME).read_bytes(), (place / WEIGHTS_NAME).read_bytes()))
        self.folder.mkdir(exist_ok=True)

    def run(self, files: int, progress: Callable[[range], Any] = lambda numbers: numbers) -> Report:
        """Returns the outcomes of reading the files.

        Raises:
            RuntimeError: the reader crashed, hung or used too much memory; the message names the file.
        """
        report = Report()
        for number in progress(range(files)):
            config, weights = self.random.choice(self.good)
            which = self.random.random()
            if which < 0.5:
                config = self._json(config)
            if which > 0.4:
                weights = self._header(weights) if self.random.random() < 0.6 else self._bytes(weights)
            (self.folder / CONFIG_NAME).write_bytes(config)
            (self.folder / WEIGHTS_NAME).write_bytes(weights)
            traced = number % 100 == 0
            self._read(number, report, traced)
        return report

    def _read(self, number: int, report: Report, traced: bool) -> None:
        if traced:
            tracemalloc.start()
        # of this thread: the machine may let a process wait
        start = time.thread_time()
        try:
            load_adapter(self.folder)
            report.taken += 1
            outcome = "taken"
        except AdapterError as error:
            report.refused += 1
            outcome = "refused: " + str(error).replace(str(self.folder), "").split(":")[0][:40]
        except Exception as error:
            raise RuntimeError(f"file {number} of seed {self.seed}: {type(error).__name__}: {error}") from error
        seconds = time.thread_time() - start
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if peak > MAX_TRACED_BYTES:
                raise RuntimeError(f"file {number} of seed {self.seed}: the reader took {peak} bytes")
        elif seconds > MAX_SECONDS:
            raise RuntimeError(f"file {number} of seed {self.seed}: the reader took {seconds:.1f} s")
        else:
            report.slowest_s = max(report.slowest_s, seconds)
        report.files += 1
        report.outcomes[outcome] += 1

    def _bytes(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            place = self.random.randrange(len(changed)) if changed else 0
            way = self.random.randrange(5)
            if way == 0 and changed:
                changed[place] = self.random.randrange(256)
            elif way == 1:
                del changed[place : place + self.random.randint(1, 64)]
            elif way == 2:
                changed[place:place] = self.random.randbytes(self.random.randint(1, 64))
            elif way == 3:
                changed[place:place] = changed[: self.random.randint(0, 200)]
            else:
                changed[:8] = struct.pack("<Q", self.random.choice([0, 1, 7, 2**16, 2**26, 2**32, 2**63, 2**64 - 1]))
        return bytes(changed)

    def _json(self, data: bytes) -> bytes:
        if self.random.random() < 0.3:
            return self._bytes(data)
        value = json.loads(data)
        for _ in range(self.random.randint(1, 3)):
            key = self.random.choice([*value, "unknown", "lora_alpha", "r"])
            way = self.random.randrange(4)
            if way == 0:
                value.pop(key, None)
            else:
                value[key] = self.random.choice(ODD)
        if self.random.random() < 0.1:
            value = self.random.choice(ODD)
        text = json.dumps(value)
        if self.random.random() < 0.1:
            text = text.replace("}", ', "r": 3}') if self.random.random() < 0.5 else "[" * 100_000 + text
        return text.encode()

    def _header(self, data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        for _ in range(self.random.randint(1, 3)):
            names = [name for name in header if isinstance(header[name], dict)]
            if not names:
                break
            name = self.random.choice(names)
            way = self.random.randrange(6)
            if way == 0:
                header[name] = self.random.choice(ODD)
            elif way == 1:
                header[self.random.choice(["x", "", name + ".x", "base_model.model..preft_A"])] = header.pop(name)
            elif way == 2:
                header[name]["dtype"] = self.random.choice(["F64", "I8", "F16", "BF16", "", 3, None])
            elif way == 3:
                header[name]["shape"] = self.random.choice(
                    [[2, 6], [0, 6], [2**40, 2**40], [-1], [1] * 60, "x", [2.5], [6, 2]]
                )
            elif way == 4:
                header[name]["data_offsets"] = self.random.choice(
                    [[0, 48], [48, 0], [0], [0, 2**60], [-8, 40], ["0", 1]]
                )
            else:
                header[name + "2"] = dict(header[name])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + rest[: self.random.choice([None, None, 8, 0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fuzzer = Fuzzer(Path(folder), options.seed)
        report = fuzzer.run(options.files, lambda numbers: track(numbers, console=console, description="fuzz"))
    seconds = time.perf_counter() - start
    console.print(
        f"{report.files} files in {seconds:.0f} s, seed {options.seed}: {report.taken} taken, {report.refused} refused"
    )
    console.print(f"slowest {1e3 * report.slowest_s:.0f} ms; no other exception")
    for outcome, number in report.outcomes.most_common(25):
        console.print(f"{number:8} {outcome}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
