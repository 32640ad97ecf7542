"""A model's adapters to the Hub. What needs no model is in preft_core.hub and named here too."""

import tempfile
from pathlib import Path

from peft import PeftModel

from preft_core.card import CARD_NAME
from preft_core.hub import Pulled, Pushed, pinned, pull_adapter, pull_adapters, push_adapter

__all__ = ["Pulled", "Pushed", "pinned", "pull_adapter", "pull_adapters", "push_adapter", "push_model"]


def push_model(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    adapter_name: str | None = None,
) -> Pushed:
    """Pushes one adapter of a model, by default its active one. Raises as push_adapter."""
    name = adapter_name or model.active_adapter
    if not isinstance(name, str):
        raise ValueError(f"adapters {', '.join(name)} are active: say with adapter_name which one to push")
    with tempfile.TemporaryDirectory(prefix="preft-push-") as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        saved = Path(folder) if name == "default" else Path(folder) / name
        # PEFT's card says nothing that ours does not
        (Path(folder) / CARD_NAME).unlink(missing_ok=True)
        (saved / CARD_NAME).unlink(missing_ok=True)
        return push_adapter(
            saved,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload prefill-only adapter",
        )
