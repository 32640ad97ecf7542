"""The hand-written two-phase loop: an adapted copy of the model fills the cache, the untouched base model decodes.

Nothing of preft_hf runs here. LoRA is merged into a copy's weights, DiReFT and LoReFT are plain forward hooks.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from preft_hf.forward.caches import cache_argument, cache_of


def adapted_copy(base: PreTrainedModel, method: str, weights: dict[str, Tensor], scaling: float) -> PreTrainedModel:
    """Returns a copy of the base on which the adapter acts on every token.

    Args:
        weights: the adapter's tensors by module path and leaf, "<module path>.preft_A" and so on
    """
    model = copy.deepcopy(base)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        path, _, leaf = key.rpartition(".")
        groups.setdefault(path.removeprefix("base_model.model."), {})[leaf] = tensor.detach().clone()
    for path, leaves in groups.items():
        if method == "lora":
            module = model.get_submodule(path)
            delta = scaling * leaves["preft_B"] @ leaves["preft_A"]
            module.weight.data += delta.T if isinstance(module, Conv1D) else delta
        else:
            layer = model.get_submodule(path.removesuffix(".preft"))
            layer.register_forward_hook(_edit(method, leaves, scaling))
    return model


def _edit(method: str, leaves: dict[str, Tensor], scaling: float):
    a, bias = leaves["preft_A"], leaves["preft_bias"]
    if method == "loreft":
        # rows made orthonormal one after the other
        rows: list[Tensor] = []
        for row in leaves["preft_R"].double():
            for done in rows:
                row = row - (row @ done) * done
            rows.append(row / row.norm())
        rotation = torch.stack(rows).float()

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if method == "loreft":
            edited = hidden + (hidden @ a.T + bias - hidden @ rotation.T) @ rotation
        else:
            edited = hidden + scaling * (hidden @ a.T + bias) @ leaves["preft_B"].T
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


@torch.no_grad()
def two_phase_greedy(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    input_ids: Tensor,
    num_new: int,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    first: int = 0,
    before_decode: Callable[[Any], None] = lambda cache: None,
) -> tuple[Tensor, Tensor]:
    """Returns the new tokens (batch, num_new) and the logits they came from (batch, num_new, vocabulary).

    Args:
        cache: of any class, by default an empty DynamicCache; with a cache that is given no attention mask is passed,
            since it may hold fewer tokens than the mask has
        first: position of the first of input_ids, for a cache that is not empty
        before_decode: called with the cache before each decode forward
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    masked = cache is None
    cache = DynamicCache(config=prefill.config) if masked else cache
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + first
    arguments = {"attention_mask": mask} if masked else {}
    output = prefill(input_ids=input_ids, position_ids=positions, **arguments, **cache_argument(cache), use_cache=True)
    tokens, logits = [], []
    for _ in range(num_new):
        logits.append(output.logits[:, -1])
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
        position = mask.sum(-1, keepdim=True) - 1 + first
        before_decode(cache_of(output))
        output = decode(
            input_ids=tokens[-1],
            position_ids=position,
            **({"attention_mask": mask} if masked else {}),
            **cache_argument(cache_of(output)),
            use_cache=True,
        )
    return torch.cat(tokens, 1), torch.stack(logits, 1)


@torch.no_grad()
def greedy_from(
    prefilled: ModelOutput, decode: PreTrainedModel, num_new: int, allowed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns new tokens and their logits as `two_phase_greedy`, from a prefill whose model made the cache itself.

    Args:
        allowed: only tokens below are chosen
    """
    tokens, logits, output = [], [], prefilled
    for _ in range(num_new):
        logits.append(output.logits[:, -1])
        tokens.append(logits[-1][:, :allowed].argmax(-1, keepdim=True))
        name = next((name for name in ("cache_params", "state") if output.get(name) is not None), None)
        kept = cache_argument(cache_of(output)) if name is None else {name: output[name]}
        output = decode(input_ids=tokens[-1], use_cache=True, **kept)
    return torch.cat(tokens, 1), torch.stack(logits, 1)
