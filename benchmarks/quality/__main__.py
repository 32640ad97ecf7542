"""The quality study: `python -m benchmarks.quality [--tasks cities,devil] [--seeds 3] [--device cuda]`.

Ctrl-C stops it; the same command goes on where it stopped. Results: a JSON file per device in --results;
docs/quality.md is written from the committed ones by `python -m benchmarks.quality.report`.
"""

import argparse
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality.methods import METHODS, RANKS
from benchmarks.quality.store import RESULTS, Store
from benchmarks.quality.study import Bench, base_result, chosen_rate, full_run, plan
from benchmarks.quality.tasks import TASKS
from benchmarks.run import device_name, environment
from preft_hf.demo.model import load_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    options = parser.parse_args()
    tasks, methods = options.tasks.split(","), options.methods.split(",")
    for name, given, allowed in (("--tasks", tasks, TASKS), ("--methods", methods, METHODS)):
        unknown = [value for value in given if value not in allowed]
        if unknown:
            parser.error(f"{name} has {', '.join(unknown)}: give some of {', '.join(allowed)}")
    transformers.utils.logging.set_verbosity_error()
    device = "cpu" if options.device == "cpu" else device_name()
    store = Store(options.results / f"{device}.json", environment("python -m benchmarks.quality"))
    base, tokenizer = load_demo_model()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = base.to(device=options.device, dtype=torch.bfloat16)
    benches = {name: Bench(base, tokenizer, TASKS[name]()) for name in tasks}
    runs = list(plan(tasks, methods, [int(rank) for rank in options.ranks.split(",")], options.seeds))
    until = time.monotonic() + 60 * options.minutes
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console()) as progress:
        bar = progress.add_task("", total=len(runs))
        for name, method, rank, seed in runs:
            if time.monotonic() > until:
                break

            def report(text: str) -> None:
                progress.update(bar, description=text)

            base_result(benches[name], store)
            rate = chosen_rate(benches[name], store, method, rank, report)
            full_run(benches[name], store, method, rank, rate, seed, report)
            progress.advance(bar)


if __name__ == "__main__":
    main()
