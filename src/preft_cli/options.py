"""What several commands share: choices, and quiet libraries."""

from enum import Enum


class Method(str, Enum):
    """How the adapter changes the model."""

    lora = "lora"
    direft = "direft"
    loreft = "loreft"


class Precision(str, Enum):
    """Numbers of the base model; the adapter is float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def quiet() -> None:
    """Leaves the terminal to our own progress bars."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft 0.21 still calls the old name of a method of transformers
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
