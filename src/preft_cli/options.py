"""Choices and checks that several commands share, and the verbosity of libraries."""

import math
from enum import Enum

import typer


class Method(str, Enum):
    """Method of the adapter."""

    lora = "lora"
    direft = "direft"
    loreft = "loreft"


class Precision(str, Enum):
    """Data type of the base model; the adapter is float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def learning_rate(value: float) -> float:
    """Checks --lr before anything is loaded."""
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a finite number above 0: give one such as 1e-3")
    return value


def quiet() -> None:
    """Silences the logs and progress bars of transformers and peft."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft 0.21 still calls the old name of a method of transformers
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
