"""The model card of an adapter: metadata that the Hub indexes, and how to load and serve it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from preft_core.format.adapter import Adapter

CARD_NAME = "README.md"
BEGIN, END = "<!-- preft -->", "<!-- /preft -->"
TAGS = ("peft", "prefill-only", "preft")
_BASE_TAG = "base_model:adapter:"
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
{load}
```

Hundreds of adapters for one model, chosen by name for each prompt:

```python
from preft_hf import PreftPool

pool = PreftPool.from_pretrained(model, {{"mine": {place}}})
model.generate(**inputs, adapter_names=["mine", "__base__"])
```

Without `preft_hf` PEFT, TGI and vLLM refuse this adapter: on every token it would be another one.

{end}
"""
_LOAD = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({place})"""
# PEFT would look for the base model in a folder of that name too
_LOAD_FOLDER = """from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM

folder = snapshot_download("{repository}", allow_patterns=["{subfolder}/*"]) + "/{subfolder}"
model = AutoPeftModelForCausalLM.from_pretrained({place})"""


def read_card(file: Path, name: str | None = None) -> str | None:
    """Returns the text of a card, None if there is no file. Checks that its metadata can be read.

    Args:
        name: of the file, for the error; None uses its path
    Raises:
        ValueError: the file cannot be read or is not UTF-8, or its metadata is not a YAML table.
    """
    name = name or str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}; save it as UTF-8, or delete it") from error
    _parsed(text, name)
    return text


def tags_of(text: str | None) -> list[str]:
    """Returns the tags in a card's metadata.

    Raises:
        ValueError: its metadata are no YAML table.
    """
    return [] if text is None else [str(tag) for tag in _parsed(text, CARD_NAME).data.get("tags") or []]


def model_card(
    adapter: Adapter,
    existing: str | None = None,
    *,
    repository: str = "this repository",
    subfolder: str = "",
    license: str | None = None,
    facts: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> str:
    """Returns the model card of an adapter, with valid Hub metadata.

    Args:
        existing: a card whose text and metadata are kept; the part between the preft markers is replaced
        repository: "org/name", if known
        subfolder: of the repository, where the adapter's files are
        license: of the base model, as the Hub spells it
        facts: rows for the table, such as training data and metrics
        tags: further ones, such as those of the trainer; a tag that names a base model by a path is left out
    Raises:
        ValueError: an existing card whose metadata is not a YAML table.
    """
    card = _parsed(existing, CARD_NAME) if existing else ModelCard.from_template(ModelCardData())
    text = card.text if existing else ""
    config, base = adapter.config, _base(adapter)
    data = card.data
    if base is not None:
        data["base_model"] = base
        data["base_model_relation"] = "adapter"
    elif data.get("base_model") == config.base_model_name_or_path:
        # PEFT's card names the base model by its path on this machine
        data["base_model"] = None
    data["library_name"] = "peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    named = [] if base is None else [f"{_BASE_TAG}{base}"]
    wanted = dict.fromkeys([*(data.get("tags") or []), *tags, *TAGS, f"preft-{config.method}", *named])
    data["tags"] = [tag for tag in wanted if tag in named or not str(tag).startswith(_BASE_TAG)]
    if license is not None and not data.get("license"):
        data["license"] = license
    layers = f" of {len(config.layers_to_transform)} layers" if config.layers_to_transform else ""
    place = "folder" if subfolder else f'"{repository}"'
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
        load=(_LOAD_FOLDER if subfolder else _LOAD).format(repository=repository, subfolder=subfolder, place=place),
        place=place,
    )
    kept = re.sub(f"{BEGIN}.*?{END}\n?", "", text, flags=re.DOTALL).strip()
    card.text = f"\n{kept or '# Prefill-only adapter'}\n\n{ours}"
    return str(card)


def _parsed(text: str, name: str) -> ModelCard:
    try:
        return ModelCard(text, ignore_metadata_errors=False)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the metadata of {name}, between --- and ---, is not a YAML table of a model card: {reason}; correct or "
            "delete it"
        ) from error


def _base(adapter: Adapter) -> str | None:
    """Returns the base model's Hub id, None for a local path, which is not published."""
    base = adapter.config.base_model_name_or_path
    return base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
