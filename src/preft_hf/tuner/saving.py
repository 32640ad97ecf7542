"""Saves and pushes adapters: all files or none, with a fingerprint and a model card."""

import functools
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from peft import PeftModel
from torch.distributed.tensor import DTensor

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from preft_core.format.staging import publish_files, staging_in, write_config
from preft_core.hub.card import CARD_NAME, model_card, read_card, tags_of
from preft_core.hub.push_pull import Pushed, push_adapter
from preft_hf.config import PreftConfig
from preft_hf.layers.block import PreftBlock
from preft_hf.tuner.attach import BLOCK
from preft_hf.tuner.loading import layers_with
from preft_hf.tuner.names import unwrapped
from preft_hf.tuner.reading import is_preft
from preft_hf.tuner.resized import warn_of_resized
from preft_hf.tuner.targets import resolve

LEAVES = PreftBlock.adapter_layer_names


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
        # push_adapter writes the card
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


def push_in_one_commit(push: Callable[..., Any]) -> Callable[..., Any]:
    """The push_to_hub of transformers replaces the saved card with one that names no base model."""

    @functools.wraps(push)
    def push_to_hub(self: PeftModel, repo_id: str, **kwargs: Any) -> Any:
        active = [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)
        if not any(isinstance(self.peft_config.get(name), PreftConfig) for name in active):
            return push(self, repo_id, **kwargs)
        unknown = sorted(set(kwargs) - set(inspect.signature(push_model).parameters))
        if unknown:
            raise TypeError(f"push_to_hub of a PreFT adapter takes no {', '.join(unknown)}: leave it out")
        return push_model(self, repo_id, **kwargs)

    return push_to_hub


def save_in_one_step(save: Callable[..., None]) -> Callable[..., None]:
    """PEFT writes weights and then config in place: a killed save could leave one without the other."""

    @functools.wraps(save)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if not any(isinstance(self.peft_config.get(name), PreftConfig) for name in names):
            save(
                self,
                save_directory,
                safe_serialization=safe_serialization,
                selected_adapters=selected_adapters,
                save_embedding_layers=save_embedding_layers,
                is_main_process=is_main_process,
                **kwargs,
            )
            return
        _check_save(save_directory, safe_serialization, save_embedding_layers, kwargs)
        if save_embedding_layers == "auto" and is_main_process:
            warn_of_resized(self, names)
        if is_main_process:
            check_gathered(self, names, kwargs.get("state_dict"))
            if kwargs.get("state_dict") is None:
                check_configs(self, names)
        with staging_in(Path(save_directory)) as staging:
            save(
                self,
                str(staging),
                selected_adapters=names,
                save_embedding_layers=False,
                is_main_process=is_main_process,
                **kwargs,
            )
            if is_main_process:
                _publish(staging, Path(save_directory), names)

    return save_pretrained


def card_kept(save: Callable[..., None]) -> Callable[..., None]:
    """Trainers replace the card that says how to load a PreFT adapter with their own: this merges both."""

    @functools.wraps(save)
    def save_card(self: RepoCard, filepath: str | Path) -> None:
        card = Path(filepath)
        if card.name != CARD_NAME or not is_preft(card.parent) or not (card.parent / WEIGHTS_NAME).exists():
            save(self, filepath)
            return
        try:
            # PEFT's create_or_update_model_card drops the tags of the existing card
            tags = tags_of(read_card(card))
            save(self, filepath)
            text = model_card(load_adapter(card.parent), read_card(card), tags=tags)
        except ValueError as error:
            warnings.warn(f"{card} does not say how its PreFT adapter is loaded: {error}", stacklevel=2)
            save(self, filepath)
            return
        card.write_text(text, encoding="utf-8")

    return save_card


def _check_save(directory: str, safe_serialization: bool, embeddings: str | bool, others: dict[str, Any]) -> None:
    faults = []
    if Path(directory).is_file():
        faults.append(f"save_directory {directory} is a file: give a directory")
    if not safe_serialization:
        faults.append("safe_serialization is False: PreFT adapters are safetensors, never a pickle; leave it out")
    if embeddings is True:
        faults.append("save_embedding_layers is True: a PreFT adapter holds no embeddings; save the base model itself")
    if others.get("path_initial_model_for_weight_conversion") is not None:
        faults.append(
            "path_initial_model_for_weight_conversion: a PreFT adapter never changes base weights; leave it out"
        )
    if faults:
        raise ValueError("; ".join(faults))


def check_gathered(model: PeftModel, names: list[str], state_dict: Mapping[str, Any] | None) -> None:
    """Checks that the weights to save are complete, not one process's shard.

    Raises:
        ValueError: weights that are sharded or empty, or a state dict without the adapters' weights.
    """
    weights = dict(model.named_parameters()) if state_dict is None else state_dict
    faults = []
    for name in names:
        # with the adapter's name at the end, or without, as PEFT's get_peft_model_state_dict returns them
        endings = tuple(f".{leaf}{end}" for leaf in LEAVES for end in ("", f".{name}"))
        own = [(key, weights[key]) for key in sorted(weights) if key.endswith(endings)]
        sharded = [key for key, tensor in own if isinstance(tensor, DTensor)]
        empty = [key for key, tensor in own if tensor.numel() == 0]
        if not own:
            faults.append(f"state_dict has no weight of adapter {name!r}: pass the whole model's, or leave it out")
        if sharded:
            faults.append(
                f"{len(sharded)} weights of adapter {name!r} are sharded (FSDP2), such as {sharded[0]}: on every "
                "process call trainer.save_model(), or pass state_dict=accelerator.get_state_dict(model)"
            )
        if empty:
            faults.append(
                f"{len(empty)} weights of adapter {name!r} are empty (DeepSpeed ZeRO-3), such as {empty[0]}: on every "
                "process call trainer.save_model() with stage3_gather_16bit_weights_on_model_save set, or pass "
                "state_dict=accelerator.get_state_dict(model)"
            )
    if faults:
        raise ValueError("; ".join(faults))


def check_configs(model: PeftModel, names: list[str]) -> None:
    """Checks that the model's layers hold the adapters that their configs describe.

    Raises:
        ValueError: adapters on other modules, or with another scaling, than their configs say. A config that was
            changed after its adapter was made would be saved with weights that it does not describe.
    """
    faults = []
    base = unwrapped(model.get_base_model())
    for name in names:
        config = model.peft_config[name]
        assert isinstance(config, PreftConfig)
        suffix = "" if config.method == "lora" else f".{BLOCK}"
        wanted = {path + suffix for path in resolve(config, base)}
        layers = layers_with(base, name)
        described = f"adapter {name!r} has"
        if surplus := sorted(layers.keys() - wanted):
            faults.append(
                f"{described} weights on {len(surplus)} modules that its config does not choose, such as {surplus[0]}"
            )
        if missing := sorted(wanted - layers.keys()):
            faults.append(
                f"{described} no weights of {len(missing)} modules that its config chooses, such as {missing[0]}"
            )
        scalings = {layer.scaling[name] for layer in layers.values()}
        if other := sorted(scalings - {config.scaling}):
            faults.append(
                f"adapter {name!r}: the scaling of its config is {config.scaling} and its layers compute with "
                f"{other[0]}"
            )
    if faults:
        raise ValueError(
            f"{'; '.join(faults)}: the config was changed after the adapter was made, and nothing was saved; set it "
            "back, or make a new adapter from the changed config"
        )


def _publish(staging: Path, directory: Path, names: list[str]) -> None:
    """Checks the staged files, adds each adapter's fingerprint to its config, and moves all files into place."""
    card = staging / CARD_NAME
    folders = ["" if name == "default" else name for name in names]
    for folder in folders:
        adapter = load_adapter(staging / folder)
        config = json.loads((staging / folder / CONFIG_NAME).read_text()) | {"fingerprint": adapter.fingerprint}
        write_config(staging / folder, config)
        if folder == folders[0]:
            try:
                # PEFT's card has the tags of transformers and of the trainer
                tags = tags_of(read_card(card))
                text = model_card(adapter, read_card(directory / CARD_NAME), tags=tags)
                card.write_text(text, encoding="utf-8")
            except ValueError as error:
                # a card is no reason to lose a trained adapter
                warnings.warn(f"the adapter is saved, and its card is left as it is: {error}", stacklevel=2)
                card.unlink(missing_ok=True)
    for folder in folders:
        (directory / folder).mkdir(exist_ok=True)
        publish_files(staging / folder, directory / folder)
    if card.exists():
        card.replace(directory / CARD_NAME)
