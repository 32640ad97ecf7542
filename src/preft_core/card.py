"""The model card of an adapter: metadata that the Hub indexes, and how to load and serve it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from preft_core.adapter import Adapter

CARD_NAME = "README.md"
BEGIN, END = "<!-- preft -->", "<!-- /preft -->"
METHODS = {"lora": "LoRA-P", "direft": "DiReFT-P", "loreft": "LoReFT, prefill only"}
_TEXT = """{begin}

A prefill-only adapter (PreFT, arXiv 2605.14217): it acts on the tokens of the prompt and is dropped for decoding, so
every generated token is computed by the base model.

| | |
|---|---|
| base model | {base} |
| method | {method}, rank {rank}, scaling {scaling:g} |
| adapted | {num_modules} modules{layers} |
| parameters | {parameters:,} |
| fingerprint | `{fingerprint}` |
{facts}
## Use

`pip install preft-hf`, then the import that makes PEFT know its type:

```python
import preft_hf
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{repository}")
```

Hundreds of adapters for one model, chosen by name for each prompt:

```python
from preft_hf import PreftPool

pool = PreftPool.from_pretrained(model, {{"mine": "{repository}"}})
model.generate(**inputs, adapter_names=["mine", "__base__"])
```

Without `preft_hf` PEFT, TGI and vLLM refuse this adapter: on every token it would be another one.

{end}
"""


def model_card(
    adapter: Adapter,
    existing: str | None = None,
    *,
    repository: str = "this repository",
    license: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Returns the card of an adapter, with valid Hub metadata.

    Args:
        existing: a card whose own text and metadata are kept; our part of it is renewed
        repository: its id, where it is known
        license: of the base model, as the Hub spells it
        facts: lines for the table, such as training data and metrics
    Raises:
        ValueError: an existing card whose metadata is no YAML.
    """
    card = ModelCard(existing, ignore_metadata_errors=False) if existing else ModelCard.from_template(ModelCardData())
    text = card.text if existing else ""
    config, base = adapter.config, _base(adapter)
    data = card.data
    if base is not None:
        data["base_model"] = base
        data["base_model_relation"] = "adapter"
    data["library_name"] = "peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    data["tags"] = sorted({*(data.get("tags") or []), "preft", "peft", "prefill-only", f"preft-{config.method}"})
    if license is not None and not data.get("license"):
        data["license"] = license
    layers = f" of {len(config.layers_to_transform)} layers" if config.layers_to_transform else ""
    ours = _TEXT.format(
        begin=BEGIN,
        end=END,
        base=f"`{base}`" if base else "not recorded",
        method=METHODS[config.method],
        rank=config.r,
        scaling=config.scaling,
        num_modules=len(adapter.modules()),
        layers=layers,
        parameters=adapter.num_parameters,
        fingerprint=adapter.fingerprint,
        facts="".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in (facts or {}).items()),
        repository=repository,
    )
    kept = re.sub(f"{BEGIN}.*?{END}\n?", "", text, flags=re.DOTALL).strip()
    card.text = f"\n{kept or '# Prefill-only adapter'}\n\n{ours}"
    return str(card)


def _base(adapter: Adapter) -> str | None:
    """Returns the base model's id; a path on somebody's machine is nothing to publish."""
    base = adapter.config.base_model_name_or_path
    return base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
