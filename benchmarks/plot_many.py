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
