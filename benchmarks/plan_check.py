"""Compares the planner with measurements: `python -m benchmarks.plan_check`.

A CPU's rates are the largest that the base model reached in the cases of the same file. The paper does not fully
describe its servers and loads, so its ratios are shown but not checked.
"""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import SHARD_70B
from benchmarks.run import RESULTS
from preft_core.planner import DEVICES, SHAPES, Device, Planner, Workload

FLOAT32 = 4
PUBLISHED = (
    ("llama-3.1-70b", 4, 1.87, 1.90),
    ("llama-3.1-8b", 1, 1.83, 2.21),
    ("qwen2.5-0.5b", 1, 1.63, 2.39),
)
"""Shape, GPUs, and the throughput of LoRA-P and DiReFT-P against vLLM's LoRA with 512 adapters: arXiv 2605.14217."""


def main() -> None:
    console = Console()
    for file in sorted(RESULTS.glob("many-adapters-cpu-*.json")):
        console.print(table(file.stem, compare(json.loads(file.read_text()))))
    for file in sorted(RESULTS.glob("serving-*.json")):
        console.print(engine_table(file.stem, compare_engine(json.loads(file.read_text()))))
    console.print(published())


def calibrated(report: dict[str, Any]) -> Device:
    """Returns a device whose rates follow from the base model's times."""
    shape = SHAPES["smollm2-135m"]
    if report["device"] in DEVICES:
        return DEVICES[report["device"]]
    flops, steps = 0.0, []
    for case in report["cases"]:
        base = case["systems"]["base"]
        tokens = case["adapters"] * case["prompt"]
        flops = max(flops, 2 * shape.num_parameters * tokens / base["prefill_s"]["median"])
        steps.append((case, case["adapters"] / base["decode_tokens_per_s"]["median"]))
    bandwidth = 0.0
    for case, seconds in steps:
        moved = shape.num_parameters * FLOAT32
        moved += case["adapters"] * (case["prompt"] + case["decode"] / 2) * shape.kv_bytes(FLOAT32)
        bandwidth = max(bandwidth, moved / seconds)
    return Device(report["device"], bandwidth, flops, 16e9)


def compare(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns predicted and measured ratios of each case: prefill to base, and PEFT's LoRA to PreFT end to end."""
    device, rows = calibrated(report), []
    for case in report["cases"]:
        work = Workload(case["adapters"], case["adapters"], case["prompt"], case["decode"], 1 << 30)
        for name, method in (("lora-p", "lora"), ("direft-p", "direft")):
            planner = Planner(SHAPES["smollm2-135m"], device, method, report["rank"], element_bytes=FLOAT32)  # type: ignore[arg-type]
            systems = case["systems"]
            rows.append(
                {
                    "case": f"{case['adapters']} adapters, {case['prompt']} + {case['decode']}",
                    "system": name,
                    "prefill": (
                        1 + planner.prefill(case["adapters"] * case["prompt"], case["adapters"]).overhead,
                        systems[name]["prefill_s"]["ratio"],
                    ),
                    "decode": (1.0, systems[name]["decode_tokens_per_s"]["ratio"]),
                    "against_lora": (
                        planner.ratio(work),
                        systems["peft-lora"]["end_to_end_s"]["ratio"] / systems[name]["end_to_end_s"]["ratio"],
                    ),
                }
            )
    return rows


def compare_engine(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns predicted and measured ratios of a run of benchmarks.gpu: prompts to base, all-token LoRA to PreFT."""
    shapes = dict(SHAPES) | {SHARD_70B.name: SHARD_70B}
    forwards = {(k["model"], k["rank"], k["adapters"], k["system"]): k for k in report["forwards"]}
    runs = {(k["model"], k["rank"], k["adapters"], k["prompt"], k["system"]): k for k in report["serving"]}
    rows = []
    for (model, rank, adapters, prompt, system), case in runs.items():
        lora = runs.get((model, rank, adapters, prompt, "all-token"))
        if system not in ("lora-p", "direft-p") or lora is None:
            continue
        planner = Planner(shapes[model], DEVICES["h100"], "lora" if system == "lora-p" else "direft", rank)
        work = Workload(adapters, case["rows"], prompt, case["steps"])
        once, base = forwards[model, rank, adapters, system], forwards[model, rank, adapters, "base"]
        rows.append(
            {
                "case": f"{model}, r={rank}, {adapters} adapters, {prompt} + {case['steps']}",
                "system": system,
                "prefill": (
                    1 + planner.prefill(once["tokens"], adapters).overhead,
                    once["forward"]["median"] / base["forward"]["median"],
                ),
                "against_lora": (planner.ratio(work), lora["whole_s"] / case["whole_s"]),
            }
        )
    return rows


def engine_table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{name}: predicted / measured")
    for column in ("case", "", "prompts / base", "whole run, all-token LoRA / PreFT"):
        shown.add_column(column)
    for row in rows:
        pairs = [row[key] for key in ("prefill", "against_lora")]
        shown.add_row(row["case"], row["system"], *(f"{a:.2f} / {b:.2f}" for a, b in pairs))
    return shown


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{name}: predicted / measured")
    for column in ("case", "", "prefill / base", "decode rate / base", "whole time, all-token LoRA / PreFT"):
        shown.add_column(column)
    for row in rows:
        pairs = [row[key] for key in ("prefill", "decode", "against_lora")]
        shown.add_row(row["case"], row["system"], *(f"{a:.2f} / {b:.2f}" for a, b in pairs))
    return shown


def published() -> Table:
    shown = Table(title="512 adapters and requests on H100, rank 16: predicted at 128 + 512 tokens / published")
    for column in ("model", "LoRA-P", "DiReFT-P"):
        shown.add_column(column)
    work = Workload(512, 512, 128, 512)
    for name, parallel, *ratios in PUBLISHED:
        cells = []
        for method, ratio in zip(("lora", "direft"), ratios, strict=True):
            planner = Planner(SHAPES[name], DEVICES["h100"], method, 16, tensor_parallel=parallel)  # type: ignore[arg-type]
            cells.append(f"{planner.ratio(work):.2f} / {ratio:.2f}")
        shown.add_row(name, *cells)
    return shown


if __name__ == "__main__":
    main()
