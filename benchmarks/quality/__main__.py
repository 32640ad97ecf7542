"""The quality study: `python -m benchmarks.quality [--tasks cities,devil] [--seeds 3] [--device cuda]`.

Parts: sft (methods and ranks by task), short (fewer steps), distill, turns (conversations), rl (GRPO), helps (settings
of LoRA-P). Ctrl-C stops it; the same command goes on where it stopped. Results: a JSON file per device and part in
--results.
`python -m benchmarks.quality.report` writes docs/explain/quality-data.md from the committed ones.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality import distill, helps, rl, short, turns
from benchmarks.quality.methods import METHODS, RANKS
from benchmarks.quality.store import RESULTS, Store
from benchmarks.quality.study import Bench, base_result, chosen_rate, full_run, plan
from benchmarks.quality.tasks import TASKS
from benchmarks.run import device_name, environment
from preft_hf.embedded_model import load_demo_model

Report = Callable[[str], None]
Run = Callable[[Report], object]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line, checked. Ends the process with a sentence if they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = f"of {', '.join(PARTS)} (default: all; sft if one of the next three is given)"
    parser.add_argument("--parts", type=_of(PARTS), help=parts)
    parser.add_argument("--tasks", type=_of(TASKS), help=f"of {', '.join(TASKS)}; for the part sft")
    parser.add_argument("--methods", type=_of(METHODS), help=f"of {', '.join(METHODS)}; for the part sft")
    ranks = [str(rank) for rank in RANKS]
    parser.add_argument("--ranks", type=_of(ranks), help=f"of {', '.join(ranks)}; for the part sft")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of the base model's arithmetic; the weights are those of bfloat16 in both. float32 is several times "
        "faster on a CPU without 16-bit instructions (no avx512_bf16 in /proc/cpuinfo)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and there is no CUDA device: leave it out")
    narrowed = [name for name in ("tasks", "methods", "ranks") if getattr(options, name) is not None]
    options.parts = options.parts or (["sft"] if narrowed else list(PARTS))
    if narrowed and "sft" not in options.parts:
        parser.error(f"--{narrowed[0]} is for the part sft, and --parts is {','.join(options.parts)}: leave one out")
    options.tasks, options.methods = options.tasks or list(TASKS), options.methods or list(METHODS)
    options.ranks = [int(rank) for rank in options.ranks or RANKS]
    return options


def _of(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns what reads a list with commas whose items are among the allowed ones."""

    def read(given: str) -> list[str]:
        unknown = [value for value in given.split(",") if value not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"has {', '.join(unknown)}: give some of {', '.join(allowed)}")
        return given.split(",")

    return read


def main() -> None:
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    device = "cpu" if options.device == "cpu" else device_name()
    base, tokenizer = load_demo_model()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # rounded first, so that both dtypes hold the same model
    base = base.to(device=options.device, dtype=torch.bfloat16).to(getattr(torch, options.dtype))
    folders = {"sft": options.results} | {part: options.results / part for part in PARTS if part != "sft"}
    command = "python -m benchmarks.quality"
    runs: list[Run] = []
    for part in options.parts:
        store = Store(folders[part] / f"{device}.json", environment(command) | {"dtype": options.dtype})
        runs += PARTS[part](base, tokenizer, store, options)
    until = time.monotonic() + 60 * options.minutes
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console()) as progress:
        bar = progress.add_task("", total=len(runs))
        for run in runs:
            if time.monotonic() > until:
                break
            run(lambda text: progress.update(bar, description=text))
            progress.advance(bar)


def _sft(base: Any, tokenizer: Any, store: Store, options: argparse.Namespace) -> list[Run]:
    benches = {name: Bench(base, tokenizer, TASKS[name]()) for name in options.tasks}

    def run(name: str, method: str, rank: int, seed: int, report: Report) -> None:
        base_result(benches[name], store)
        rate = chosen_rate(benches[name], store, method, rank, report)
        full_run(benches[name], store, method, rank, rate, seed, report)

    return [partial(run, *one) for one in plan(options.tasks, options.methods, options.ranks, options.seeds)]


def _short(base: Any, tokenizer: Any, store: Store, options: argparse.Namespace) -> list[Run]:
    benches = {name: Bench(base, tokenizer, TASKS[name]()) for name in short.TASKS}
    return [partial(short.run, benches[task], store, *one) for task, *one in short.plan(options.seeds)]


def _on_cities(part: Any, base: Any, tokenizer: Any, store: Store, options: argparse.Namespace) -> list[Run]:
    bench = Bench(base, tokenizer, TASKS["cities"]())
    return [partial(part.run, bench, store, *one) for one in part.plan(options.seeds)]


def _turns(base: Any, tokenizer: Any, store: Store, options: argparse.Namespace) -> list[Run]:
    return [partial(turns.run, base, tokenizer, store, *one) for one in turns.plan(options.seeds)]


PARTS: dict[str, Callable[..., list[Run]]] = {
    "sft": _sft,
    "short": _short,
    "distill": partial(_on_cities, distill),
    "turns": _turns,
    "rl": partial(_on_cities, rl),
    "helps": partial(_on_cities, helps),
}


if __name__ == "__main__":
    main()
