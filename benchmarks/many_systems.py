"""The systems that `benchmarks.many` compares: generation for a batch in which every row has its own adapter."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from preft_hf import PreftConfig, PreftPool
from preft_hf.forward.caches import cache_argument, cache_of
from preft_hf.tuner.targets import linear_layers

SYSTEMS = ("base", "peft-lora", "lora-p", "direft-p")
RANK = 16
TOLERANCE = 1e-3
"""Largest allowed difference of logits to the oracle: float32 over 30 layers. Adapters change them far more."""


@dataclass(frozen=True)
class System:
    """One system. `arguments` returns generate's arguments for the rows' adapters; `adapters_in_decode`: all-token."""

    name: str
    model: Any
    arguments: Callable[[list[str]], dict[str, Any]]
    adapters_in_decode: bool = False


def adapter_names(num_adapters: int) -> list[str]:
    return [f"adapter-{i}" for i in range(num_adapters)]


def save_adapters(base: Any, method: str, num_adapters: int, folder: Path) -> dict[str, Path]:
    """Writes random adapters with different weights and returns their directories."""
    model = get_peft_model(
        copy.deepcopy(base),
        PreftConfig(method=method, r=RANK, init_weights=False, task_type="CAUSAL_LM"),  # type: ignore[arg-type]
    )
    places = {}
    for seed, name in enumerate(adapter_names(num_adapters)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "preft_A" in path:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                elif "preft_B" in path:
                    parameter.normal_(std=0.01)
        model.save_pretrained(folder / method / name)
        places[name] = folder / method / name
    return places


def make_system(name: str, base: Any, num_adapters: int, folder: Path) -> System:
    """Returns a system with num_adapters adapters; PEFT's layers and the pool have the same LoRA weights."""
    if name == "base":
        return System(name, copy.deepcopy(base), lambda names: {})
    if name == "peft-lora":
        return System(name, _peft_lora(base, num_adapters, folder), lambda names: {"adapter_names": names}, True)
    method = {"lora-p": "lora", "direft-p": "direft"}[name]
    places = {adapter: folder / method / adapter for adapter in adapter_names(num_adapters)}
    if not all((place / "adapter_config.json").exists() for place in places.values()):
        places = save_adapters(base, method, num_adapters, folder)
    model = copy.deepcopy(base)
    PreftPool.from_pretrained(model, places, num_slots=num_adapters)
    return System(name, model, lambda names: {"adapter_names": names})


def _peft_lora(base: Any, num_adapters: int, folder: Path) -> Any:
    if not (folder / "lora" / adapter_names(num_adapters)[-1] / "adapter_config.json").exists():
        save_adapters(base, "lora", num_adapters, folder)
    targets = sorted({path.rpartition(".")[2] for path in linear_layers(base) if "head" not in path})
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    names = adapter_names(num_adapters)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        saved = load_file(folder / "lora" / name / "adapter_model.safetensors")
        scaling = PreftConfig(method="lora", r=RANK).scaling
        for key, tensor in saved.items():
            path, _, leaf = key.removesuffix(".weight").rpartition(".")
            layer: Any = model.get_base_model().get_submodule(path.removeprefix("base_model.model."))
            lora = layer.lora_A if leaf == "preft_A" else layer.lora_B
            # PEFT's scaling is lora_alpha / r = 1 here
            lora[name].weight.data.copy_(tensor if leaf == "preft_A" else tensor * scaling)
    return model.eval()


@contextmanager
def adapted(model: Any, method: str, place: Path) -> Iterator[None]:
    """Puts one saved adapter on every token of a model, by plain torch: merged LoRA, or hooks for DiReFT."""
    saved = load_file(place / "adapter_model.safetensors", device=str(model.device))
    scaling = PreftConfig(method=method, r=RANK).scaling  # type: ignore[arg-type]
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        path, _, leaf = key.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        modules.setdefault(path, {})[leaf] = tensor
    kept, handles = [], []
    for path, leaves in modules.items():
        module: nn.Module = model.get_submodule(path.removesuffix(".preft"))
        if method == "lora":
            weight: Tensor = module.weight.data  # type: ignore[assignment]
            kept.append((weight, weight.clone()))
            weight += scaling * leaves["preft_B"] @ leaves["preft_A"]
        else:
            handles.append(module.register_forward_hook(_edit(leaves, scaling)))
    try:
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)
        for handle in handles:
            handle.remove()


def _edit(leaves: dict[str, Tensor], scaling: float) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + scaling * (output @ leaves["preft_A"].T + leaves["preft_bias"]) @ leaves["preft_B"].T

    return hook


@torch.no_grad()
def check(system: System, base: Any, ids: Tensor, names: list[str], folder: Path, num_steps: int = 4) -> None:
    """Compares a few rows of a mixed batch with a loop over single adapters that shares no code with preft_hf.

    Raises:
        RuntimeError: a wrong result, which is not timed.
    """
    produced = system.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_steps,
        min_new_tokens=num_steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **system.arguments(names),
    )
    for row in sorted({0, len(names) // 2, len(names) - 1}):
        tokens, logits = produced.sequences[row : row + 1, ids.shape[1] :], [x[row] for x in produced.logits]
        expected = _oracle(system, base, ids[row : row + 1], tokens, names[row], folder)
        difference = max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True))
        if difference > TOLERANCE:
            raise RuntimeError(
                f"{system.name}, row {row} of {len(names)}: logits differ by {difference:.2e} (allowed {TOLERANCE}): "
                "a wrong result is not timed"
            )
        if system.name != "base":
            plain = base(input_ids=ids[row : row + 1]).logits[0, -1]
            if (logits[0] - plain).abs().max() < 100 * TOLERANCE:
                raise RuntimeError(f"{system.name}: the adapter changes nothing, so the check would prove nothing")


def _oracle(system: System, base: Any, ids: Tensor, tokens: Tensor, name: str, folder: Path) -> list[Tensor]:
    """Returns the logits of each token, with an adapted prompt and adapted or base decode."""
    method = {"lora-p": "lora", "peft-lora": "lora", "direft-p": "direft"}.get(system.name)
    if method is None:
        first = base(input_ids=ids, use_cache=True)
        return [first.logits[0, -1], *_decode(base, cache_of(first), tokens)]
    with adapted(base, method, folder / method / name):
        first = base(input_ids=ids, use_cache=True)
        if system.adapters_in_decode:
            return [first.logits[0, -1], *_decode(base, cache_of(first), tokens)]
    return [first.logits[0, -1], *_decode(base, cache_of(first), tokens)]


def _decode(model: Any, cache: Any, tokens: Tensor) -> list[Tensor]:
    logits = []
    for i in range(tokens.shape[1] - 1):
        output = model(input_ids=tokens[:, i : i + 1], **cache_argument(cache), use_cache=True)
        logits.append(output.logits[0, -1])
    return logits
