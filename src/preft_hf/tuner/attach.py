"""Adds adapter layers to the target modules of a base model, and removes them."""

from collections.abc import Callable

from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from preft_hf.forward.hooks import ATTRIBUTE, attachment_of
from preft_hf.layers.block import PreftBlock
from preft_hf.layers.linear import PreftLinear
from preft_hf.tuner.names import plain_name, submodule, unwrapped
from preft_hf.tuner.targets import features_of

BLOCK = "preft"


def linear_at(model: nn.Module, name: str) -> PreftLinear:
    """Returns the adapter layer around the linear layer of this name; adds it if there is none."""
    name = plain_name(name)
    target = submodule(model, name)
    if isinstance(target, PreftLinear):
        return target
    features = features_of(target)
    assert features is not None
    attachment = attachment_of(model)
    layer = PreftLinear(target, features, attachment.phase).train(target.training)
    linear = layer.get_base_layer()
    if type(linear) not in (nn.Linear, Conv1D) or type(linear.weight) is not nn.Parameter:
        # for PEFT's get_base_weight and reports; torchao's argument is for merging alone
        layer.quantization_backend = resolve_quantization_backend(linear, get_apply_tensor_subclass=lambda: None)
    attachment.add_layer(layer)
    parent, _, last = name.rpartition(".")
    setattr(unwrapped(submodule(model, parent)), last, layer)
    return layer


def block_at(model: nn.Module, name: str) -> PreftBlock:
    """Returns the adapter layer inside the decoder layer of this name; adds it if there is none."""
    target = unwrapped(submodule(model, plain_name(name)))
    block = target._modules.get(BLOCK)
    if isinstance(block, PreftBlock):
        return block
    attachment = attachment_of(model)
    block = PreftBlock(model.config.get_text_config().hidden_size, attachment.phase)  # pyright: ignore
    attachment.add_layer(block, target.register_forward_hook(block.edit_output))
    target.add_module(BLOCK, block.train(target.training))
    return block


def take_out(model: nn.Module, which: Callable[[PreftLinear | PreftBlock], bool] = lambda layer: True) -> None:
    """Removes the chosen adapter layers from the model; with the last of them, its hooks and its generate."""
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PreftLinear) and which(child):
                setattr(parent, name, child.base_layer)
                attachment.drop_layer(child)
            elif isinstance(child, PreftBlock) and which(child):
                delattr(parent, name)
                attachment.drop_layer(child)
    if not attachment.layers:
        attachment.remove()
