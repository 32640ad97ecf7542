"""Base models with resized embeddings: no adapter holds their new rows."""

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


def warn_of_resized(model: Any, adapters: Sequence[str]) -> None:
    """Warns if the model has more or fewer embeddings than the base model that its adapters name.

    PEFT would save the embeddings beside a LoRA. A prefill-only adapter holds none: a server runs many of them on one
    base model, and decoding is that base model. The named model's config is read from this machine, never downloaded.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return
    found = config.get_text_config().vocab_size
    for name in dict.fromkeys(model.peft_config[adapter].base_model_name_or_path for adapter in adapters):
        named = _vocabulary(name, type(config))
        if named is not None and named != found:
            warnings.warn(
                f"the model has {found} embeddings and its base model {name} has {named}: they were resized, and the "
                f"adapter holds no embeddings, so on {name} it is not what was trained; save this base model too "
                "(model.unload().save_pretrained(folder), with its tokenizer) and load and serve the adapter on that",
                stacklevel=3,
            )


def _vocabulary(name: str | None, kind: type[PretrainedConfig]) -> int | None:
    """Returns the number of embeddings of the named model; None if its config is not on this machine."""
    if not name:
        return None
    try:
        return kind.from_pretrained(name, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError):
        return None
