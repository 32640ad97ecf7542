"""Draws the committed studies of many adapters: `python -m benchmarks.plot_many`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.readme import NAMES
from benchmarks.run import RESULTS
from preft_core.plots import draw, finish_axes, new_figure, save

IMAGES = Path(__file__).parents[1] / "docs" / "images"
HEADLINE = "serving-8b"
MODEL_NAMES = {
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b, 1 of 4": "Llama-3.1-70B, one of 4 shards",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
}
# the names of systems in the results -> the systems of preft_core.plots
SYSTEMS = {"base": "base", "all-token": "lora", "peft-lora": "lora", "lora-p": "lora-p", "direft-p": "direft-p"}
ADAPTERS = (1, 32, 128, 512)
RANK = 16

Case = dict[str, Any]


def main() -> None:
    for file in sorted(RESULTS.glob("many-adapters-*.json")):
        plot_batches(json.loads(file.read_text()), IMAGES / file.stem)
    for file in sorted(RESULTS.glob("serving-*.json")):
        report = json.loads(file.read_text())
        plot_headline(report, IMAGES / HEADLINE)
        plot_engine(report, IMAGES / file.stem)


def plot_headline(report: dict[str, Any], file: Path) -> None:
    """Draws a decode step and a whole run over the number of adapters, on an 8B shape."""
    model = "llama-3.1-8b"
    figure = new_figure(10, 3.4)
    steps, whole = figure.subplots(1, 2)
    found = dict(_cases(report, model))
    _draw_steps(steps, found)
    finish_axes(steps, _finding(found), "adapters", "decode step / base model's", log_x=ADAPTERS, room=0.36)
    _draw_gain(whole, found)
    gain = _gain(found, 512)
    finish_axes(
        whole,
        f"A whole run is up to {gain:.1f} times as fast",
        "adapters",
        "all-token LoRA's time / LoRA-P's",
        log_x=ADAPTERS,
        room=0.1,
    )
    for axes in (steps, whole):
        axes.set_ylim(0.9, 2.1)
    save(figure, file, _source(report, f"shape of {MODEL_NAMES[model]}, random weights", found))


def plot_engine(report: dict[str, Any], file: Path) -> None:
    """Draws what benchmarks.gpu measured at rank 16: decode steps, prompts and whole runs, a row for each model."""
    models = list(dict.fromkeys(case["model"] for case in report["serving"]))
    figure = new_figure(11, 3 * len(models))
    grid = figure.subplots(len(models), 3, squeeze=False)
    for (steps, prompts, whole), model in zip(grid, models, strict=True):
        found = dict(_cases(report, model))
        _draw_steps(steps, found)
        finish_axes(
            steps, f"{MODEL_NAMES[model]}: decode step", "adapters", "/ base model's", log_x=ADAPTERS, room=0.4
        )
        forwards = {(case["adapters"], case["system"]): case for case in _of(report["forwards"], model)}
        for system in ("lora-p", "direft-p"):
            _draw_ratio(prompts, forwards, system, "forward")
        finish_axes(prompts, "Forward of 8192 prompt tokens", "adapters", "/ base model's", log_x=ADAPTERS, room=0.34)
        _draw_gain(whole, found)
        finish_axes(whole, "Whole run", "adapters", "all-token LoRA's time / LoRA-P's", log_x=ADAPTERS, room=0.1)
    save(figure, file, _source(report, "random weights", found))


def plot_batches(report: dict[str, Any], file: Path) -> None:
    """Draws decode rate, time to first token and whole time of a batch that has an adapter for each row."""
    figures = {
        "decode_tokens_per_s": "decode, tokens/s",
        "time_to_first_token_s": "time to first token, s",
        "end_to_end_s": "end to end, s",
    }
    shapes = sorted({(case["prompt"], case["decode"]) for case in report["cases"]})
    figure = new_figure(12, 3.2 * len(shapes))
    grid = figure.subplots(len(shapes), len(figures), squeeze=False)
    for row, (prompt, decode) in zip(grid, shapes, strict=True):
        cases = [case for case in report["cases"] if (case["prompt"], case["decode"]) == (prompt, decode)]
        cases.sort(key=lambda case: case["adapters"])
        numbers = [case["adapters"] for case in cases]
        for axes, (key, label) in zip(row, figures.items(), strict=True):
            for system in NAMES:
                values = [case["systems"][system][key] for case in cases]
                draw(axes, SYSTEMS[system], numbers, *_medians(values))
            title = f"Prompt {prompt}, answer {decode} tokens" if key == "decode_tokens_per_s" else ""
            finish_axes(
                axes, title, "adapters, one per row of the batch", label, log_x=numbers, log_y=_ROUND, room=0.34
            )
    made = report["environment"]
    source = (
        f"{report['model']}, rank {report['rank']}, medians and quartiles; {made['device']}, {made['threads']} threads"
    )
    save(figure, file, f"{source}; {made['command']}")


_ROUND = [mantissa * 10**power for power in range(-3, 5) for mantissa in (1, 2, 5)]


def _of(cases: list[Case], model: str) -> list[Case]:
    return [case for case in cases if case["model"] == model and case["rank"] == RANK]


def _cases(report: dict[str, Any], model: str) -> Iterator[tuple[tuple[int, str], Case]]:
    """Yields (adapters, system) and the case, of the first load that was measured for the model."""
    cases = _of(report["serving"], model)
    load = cases[0]["prompt"], cases[0]["steps"]
    for case in cases:
        if (case["prompt"], case["steps"]) == load:
            yield (case["adapters"], case["system"]), case


def _draw_ratio(axes: Axes, found: dict[tuple[int, str], Case], system: str, figure: str) -> None:
    """Draws a figure of a system over the base model's, with the quartiles over the base's median as spread."""
    counts = [count for count in ADAPTERS if (count, system) in found]
    base = [found[count, "base"][figure]["median"] for count in counts]
    own = [found[count, system][figure] for count in counts]
    ratios = [value["median"] / one for value, one in zip(own, base, strict=True)]
    spread = [(v["quartiles"][0] / one, v["quartiles"][1] / one) for v, one in zip(own, base, strict=True)]
    draw(axes, SYSTEMS[system], counts, ratios, spread)


def _draw_steps(axes: Axes, found: dict[tuple[int, str], Case]) -> None:
    _draw_ratio(axes, found, "all-token", "step")
    counts = [count for count in ADAPTERS if (count, "base") in found]
    # no adapter has a part in a decode step: it is the base model's own
    draw(axes, "lora-p", counts, [1.0] * len(counts), label="LoRA-P, DiReFT-P")


def _gain(found: dict[tuple[int, str], Case], count: int) -> float:
    return found[count, "all-token"]["whole_s"] / found[count, "lora-p"]["whole_s"]


def _draw_gain(axes: Axes, found: dict[tuple[int, str], Case]) -> None:
    counts = [count for count in ADAPTERS if (count, "lora-p") in found]
    gains = [_gain(found, count) for count in counts]
    draw(axes, "lora-p", counts, gains, label="")
    axes.set_ylim(0.95 * min(gains), 1.1 * max(gains))
    for count, gain in zip(counts, gains, strict=True):
        axes.annotate(f"{gain:.2f}", (count, gain), (0, 7), textcoords="offset points", fontsize=8, ha="center")


def _finding(found: dict[tuple[int, str], Case]) -> str:
    slower = found[512, "all-token"]["step"]["median"] / found[512, "base"]["step"]["median"]
    return f"512 LoRAs slow decoding {slower:.2f} times; PreFT does not"


def _medians(values: list[dict[str, Any]]) -> tuple[list[float], list[tuple[float, float]]]:
    return [value["median"] for value in values], [tuple(value["quartiles"]) for value in values]


def _source(report: dict[str, Any], model: str, found: dict[tuple[int, str], Case]) -> str:
    case = next(iter(found.values()))
    made = report["environment"]
    return (
        f"{model}, rank {RANK}, {case['rows']} requests of {case['prompt']} + {case['steps']} tokens; "
        f"{made['device']}, torch {made['torch']}, triton {made['triton']}; {made['command']}"
    )


if __name__ == "__main__":
    main()
