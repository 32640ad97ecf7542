"""The training run behind `preft train`: transformers' Trainer with a progress bar, stopped and resumed safely."""

import functools
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from preft_hf.training.data import Sample, collate

LossOf = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]

CHECKPOINTS = "checkpoints"
HISTORY = "history.json"


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    Attributes:
        num_steps: optimizer steps
        batch_size: rows a step
        learning_rate: of AdamW; rises over a tenth of the steps, at most 20, then falls linearly to 0
        eval_every, save_every: steps; 0 means at the end only
        patience: evaluations without a lower loss before training stops; above 0, each evaluation writes a checkpoint
            and the adapter with the lowest evaluation loss is kept
    """

    output: Path
    num_steps: int
    batch_size: int = 4
    learning_rate: float = 3e-3
    eval_every: int = 0
    save_every: int = 0
    seed: int = 0
    patience: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. interrupted: Ctrl-C stopped it, with a checkpoint. losses: (step, nats per response token)."""

    interrupted: bool
    num_steps: int
    losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]


def train(
    model: Any,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    plan: TrainingPlan,
    pad_token_id: int,
    console: Console,
    resume: bool = False,
    loss_of: LossOf | None = None,
) -> TrainingResult:
    """Trains the model's adapter in place; Ctrl-C stops after the current step and writes a checkpoint.

    Args:
        model: a PeftModel with a trainable adapter
        eval_samples: may be empty, unless the plan has patience
        loss_of: the loss of a model on a batch from `collate`; None uses the model's own loss on its labels
        resume: continue from the last checkpoint in the plan's output, with its optimizer, data order and random state
    Raises:
        ValueError: resume without a checkpoint.
        RuntimeError: the loss is no longer finite.
    """
    folder = plan.output / CHECKPOINTS
    checkpoint = last_checkpoint(folder) if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint to resume from: start without --resume")
    bar = ProgressBar(console, plan, _num_tokens_a_row(train_samples))
    trainer = _Trainer(
        loss_of,
        model=model,
        args=_arguments(plan, folder, has_eval=len(eval_samples) > 0),
        train_dataset=list(train_samples),  # type: ignore[arg-type]
        eval_dataset=list(eval_samples) or None,  # type: ignore[arg-type]
        data_collator=functools.partial(collate, pad_token_id=pad_token_id),
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    if plan.patience:
        stopping = EarlyStoppingCallback(plan.patience)
        if checkpoint is not None:
            stopping.early_stopping_patience_counter = _num_worse_evaluations(checkpoint)
        trainer.add_callback(stopping)
    with bar:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    result = TrainingResult(
        interrupted=bar.interrupted and trainer.state.global_step < plan.num_steps,
        num_steps=trainer.state.global_step,
        losses=_series(history, "loss"),
        eval_losses=_series(history, "eval_loss"),
    )
    (plan.output / HISTORY).write_text(
        json.dumps({"losses": result.losses, "eval_losses": result.eval_losses}, indent=1) + "\n"
    )
    return result


class _Trainer(Trainer):
    """Trainer with a custom loss of model and inputs; `compute_loss_func` does not get the inputs."""

    def __init__(self, loss_of: LossOf | None, **settings: Any):
        self._loss_of = loss_of
        super().__init__(**settings)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._loss_of is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._loss_of(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


def steps_of(steps: int | None, epochs: float, num_rows: int, batch_size: int) -> int:
    """Returns the number of optimizer steps: `steps`, or that of `epochs` passes over the rows; at least 1."""
    return steps or max(1, round(epochs * num_rows / batch_size))


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the latest complete checkpoint, None if there is none. Trainer writes trainer_state.json last."""
    whole = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json") if _is_json(file)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _num_worse_evaluations(checkpoint: Path) -> int:
    """Returns how many evaluations in a row had no lower loss when the checkpoint was written.

    Trainer's restore_callback_states_from_checkpoint would restore the old patience too.
    """
    callbacks = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    saved = callbacks.get(EarlyStoppingCallback.__name__)
    # a run without patience has no such callback
    return 0 if saved is None else saved["attributes"]["early_stopping_patience_counter"]


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except ValueError:
        return False
    return True


def evaluate(model: Any, samples: Sequence[Sample], pad_token_id: int, batch_size: int = 8) -> float:
    """Returns the mean loss over the response tokens of all samples, in nats per token."""
    total, num_tokens = 0.0, 0
    model.eval()
    for i in range(0, len(samples), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(samples[i : i + batch_size], pad_token_id).items()}
        with torch.no_grad():
            loss = model(**batch).loss
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(loss) * count
        num_tokens += count
    return total / num_tokens


def _series(history: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), float(entry[name])) for entry in history if name in entry]


def _arguments(plan: TrainingPlan, folder: Path, has_eval: bool) -> TrainingArguments:
    eval_every = plan.eval_every or plan.num_steps
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.num_steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, plan.num_steps // 10),
        weight_decay=0.0,
        logging_strategy="steps",
        logging_steps=1,
        # the filter would show the mean of earlier losses instead of NaN
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=eval_every if plan.patience else plan.save_every or plan.num_steps,
        save_total_limit=2,
        load_best_model_at_end=plan.patience > 0,
        seed=plan.seed,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _num_tokens_a_row(samples: Sequence[Sample]) -> float:
    return sum(len(sample["input_ids"]) for sample in samples) / max(len(samples), 1)


class ProgressBar(TrainerCallback):
    """Shows loss, tokens per second and remaining time; the first Ctrl-C writes a checkpoint and stops."""

    def __init__(self, console: Console, plan: TrainingPlan, num_tokens_a_row: float):
        self.interrupted = False
        self._plan = plan
        self._num_tokens_a_step = num_tokens_a_row * plan.batch_size
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  eval {task.fields[eval_loss]}  {task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=plan.num_steps, loss="-", eval_loss="-", rate="-")
        self._before: Any = None
        self._started: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressBar":
        try:
            self._before = signal.signal(signal.SIGINT, self._stop)
        except ValueError:
            # not in the main thread, which alone gets Ctrl-C
            self._before = None
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _stop(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._progress.console.print(
            "Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = time.perf_counter()
        if self._started is None:
            self._started = (now, state.global_step)
        elapsed, steps = now - self._started[0], state.global_step - self._started[1]
        rate = f"{steps * self._num_tokens_a_step / elapsed:.0f}" if steps else "-"
        self._progress.update(self._task, completed=state.global_step, rate=rate)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise RuntimeError(
                f"the loss is {logs['loss']} at step {state.global_step}, so training diverged: restart with a "
                f"lower learning rate than {self._plan.learning_rate:g}"
            )
        for name in ("loss", "eval_loss"):
            if logs and name in logs:
                shown: dict[str, Any] = {name: f"{float(logs[name]):.3f}"}
                self._progress.update(self._task, **shown)
