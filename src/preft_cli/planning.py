"""The output of `preft plan`: predictions of preft_core.planner as a table, JSON or a plot."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from preft_core import plots
from preft_core.planner import DEVICES, METHODS, SHAPES, Device, Method, Planner, Shape, Workload

TITLES = {"lora": "LoRA-P", "direft": "DiReFT-P"}
PLOT_ADAPTERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PLOT_RANKS = (8, 16, 64)


def shape_of(model: str) -> Shape:
    """Returns a known shape, or the shape in a config.json, given by file, folder or Hub id.

    Raises:
        ValueError: none of these; HubError if the Hub does not answer.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    file = Path(model)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        if model.count("/") != 1 or model.startswith((".", "/")):
            raise ValueError(
                f"--model is {model!r}: give {', '.join(SHAPES)}, a directory with a config.json, or a "
                "Hub id, org/name"
            )
        file = _from_hub(model)
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    return Shape.of_config(config, model)


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    from preft_core.hub.source import hub_errors

    with hub_errors("config.json", model, None):
        return Path(hf_hub_download(model, "config.json"))


def device_of(gpu: str, bandwidth: float | None, tflops: float | None, memory_gb: float | None) -> Device:
    """Returns a known device, with the given figures instead of its own.

    Raises:
        ValueError: an unknown name without all three figures, or a figure that is not positive.
    """
    given = {"bandwidth": bandwidth, "flops": tflops, "memory": memory_gb}
    scale = {"bandwidth": 1e9, "flops": 1e12, "memory": 1e9}
    faults = [f"{name} is {value}: more than 0" for name, value in given.items() if value is not None and value <= 0]
    if faults:
        raise ValueError("; ".join(faults))
    figures = {name: value * scale[name] for name, value in given.items() if value is not None}
    if gpu in DEVICES:
        return replace(DEVICES[gpu], **figures)
    if len(figures) < 3:
        raise ValueError(
            f"--gpu is {gpu!r}: give {', '.join(DEVICES)}, or a name with --bandwidth, --tflops and --memory"
        )
    return Device(gpu, **figures)


def plan(planners: Mapping[Method, Planner], work: Workload) -> dict[str, Any]:
    """Returns the predictions for each method, as JSON values; times in seconds, sizes in bytes."""
    first = next(iter(planners.values()))
    found: dict[str, Any] = {
        "model": asdict(first.shape) | {"num_parameters": first.shape.num_parameters},
        "device": asdict(first.device) | {"tensor_parallel": first.tensor_parallel},
        "workload": asdict(work),
        "rank": first.rank,
        "methods": {},
    }
    for method, planner in planners.items():
        per_forward = min(work.prefill_tokens, work.num_requests * work.prompt)
        adapters = min(work.num_adapters, work.num_requests, max(1, -(-per_forward // work.prompt)))
        prefill = planner.prefill(per_forward, adapters)
        context = work.prompt + work.output / 2
        lora = replace(planner, method="lora")
        found["methods"][method] = {
            "adapter_bytes": planner.adapter_bytes,
            "slot_bytes": planner.slot_bytes,
            "all_adapters_bytes": planner.slot_bytes * work.num_adapters,
            "adapters_that_fit": planner.adapters_that_fit(work),
            "prefill_tokens": per_forward,
            "prefill_adapters": adapters,
            "prefill_base_s": prefill.base,
            "prefill_overhead": {
                "adapter_bytes": prefill.adapter_bytes / prefill.base,
                "activations": prefill.activations / prefill.base,
                "arithmetic": prefill.arithmetic / prefill.base,
                "total": prefill.overhead,
            },
            "decode_step_s": planner.decode_step(work.num_requests, context),
            "all_token_lora_decode_step_s": lora.decode_step(
                work.num_requests, context, min(work.num_adapters, work.num_requests)
            ),
            "tokens_per_s": planner.throughput(work, "preft"),
            "base_tokens_per_s": planner.throughput(work, "base"),
            "all_token_lora_tokens_per_s": lora.throughput(work, "all-token"),
            "ratio_to_all_token_lora": planner.ratio(work),
        }
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the predictions as a table."""
    work, device = found["workload"], found["device"]
    console.print(
        f"{found['model']['name']}, rank {found['rank']}, on {device['tensor_parallel']} x {device['name']}: "
        f"{work['num_adapters']} adapters, {work['num_requests']} requests at once, {work['prompt']} + "
        f"{work['output']} tokens. Predicted by a first-order model, not measured."
    )
    table = Table()
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for method, facts in found["methods"].items():
        table.add_column(TITLES[method], justify="right")
        for name, value in _lines(facts):
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    overhead = facts["prefill_overhead"]
    split = " + ".join(f"{100 * overhead[part]:.1f}" for part in ("adapter_bytes", "activations", "arithmetic"))
    return [
        ("one adapter, in a slot", f"{facts['adapter_bytes'] / 1e6:.1f} MB, {facts['slot_bytes'] / 1e6:.1f} MB"),
        ("slots for all adapters", f"{facts['all_adapters_bytes'] / 1e9:.2f} GB"),
        ("adapters that fit beside weights and KV", f"{facts['adapters_that_fit']}"),
        (f"prefill of {facts['prefill_tokens']} tokens, base", f"{1e3 * facts['prefill_base_s']:.1f} ms"),
        (f"  adapters add ({facts['prefill_adapters']} of them)", f"{100 * overhead['total']:.1f} %"),
        ("  bytes + activations + arithmetic", f"{split} %"),
        ("decode step, base and PreFT", f"{1e3 * facts['decode_step_s']:.2f} ms"),
        ("decode step, all-token LoRA", f"{1e3 * facts['all_token_lora_decode_step_s']:.2f} ms"),
        ("output tokens/s, base", f"{facts['base_tokens_per_s']:.0f}"),
        ("output tokens/s, PreFT", f"{facts['tokens_per_s']:.0f}"),
        ("output tokens/s, all-token LoRA", f"{facts['all_token_lora_tokens_per_s']:.0f}"),
        ("PreFT / all-token LoRA", f"{facts['ratio_to_all_token_lora']:.2f}"),
    ]


def plot(planner: Planner, work: Workload, file: Path) -> None:
    """Draws the ratio to all-token LoRA over the number of adapters, for both methods and several ranks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = plots.new_figure(7, 4.2)
    axes = figure.subplots()
    systems = {"lora": "lora-p", "direft": "direft-p"}
    last = []
    for method in METHODS:
        for rank, style in zip(PLOT_RANKS, ("-", "--", ":"), strict=True):
            chosen = replace(planner, method=method, rank=rank)
            ratios = [chosen.ratio(replace(work, num_adapters=number)) for number in PLOT_ADAPTERS]
            label = f"{TITLES[method]} r={rank}"
            plots.draw(axes, systems[method], PLOT_ADAPTERS, ratios, label=label, linestyle=style, marker="")
            last.append(ratios[-1])
    axes.axhline(1, color="grey", linewidth=0.8)
    title = (
        f"Predicted: {min(last):.1f} to {max(last):.1f} times all-token LoRA at {PLOT_ADAPTERS[-1]} adapters, by rank"
    )
    plots.finish_axes(axes, title, "adapters", "throughput / all-token LoRA's", log_x=PLOT_ADAPTERS, room=0.24)
    device = f"{planner.tensor_parallel} x {planner.device.name}"
    load = f"{work.num_requests} requests of {work.prompt} + {work.output} tokens"
    plots.save(figure, file, f"{planner.shape.name} on {device}, {load}; first-order model, not measured; preft plan")
