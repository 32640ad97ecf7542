"""Writes the README's table from committed results: `python -m benchmarks.readme`."""

import json
from pathlib import Path

from benchmarks.run import RESULTS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- results -->\n", "<!-- /results -->"


def main() -> None:
    before, _, rest = README.read_text().partition(START)
    after = rest.partition(END)[2]
    README.write_text(before + START + "".join(section(file) for file in sorted(RESULTS.glob("*.json"))) + END + after)


def section(file: Path) -> str:
    """Returns a results file as a Markdown table with device, versions and command."""
    report = json.loads(file.read_text())
    made = report["environment"]
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
    lines.append(
        f"{report['model']}; {made['device']}, {made['threads']} threads; torch {made['torch']}, transformers "
        f"{made['transformers']}, peft {made['peft']}. Command: `{made['command']}`."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
