"""Runs the cases: `python -m benchmarks.run [--repeats N] [--only TEXT]`. Base and PreFT alternate in one process."""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cases import CASES, Case, models, prepared
from preft_hf.embedded_model import load_demo_model

RESULTS = Path(__file__).parent / "results"
NUM_WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timings of each side, at least 5")
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and save nothing")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats is {options.repeats}: give 5 or more")
    console = Console()
    transformers.utils.logging.set_verbosity_error()
    # A copy, because the loaded weights lie in the file's mapping, at addresses for which the CPU's matrix library
    # takes another path: other last bits and other times than for the copies that they are compared with.
    base = copy.deepcopy(load_demo_model()[0])
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    results, made = [], {}
    for case in [case for case in CASES if options.only in case.name]:
        key = (case.method, case.rank)
        if key not in made:
            made = {key: models(base, *key)}
        results.append(measure(case, prepared(case, base, *made[key]), options.repeats * case.repeat_factor, console))
    console.print(table(results))
    if not options.only:
        report = {"environment": environment(), "model": "SmolLM2-135M-Instruct, float32", "results": results}
        file = RESULTS / f"{device_name()}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"Saved {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file.name}")


@torch.no_grad()
def measure(
    case: Case, runs: tuple[Callable[[], Any], Callable[[], Any]], repeats: int, console: Console
) -> dict[str, Any]:
    """Returns the times of both sides in seconds and the ratio PreFT / base, with medians and quartiles.

    The order alternates. The ratio is taken within each pair, so that a slow period of the machine affects both.
    """
    for run in runs * NUM_WARM_UP:
        run()
    times: tuple[list[float], list[float]] = ([], [])
    for i in track(range(repeats), description=f"{case.name:30}", console=console):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            start = time.perf_counter()
            runs[side]()
            times[side].append(time.perf_counter() - start)
    ratios = [preft / base for base, preft in zip(*times, strict=True)]
    return {
        "case": case.__dict__,
        "repeats": repeats,
        "base_s": statistics.median(times[0]),
        "preft_s": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table("case", "base, ms", "PreFT, ms", "ratio", "quartiles", title="SmolLM2-135M, float32")
    for result in results:
        low, high = result["ratio_quartiles"]
        times = [f"{1000 * result[side]:.1f}" for side in ("base_s", "preft_s")]
        shown.add_row(result["case"]["name"], *times, f"{result['ratio']:.3f}", f"{low:.3f} - {high:.3f}")
    return shown


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def environment(command: str = "python -m benchmarks.run") -> dict[str, str]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": command,
        "device": cpu[0].partition(":")[2].strip() if cpu and not torch.cuda.is_available() else device_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
