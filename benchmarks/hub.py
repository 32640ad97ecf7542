"""Pulls hundreds of adapters from a local Hub server: `python -m benchmarks.hub [--adapters N]`.

`pull_adapters` (checks, pins, parallel downloads) and a plain loop of snapshot_download alternate, each with an empty
cache. A second pull, with everything cached, shows the cost of resuming.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from tests.hub.server import Hub

from benchmarks.run import environment
from preft_core.format.adapter import save_adapter
from preft_core.format.config import AdapterConfig

SYSTEMS = ("loop of snapshot_download", "preft pull, 1 at once", "preft pull, 8 at once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=1.0, help="size of an adapter")
    parser.add_argument("--client", nargs=2, metavar=("SYSTEM", "CACHE"), help="internal")
    options = parser.parse_args()
    if options.client:
        client(options.client[0], Path(options.client[1]), options.adapters)
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        fill(hub, Path(folder), options.adapters, options.megabytes)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
        for i in range(options.repeats):
            for j in range(len(SYSTEMS)):
                name = SYSTEMS[(i + j) % len(SYSTEMS)]
                times[name].append(run(hub, name, Path(folder) / "cache", options.adapters))
    made = environment("python -m benchmarks.hub")
    console.print(
        f"{options.adapters} adapters of {options.megabytes:g} MB, {made['device']}, {options.repeats} turns"
    )
    loop = statistics.median(one["seconds"] for one in times[SYSTEMS[0]])
    for name, found in times.items():
        seconds = [one["seconds"] for one in found]
        low, high = statistics.quantiles(seconds, n=4)[::2]
        middle, again = statistics.median(seconds), statistics.median(one["again"] for one in found)
        peak = max(one["peak_mb"] for one in found)
        console.print(
            f"{name:28} {middle:6.1f} s ({low:.1f} to {high:.1f}), loop / this {loop / middle:.2f}; again from cache "
            f"{again:.1f} s; peak memory {peak:.0f} MB"
        )


def fill(hub: Hub, folder: Path, number: int, megabytes: float) -> None:
    rank = 8
    width = max(1, int(megabytes * 1e6 / 4 / rank / 2))
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        tensors = {
            "base_model.model.up.preft_A": torch.randn(rank, width, generator=generator),
            "base_model.model.up.preft_B": torch.randn(width, rank, generator=generator),
        }
        save_adapter(folder / "one", AdapterConfig("lora", rank, 16.0, target_modules=("up",)), tensors)
        hub.put(f"org/a{i}", {file.name: file.read_bytes() for file in (folder / "one").iterdir() if file.is_file()})


def run(hub: Hub, name: str, cache: Path, number: int) -> dict[str, float]:
    """Returns one client's times, in a separate process with an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "benchmarks.hub", "--adapters", str(number), "--client", name, str(cache)]
    done = subprocess.run(
        command, env={**os.environ, **settings, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def client(name: str, cache: Path, number: int) -> None:
    from huggingface_hub import snapshot_download

    from preft_core.hub.push_pull import pull_adapters

    places = {f"a{i}": f"org/a{i}" for i in range(number)}

    def pull() -> None:
        if name == SYSTEMS[0]:
            for place in places.values():
                snapshot_download(place, cache_dir=cache)
            return
        found = pull_adapters(places, max_workers=int(name.split()[2]), cache_dir=cache)
        if any(one.error for one in found):
            raise RuntimeError("an adapter was not pulled, so this is not timed")

    times = []
    for _ in range(2):
        start = time.perf_counter()
        pull()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": times[0], "again": times[1], "peak_mb": peak}))


if __name__ == "__main__":
    main()
