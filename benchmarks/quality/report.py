"""Writes docs/explain/quality-data.md's tables and plots from results: `python -m benchmarks.quality.report`."""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import difference, each_row_alike, interval
from benchmarks.quality.methods import METHODS, NAMES, RANKS
from benchmarks.quality.report_parts import PLOT_SOURCE, TABLES, short_runs
from benchmarks.quality.store import RESULTS
from preft_core import plots

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explain" / "quality-data.md"
IMAGES = ROOT / "docs" / "images"
# the device of most runs; a rank of a task may come from another one
MAIN = "cpu"
RANK_OF_CURVES = 16
BEGIN, END = "<!-- {} -->", "<!-- end -->"

Runs = list[dict[str, Any]]


def main() -> None:
    page = PAGE.read_text()
    full, parts = _results(RESULTS), {part: _results(RESULTS / part) for part, _, _ in TABLES.values()}
    data = full[MAIN]
    runs_of_all = with_row_tokens(data["runs"], data["runs"])
    short = parts["short"].get(MAIN, {"runs": {}})["runs"]
    for task in sorted({run["task"] for run in runs_of_all.values() if "seed" in run}):
        runs, elsewhere = with_other_devices(list(runs_of_all.values()), full, task)
        if {run["method"] for run in runs} != set(METHODS):
            # a task that the study has only begun compares nothing
            continue
        base = data["runs"][f"part=base task={task}"]
        made_on = where(data) + elsewhere
        made_on += in_float32(runs, "rank", data["runs"].get(f"part=base task={task} dtype=float32"))
        page = replaced(page, f"{MAIN} {task} rank", rank_table(runs, base, made_on))
        page = replaced(page, f"{MAIN} {task} distance", distance_table(runs, base, short_runs(short, task)))
        plot(runs, base, task, IMAGES / f"quality-{MAIN}-{task}")
    for mark, (part, table, draw) in TABLES.items():
        for device, data in parts[part].items():
            made_on = where(data) + in_float32(list(data["runs"].values()), "seed")
            runs = with_row_tokens(data["runs"], full.get(device, {"runs": {}})["runs"])
            page = replaced(page, f"{device} {mark}", [made_on, "", *table(runs)])
            if draw is not None:
                draw(runs, IMAGES / f"quality-{device}-{part}")
    PAGE.write_text(page)


def _results(folder: Path) -> dict[str, Any]:
    """Returns the results in a folder by the device that they were made on."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def with_other_devices(main: Runs, full: dict[str, Any], task: str) -> tuple[Runs, str]:
    """Returns a task's runs over seeds, and a sentence on the ranks whose runs are another device's.

    A rank's runs come from one device: the one that has most of them, the main one among equals.

    Args:
        main: the runs of the main device
        full: results by device
    """
    runs = [run for run in main if run.get("task") == task and "seed" in run]
    tokens = next((run["row_tokens"] for run in runs if "row_tokens" in run), None)
    said = ""
    for device, data in full.items():
        others = [run for run in data["runs"].values() if run.get("task") == task and "seed" in run]
        ranks = [rank for rank in RANKS if len(_at(others, rank)) > len(_at(runs, rank))]
        if device != MAIN and ranks:
            told = {} if tokens is None else {"row_tokens": tokens}
            kept = [run for run in runs if run["rank"] not in ranks]
            runs = kept + [run | told for rank in ranks for run in _at(others, rank)]
            made_on = data["environment"]
            said += f" On {made_on['device']}, torch {made_on['torch']}: rank {', '.join(map(str, ranks))}."
    return runs, said


def where(data: dict[str, Any]) -> str:
    """Returns the line above a table: what its runs were made on."""
    environments = [*data.get("earlier", []), data["environment"]]
    versions = ", ".join(sorted({one["torch"] for one in environments}))
    threads = ", ".join(sorted({one["threads"] for one in environments}))
    devices = " and ".join(dict.fromkeys(one["device"] for one in environments))
    return f"{devices}, {threads} thread(s), torch {versions}."


def in_float32(runs: Runs, fact: str, base: dict[str, Any] | None = None) -> str:
    """Returns a sentence on the ranks or seeds run in float32, with the base model's loss in it, or nothing."""
    values = sorted({run[fact] for run in runs if fact in run and run.get("dtype") == "float32"})
    if not values:
        return ""
    loss = "" if base is None else f" (base model {base['loss']:.3f})"
    return f" Arithmetic in float32{loss}: {fact} {', '.join(map(str, values))}."


def rank_table(runs: Runs, base: dict[str, Any], made_on: str) -> list[str]:
    """Returns loss by method and rank: mean over seeds, half of the 95 % interval, difference to LoRA seed by seed.

    Beside it the difference's interval over held-out rows, the difference with each row alike, and the loss with
    early stopping for runs that looked at their validation rows.
    """
    scored = "field_accuracy" in base
    stopped = _stopped_early(runs)
    head = ["method", "r", "learning rate", "seeds", "held-out loss", "against LoRA of this r", "each row alike"]
    head.append("against LoRA, r=1")
    head += ["fields right"] if scored else []
    head += ["stopped early, at step", "its held-out loss", "against LoRA of this r"] if stopped else []
    rows = [head, ["---"] * len(head)]
    for method, rank, found in _groups(runs):
        rates = sorted({run["lr"] for run in found})
        row = [NAMES[method], str(rank), ", ".join(f"{rate:g}" for rate in rates), str(len(found))]
        lora = _of(runs, "lora", rank)
        row += [interval([run["loss"] for run in found]), difference(found, lora, rows=True)]
        row.append(each_row_alike(found, lora))
        row.append(difference(found, _of(runs, "lora", 1)))
        if scored:
            row.append(f"{100 * statistics.fmean(run['field_accuracy'] for run in found):.0f} %")
        if stopped:
            early = _of(stopped, method, rank)
            row.append(", ".join(str(run["step"]) for run in early))
            row += [interval([run["loss"] for run in early]), difference(early, _of(stopped, "lora", rank))]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    test = f"{base['num_test_rows']} held-out rows; loss of the base model {base['loss']:.3f}"
    floor = noise_floor(runs)
    noise = "" if floor is None else f"; noise floor (standard deviation over seeds, pooled) {floor:.3f}"
    return [f"{test}{noise}. {made_on}", "", *lines]


def with_row_tokens(runs: dict[str, Any], bases: dict[str, Any]) -> dict[str, Any]:
    """Returns the runs with the response tokens of each held-out row, where the base model's result tells them.

    Args:
        bases: runs by key, the base models' among them
    """
    tokens = {base["task"]: {"row_tokens": base["row_tokens"]} for base in bases.values() if "row_tokens" in base}
    return {key: run | tokens.get(run.get("task"), {}) for key, run in runs.items()}


def distance_table(runs: Runs, base: dict[str, Any], short: Runs) -> list[str]:
    """Returns the gain over the base model in nats a token by distance from the prompt, mean over seeds.

    Full runs, those that looked at their validation rows at their best step, then those of fewer steps.
    """
    firsts = [first for first, (_, count) in base["by_distance"].items() if count >= 50]
    ends = [str(int(first) * 2 - 1) for first in firsts]
    spans = [first if first == end else f"{first}-{end}" for first, end in zip(firsts, ends, strict=True)]
    lines = [f"| method | r | {' | '.join(spans)} |", "|" + " --- |" * (2 + len(spans))]
    steps = f", {short[0]['steps']} steps" if short else ""
    for shown, note in ((runs, ""), (_stopped_early(runs), ", stopped early"), (short, steps)):
        for method, rank, found in _groups(shown):
            gains = [statistics.fmean(_gain(run, base, first) for run in found) for first in firsts]
            lines.append(f"| {NAMES[method]}{note} | {rank} | {' | '.join(f'{gain:.2f}' for gain in gains)} |")
    return lines


def noise_floor(runs: Runs) -> float | None:
    """Returns the standard deviation over seeds of a run's loss, pooled over methods and ranks; None with one seed."""
    groups = [[run["loss"] for run in found] for _, _, found in _groups(runs)]
    variances = [(statistics.variance(group), len(group) - 1) for group in groups if len(group) > 1]
    if not variances:
        return None
    return math.sqrt(sum(v * n for v, n in variances) / sum(n for _, n in variances))


def replaced(page: str, name: str, lines: Sequence[str]) -> str:
    """Returns the page with what stands between the marks of a name replaced.

    Raises:
        ValueError: the page has no such mark.
    """
    begin = BEGIN.format(name)
    head, mark, rest = page.partition(begin)
    if not mark:
        raise ValueError(f"{PAGE.name} has no mark {begin}: put it, and {END} after it, where the table belongs")
    return head + begin + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def plot(runs: Runs, base: dict[str, Any], title: str, file: Path) -> None:
    """Draws loss by rank, gain by distance from the prompt, and training curves: means and range over seeds."""
    early_runs = _stopped_early(runs)
    figure = plots.new_figure(13, 3.8)
    by_rank, by_distance, curves = figure.subplots(1, 3)
    ranks = sorted({run["rank"] for run in runs})
    firsts = [first for first, (_, count) in base["by_distance"].items() if count >= 50]
    distances = [int(first) for first in firsts]
    for method in METHODS:
        present = [rank for rank in ranks if _of(runs, method, rank)]
        losses = [[run["loss"] for run in _of(runs, method, rank)] for rank in present]
        means = [statistics.fmean(found) for found in losses]
        plots.draw(by_rank, method, present, means, [(min(found), max(found)) for found in losses])
        found = _of(runs, method, RANK_OF_CURVES) or [run for run in runs if run["method"] == method]
        early = _of(early_runs, method, RANK_OF_CURVES)
        for those, line in ((found, "-"), (early, "--")):
            if those:
                gains = [_mean(those, lambda run, first=first: _gain(run, base, first)) for first in firsts]
                plots.draw(by_distance, method, distances, gains, label=None if line == "-" else "", linestyle=line)
        steps = range(len(found[0]["train_curve"]))
        values = [_mean(found, lambda run, step=step: run["train_curve"][step]) for step in steps]
        plots.draw(curves, method, [10 * step for step in steps], values, marker="")
    dashed = "; dashed: stopped early" if early_runs else ""
    nats = "nats per token"
    best = _best(runs)
    plots.finish_axes(by_rank, f"{title}: lowest loss by {best}", "rank", f"held-out loss, {nats}", log_x=ranks)
    plots.finish_axes(
        by_distance,
        f"Gain by distance, rank {RANK_OF_CURVES}",
        f"distance from the prompt, tokens{dashed}",
        f"gain over base, {nats}",
        log_x=distances,
    )
    plots.finish_axes(
        curves, f"Training, rank {RANK_OF_CURVES}", "step", f"training loss, {nats}", log_y=(0.2, 0.3, 0.5, 1, 2, 3, 5)
    )
    plots.save(figure, file, PLOT_SOURCE)


def _best(runs: Runs) -> str:
    """Returns the name of the method with the lowest mean loss at any rank."""
    losses = [(statistics.fmean(run["loss"] for run in found), method) for method, _, found in _groups(runs)]
    return NAMES[min(losses)[1]]


def _at(runs: Runs, rank: int) -> Runs:
    return [run for run in runs if run["rank"] == rank]


def _of(runs: Runs, method: str, rank: int) -> Runs:
    return [run for run in runs if run["method"] == method and run["rank"] == rank]


def _groups(runs: Runs) -> Iterator[tuple[str, int, Runs]]:
    """Yields (method, rank, its runs) in the order of the tables, without groups that have no run."""
    for method, rank in product(METHODS, sorted({run["rank"] for run in runs})):
        found = _of(runs, method, rank)
        if found:
            yield method, rank, found


def _stopped_early(runs: Runs) -> Runs:
    """Returns the runs that looked at their validation rows, with the figures of their best step."""
    return [run | run["early_stopped"] for run in runs if run.get("early_stopped")]


def _gain(run: dict[str, Any], base: dict[str, Any], first: str) -> float:
    total, count = base["by_distance"][first]
    return (total - run["by_distance"][first][0]) / count


def _mean(runs: Runs, figure: Callable[[dict[str, Any]], float]) -> float:
    return statistics.fmean(figure(run) for run in runs)


if __name__ == "__main__":
    main()
