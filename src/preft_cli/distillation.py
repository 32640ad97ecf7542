"""`preft distill`: from a fleet of all-token LoRAs to prefill-only adapters, without their training data's labels."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from preft_cli.options import Method, Precision, quiet


class Start(str, Enum):
    """What the student is before training."""

    teacher = "teacher"
    zero = "zero"


def distill(
    lora: Annotated[Path, typer.Argument(help="Folder of a plain PEFT LoRA: the teacher.")],
    data: Annotated[Path, typer.Option(help="JSONL: rows of prompt, with or without response, or of messages.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter and its checkpoints.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the one in the LoRA's config.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Student's rank. Default 4 times the teacher's.")] = None,
    start: Annotated[Start, typer.Option(help="The teacher's weights, or a new adapter.")] = Start.teacher,
    method: Annotated[Method, typer.Option(help="Student's method; others than lora start from zero.")] = Method.lora,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps at most; instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the data at most.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row, tokens; longer ones are left out.")] = 1024,
    sample: Annotated[bool, typer.Option("--sample", help="Let the teacher answer rows with a response too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response of the teacher, tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the teacher's responses; 0: the likeliest.")] = 1.0,
    eval_split: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of rows held out.")] = 0.1,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: a tenth of all.")] = 0,
    patience: Annotated[int, typer.Option(min=1, help="Evaluations without a lower KL after which it stops.")] = 3,
    scored_rows: Annotated[int, typer.Option(min=0, help="Held-out rows to generate answers for.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of split, responses, order and adapter.")] = 0,
    dtype: Annotated[
        Precision, typer.Option(help="Base model's numbers; 16 bits are slow on most CPUs.")
    ] = Precision.float32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
) -> None:
    """Distil an all-token LoRA into a prefill-only adapter of higher rank.

    The student learns the teacher's predictions (KL divergence) on response tokens; prompts without a response are
    answered by the teacher first. The adapter of the lowest held-out KL is kept.
    """
    quiet()
    from preft_hf.training.distill_run import DistillOptions
    from preft_hf.training.distill_run import distill as run

    options = DistillOptions(
        lora, data, output, model, rank, start.value, method.value, lr, steps, epochs, batch_size, max_length, sample,
        max_new_tokens, temperature, eval_split, eval_every, patience, scored_rows, seed, dtype.value, resume,
    )  # fmt: skip
    if not run(options, Console()):
        raise typer.Exit(130)
