"""DiReFT-P in vLLM: edits the residual stream after decoder layers, with the weights in vLLM's adapter slots.

A target implements vLLM's interface of a layer with LoRA (set_lora, reset_lora, set_mapping), so vLLM manages slots,
evictions and the ids of rows. A forward hook on the decoder layer calls it; under torch.compile, as a custom op.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.ops import add_direft_

BLOCK_LEAF = "preft"
ANY_ROW = "__preft_any_row__"
BLOCKS = frozenset(
    f"vllm.model_executor.models.{name}"
    for name in (
        "llama.LlamaDecoderLayer",
        "mistral.MistralDecoderLayer",
        "qwen2.Qwen2DecoderLayer",
        "qwen3.Qwen3DecoderLayer",
    )
)
"""Supported decoder layers: they return (hidden, residual), and the residual stream is the sum."""


def add_blocks(manager: Any, vllm_config: Any) -> int:
    """Registers a DiReFT-P target after each decoder layer of this worker. Returns how many.

    Args:
        manager: vLLM's LoRAModelManager, which writes an activated adapter into its `modules`
    """
    found = [
        (name, module)
        for name, module in manager.model.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in BLOCKS
    ]
    if not found:
        return 0
    # a subclass of vLLM's layer, so it is defined when vLLM is present
    target = _target_class()
    hidden_size = vllm_config.model_config.get_hidden_size()
    device = next(manager.model.parameters()).device
    for name, layer in found:
        key = f"{name}.{BLOCK_LEAF}"
        block = target(key, hidden_size, manager.lora_slots, manager.lora_config, device)
        block.set_mapping(manager._get_punica_wrapper(name))
        block.adapter_manager = (manager,)
        manager.register_module(key, block)
        vllm_config.compilation_config.static_forward_context[key] = block
        layer.register_forward_hook(functools.partial(_hook, block))
    return len(found)


def config_hash(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the plugin's identity to the hash of vLLM's LoRAConfig, which is part of the key of compiled graphs.

    vLLM loads ahead-of-time compiled graphs by that key, which does not cover the hooks of `add_blocks`. A graph that
    was compiled without them would ignore DiReFT-P adapters.
    """

    @functools.wraps(original)
    def hashed(self: Any) -> str:
        return hashlib.sha256(f"{original(self)} {_identity()}".encode()).hexdigest()

    return hashed


@functools.cache
def _identity() -> str:
    """Returns a hash of the plugin's source."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def set_adapter_mapping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Records whether any row of the next forward has an adapter, so that decode forwards skip DiReFT-P."""

    @functools.wraps(original)
    def mapped(self: Any, mapping: Any) -> Any:
        result = original(self, mapping)
        setattr(self, ANY_ROW, any(number > 0 for number in mapping.index_mapping))
        return result

    return mapped


def edit(block: Any, hidden: Tensor, residual: Tensor) -> None:
    """Edits the adapted rows of a decoder layer's output in place.

        hidden + residual  becomes  hidden + residual + B (A (hidden + residual) + bias)

    Args:
        hidden, residual: (rows, hidden size); the last rows may be padding
    """
    if not getattr(block.adapter_manager[0], ANY_ROW, False):
        return
    wrapper = block.punica_wrapper
    segments = getattr(wrapper, "segments", None)
    if segments is not None:
        # GroupedPunicaCPU: exact, the edited rows become (stream, 0)
        if not any(span.slot in block.filled for span in segments.spans or ()):
            return
        stream = (hidden + residual)[: segments.num_rows]
        add_direft_(stream, block.a[:, 0], block.b[:, 0], block.bias, segments)
        for span in segments.spans or ():
            hidden[span.begin : span.end] = stream[span.begin : span.end]
            residual[span.begin : span.end] = 0
        return
    index = wrapper._token_lora_indices[: hidden.shape[0]]
    wrapper.add_lora_linear(hidden, hidden + residual, (block.a,), (block.b,), 1.0, (block.hidden_size,))
    # index -1 is the last row of the table, which is zero
    hidden += block.constant[index]


@torch.library.custom_op("preft::edit_stream", mutates_args=("hidden", "residual"))
def edit_stream(hidden: Tensor, residual: Tensor, key: str) -> None:
    """`edit` as an op that torch.compile does not trace. key: of the target in vLLM's forward context."""
    from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]

    edit(get_forward_context().no_compile_layers[key], hidden, residual)


@edit_stream.register_fake
def _(hidden: Tensor, residual: Tensor, key: str) -> None:
    return None


def _hook(block: Any, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
    hidden, residual = output
    if torch.compiler.is_compiling():
        edit_stream(hidden, residual, block.key)
    else:
        edit(block, hidden, residual)


@functools.cache
def _target_class() -> type:
    from vllm.lora.layers import BaseLayerWithLoRA  # pyright: ignore[reportMissingImports]

    class BlockWithEdit(BaseLayerWithLoRA):
        """The slots of one decoder layer.

        a: (slots, 1, rank, hidden), b: (slots, 1, hidden, rank), bias: (slots, rank), constant: (slots + 1, hidden)
        """

        def __init__(self, key: str, hidden_size: int, slots: int, lora_config: Any, device: torch.device):
            super().__init__()
            rank, dtype = lora_config.max_lora_rank, lora_config.lora_dtype
            self.key, self.hidden_size = key, hidden_size
            # slots whose adapter edits this layer
            self.filled: set[int] = set()
            self.a = torch.zeros(slots, 1, rank, hidden_size, dtype=dtype, device=device)
            self.b = torch.zeros(slots, 1, hidden_size, rank, dtype=dtype, device=device)
            self.bias = torch.zeros(slots, rank, dtype=dtype, device=device)
            # B bias of each slot, and a row of zeros
            self.constant = torch.zeros(slots + 1, hidden_size, dtype=dtype, device=device)

        def reset_lora(self, index: int) -> None:
            for table in (self.a, self.b, self.bias, self.constant):
                table[index] = 0
            self.filled.discard(index)

        def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
            self.reset_lora(index)
            self.filled.add(index)
            rank = lora_a.shape[0]
            self.a[index, 0, :rank].copy_(lora_a[:, :-1])
            self.b[index, 0, :, :rank].copy_(lora_b)
            self.bias[index, :rank].copy_(lora_a[:, -1])
            self.constant[index].copy_((lora_b.float() @ lora_a[:, -1].float()).to(self.constant.dtype))

    return BlockWithEdit
