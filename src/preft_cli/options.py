"""Choices that several commands share, and the verbosity of libraries."""

from enum import Enum


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


def quiet() -> None:
    """Silences the logs and progress bars of transformers and peft."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft 0.21 still calls the old name of a method of transformers
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
