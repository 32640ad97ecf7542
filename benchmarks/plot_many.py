"""Draws the committed studies of many adapters: `python -m benchmarks.plot_many`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.readme import NAMES
from benchmarks.run import RESULTS

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FIGURES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "time_to_first_token_s": "time to first token, s",
    "end_to_end_s": "end to end, s",
}


def main() -> None:
    for file in sorted(RESULTS.glob("many-adapters-*.json")):
        report = json.loads(file.read_text())
        shapes = sorted({(case["prompt"], case["decode"]) for case in report["cases"]})
        figure = Figure(figsize=(12, 3.6 * len(shapes)), layout="constrained")
        grid = figure.subplots(len(shapes), len(FIGURES), squeeze=False)
        for row, (prompt, decode) in zip(grid, shapes, strict=True):
            cases = [case for case in report["cases"] if (case["prompt"], case["decode"]) == (prompt, decode)]
            for axes, (key, label) in zip(row, FIGURES.items(), strict=True):
                draw(axes, sorted(cases, key=lambda case: case["adapters"]), key, label)
            row[0].set_title(f"prompt {prompt}, answer {decode} tokens", loc="left", fontsize=10)
        grid[0][0].legend(fontsize=8)
        made = report["environment"]
        figure.suptitle(f"{report['model']}, rank {report['rank']}, {made['device']}, {made['threads']} threads")
        IMAGES.mkdir(exist_ok=True)
        figure.savefig(IMAGES / f"{file.stem}.png", dpi=110)
    for file in sorted(RESULTS.glob("serving-*.json")):
        plot_engine(json.loads(file.read_text()), IMAGES / f"{file.stem}.png")


def plot_engine(report: dict[str, Any], file: Path) -> None:
    """Draws what benchmarks.gpu measured at rank 16 over the number of adapters: decode steps, prompts, whole runs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    steps, prompts, whole = figure.subplots(1, 3)
    cases = [case for case in report["serving"] if case["rank"] == 16]
    load = cases[0]["prompt"], cases[0]["steps"]
    runs = {(case["model"], case["adapters"], case["system"]): case for case in cases if _load(case) == load}
    forwards = {(k["model"], k["adapters"], k["system"]): k["forward"] for k in report["forwards"] if k["rank"] == 16}
    for number, model in enumerate(dict.fromkeys(case["model"] for case in cases)):
        colour, counts = f"C{number}", sorted({adapters for name, adapters, _ in runs if name == model})
        for axes, system, style in (
            (steps, "all-token", "o-"),
            (prompts, "lora-p", "o-"),
            (prompts, "direft-p", "s--"),
        ):
            found = runs if axes is steps else forwards
            there = [n for n in counts if (model, n, system) in found]
            pairs = [(found[model, n, system], found[model, n, "base"]) for n in there]
            if axes is steps:
                pairs = [(one["step"], base["step"]) for one, base in pairs]
            ratios = [one["median"] / base["median"] for one, base in pairs]
            name = {"all-token": "", "lora-p": ", LoRA-P", "direft-p": ", DiReFT-P"}[system]
            axes.plot(there, ratios, style, color=colour, label=model + name)
        there = [n for n in counts if (model, n, "lora-p") in runs]
        gains = [runs[model, n, "all-token"]["whole_s"] / runs[model, n, "lora-p"]["whole_s"] for n in there]
        whole.plot(there, gains, "o-", color=colour, label=model)
    steps.axhline(1, color="black", linewidth=1, label="PreFT: the base's own step")
    for axes, title in (
        (steps, "decode step, all-token LoRA / base"),
        (prompts, "forward of 8192 prompt tokens / base"),
        (whole, f"whole run, all-token LoRA / LoRA-P, {load[0]} + {load[1]} tokens"),
    ):
        axes.set(title=title, xlabel="adapters", xscale="log")
        axes.set_xticks([1, 32, 128, 512], labels=["1", "32", "128", "512"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        axes.title.set_fontsize(10)
    figure.suptitle(f"rank 16, 512 requests, {report['environment']['device']}")
    figure.savefig(file, dpi=110)


def _load(case: dict[str, Any]) -> tuple[int, int]:
    return case["prompt"], case["steps"]


def draw(axes: Axes, cases: list[dict[str, Any]], key: str, label: str) -> None:
    """Draws one figure over the number of adapters: medians, with quartiles as bars."""
    numbers = [case["adapters"] for case in cases]
    for system, style in zip(NAMES, ("k--", "C3-o", "C0-o", "C2-o"), strict=True):
        found = [case["systems"][system][key] for case in cases]
        middle = [value["median"] for value in found]
        spread = [[abs(value["median"] - value["quartiles"][side]) for value in found] for side in (0, 1)]
        axes.errorbar(numbers, middle, yerr=spread, fmt=style, label=NAMES[system], markersize=4, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xlabel("adapters, one per row of the batch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
