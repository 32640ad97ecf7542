"""`preft distill`: prefill-only adapters from all-token LoRAs, without the labels of their training data."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from preft_cli.options import Method, Precision, learning_rate, quiet


class Start(str, Enum):
    """The student before training: the teacher's weights, or a new adapter."""

    teacher = "teacher"
    zero = "zero"


def distill(
    lora: Annotated[Path, typer.Argument(help="Folder of a plain PEFT LoRA: the teacher.")],
    data: Annotated[Path, typer.Option(help="JSONL file with prompt (response optional) or messages in each row.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter and its checkpoints.")],
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one in the LoRA's config.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the student. Default: 4 times the teacher's.")
    ] = None,
    start: Annotated[
        Start, typer.Option(help="Start from the teacher's weights, or from a new adapter.")
    ] = Start.teacher,
    method: Annotated[
        Method, typer.Option(help="Method of the student; direft and loreft need --start zero.")
    ] = Method.lora,
    lr: Annotated[float, typer.Option(callback=learning_rate, help="Learning rate of AdamW.")] = 1e-3,
    steps: Annotated[int | None, typer.Option(min=1, help="Maximum optimizer steps, instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Maximum passes over the data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row in tokens; longer rows are skipped.")] = 1024,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample responses from the teacher for rows with a response too.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response of the teacher in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the teacher's sampling; 0 takes the most likely token.")
    ] = 1.0,
    eval_split: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of rows held out.")] = 0.1,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: a tenth of all.")] = 0,
    patience: Annotated[int, typer.Option(min=1, help="Evaluations without a lower KL before it stops.")] = 3,
    scored_rows: Annotated[int, typer.Option(min=0, help="Held-out rows to generate responses for.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of split, responses, order and adapter.")] = 0,
    dtype: Annotated[
        Precision, typer.Option(help="Data type of the base model; 16 bits are slow on most CPUs.")
    ] = Precision.float32,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")] = False,
) -> None:
    """Distil an all-token LoRA into a prefill-only adapter of higher rank.

    The student learns the teacher's predictions on response tokens (KL divergence). Where the data has no response,
    the teacher generates it first. The adapter with the lowest held-out KL is kept.
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
