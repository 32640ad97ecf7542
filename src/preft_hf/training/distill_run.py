"""The run behind `preft distill`: teacher, student, responses, training, scores before and after."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from preft_hf.config import PreftConfig
from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.data import Sample, encode_prompts, encode_turns
from preft_hf.training.distill import Agreement, agreement, distillation_loss, load_teacher, responses, widened
from preft_hf.training.run_folder import check_output, run_facts, write_facts, write_metrics
from preft_hf.training.sft import TrainingPlan, steps_of, train
from preft_hf.training.train_run import check_context, load_base, split
from preft_hf.training.turns import DataError, Turn, read_turns

FREE_OPTIONS = {"output", "data", "resume", "scored_rows"}


@dataclass(frozen=True)
class DistillOptions:
    """The options of `preft distill`, in its order."""

    lora: Path
    data: Path
    output: Path
    model: str | None
    rank: int | None
    start: str
    method: str
    learning_rate: float
    steps: int | None
    epochs: float
    batch_size: int
    max_length: int
    sample: bool
    max_new_tokens: int
    temperature: float
    eval_split: float
    eval_every: int
    patience: int
    scored_rows: int
    seed: int
    dtype: str
    resume: bool


@dataclass(frozen=True)
class Score:
    """A student on held-out rows. same_answers: share of greedy responses that are as expected; None: not run."""

    kl: float
    top1: float
    same_answers: float | None


def distill(options: DistillOptions, console: Console) -> bool:
    """Distils the LoRA and saves the student; returns False if Ctrl-C stopped it, with a checkpoint.

    Raises:
        ValueError: invalid options, data, LoRA or base model, or an output folder of another run.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    facts = run_facts(options, options.data, FREE_OPTIONS)
    check_output(options.output, options.resume, facts)
    turns = read_turns(options.data, prompts_alone=True)
    train_turns, eval_turns = split(turns, options.eval_split, options.seed, options.data)
    if not eval_turns:
        raise ValueError("--eval-split is 0: give the share of rows to hold out for scoring the student")
    base, teacher, tokenizer = _load(options)
    torch.manual_seed(options.seed)
    train_samples, _ = _samples(train_turns, teacher, tokenizer, options, console, "sampling responses")
    eval_samples, num_given = _samples(eval_turns, teacher, tokenizer, options, console, "sampling held-out responses")
    check_context(base, train_samples + eval_samples)
    torch.manual_seed(options.seed)
    student = _student(base, teacher, options)
    judge = _Judge(teacher, tokenizer, eval_samples, options.scored_rows, num_given)
    before = judge.score(student)
    plan = _plan(options, len(train_samples))
    config = student.peft_config["default"]
    console.print(
        f"{config.method} of rank {config.r} from {options.start}: KL {before.kl:.3f} nats a token; "
        f"{len(train_samples)} rows, {len(eval_samples)} held out, up to {plan.num_steps} steps of {plan.batch_size}"
    )
    write_facts(options.output, facts)
    pad = tokenizer.pad_token_id
    loss = distillation_loss(teacher)
    first = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(student).items()}
    result = train(student, train_samples, eval_samples, plan, pad, console, options.resume, loss)
    if result.interrupted:
        console.print(
            f"Stopped at step {result.num_steps} of {plan.num_steps}. To continue: the same command with --resume"
        )
        return False
    after = judge.score(student)
    if after.kl >= before.kl:
        # no evaluation saw the student before its first step
        set_peft_model_state_dict(student, first)
        console.print(f"[yellow]KL {after.kl:.4f} is no lower than before: the initial student is kept[/]")
        after = before
    student.save_pretrained(str(options.output))
    tokenizer.save_pretrained(str(options.output))
    metrics = {
        "num_train_rows": len(train_samples),
        "num_eval_rows": len(eval_samples),
        "num_steps": result.num_steps,
        "teacher_same_answers": judge.teacher_same_answers,
        "before": asdict(before),
        "after": asdict(after),
    }
    write_metrics(options.output, options, metrics)
    _report(before, after, judge.teacher_same_answers, console)
    console.print(f"The adapter is in [bold]{options.output}[/]")
    return True


def _load(options: DistillOptions) -> tuple[Any, Any, Any]:
    """Returns base model, teacher and tokenizer."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(options.lora))
    except ValueError as error:
        raise ValueError(f"{options.lora} is not an adapter: {error}; give the folder of a plain PEFT LoRA") from error
    name = options.model or config.base_model_name_or_path
    if name is None:
        raise ValueError(f"the config of {options.lora} names no base model: give it with --model")
    base, tokenizer = load_base(name, options.dtype)
    teacher = load_teacher(base, options.lora)
    if torch.cuda.is_available():
        base, teacher = base.cuda(), teacher.cuda()
    return base, teacher, tokenizer


class _Judge:
    """Scores students on the same held-out rows, and by greedy responses to the first of them.

    The expected response is the row's. Where it has none, it is the teacher's greedy response, not the sampled one.

    Args:
        num_given: the number of first samples whose response is in the data
    """

    def __init__(self, teacher: Any, tokenizer: Any, samples: Sequence[Sample], num_scored: int, num_given: int):
        self._teacher, self._tokenizer, self._samples = teacher, tokenizer, samples
        scored = samples[:num_scored]
        self._prompts = [_part(sample, of_prompt=True) for sample in scored]
        self._expected = [_part(sample, of_prompt=False) for sample in scored]
        self._max_new_tokens = max((len(response) for response in self._expected), default=1)
        found = self._answers(teacher)
        self._expected[num_given:] = found[num_given:]
        self.teacher_same_answers = self._same(found)

    def score(self, student: Any) -> Score:
        """Returns the student's figures."""
        near: Agreement = agreement(self._teacher, student, self._samples, self._tokenizer.pad_token_id)
        return Score(near.kl, near.top1, self._same(self._answers(student)))

    def _answers(self, model: Any) -> list[list[int]]:
        was_training = model.training
        found = responses(model.eval(), self._tokenizer, self._prompts, self._max_new_tokens, temperature=0.0)
        model.train(was_training)
        return found

    def _same(self, found: list[list[int]]) -> float | None:
        if not found:
            return None
        return sum(one == other for one, other in zip(found, self._expected, strict=True)) / len(found)


def _samples(
    turns: list[Turn], teacher: Any, tokenizer: Any, options: DistillOptions, console: Console, title: str
) -> tuple[list[Sample], int]:
    """Returns samples of the given responses, then of responses sampled from the teacher, and how many are given."""
    given = [turn for turn in turns if not turn.is_open and not options.sample]
    asked = [turn for turn in turns if turn.is_open or options.sample]
    samples, num_long = encode_turns(given, tokenizer, options.max_length) if given else ([], 0)
    num_given = len(samples)
    if asked:
        prompts, num_long_prompts = encode_prompts(asked, tokenizer, options.max_length)
        short = [prompt for prompt in prompts if prompt is not None]
        with Progress(console=console) as progress:
            bar = progress.add_task(title, total=len(short))
            found = responses(
                teacher,
                tokenizer,
                short,
                options.max_new_tokens,
                options.temperature,
                lambda num_rows: progress.advance(bar, num_rows),
            )
        for prompt, response in zip(short, found, strict=True):
            kept = response[: options.max_length - len(prompt)]
            samples.append({"input_ids": prompt + kept, "labels": [IGNORED_LABEL] * len(prompt) + kept})
        num_long += num_long_prompts
    if num_long:
        console.print(f"[yellow]{num_long} rows have more than {options.max_length} tokens and are skipped[/]")
    if not samples:
        raise DataError(f"no row of {options.data} is left: raise --max-length from {options.max_length}")
    return samples, num_given


def _student(base: Any, teacher: Any, options: DistillOptions) -> Any:
    from peft import get_peft_model

    rank = options.rank or 4 * teacher.peft_config["default"].r
    if options.start == "teacher":
        if options.method != "lora":
            raise ValueError(f"--method is {options.method}: a student from the teacher is lora; give --start zero")
        return widened(base, options.lora, rank)
    return get_peft_model(base, PreftConfig(method=options.method, r=rank, task_type="CAUSAL_LM"))  # type: ignore[arg-type]


def _plan(options: DistillOptions, num_rows: int) -> TrainingPlan:
    steps = steps_of(options.steps, options.epochs, num_rows, options.batch_size)
    return TrainingPlan(
        output=options.output,
        num_steps=steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        eval_every=options.eval_every or math.ceil(steps / 10),
        seed=options.seed,
        patience=options.patience,
    )


def _part(sample: Sample, of_prompt: bool) -> list[int]:
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    return [token for token, label in pairs if (label == IGNORED_LABEL) == of_prompt]


def _report(before: Score, after: Score, of_teacher: float | None, console: Console) -> None:
    from rich.table import Table

    table = Table("held-out rows", "KL, nats a token", "top-1 agreement", "expected answers")

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    table.add_row("teacher", "0", "100%", share(of_teacher))
    for name, score in (("student before", before), ("student after", after)):
        table.add_row(name, f"{score.kl:.4f}", share(score.top1), share(score.same_answers))
    console.print(table)
