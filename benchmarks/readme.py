"""Writes the tables of README, docs/explain/speed.md and docs/how-to/vllm.md: `python -m benchmarks.readme`."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.run import RESULTS

README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "explain" / "speed.md"
VLLM_PAGE = README.parent / "docs" / "how-to" / "vllm.md"
VLLM_START, VLLM_END = "<!-- vllm -->\n", "<!-- /vllm -->"
GPU_START, GPU_END = "<!-- gpu -->\n", "<!-- /gpu -->"
SYSTEMS = ("base", "peft-lora", "lora-p", "direft-p")
NAMES = {"base": "base model", "peft-lora": "PEFT LoRA", "lora-p": "LoRA-P", "direft-p": "DiReFT-P"}
START, END = "<!-- results -->\n", "<!-- /results -->"
MANY_START, MANY_END = "<!-- many -->\n", "<!-- /many -->"
SINGLE_START, SINGLE_END = "<!-- single -->\n", "<!-- /single -->"
HEADLINE_START, HEADLINE_END = "<!-- headline -->\n", "<!-- /headline -->"
HEADLINE = {"model": "llama-3.1-8b", "rank": 16, "prompt": 64}


def main() -> None:
    many, single = sorted(RESULTS.glob("many-adapters-*.json")), sorted(RESULTS.glob("cpu-*.json"))
    measured = sorted(RESULTS.glob("serving-*.json"))
    put(README, HEADLINE_START, HEADLINE_END, map(headline_section, measured))
    put(PAGE, MANY_START, MANY_END, map(many_section, many))
    put(PAGE, START, END, map(all_figures, many))
    put(PAGE, SINGLE_START, SINGLE_END, map(section, single))
    put(PAGE, GPU_START, GPU_END, map(gpu_section, measured))
    put(VLLM_PAGE, VLLM_START, VLLM_END, map(vllm_section, sorted(RESULTS.glob("vllm-*.json"))))


def put(page: Path, start: str, end: str, sections: Iterable[str]) -> None:
    """Writes sections between two marks of a page, in place of what is there."""
    before, _, rest = page.read_text().partition(start)
    page.write_text(before + start + "\n".join(sections) + end + rest.partition(end)[2])


def vllm_section(file: Path) -> str:
    """Returns what docs/how-to/vllm.md shows of a run of benchmarks.vllm_engine."""
    report = json.loads(file.read_text())
    lines = ["| | decode, tokens/s | of base | quartiles | whole run, s |", "|---|---|---|---|---|"]
    for name, one in report["systems"].items():
        low, high = one["ratio_quartiles"]
        lines.append(
            f"| {name} | {one['decode_tokens_per_s']:.0f} | {one['ratio']:.2f} | {low:.2f} to {high:.2f} | "
            f"{one['seconds']:.2f} |"
        )
    made, rates = report["environment"], {name: one["decode_tokens_per_s"] for name, one in report["systems"].items()}
    plain, stock = (rates["LoRA-P"] / rates[name] for name in ("all-token LoRA", "all-token LoRA, vLLM's kernels"))
    lines += ["", f"LoRA-P decodes {stock:.2f} times as fast as all-token LoRA with vLLM's kernels, and {plain:.2f} "]
    lines[-1] += "times as fast as with the plugin's."
    lines += ["", f"{report['model']}; {made['device']}, {made['threads']} thread(s); torch {made['torch']}, vLLM "]
    lines[-1] += f"{made['vllm']}. Command: `{made['command']}`."
    return "\n".join(lines) + "\n"


def headline_section(file: Path) -> str:
    """Returns what the README shows of a run of benchmarks.gpu: one model's shape, by the number of adapters."""
    report = json.loads(file.read_text())
    lines = [
        "| adapters | decode step, all-token LoRA | decode step, LoRA-P and DiReFT-P | prompts, LoRA-P "
        "| prompts, DiReFT-P | whole run, all-token LoRA / LoRA-P |",
        "|---|---|---|---|---|---|",
    ]
    forwards = {_case(one): one["forward"]["median"] for one in report["forwards"]}
    runs = {one["adapters"]: {} for one in report["serving"] if HEADLINE.items() <= one.items()}
    for one in report["serving"]:
        if HEADLINE.items() <= one.items():
            runs[one["adapters"]][one["system"]] = one
    for adapters, found in runs.items():
        model, rank = HEADLINE["model"], HEADLINE["rank"]
        base = forwards[model, rank, adapters, "base"]
        step = found["all-token"]["step"]["median"] / found["base"]["step"]["median"]
        prompts = [forwards[model, rank, adapters, name] / base for name in ("lora-p", "direft-p")]
        whole = found["all-token"]["whole_s"] / found["lora-p"]["whole_s"]
        cells = [str(adapters), f"{step:.2f}", "1.00", *(f"{ratio:.2f}" for ratio in prompts), f"{whole:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    one, made = next(iter(runs.values()))["base"], report["environment"]
    versions = f"{made['device']}, torch {made['torch']}, triton {made['triton']}"
    lines += [
        "",
        f"Times over the base model's. Random weights in the shape of {one['model']}, r={one['rank']}, {one['rows']} "
        f"requests of {one['prompt']} + {one['steps']} tokens; {versions}. Command: `{made['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def gpu_section(file: Path) -> str:
    """Returns what the page on speed shows of a run of benchmarks.gpu: prompts, decode steps and whole runs."""
    report = json.loads(file.read_text())
    lines = [
        "| model | r | adapters | prompts / base: LoRA-P | DiReFT-P | decode step / base: PreFT | all-token "
        "| requests, tokens | whole run, all-token / LoRA-P | / DiReFT-P |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    forwards = {_case(one): one["forward"] for one in report["forwards"]}
    runs = {(*_case(one), one["prompt"], one["steps"]): one for one in report["serving"]}
    for (model, rank, adapters, system, *load), base in runs.items():
        if system != "base":
            continue
        found = {name: runs.get((model, rank, adapters, name, *load)) for name in ("lora-p", "direft-p", "all-token")}
        cells = [model, str(rank), str(adapters)]
        for name in ("lora-p", "direft-p"):
            cells.append(_over(forwards.get((model, rank, adapters, name)), forwards[model, rank, adapters, "base"]))
        lora = found["all-token"]
        cells += ["1", _over(lora and lora["step"], base["step"])]
        cells.append(f"{base['rows']} x ({load[0]} + {load[1]})")
        for name in ("lora-p", "direft-p"):
            one = found[name]
            cells.append(f"{lora['whole_s'] / one['whole_s']:.2f}" if lora and one else "")
        lines.append(f"| {' | '.join(cells)} |")
    made = report["environment"]
    lines += ["", f"{made['device']}; torch {made['torch']}, triton {made['triton']}. Command: `{made['command']}`."]
    return "\n".join(lines) + "\n"


def _case(one: dict) -> tuple:
    return one["model"], one["rank"], one["adapters"], one["system"]


def _over(times: dict | None, base: dict) -> str:
    """Returns a median over the base's median, and its quartiles over the same; nothing for no times."""
    if times is None:
        return ""
    ratio, low, high = (seconds / base["median"] for seconds in (times["median"], *times["quartiles"]))
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def many_section(file: Path) -> str:
    """Returns decode rates and whole times of a batch with an adapter per row, for a study's shortest prompts."""
    report = json.loads(file.read_text())
    shortest = min(case["prompt"] for case in report["cases"])
    lines = [
        "| adapters, prompt + answer | base, tokens/s | PEFT LoRA | LoRA-P | DiReFT-P | whole time, PEFT / LoRA-P |",
        "|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        if case["prompt"] > shortest:
            continue
        rates = {name: figures["decode_tokens_per_s"] for name, figures in case["systems"].items()}
        whole = {name: figures["end_to_end_s"]["ratio"] for name, figures in case["systems"].items()}
        cells = [f"{rates[name]['median']:.0f} ({rates[name]['ratio']:.2f})" for name in SYSTEMS[1:]]
        lines.append(
            f"| {case['adapters']}, {case['prompt']} + {case['decode']} | {rates['base']['median']:.0f} | "
            + " | ".join(cells)
            + f" | {whole['peft-lora'] / whole['lora-p']:.1f} |"
        )
    return "\n".join([*lines, "", source(report, f"rank {report['rank']} on all linear layers, medians")]) + "\n"


def all_figures(file: Path) -> str:
    """Returns every figure of a study of many adapters as a Markdown table."""
    report = json.loads(file.read_text())
    lines = [
        "| adapters, tokens | | prefill, s | first token, s | decode, tokens/s | end to end, s | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        for name, figures in case["systems"].items():
            cells = []
            for figure in ("prefill_s", "time_to_first_token_s", "decode_tokens_per_s", "end_to_end_s"):
                low, high = figures[figure]["ratio_quartiles"]
                ratio = "" if name == "base" else f" ({figures[figure]['ratio']:.2f}: {low:.2f} to {high:.2f})"
                cells.append(f"{figures[figure]['median']:.3g}{ratio}")
            cells.append("" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 1e9:.2f}")
            first = f"{case['adapters']}, {case['prompt']} + {case['decode']}" if name == "base" else ""
            lines.append(f"| {first} | {NAMES[name]} | " + " | ".join(cells) + " |")
    repeats = sorted({case["repeats"] for case in report["cases"]})
    said = (
        f"rank {report['rank']} on all linear layers; median of {' or '.join(map(str, repeats))} turns, ratio to base "
    )
    return "\n".join([*lines, "", source(report, said + "within a turn: median and quartiles")]) + "\n"


def source(report: dict, said: str) -> str:
    """Returns device, versions and command of a report."""
    made = report["environment"]
    return (
        f"{report['model']}, {said}; {made['device']}, {made['threads']} threads; torch {made['torch']}, transformers "
        f"{made['transformers']}, peft {made['peft']}. Command: `{made['command']}`."
    )


def section(file: Path) -> str:
    """Returns a results file as a Markdown table with device, versions and command."""
    report = json.loads(file.read_text())
    lines = ["| | base, ms | with adapter, ms | ratio | quartiles |", "|---|---|---|---|---|"]
    for result in report["results"]:
        case, (low, high) = result["case"], result["ratio_quartiles"]
        times = " | ".join(f"{1000 * result[side]:.0f}" for side in ("base_s", "preft_s"))
        method = "DiReFT-P" if case["method"] == "direft" else "LoRA-P"
        name = case["name"].removesuffix(", DiReFT-P")
        lines.append(
            f"| {method} r={case['rank']}, {name} | {times} | {result['ratio']:.3f} | {low:.3f} to {high:.3f} |"
        )
    lines.append("")
    lines.append(source(report, "median of pairs"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
