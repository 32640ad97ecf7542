"""Which tokens of a forward are prefill: by its mask, its labels, a declaration, or its cache, in this order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preft_hf.forward.cache_record import record_of
from preft_hf.forward.caches import cache_of, cached_length
from preft_hf.forward.label_checks import check_loss
from preft_hf.forward.labels import LabelsRule, trainer_of_step
from preft_hf.forward.positions import WholePrefill
from preft_hf.layers.phase import SharedPhase, declared, phase_of_mask


def given_phase(mask: Any, values: Mapping[str, Any], shape: tuple[int, ...]) -> SharedPhase:
    """Returns the phase that `prefill_mask` says.

    Args:
        mask: bool, (batch, length); True or False for all tokens; or what generate passes on
        values: the forward's arguments by name
        shape: (batch, length)
    Raises:
        ValueError: a mask of another kind.
        RuntimeError: a mask that generate made for another forward.
    """
    if isinstance(mask, WholePrefill):
        if not torch.compiler.is_compiling():
            mask.check(cached_length(cache_of(values)), shape[1])
        return True
    if isinstance(mask, bool):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prefill_mask is {found}: give torch.bool of shape {shape} (batch, length), True on the tokens to adapt, "
            "or True or False for all of them"
        )
    return phase_of_mask(check_loss(mask, values))


def inferred_phase(
    values: Mapping[str, Any], shape: tuple[int, ...], is_training: bool, is_generating: bool, labels: LabelsRule
) -> SharedPhase:
    """Returns the phase of a forward that was given no `prefill_mask`.

    Args:
        values: the forward's arguments by name
        shape: (batch, length)
        is_training: whether the model is in train mode
        is_generating: whether the model's generate is running
        labels: reads the phase from labels, where the forward has some
    Raises:
        RuntimeError: generate called the model without saying which tokens are prompt tokens.
        ValueError: nothing tells prompt tokens from others, or labels that do not fit.
    """
    if is_generating:
        raise RuntimeError(
            "generate called the model without prepare_inputs_for_generation, so nothing tells which tokens are "
            "prompt tokens: this decoding method is not supported with a PreFT adapter; leave guidance_scale out, "
            "and pass prefill_mask in a custom loop or logits processor"
        )
    if values.get("labels") is not None:
        return labels.phase(values, shape)
    declaration = declared()
    if isinstance(declaration, tuple):
        return _phase_of_context(declaration, values, shape)
    if declaration is not None:
        return declaration
    if is_training:
        raise ValueError(
            "a PreFT model in train mode was given neither labels nor prefill_mask, so it cannot tell prompt from "
            "response tokens: pass labels with -100 on the prompt, or, where the trainer withholds labels from "
            "the model (label smoothing, compute_loss_func), pass prefill_mask with PrefillMaskCollator"
        )
    trainer = trainer_of_step()
    if trainer is not None:
        raise ValueError(
            f"{trainer} gave the model neither labels nor prefill_mask in evaluation, where rows of prompt and "
            "response would all count as prompt: pass prefill_mask with PrefillMaskCollator, leave out what "
            "withholds the labels (compute_metrics in TRL's trainers, label smoothing, compute_loss_func), or, "
            'if the rows are prompts alone, evaluate inside preft_phase("prefill")'
        )
    return _phase_of_cache(cache_of(values), shape[1])


def _phase_of_context(lengths: tuple[int, ...], values: Mapping[str, Any], shape: tuple[int, ...]) -> SharedPhase:
    num_rows = shape[0]
    if len(lengths) not in (1, num_rows):
        raise ValueError(
            f"preft_scoring has {len(lengths)} context lengths and the forward {num_rows} rows: give one per row"
        )
    held = cached_length(cache_of(values))
    if held != 0:
        raise ValueError(
            "a forward inside preft_scoring was given a cache that is not empty: give each row whole, its context and "
            'its continuation, or use preft_phase("prefill") and then preft_phase("decode")'
        )
    tokens = next(values[name] for name in ("input_ids", "inputs_embeds") if values.get(name) is not None)
    attended = values.get("attention_mask")
    if isinstance(attended, Tensor) and tuple(attended.shape) == shape:
        attended = attended.to(tokens.device, torch.bool)
    else:
        attended = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    place = attended.cumsum(1)
    return phase_of_mask(attended & (place <= torch.tensor(lengths, device=tokens.device)[:, None]))


def _phase_of_cache(cache: Any, num_tokens: int) -> SharedPhase:
    length, record = cached_length(cache), record_of(cache)
    if record is not None and record.length == 0:
        # it holds a prompt and says that it is empty
        length = None
    if length == 0:
        return True
    if length is not None and num_tokens == 1:
        return False
    raise ValueError(
        f"a forward of {num_tokens} tokens on a cache "
        + ("without a length" if length is None else f"of {length} tokens")
        + ' may be the next chunk of a prompt or generated tokens: say which with preft_phase("prefill") or '
        'preft_phase("decode"), or pass prefill_mask'
    )
