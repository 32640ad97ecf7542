"""Many adapters in one batch: `python -m benchmarks.many [--repeats N] [--adapters 1,4,16] [--device cuda]`.

Every row of the batch has its own adapter. The systems alternate in one process. A case that is already in the results
file is kept, so that an interrupted study can be resumed.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.many_systems import RANK, SYSTEMS, System, adapter_names, check, make_system
from benchmarks.run import RESULTS, device_name, environment
from preft_hf.embedded_model import load_demo_model

ADAPTERS = (1, 4, 16, 32, 64)
SHAPES = ((64, 32), (256, 128))
MEASURED = ("prefill_s", "time_to_first_token_s", "decode_tokens_per_s", "end_to_end_s")


def now() -> float:
    """Returns the clock in seconds, after synchronising with the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(StoppingCriteria):
    """Records the time of each token, and the time of the prompt's forward."""

    def __init__(self, model: Any):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokens: list[float] = []
        self.forwards: list[float] = []
        self._handles = [
            base.register_forward_pre_hook(self._begin, prepend=True),
            base.register_forward_hook(self._end),
        ]

    def _begin(self, *args: Any) -> None:
        self._began = now()

    def _end(self, *args: Any) -> None:
        self.forwards.append(now() - self._began)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="generations of each system, at least 5")
    parser.add_argument("--adapters", default=",".join(map(str, ADAPTERS)), help="rows, each with its own adapter")
    parser.add_argument("--shapes", default=",".join(f"{p}x{d}" for p, d in SHAPES), help="prompt x decode tokens")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--no-peak", action="store_true", help="leave out the memory, which takes processes of its own"
    )
    parser.add_argument("--peak-of", nargs=4, metavar=("SYSTEM", "ADAPTERS", "PROMPT", "DECODE"), help="internal")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats is {options.repeats}: give 5 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and there is no CUDA device: leave it out")
    transformers.utils.logging.set_verbosity_error()
    # the same float32 arithmetic on every device
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = Path(tempfile.gettempdir()) / f"preft-many-adapters-r{RANK}"
    if options.peak_of:
        print_peak(options.peak_of[0], *map(int, options.peak_of[1:]), folder, options.device)
        return
    counts = sorted(int(number) for number in options.adapters.split(","))
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    console = Console()
    device = device_name() if options.device == "cuda" else f"cpu-{torch.get_num_threads()}-threads"
    command = "python -m benchmarks.many" + (" --device cuda" if options.device == "cuda" else "")
    file = RESULTS / f"many-adapters-{device}.json"
    report = json.loads(file.read_text()) if file.exists() else {"cases": []}
    done = {(case["adapters"], case["prompt"], case["decode"]) for case in report["cases"]}
    wanted = [(n, p, d) for p, d in shapes for n in counts if (n, p, d) not in done]
    if wanted:
        base = demo_base().to(options.device)
        systems = [make_system(name, base, max(counts), folder) for name in SYSTEMS]
        for case in wanted:
            report["cases"].append(measure(systems, base, case, options, folder, console))
            report |= {
                "device": device,
                "environment": environment(command),
                "model": "SmolLM2-135M-Instruct, float32",
                "rank": RANK,
            }
            file.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(report))


def demo_base() -> Any:
    # a copy, as in benchmarks.run: the file's mapping gives other times
    base = copy.deepcopy(load_demo_model()[0]).eval()
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    return base


def measure(
    systems: list[System],
    base: Any,
    case: tuple[int, int, int],
    options: argparse.Namespace,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Returns one case's medians, quartiles and ratios to base. Systems alternate, in a rotating order."""
    (num_adapters, prompt, decode), repeats = case, options.repeats
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (num_adapters, prompt)).to(options.device)
    names = adapter_names(num_adapters)
    for system in systems:
        # also the warm-up: the pool loads its adapters here
        check(system, base, ids, names, folder)
    times: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
    for i in track(range(repeats), description=f"{num_adapters} adapters, {prompt} + {decode}", console=console):
        for j in range(len(systems)):
            system = systems[(i + j) % len(systems)]
            times[system.name].append(generation(system, ids, names, decode))
    result: dict[str, Any] = {"adapters": num_adapters, "prompt": prompt, "decode": decode, "repeats": repeats}
    result["systems"] = {name: summary(runs, times["base"]) for name, runs in times.items()}
    for name in times:
        result["systems"][name]["peak_bytes"] = None if options.no_peak else peak_bytes(name, case, options.device)
    return result


def generation(system: System, ids: torch.Tensor, names: list[str], decode: int) -> dict[str, float]:
    """Returns the times of one generation of all rows."""
    clock = Clock(system.model)
    start = now()
    system.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=decode,
        min_new_tokens=decode,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **system.arguments(names),
    )
    end = now()
    clock.remove()
    return {
        "prefill_s": clock.forwards[0],
        "time_to_first_token_s": clock.tokens[0] - start,
        "decode_tokens_per_s": len(ids) * (decode - 1) / (clock.tokens[-1] - clock.tokens[0]),
        "end_to_end_s": end - start,
    }


def summary(runs: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Returns median and quartiles of each figure, and of its ratio to base's in the same turn."""
    result = {}
    for figure in MEASURED:
        values = [run[figure] for run in runs]
        ratios = [run[figure] / other[figure] for run, other in zip(runs, base, strict=True)]
        result[figure] = {
            "median": statistics.median(values),
            "quartiles": statistics.quantiles(values, n=4)[::2],
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return result


def peak_bytes(name: str, case: tuple[int, int, int], device: str) -> int:
    """Returns the peak memory of a separate process for one generation with this system."""
    command = [sys.executable, "-m", "benchmarks.many", "--device", device, "--peak-of", name]
    command += map(str, case)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(name: str, num_adapters: int, prompt: int, decode: int, folder: Path, device: str) -> None:
    system = make_system(name, base := demo_base().to(device), num_adapters, folder)
    names = adapter_names(num_adapters)
    ids = torch.randint(0, base.config.vocab_size, (num_adapters, prompt)).to(device)
    del base
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        generation(system, ids, names, min(decode, 4))
        print(torch.cuda.max_memory_allocated())
        return
    # making the model took more memory than using it: start the kernel's record of the peak anew
    Path("/proc/self/clear_refs").write_text("5")
    generation(system, ids, names, min(decode, 4))
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def table(report: dict[str, Any]) -> Table:
    shown = Table(title=f"{report['model']}, rank {report['rank']}, every row with its own adapter")
    for column in (
        "adapters",
        "tokens",
        "system",
        "prefill, s",
        "first token, s",
        "decode, tokens/s",
        "end to end, s",
    ):
        shown.add_column(column)
    shown.add_column("peak, GB")
    for case in report["cases"]:
        for name, figures in case["systems"].items():
            cells = [f"{figures[key]['median']:.2f} ({figures[key]['ratio']:.2f}x)" for key in MEASURED]
            label = (str(case["adapters"]), f"{case['prompt']} + {case['decode']}") if name == "base" else ("", "")
            peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 1e9:.2f}"
            shown.add_row(*label, name, *cells, peak, end_section=name == SYSTEMS[-1])
    return shown


if __name__ == "__main__":
    main()
