"""Several adapters of one model, saved: of each method, of different ranks, on different layers."""

import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from preft_core.format.adapter import load_adapter
from preft_hf import PreftPool
from preft_hf.tuner.targets import linear_layers
from tests.hf.cases import NEW_TOKENS, prompt
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import make_base, make_preft

BASE = "__base__"
KINDS = ["held", "pooled", "both"]


@dataclass
class SavedAdapters:
    """base: untouched; adapted: adapter name -> a copy that it adapts on every token; paths: name -> saved adapter."""

    base: PreTrainedModel
    adapted: dict[str, PreTrainedModel]
    paths: dict[str, Path]

    def model(self, kind: str, num_slots: int = 4, device: str = "cpu"):
        """Returns a new model that knows all adapters: in its layers, in a pool, or some here and some there."""
        model = copy.deepcopy(self.base).to(device)
        names = list(self.paths)
        held = {"held": names, "pooled": [], "both": names[1:3]}[kind]
        if held:
            model = PeftModel.from_pretrained(model, self.paths[held[0]], adapter_name=held[0]).eval()
            for name in held[1:]:
                model.load_adapter(self.paths[name], adapter_name=name)
        if len(held) < len(names):
            PreftPool.from_pretrained(
                model, {name: path for name, path in self.paths.items() if name not in held}, num_slots=num_slots
            )
        return model

    def oracle(self, name: str, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the two-phase loop's tokens and logits for rows that all have this adapter."""
        return two_phase_greedy(self.adapted[name], self.base, ids, NEW_TOKENS, mask)

    def oracle_rows(self, names: list[str], ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the two-phase loop's tokens and logits of each row by itself."""
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [self.oracle(name, row[keep.bool()][None]) for name, row, keep in zip(names, ids, mask, strict=True)]
        return torch.cat([tokens for tokens, _ in rows]), torch.cat([logits for _, logits in rows])


@functools.cache
def saved_adapters(architecture: str = "llama", **overrides: object) -> SavedAdapters:
    base = make_base(architecture, **overrides)
    some = sorted({name.rpartition(".")[2] for name in linear_layers(base) if "head" not in name})[:2]
    settings = {
        "wide": {"method": "lora", "r": 4},
        "few": {"method": "lora", "r": 12, "target_modules": some},
        "stable": {"method": "lora", "r": 5, "use_rslora": True},
        "edit": {"method": "direft", "r": 3},
        "turn": {"method": "loreft", "r": 9, "layers_to_transform": [1]},
    }
    root = Path(tempfile.mkdtemp(prefix="preft-adapters-"))
    adapted, paths = {BASE: base}, {}
    for seed, (name, setting) in enumerate(settings.items(), 1):
        make_preft(copy.deepcopy(base), seed=seed, **setting).save_pretrained(root / name)
        saved = load_adapter(root / name)
        adapted[name] = adapted_copy(base, saved.config.method, saved.tensors, saved.config.scaling)
        paths[name] = root / name
    return SavedAdapters(base, adapted, paths)


# the names that other tests import
Crowd, crowd = SavedAdapters, saved_adapters


NAMES = ["turn", "wide", BASE, "few", "edit", "wide", "stable"]


def prompts(num_rows: int = len(NAMES), length: int = 9) -> Tensor:
    """Returns rows of which two are the same prompt, for different adapters."""
    ids = prompt(num_rows, length)
    ids[1:2] = ids[:1]
    return ids
