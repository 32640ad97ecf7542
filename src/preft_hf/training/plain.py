"""Generation that ignores a model's own generation settings, except for its special tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Within it, `generate` uses only the special tokens of the model's generation config; afterwards all settings.

    Passing a generation config to `generate` is not enough: what it does not set comes from the model's config, such
    as repetition_penalty, suppress_tokens or num_beams.

    Args:
        model: a causal language model, or a PeftModel of one
    """
    owner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    before = owner.generation_config
    owner.generation_config = GenerationConfig(**{name: getattr(before, name) for name in KEPT})
    try:
        yield
    finally:
        owner.generation_config = before
