"""Checks of the loaded base model: does TGI serve it with the layers that adapters need, and read its config whole."""

import json
from collections.abc import Mapping
from typing import Any

from tgi_patch.server.target_modules import UnsupportedModel
from tgi_patch.settings import Settings, SettingsError, check_prefix_caching

PREFIX_ATTENTION = ("flashinfer", "flashdecoding", "flashdecoding-ipex")
"""The kinds of attention that read a prompt's earlier tokens from the KV cache."""
_THETA = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""transformers 5's name of a kind of layer -> the field that held its RoPE base before."""


def check_model(model: Any, settings: Settings) -> None:
    """Checks a loaded model before adapters are attached to it.

    Args:
        model: what TGI's `get_model_with_lora_adapters` returns
    Raises:
        UnsupportedModel: TGI serves it without the layers that adapters need.
        SettingsError: TGI's own prefix cache is on, or PREFT_PREFIX_CACHE with attention that does not read the cache.
    """
    kind = type(model).__name__
    if kind != "FlashCausalLM":
        raise UnsupportedModel(
            f"TGI serves this model as {kind}, and PreFT adapters need FlashCausalLM, which is for text models: unset "
            "PREFT_ADAPTERS, or set PREFT_DISABLE=1 to serve the model alone"
        )
    from text_generation_server.models.globals import ATTENTION, PREFIX_CACHING  # pyright: ignore[reportMissingImports]

    check_prefix_caching(str(int(PREFIX_CACHING)))
    if settings.prefix_tokens and ATTENTION not in PREFIX_ATTENTION:
        raise SettingsError(
            f"PREFT_PREFIX_CACHE is set and ATTENTION is {ATTENTION}, which computes a prompt without reading the KV "
            f"cache: use {' or '.join(PREFIX_ATTENTION)}, or unset PREFT_PREFIX_CACHE"
        )


def check_rope(config: Any, model_id: str) -> None:
    """Refuses a base model whose RoPE settings TGI did not read.

    transformers 5 saves them in `rope_parameters`. TGI's transformers 4.51 keeps that field and does not use it: it
    takes its defaults for `rope_theta` and `rope_scaling`, and every token is wrong.

    Args:
        config: of the loaded model, as TGI's transformers read it
    Raises:
        UnsupportedModel: `rope_parameters` differs from what TGI read. Names the fields to add to config.json.
    """
    missing = _missing_fields(config)
    if missing:
        raise UnsupportedModel(
            f"{model_id}: its config.json has rope_parameters, as transformers 5 writes it, and TGI 3.3.7 reads the "
            f"older fields, so every token would be wrong: add {json.dumps(missing)[1:-1]} to config.json"
        )


def _missing_fields(config: Any) -> dict[str, Any]:
    """Returns the older fields that config.json lacks, with their values."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return {}
    by_kind = {kind: given for kind, given in parameters.items() if isinstance(given, Mapping)}
    missing: dict[str, Any] = {}
    for kind, given in (by_kind or {"full_attention": parameters}).items():
        # a kind of layer that TGI's models do not have keeps its new name, and is never found
        theta = _THETA.get(kind, f"rope_theta of {kind}")
        scaling = {name: value for name, value in given.items() if name not in {"rope_theta", "partial_rotary_factor"}}
        scaled = scaling.get("rope_type", "default") != "default"
        wanted = {
            theta: given.get("rope_theta"),
            "rope_scaling" if kind == "full_attention" else f"rope_scaling of {kind}": scaling if scaled else None,
            "partial_rotary_factor": given.get("partial_rotary_factor"),
        }
        missing |= {
            name: value for name, value in wanted.items() if value is not None and not _read(config, name, value)
        }
    return missing


def _read(config: Any, name: str, value: Any) -> bool:
    """Whether TGI's config has this value under the older name."""
    found = getattr(config, name, 1.0 if name == "partial_rotary_factor" else None)
    if not isinstance(value, Mapping) or not isinstance(found, Mapping):
        return found == value
    # transformers 4 has `type` for `rope_type` in older files, and some lengths beside rope_scaling
    found = {"rope_type": found.get("type"), **found}
    return all(found.get(key, getattr(config, key, None)) == part for key, part in value.items())
