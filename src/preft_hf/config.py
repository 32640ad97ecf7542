"""PreftConfig: the facts an adapter is saved with, checked when the config is made."""

import functools
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from peft import PeftConfig

from preft_core.format.adapter import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, AdapterConfig, config_faults

_BASE_WEIGHTS = "it changes base weights, which decoding uses; use init_weights=True"
_ONE_RANK = "an adapter has one rank and one scaling for all its modules; train two adapters and activate both"
OF_OTHER_METHODS = {
    "modules_to_save": "a PreFT adapter holds no modules of the base model, which all adapters of a server share; "
    "train them into the base model first",
    "trainable_token_indices": "a PreFT adapter holds no embeddings; train them into the base model first",
    "init_lora_weights": "EVA and orthogonal initialisation are not implemented, and PiSSA, OLoRA, CorDA and LoftQ "
    "change base weights, which decoding uses; use init_weights=True",
    "eva_config": "EVA initialisation is not implemented; use init_weights=True",
    "loftq_config": _BASE_WEIGHTS,
    "corda_config": _BASE_WEIGHTS,
    "lora_ga_config": _BASE_WEIGHTS,
    "rank_pattern": _ONE_RANK,
    "alpha_pattern": _ONE_RANK,
    "use_dora": 'DoRA is not implemented; use method="lora"',
    "bias": "a PreFT adapter trains no biases of the base model; leave it out",
    "lora_bias": "LoRA-P has no bias; leave it out",
    "target_parameters": "a PreFT adapter goes on modules, and cannot go on fused experts; use target_modules",
    "layers_pattern": "the decoder layers are found by the model's config; leave it out",
    "fan_in_fan_out": "it is found by the layer's type; leave it out",
    "layer_replication": "it changes the base model, which decoding uses; leave it out",
}
"""Fields of PEFT's other configs that users bring along: why there is none, and what to do."""

NEWER = ". If the field comes from a newer adapter_config.json, upgrade preft-hf"
REFERENCE_NAME = "ref"
"""TRL adds an adapter of this name as its reference and means a copy of the default one; it copies by other names."""


class PreftType(str, Enum):
    """The PEFT type. Name and value are the same string, so "PREFT" from a file finds the same table entries."""

    PREFT = "PREFT"


@dataclass(repr=False)
class PreftConfig(PeftConfig):
    """Prefill-only finetuning: an adapter acts on prompt tokens and is dropped for decoding (arXiv 2605.14217).

    - method "lora" (LoRA-P): y = W x + s * B A x on linear layers
    - method "direft" (DiReFT-P): h <- h + s * B (A h + bias) on the residual stream after decoder layers
    - method "loreft": h <- h + R^T (A h + bias - R h) there, R with orthonormal rows

    on tokens whose position is smaller than the prompt's length. s = lora_alpha / r (lora_alpha / sqrt(r) with
    use_rslora). Fields are documented in their metadata; every fault of a config is reported in one ValueError.
    """

    method: Literal["lora", "direft", "loreft"] = field(
        default="lora",
        metadata={"help": 'What is adapted: "lora" linear layers, "direft" or "loreft" decoder layers.'},
    )
    r: int = field(default=16, metadata={"help": "Rank of the update, 1 or more."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Numerator of the scaling s. None: 2 * r for lora, r for direft (s = 1). None for loreft."},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the update's input while training, 0 <= p < 1. 0 for loreft."}
    )
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={
            "help": 'lora: "all-linear" (every linear layer but the output embedding), a list of name endings, or a '
            "regular expression that matches whole module names. direft and loreft take layers_to_transform instead."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "lora: name endings, or a regular expression, of layers to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt, from 0. None: all of them."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead of / r."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: a new adapter changes nothing. False: random weights, for tests."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the file format."})
    fingerprint: str | None = field(
        default=None, metadata={"help": "sha256 over config and weights, written when the adapter is saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only a file names the type; whoever writes PreftConfig(...) has said it by that.
        self.from_file = self.peft_type is not None
        self.saved_fingerprint = self.fingerprint
        self.peft_type = PreftType.PREFT
        faults = config_faults({f.name: getattr(self, f.name) for f in fields(self)}, resolved=False)
        if faults:
            raise ValueError("PreftConfig: " + "; ".join(faults))
        if isinstance(self.target_modules, (set, tuple, list)):
            self.target_modules = sorted(set(self.target_modules))
        if isinstance(self.exclude_modules, (set, tuple, list)):
            self.exclude_modules = sorted(set(self.exclude_modules))
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        elif self.layers_to_transform is not None:
            self.layers_to_transform = sorted(set(self.layers_to_transform))
        if self.method == "lora":
            self.target_modules = "all-linear" if self.target_modules is None else self.target_modules
        else:
            self.target_modules = None
        if self.lora_alpha is None and self.method != "loreft":
            self.lora_alpha = 2 * self.r if self.method == "lora" else self.r

    def __repr__(self) -> str:
        """Returns the call that makes this config, without the fields that have their default."""
        hidden = {"peft_type", "peft_version"}
        changed = {one.name for one in fields(self) if getattr(self, one.name) != one.default} - hidden
        shown = [one.name for one in fields(self) if one.name in changed | {"method"}]
        return f"PreftConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name in OF_OTHER_METHODS:
                raise AttributeError(
                    f"PreftConfig has no {name}, which is a field of LoRA's: EVA initialisation, X-LoRA and other "
                    "code for LoRA do not take a PreFT adapter"
                )
            raise AttributeError(f"'PreftConfig' object has no attribute {name!r}")

    @property
    def scaling(self) -> float:
        """The factor s of the update; 1.0 for loreft."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json in one step. `PeftModel.save_pretrained` adds the fingerprint of the weights."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory {save_directory} is a file: give a directory")
        data = self.to_dict() | {"fingerprint": None}
        if kwargs.get("auto_mapping_dict") is not None:
            data["auto_mapping"] = kwargs["auto_mapping_dict"]
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{CONFIG_NAME}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
            partial.replace(directory / CONFIG_NAME)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "PreftConfig":
        """Reads a saved config. Refuses a local adapter whose weights are a pickle."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        pickled = directory / "adapter_model.bin"
        if pickled.exists() and not (directory / WEIGHTS_NAME).exists():
            raise ValueError(
                f"{pickled} is a pickle, which can run code when it is read: PreFT adapters are {WEIGHTS_NAME} only; "
                "ask whoever made the adapter to save it again"
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, PreftConfig):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds an adapter of type {config.peft_type}, not PreFT: read it "
                "with peft's PeftConfig"
            )
        return config


def full_config(config: AdapterConfig) -> PreftConfig:
    """Returns the config of a saved adapter as PEFT's kind of config."""
    return PreftConfig(**{one.name: getattr(config, one.name) for one in fields(AdapterConfig)})


def core_config(config: PreftConfig | AdapterConfig) -> AdapterConfig:
    """Returns a config with the facts that choose an adapter's slot: method, rank and scaling."""
    if isinstance(config, AdapterConfig):
        return config
    return AdapterConfig(method=config.method, r=config.r, lora_alpha=config.lora_alpha, format_version=1)


class UnknownFieldError(TypeError, ValueError):
    """A keyword argument that is no field: a TypeError, as of any call, and a ValueError, as of any config."""


def _refuse_unknown_fields(init: Callable[..., None]) -> Callable[..., None]:
    """PEFT drops the config fields it does not know with a warning, and with them what the adapter means."""

    @functools.wraps(init)
    def checked(self: PreftConfig, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(PreftConfig)]
        unknown = sorted(kwargs.keys() - set(known))
        if unknown:
            faults = [_unknown(name, known) for name in unknown]
            newer = "" if all(name in OF_OTHER_METHODS for name in unknown) else NEWER
            raise UnknownFieldError(f"PreftConfig: {'; '.join(faults)}. Known fields are {', '.join(known)}{newer}")
        init(self, *args, **kwargs)

    return checked


def _unknown(name: str, known: list[str]) -> str:
    if name in OF_OTHER_METHODS:
        return f"unknown field {name!r}: {OF_OTHER_METHODS[name]}"
    close = get_close_matches(name, known, n=1)
    return f"unknown field {name!r}" + (f" (did you mean {close[0]!r}?)" if close else "")


PreftConfig.__init__ = _refuse_unknown_fields(PreftConfig.__init__)  # pyright: ignore[reportAttributeAccessIssue]
PreftConfig.__doc__ = f"{inspect.cleandoc(PreftConfig.__doc__ or '')}\n\nArgs:\n" + "\n".join(
    f"    {one.name} (default {one.default!r}): {one.metadata.get('help', '')}" for one in fields(PreftConfig)
)
