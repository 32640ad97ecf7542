"""Distils an all-token LoRA into a prefill-only adapter: KL divergence from its predictions on response tokens."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from preft_core.format.plain_lora import read_lora
from preft_hf.config import PreftConfig
from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.layers.linear import PreftLinear
from preft_hf.training.data import Sample, collate
from preft_hf.training.plain import plain_generation


@dataclass(frozen=True)
class Agreement:
    """How close a student's predictions of response tokens are to its teacher's, in the same context.

    Attributes:
        kl: mean KL divergence of the student from the teacher, KL(teacher || student), nats a token
        top1: share of positions with the same most likely token, 0 to 1
    """

    kl: float
    top1: float


def load_teacher(base: Any, lora: str | Path) -> Any:
    """Returns a PeftModel in eval mode with a plain PEFT LoRA (it acts on every token), sharing the base's weights.

    Args:
        base: unchanged
    Raises:
        ValueError: there is no adapter, a PreFT adapter, or an adapter of another base model's shapes.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(lora))
    if config.peft_type == "PREFT":
        raise ValueError(f"{lora} is already a prefill-only adapter: give the folder of a plain PEFT LoRA")
    if config.peft_type != "LORA":
        raise ValueError(f"{lora} has peft_type {config.peft_type}: give the folder of a plain PEFT LoRA")
    try:
        teacher = PeftModel.from_pretrained(sharing(base), str(lora))
    except RuntimeError as error:
        raise ValueError(f"{lora} does not fit the base model: {error}") from error
    return teacher.requires_grad_(False).eval()


def sharing(model: torch.nn.Module) -> Any:
    """Returns a copy of the model's modules that shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def widened(base: Any, lora: str | Path, rank: int) -> Any:
    """Returns a PeftModel with a LoRA-P student that starts as the LoRA's plain conversion, at a higher rank.

    The LoRA's rows of A come first; the other rows are random and their columns of B are zero. lora_alpha is chosen
    so that the LoRA's weights keep their scaling.

    Args:
        base: gets the student's layers
    Raises:
        AdapterError: a LoRA whose options a LoRA-P adapter cannot express.
        ValueError: a rank below the LoRA's.
    """
    from peft import get_peft_model

    source, tensors = read_lora(lora)
    if rank < source.r:
        raise ValueError(
            f"rank is {rank} and the teacher's is {source.r}: give at least the teacher's, or --start zero"
        )
    scaling = PreftConfig(r=source.r, lora_alpha=source.lora_alpha, use_rslora=source.use_rslora).scaling
    config = PreftConfig(
        method="lora",
        r=rank,
        lora_alpha=scaling * rank,
        lora_dropout=source.lora_dropout,
        target_modules=_listed(source.target_modules),
        exclude_modules=_listed(source.exclude_modules),
        layers_to_transform=_listed(source.layers_to_transform),
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(base, config)
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, PreftLinear)}
    strange = tensors.keys() ^ {f"{name}.preft_{leaf}" for name in layers for leaf in "AB"}
    if strange:
        raise ValueError(f"{lora} and the base model differ in {len(strange)} weights, such as {min(strange)}")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.preft_A["default"][: source.r] = tensors[f"{name}.preft_A"].float()
            layer.preft_B["default"][:, : source.r] = tensors[f"{name}.preft_B"].float()
    return student


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def response_logits(model: Any, batch: dict[str, Tensor], is_student: bool) -> Tensor:
    """Returns the logits that predict each response token: float32 (tokens, vocabulary).

    Args:
        batch: from `collate`
        is_student: whether the model is prefill-only; its prompt tokens are those without a label
    """
    mask = {"prefill_mask": (batch["labels"] == IGNORED_LABEL) & batch["attention_mask"].bool()} if is_student else {}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, **mask, use_cache=False).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != IGNORED_LABEL].float()


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns the mean of KL(teacher || student) over rows of logits (tokens, vocabulary), in nats."""
    return functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def distillation_loss(teacher: Any) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """Returns the loss of a student on a batch: its mean divergence from the teacher on response tokens."""

    def loss(student: Any, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = response_logits(teacher.to(batch["input_ids"].device), batch, is_student=False)
        return divergence(target, response_logits(student, batch, is_student=True))

    return loss


@torch.no_grad()
def agreement(
    teacher: Any, student: Any, samples: Sequence[Sample], pad_token_id: int, is_student: bool = True
) -> Agreement:
    """Returns how close the student is to the teacher on the response tokens of all samples.

    Args:
        is_student: False for a base model without an adapter
    """
    was_training = student.training
    student.eval()
    total, same, count = 0.0, 0, 0
    for i in range(0, len(samples), 8):
        batch = {k: v.to(student.device) for k, v in collate(samples[i : i + 8], pad_token_id).items()}
        target = response_logits(teacher.to(student.device), batch, is_student=False)
        found = response_logits(student, batch, is_student)
        total += float(divergence(target, found)) * len(found)
        same += int((target.argmax(-1) == found.argmax(-1)).sum())
        count += len(found)
    student.train(was_training)
    return Agreement(total / count, same / count)


@torch.no_grad()
def responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    progress: Callable[[int], None] = lambda num_rows: None,
) -> list[list[int]]:
    """Returns the model's response to each prompt as token ids, including the end-of-text token if it is generated.

    Args:
        prompts: token ids
        temperature: 0 takes the most likely token; otherwise tokens are sampled from the whole distribution. Of the
            model's generation_config.json only the special tokens are used
        progress: called with the number of rows of each finished batch
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        length = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(prompts[i])) + list(prompts[i]) for i in rows])
        lengths = torch.tensor([[len(prompts[i])] for i in rows])
        with plain_generation(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=(torch.arange(length) >= length - lengths).long().to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **(sampling or {"do_sample": False}),
            )
        for i, row in zip(rows, output[:, length:].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in ends), len(row) - 1)
            found[i] = row[: end + 1]
        progress(len(rows))
    return [found[i] for i in range(len(prompts))]
