"""What training sees: prefill masks from labels, a collator, one sample per turn, activation checkpointing."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preft_hf.phase import ForwardPhase

IGNORED_LABEL = -100


def mask_from_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns bool (batch, length), True on prompt tokens: those that are attended to and carry no label.

        mask = (labels == -100) & (attention_mask != 0)

    Args:
        labels: int64, (batch, length), -100 where there is no loss
        attention_mask: (batch, length), 0 on padding; None, or any other shape, counts every token as attended
    """
    mask = labels == IGNORED_LABEL
    if attention_mask is not None and attention_mask.shape == labels.shape:
        mask = mask & attention_mask.to(device=labels.device, dtype=torch.bool)
    return mask


def check_prompts(
    mask: Tensor, labels: Tensor, attention_mask: Any, position_ids: Any, input_ids: Any = None
) -> Tensor:
    """Returns the mask, once every token in the loss is known to have a prompt token before it in its sequence.

    From a token that has none the adapter could never learn. A sequence is a row, or a part of it where the positions
    start anew. Padding-free rows have position ids instead of an attention mask, and trainers take the label off the
    first token of each sequence in them, so there a prompt token at position 0 does not count.

    Also under torch.compile, where it is one operation in the graph, which a compiled `fullgraph=True` step allows.

    Args:
        mask: bool, (batch, length), True on prompt tokens
        labels: int64, (batch, length)
        attention_mask: of the forward; None in padding-free rows
        position_ids: of the forward; of another shape than labels they are left out of account
        input_ids: of the forward, for the warning; None, or of another shape, leaves it out
    Returns:
        bool, (batch, length); the mask itself, under torch.compile a copy
    Raises:
        ValueError: naming the rows.
    Warns:
        if all prompt tokens are one and the same token that also follows labelled ones, as in plain text whose
        collator took the label off each end of text along with the padding.
    """
    positions = position_ids if isinstance(position_ids, Tensor) and position_ids.shape == mask.shape else None
    tokens = input_ids if isinstance(input_ids, Tensor) and input_ids.shape == mask.shape else None
    padding_free = attention_mask is None and positions is not None
    if torch.compiler.is_compiling():
        return _checked_in_graph(mask, labels, positions, tokens, padding_free)
    _check_prompts(mask, labels, positions, tokens, padding_free)
    return mask


def _check_prompts(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool
) -> None:
    # a row's first label is in no loss: nothing stands before it that could predict it
    scored = labels != IGNORED_LABEL
    scored[:, :1] = False
    prompts, starts = mask, torch.zeros_like(mask)
    if positions is not None:
        # a position repeated above 0 is a gap in the attention mask
        starts[:, 1:] = (positions[:, 1:] < positions[:, :-1]) | (positions[:, 1:] == 0)
        prompts = mask & (positions != 0) if padding_free else mask
    without = (scored & (_count_before(prompts, starts) == 0)).any(1)
    alike = without.new_zeros(1)
    if tokens is not None and tokens.numel():
        highest, lowest = tokens.where(prompts, tokens.amin()).amax(), tokens.where(prompts, tokens.amax()).amin()
        alike = ((highest == lowest) & (prompts & (_count_before(scored, starts) > 0)).any())[None]
    # one wait for the device
    *rows, is_alike = torch.cat([without, alike]).tolist()
    if any(rows):
        raise ValueError(
            f"rows {[i for i, fault in enumerate(rows) if fault]} of the batch have labels with no prompt token "
            f"(label {IGNORED_LABEL} and attended) before them in their sequence, and a prefill-only adapter acts on "
            "prompt tokens alone, so it would not learn from them: train on prompt and response pairs with label "
            f"{IGNORED_LABEL} on the prompt, packed whole if at all (packing_strategy='bfd'), or pass prefill_mask"
        )
    if is_alike and tokens is not None:
        warnings.warn(
            f"all prompt tokens of a batch are the token {int(tokens[prompts][0])}, and it follows labelled tokens "
            "too: if that is plain text, its collator took the label off the end-of-text token because pad_token is "
            "eos_token, and the adapter learns on that token alone; train on prompt and response pairs",
            stacklevel=2,
        )


def _count_before(counted: Tensor, starts: Tensor) -> Tensor:
    """Returns how many tokens up to and with each one are counted, from the start of its sequence in the row."""
    total = counted.cumsum(1)
    return total - (total - counted.long()).where(starts, 0).cummax(1).values


# it waits for the device, which a CUDA graph could not hold; torch 2.7 knows no such tag, nor tags here
_UNSAFE: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("preft_hf::checked_mask", mutates_args=(), **_UNSAFE)
def _checked_in_graph(
    mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool
) -> Tensor:
    """Returns a copy of the mask, so that no compiler drops the check as dead code."""
    _check_prompts(mask, labels, positions, tokens, padding_free)
    return mask.clone()


@_checked_in_graph.register_fake
def _(mask: Tensor, labels: Tensor, positions: Tensor | None, tokens: Tensor | None, padding_free: bool) -> Tensor:
    return torch.empty_like(mask)


class PrefillMaskCollator:
    """Adds `prefill_mask`, bool (batch, length), to the batches of another collator.

    For the cases where labels do not reach the model: label smoothing, `compute_loss_func`, losses of your own, and
    `compute_metrics` in TRL's SFTTrainer and DPOTrainer. The prompt is read from `labels`, or from the
    `completion_mask` of TRL's preference collators.

        Trainer(..., data_collator=PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer)))
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Returns the inner collator's batch with its mask.

        Raises:
            ValueError: the batch has nothing to read the prompt from, or a label without a prompt.
        """
        batch = dict(self.collator(features))
        labels, completion = batch.get("labels"), batch.get("completion_mask")
        if not isinstance(labels, Tensor) and isinstance(completion, Tensor):
            labels = batch["input_ids"].masked_fill(completion == 0, IGNORED_LABEL)
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"the batch has {', '.join(sorted(batch))} but no labels tensor, nor completion_mask: "
                f"PrefillMaskCollator takes the prompt from labels that are {IGNORED_LABEL} there; give it a collator "
                "that pads labels, such as DataCollatorForSeq2Seq"
            )
        attended, positions = batch.get("attention_mask"), batch.get("position_ids")
        mask = mask_from_labels(labels, attended)
        batch["prefill_mask"] = check_prompts(mask, labels, attended, positions, batch.get("input_ids"))
        return batch


def expand_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """Returns one sample per assistant turn, everything before it being the prompt: what a stateless server sees.

    A chat server that keeps no cache prefills the earlier assistant turns again, with the adapter. Training on whole
    conversations with a label on every assistant token leaves them base instead, which is what a server that
    continues a KV cache does.

        expand_turns([user, assistant, user, assistant])
        == [{"prompt": [user], "completion": [assistant]},
            {"prompt": [user, assistant, user], "completion": [assistant]}]

    TRL's SFTTrainer takes the samples as conversational prompt-completion data:

        Dataset.from_list([sample for row in rows for sample in expand_turns(row["messages"])])

    Args:
        messages: dicts with "role" and "content", in order
    Raises:
        ValueError: a message without a role, an assistant turn with nothing before it, or no assistant turn.
    """
    faults = [f"message {i} has no 'role'" for i, message in enumerate(messages) if "role" not in message]
    if messages and messages[0].get("role") == "assistant":
        faults.append("message 0 is an assistant turn, so nothing before it could be its prompt")
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        faults.append("no message has the role 'assistant'")
    if faults:
        raise ValueError(f"expand_turns: {'; '.join(faults)}: give messages that end a prompt with an assistant turn")
    return [{"prompt": [dict(m) for m in messages[:i]], "completion": [dict(messages[i])]} for i in turns]


class CheckpointWithPhase:
    """A layer's checkpointing function that recomputes under the phase of the first computation.

    transformers checkpoints a layer's `forward`, so the recomputation runs no module hook and would meet the phase of
    whichever forward came last.
    """

    def __init__(self, checkpoint: Callable[..., Any], phase: ForwardPhase):
        self.checkpoint = checkpoint
        self.phase = phase

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        phase, first = self.phase, self.phase.snapshot()

        def computation(*inputs: Any) -> Any:
            with phase.replay(first):
                return function(*inputs)

        return self.checkpoint(computation, *args)


def keep_phase_in_checkpoints(modules: Sequence[nn.Module], phase: ForwardPhase) -> None:
    """Wraps the checkpointing function of each module that has checkpointing switched on. Idempotent."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointWithPhase):
            module._gradient_checkpointing_func = CheckpointWithPhase(function, phase)  # type: ignore[assignment]


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that can checkpoint their activations, whether or not they do now."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
