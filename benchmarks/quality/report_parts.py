"""Tables and plots of the study's parts beside the supervised one: distillation, conversations, reinforcement."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.distill import CONVERSION, STUDENTS
from benchmarks.quality.helps import VARIANTS
from benchmarks.quality.intervals import difference, each_row_alike, interval
from benchmarks.quality.methods import NAMES
from benchmarks.quality.prompts import FORMS, PLAIN
from benchmarks.quality.short import FORMED, TASKS
from benchmarks.quality.turns import CACHED, FRESH, WAYS
from preft_core import plots

PLOT_SOURCE = "SmolLM2-135M-Instruct, means and range over seeds; python -m benchmarks.quality"

Runs = dict[str, dict[str, Any]]


def distill_table(runs: Runs) -> list[str]:
    """Returns a row for the teacher, its conversion and each student: mean over seeds and half of a 95 % interval."""
    teachers = {run["seed"]: run for key, run in runs.items() if key.startswith("part=teacher")}
    students = [run for key, run in runs.items() if key.startswith("part=distill")]
    converted = {run["seed"]: run["loss"] for run in students if run["start"] == CONVERSION}
    rank = next(iter(teachers.values()))["rank"]
    rows = [["", "r", "seeds", "held-out loss", "gap closed", "KL to the teacher", "top-1 agreement", "fields right"]]
    rows.append(["---"] * len(rows[0]))
    rows.append(["teacher, all-token LoRA", str(rank), *_loss_of(list(teachers.values())), "", "0", "100 %"])
    rows[-1].append(_percent(list(teachers.values()), "field_accuracy"))
    for start, rank in STUDENTS:
        found = [run for run in students if (run["start"], run["rank"]) == (start, rank)]
        if not found:
            continue
        closed = [_closed(run["loss"], converted[run["seed"]], teachers[run["seed"]]["loss"]) for run in found]
        rows.append([start if start == CONVERSION else f"student {start}", str(rank), *_loss_of(found)])
        rows[-1].append("" if start == CONVERSION else interval(closed))
        rows[-1].append(interval([run["kl"] for run in found]))
        rows[-1] += [_percent(found, "top1"), _percent(found, "field_accuracy")]
    return _lines(rows)


def short_table(runs: Runs) -> list[str]:
    """Returns losses by task and method, and the differences to LoRA's seed by seed."""
    rows = [["task", "method", "r", "seeds", "held-out loss", "against LoRA", "each row alike"], ["---"] * 7]
    for task in TASKS:
        rows += [[task, *row] for row in _against_lora(short_runs(runs, task))]
    return _lines(rows)


def prompts_table(runs: Runs) -> list[str]:
    """Returns the same by form of the prompts, for the task whose prompts have several."""
    rows = [["prompts", "method", "r", "seeds", "held-out loss", "against LoRA", "each row alike"], ["---"] * 7]
    for form in FORMS:
        rows += [[form, *row] for row in _against_lora(short_runs(runs, FORMED, form))]
    return _lines(rows)


def short_runs(runs: Runs, task: str, form: str = PLAIN) -> list[dict[str, Any]]:
    """Returns the part short's runs of a task whose prompts have a form."""
    return [run for run in runs.values() if run["task"] == task and run.get("form", PLAIN) == form]


def _against_lora(runs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yields a row for each method with runs: name, rank, seeds, loss, difference to LoRA, the same each row alike."""
    reference = [run for run in runs if run["method"] == "lora"]
    for method, name in NAMES.items():
        found = [run for run in runs if run["method"] == method]
        if found:
            against = difference(found, reference, rows=True), each_row_alike(found, reference)
            yield [name, str(found[0]["rank"]), *_loss_of(found), *against]


def turns_table(runs: Runs) -> list[str]:
    """Returns the losses of the first, second and third answers by form of the data and way of serving."""
    rows = [["method", "trained on", "served with", "seeds", "first answer", "second", "third"], ["---"] * 7]
    for method, form in WAYS:
        found = [run for run in runs.values() if (run["method"], run["form"]) == (method, form)]
        for way in (FRESH, CACHED) if found and method != "lora" else (FRESH,) if found else ():
            served = way if method != "lora" else "either"
            row = [NAMES[method], form, served, str(len(found))]
            rows.append(row + [interval([run["served"][way][turn] for run in found]) for turn in range(3)])
    return _lines(rows)


def rl_table(runs: Runs) -> list[str]:
    """Returns rewards at the beginning and at the end, those against LoRA's seed by seed, and greedy scores."""
    warm = [run for key, run in runs.items() if key.startswith("part=warm-start")]
    trained = [run for key, run in runs.items() if key.startswith("part=rl")]
    reference = [run for run in trained if run["method"] == "lora"]
    rows = [["", "seeds", "reward, first 5 steps", "reward, last 10 steps", "against LoRA", "held-out fields right"]]
    rows.append(["---"] * len(rows[0]))
    rows.append(["warm start", "", "", "", "", _percent(warm, "field_accuracy")])
    for method in NAMES:
        found = [run for run in trained if run["method"] == method]
        if found:
            row = [f"{NAMES[method]}, r={found[0]['rank']}", str(len(found))]
            row.append(interval([statistics.fmean(run["curve"]["reward"][:5]) for run in found]))
            row.append(interval([run["last_reward"] for run in found]))
            row.append(difference(found, reference, "last_reward"))
            scores = interval([100 * run["field_accuracy"] for run in found], digits=1)
            rows.append([*row, f"{scores} %"])
    return _lines(rows)


def helps_table(runs: Runs) -> list[str]:
    """Returns each variant's loss at its best learning rate, and the difference to the default's, seed by seed."""
    best = {variant: _at_best_rate(runs, variant) for variant in VARIANTS}
    rows = [["variant", "learning rate", "seeds", "held-out loss", "against the default"], ["---"] * 5]
    for variant, found in best.items():
        if found:
            against = difference(found, best["default"], rows=True)
            rows.append([variant, f"{found[0]['lr']:g}", *_loss_of(found), against])
    return _lines(rows)


def _at_best_rate(runs: Runs, variant: str) -> list[dict[str, Any]]:
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for run in runs.values():
        if run["variant"] == variant:
            by_rate.setdefault(run["lr"], []).append(run)
    return min(by_rate.values(), key=lambda found: statistics.fmean(run["loss"] for run in found), default=[])


def rl_plot(runs: Runs, file: Path) -> None:
    """Draws the reward of each run, smoothed over five steps, and the mean over seeds."""
    figure = plots.new_figure(6.5, 3.8)
    axes = figure.subplots()
    last = {}
    for method in NAMES:
        curves = [
            _smoothed(run["curve"]["reward"])
            for key, run in runs.items()
            if key.startswith("part=rl") and run["method"] == method
        ]
        for curve in curves:
            plots.draw(axes, method, range(1, len(curve) + 1), curve, label="", marker="", alpha=0.3)
        if curves:
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            plots.draw(axes, method, range(1, len(mean) + 1), mean, marker="")
            last[method] = mean[-1]
    ends = ", ".join(f"{NAMES[method]} {value:.2f}" for method, value in last.items())
    plots.finish_axes(axes, f"GRPO ends at: {ends}", "GRPO step", "share of right fields")
    plots.save(figure, file, f"{PLOT_SOURCE} --parts rl; thin lines: single seeds")


# by mark on the page: the part whose results it shows, its table and its plot
TABLES: dict[str, tuple[str, Callable[[Runs], list[str]], Callable[[Runs, Path], None] | None]] = {
    "short": ("short", short_table, None),
    "prompts": ("short", prompts_table, None),
    "distill": ("distill", distill_table, None),
    "turns": ("turns", turns_table, None),
    "rl": ("rl", rl_table, rl_plot),
    "helps": ("helps", helps_table, None),
}


def _closed(loss: float, converted: float, teacher: float) -> float:
    return (converted - loss) / (converted - teacher)


def _loss_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [str(len(runs)), interval([run["loss"] for run in runs])]


def _percent(runs: Sequence[dict[str, Any]], name: str) -> str:
    return f"{100 * statistics.fmean(run[name] for run in runs):.0f} %"


def _smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
