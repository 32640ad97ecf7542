"""LoRA+ for LoRA-P: PEFT's own function looks for parameters named lora_B and finds none in a PreFT adapter."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel


def create_loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Returns an optimizer that trains B of LoRA-P adapters at a higher learning rate than A.

        lr of A = lr
        lr of B = lr * loraplus_lr_ratio

    Takes the arguments of `peft.optimizers.create_loraplus_optimizer`, except for embeddings, which PreFT does not
    adapt. Give it to a Trainer as `optimizers=(optimizer, None)`.

    Args:
        optimizer_cls: such as torch.optim.AdamW
        lr: above 0
        loraplus_lr_ratio: at least 1
        loraplus_weight_decay: of all trainable parameters
        options: further arguments of optimizer_cls
    Raises:
        ValueError: a ratio below 1, or an adapter that is trained with another method than lora.
    Source: LoRA+, arXiv 2402.12354.
    """
    if loraplus_lr_ratio < 1:
        raise ValueError(
            f"loraplus_lr_ratio is {loraplus_lr_ratio}: give the learning rate of B over that of A, 1 or more"
        )
    methods = {name: getattr(config, "method", None) for name, config in model.peft_config.items()}
    others = [f"{name} ({methods[name]})" for name in model.active_adapters if methods.get(name) != "lora"]
    if others:
        raise ValueError(
            f"LoRA+ is for PreFT adapters of method lora, and the active adapters have {', '.join(others)}: make "
            "the optimizer without LoRA+"
        )
    parts: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[".preft_B." in name].append(parameter)
    return optimizer_cls(
        [
            {"params": parts[False], "lr": lr, "weight_decay": loraplus_weight_decay},
            {"params": parts[True], "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        ],
        lr=lr,
        **options,
    )
