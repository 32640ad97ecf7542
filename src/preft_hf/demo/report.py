"""The demo's results: metrics.json, loss.png and summary.md."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preft_core import plots
from preft_hf.demo.cities import ATTRIBUTION, Row


def write_report(
    output: Path, metrics: dict[str, Any], rows: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> None:
    """Writes the three files into the output folder."""
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    _plot(output / "loss.png", metrics)
    (output / "summary.md").write_text(_summary(metrics, rows, before, after))


def _plot(file: Path, metrics: dict[str, Any]) -> None:
    steps, losses = zip(*metrics["losses"], strict=True)
    figure = plots.new_figure(7, 4)
    axes = figure.subplots()
    before, after = metrics["eval_loss"]["base"], metrics["eval_loss"]["preft"]
    plots.draw(axes, "lora-p", steps, losses, label="training, batches of 4", marker="")
    for system, loss, label in (("base", before, "held-out, base"), ("lora-p", after, "held-out, adapter")):
        plots.draw(axes, system, [steps[0], steps[-1]], [loss, loss], label=label, linestyle="--", marker="")
    axes.set_ylim(0, 1.1 * max(*losses, before))
    title = f"Held-out loss falls from {before:.2f} to {after:.2f}"
    plots.finish_axes(axes, title, "step", "loss, nats per response token", room=0.3)
    plots.save(
        file=file, figure=figure, source=f"{metrics['method']}, rank {metrics['rank']}, prefill only; preft demo"
    )


def _summary(metrics: dict[str, Any], rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> str:
    loss, accuracy, ops = metrics["eval_loss"], metrics["field_accuracy"], metrics["operations"]
    examples = "\n".join(
        f"| {row.prompt.strip()} | {_line(one)} | {_line(other)} | {row.response} |"
        for row, one, other in list(zip(rows, before, after, strict=True))[:12]
    )
    return f"""# A prefill-only adapter on SmolLM2-135M-Instruct

Method {metrics["method"]}, rank {metrics["rank"]}, {metrics["num_steps"]} steps of 4 rows, seed {metrics["seed"]},
float32, {metrics["seconds"]:.0f} s in all on {platform.machine()} ({platform.system()}).

| {metrics["num_eval_rows"]} held-out rows | base model | with the adapter |
|---|---|---|
| loss, nats per response token | {loss["base"]:.3f} | {loss["preft"]:.3f} |
| fields right (name, country, population) | {accuracy["base"]:.1%} | {accuracy["preft"]:.1%} |
| operations of a prefill forward | {ops["prefill_base"]} | {ops["prefill"]} |
| operations of a decode forward | {ops["decode_base"]} | {ops["decode"]} |

The adapter was saved, loaded in a fresh process, and answered there. A decode forward ran
{"the same operations as the base model: none of the adapter's" if ops["decode_is_base"] else "OTHER operations"}.

| prompt | base model | with the adapter | expected |
|---|---|---|---|
{examples}

![training loss](loss.png)

Use it:

```python
import preft_hf
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("adapter")
```

Model: SmolLM2-135M-Instruct, Apache-2.0. {ATTRIBUTION}
"""


def _line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:60].replace("|", "\\|")
