"""PreftModel: adds adapter layers and hooks to a base model, and removes them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from preft_hf.config import REFERENCE_NAME, PreftConfig
from preft_hf.forward.hooks import attachment_of, pool_of
from preft_hf.layers.linear import MERGE_REFUSED, PreftLayer, PreftLinear, device_of
from preft_hf.tuner.attach import BLOCK, block_at, linear_at, take_out
from preft_hf.tuner.experts import check_experts
from preft_hf.tuner.loading import CheckedLoading, check_weights, layers_with
from preft_hf.tuner.names import is_inside_wrapper, plain_name, submodule, unwrapped
from preft_hf.tuner.reading import current_load, loading
from preft_hf.tuner.targets import endings, linear_layers, resolve


class PreftModel(BaseTuner):
    """A base model with PreFT adapters, as PEFT's `get_peft_model` and `PeftModel.from_pretrained` make it.

    LoRA-P adapters wrap linear layers; DiReFT-P and LoReFT adapters become a child of decoder layers. A model can have
    several adapters, of different methods too. A hook on the base model decides which tokens of each forward are
    prefill, and its `generate` adapts the prompt only. See arXiv 2605.14217.
    """

    prefix = "preft_"
    tuner_layer_cls = PreftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        core = unwrapped(model)
        check_model(core)
        check_name_is_free(adapter_name, core)
        configs = core.__dict__.get("peft_config")
        before = None if configs is None else dict(configs)
        # PeftModel gives a dict and loads through PEFT. A bare config comes from inject_adapter_in_model, which
        # transformers calls too.
        bare = isinstance(peft_config, PreftConfig)
        loaded_by_transformers = bare and current_load() is not None
        try:
            with loading() if bare and peft_config.from_file else nullcontext():
                super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except BaseException:
            if configs is not None and before is not None:
                # BaseTuner adds the new config to the model's before it knows that it fits
                configs.clear()
                configs.update(before)
            raise
        if bare and loaded_by_transformers:
            CheckedLoading(core, peft_config, adapter_name).place()

    @property
    def core(self) -> nn.Module:
        """The model that the adapters are attached to, inside torch.compile's wrapper if there is one."""
        return unwrapped(self.model)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds an adapter to the model, after checking that name, config and model fit. See BaseTuner."""
        model = unwrapped(model)
        config = self.peft_config[adapter_name]
        assert isinstance(config, PreftConfig)
        check_adapter_name(adapter_name, model)
        check_name_is_free(adapter_name, model)
        pool = pool_of(model)
        if pool is not None and adapter_name in pool.names():
            raise ValueError(f"adapter name {adapter_name!r} is one of the model's PreftPool: choose another name")
        if state_dict is not None:
            raise ValueError(
                "state_dict is not supported for PreFT adapters: pass the config alone, then load weights"
            )
        if current_load() is None:
            check_experts(config, model, linear_layers(model))
        chosen = resolve(config, model)
        if config.revision is None and not config.from_file:
            # the commit of a base model from the Hub, so that the adapter is loaded on the same weights
            config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        self._chosen = set(chosen)
        saved = config.exclude_modules
        targets = endings(chosen, model) if config.target_modules == "all-linear" else config.target_modules
        self._mark(config, adapter_name)
        # resolved above, with an error where PEFT warns
        config.target_modules, config.exclude_modules = targets, None
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        finally:
            config.target_modules, config.exclude_modules = targets, saved
        layers = layers_with(model, adapter_name).values()
        if any(layer.preft_A[adapter_name].is_meta for layer in layers) and not _is_offloaded(model):
            attachment_of(model).awaiting.add(adapter_name)

    def _mark(self, config: PreftConfig, adapter_name: str) -> None:
        """Marks an adapter whose weights are loaded next; a new one forgets the weights its config was saved with."""
        awaiting = attachment_of(self.core).awaiting
        if current_load() is not None:
            awaiting.add(adapter_name)
        else:
            awaiting.discard(adapter_name)
            config.from_file, config.saved_fingerprint = False, None

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return plain_name(key) in self._chosen and not is_inside_wrapper(key)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, PreftConfig)
        if peft_config.method == "lora":
            layer = linear_at(self.core, current_key)
            layer.add_adapter(adapter_name, peft_config)
            layer.train(layer.base_layer.training)
        else:
            block = block_at(self.core, current_key)
            block.add_adapter(adapter_name, peft_config, device_of(target))
            block.train(target.training)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leaves the adapter in float32, or casts it to each layer's dtype if autocast_adapter_dtype is False."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for path, layer in layers_with(self.core, adapter_name).items():
            block = path.removesuffix(f".{BLOCK}")
            dtype = _dtype_of(layer if isinstance(layer, PreftLinear) else submodule(self.core, block))
            for leaf in layer.adapter_layer_names:
                parameters = getattr(layer, leaf)
                if adapter_name in parameters:
                    parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, PreftConfig)
        state_dict = {plain_name(key): tensor for key, tensor in state_dict.items()}
        check_weights(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Returns the name that a weight is saved under; PEFT inverts this to load it."""
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with attachment_of(self.core).routing.declare(kwargs.get("adapter_names")):
            yield

    def unload(self) -> nn.Module:
        """Returns the base model as it was: layers, hooks and generate."""
        if pool_of(self.core) is not None:
            raise ValueError("unload: the model has a PreftPool in the same layers: close() the pool first")
        take_out(self.core)
        self.core.__dict__.pop("peft_config", None)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError(MERGE_REFUSED)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(MERGE_REFUSED)

    def unmerge_adapter(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "PreFT adapters cannot be combined into a weighted one: activate both, or train one adapter on all data"
        )


def _is_offloaded(model: nn.Module) -> bool:
    """Returns True where weights of the base model are on the meta device too."""
    return any(parameter.is_meta for name, parameter in model.named_parameters() if ".preft_" not in name)


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the dtype of a layer's own weights; float32 where none of them is a floating-point one."""
    own = (parameter.dtype for name, parameter in module.named_parameters() if "preft_" not in name)
    quantised = getattr(getattr(module, "base_layer", None), "compute_dtype", None)
    return next((dtype for dtype in own if dtype.is_floating_point), quantised or torch.float32)


def check_model(model: nn.Module) -> None:
    """Raises a ValueError if the model is not a decoder-only language model, or is a PeftModel."""
    kind = type(model).__name__
    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"the model is a {kind}: pass model.get_base_model(), which keeps the adapters of the {kind} in its layers"
        )
    classifies = isinstance(model, PreTrainedModel) and not model.can_generate() and not kind.endswith("ForCausalLM")
    if classifies and "For" in kind:
        raise ValueError(
            f"{kind} generates no text, so it has no decode tokens: PreFT adapts decoder-only language models, the "
            "...ForCausalLM ones; use LoRA here"
        )
    config = getattr(model, "config", None)
    if _reads_both_ways(model):
        raise ValueError(
            f"{kind} reads its text in both directions (config.is_decoder is False), so a prompt's tokens depend on "
            "the response: PreFT adapts decoder-only language models; load it with is_decoder=True and a language "
            "model head (AutoModelForCausalLM), or use LoRA here"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder model, whose prompt and response go through different "
            "halves: PreFT adapts decoder-only language models; use LoRA here"
        )


def _reads_both_ways(model: nn.Module) -> bool:
    """Returns True for encoders such as BERT, whose config says whether they are used as decoders."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or getattr(config, "is_encoder_decoder", False):
        return False
    # GPT-NeoX has the flag too, and is a decoder whatever it says
    is_flagged = getattr(config, "is_decoder", None) is False and not str(config.model_type).startswith("gpt_neox")
    return is_flagged and not any(getattr(module, "is_causal", None) is True for module in model.modules())


def check_name_is_free(adapter_name: str, model: nn.Module) -> None:
    """Raises a ValueError if the model has an adapter of this name, which a new one would replace in part."""
    taken = [module for module in model.modules() if isinstance(module, PreftLayer) and adapter_name in module.preft_A]
    if taken:
        raise ValueError(
            f"adapter name {adapter_name!r} is taken: {len(taken)} layers of the model have an adapter of this name; "
            f"choose another adapter_name, or call delete_adapter({adapter_name!r}) or unload() first"
        )


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Checks that an adapter's name cannot be mistaken for a part of a weight's name.

    Weights are called `<module path>.preft_A.<adapter name>`, and PEFT and transformers find an adapter's weights by
    looking for its name between the dots.

    Raises:
        ValueError: the name has other characters than letters, digits, - and _, is part of a module's path in this
            model, or contains the prefix of this method.
    """
    faults = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", adapter_name):
        faults.append("has other characters than letters, digits, - and _, or starts with one of the last two")
    inside = adapter_name in PreftModel.prefix and adapter_name != REFERENCE_NAME
    if inside or PreftModel.prefix in adapter_name:
        faults.append(f"overlaps with the prefix {PreftModel.prefix!r}")
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    own = {name for leaf in ("preft_A", "preft_B", "preft_R", "preft_bias") for name in _names_in(model, leaf)}
    if adapter_name in parts - own or hasattr(nn.ParameterDict, adapter_name):
        faults.append("is also part of a parameter's name in this model")
    if faults:
        raise ValueError(f"adapter name {adapter_name!r} {', and '.join(faults)}: choose another, such as 'adapter-1'")


def _names_in(model: nn.Module, leaf: str) -> set[str]:
    return {
        name
        for module in model.modules()
        if isinstance(module, PreftLayer) and leaf in module.adapter_layer_names
        for name in getattr(module, leaf)
    }
