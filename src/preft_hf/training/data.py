"""Turns as training samples: tokens with labels on the response."""

from collections.abc import Mapping, Sequence
from typing import Any

from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.turns import INERT, DataError, Turn, raise_faults

# what an answer may consist of besides its content
PARTS_OF_ANSWERS = frozenset({"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"})
# what a template need not write
KNOWN_TO_TEMPLATES = frozenset({"role", "content", "name", "tool_call_id"}) | INERT

Sample = dict[str, list[int]]
"""input_ids and labels of one row, of the same length, -100 on the prompt."""


class TemplateFault(DataError):
    """A chat template does not write a row out: the message names its line."""


def encode_turns(turns: Sequence[Turn], tokenizer: Any, max_length: int) -> tuple[list[Sample], int]:
    """Returns samples of at most max_length tokens, and how many turns were longer and so left out.

    A response ends with the end-of-text token (for messages, with whatever the chat template ends a turn with).

    Raises:
        DataError: messages that the chat template refuses, or whose prompt it writes in another way before a response
            than without it, or no sample left.
    """
    samples: list[Sample] = []
    faults: list[str] = []
    num_long = 0
    for turn in turns:
        try:
            prompt, whole = _texts(turn, tokenizer)
        except TemplateFault as error:
            faults.append(str(error))
            continue
        prompt_ids = tokenizer(prompt, add_special_tokens=isinstance(turn.prompt, str))["input_ids"]
        if not whole.startswith(prompt):
            faults.append(
                f"line {turn.line}: the chat template writes the prompt differently once an answer follows, so "
                "training would not see what is served; use prompt and response rows"
            )
            continue
        response_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        ids = prompt_ids + response_ids
        if len(ids) > max_length:
            num_long += 1
        elif not prompt_ids or not response_ids:
            faults.append(f"line {turn.line}: its prompt or its response has no token")
        else:
            samples.append({"input_ids": ids, "labels": [IGNORED_LABEL] * len(prompt_ids) + response_ids})
    if not samples and not faults:
        faults.append(f"all {num_long} turns have more than {max_length} tokens: raise the maximum length")
    raise_faults("the data", faults)
    return samples, num_long


def encode_prompts(turns: Sequence[Turn], tokenizer: Any, max_length: int) -> tuple[list[list[int] | None], int]:
    """Returns the token ids of each turn's prompt, None for one of max_length tokens or more, and how many those are.

    Raises:
        DataError: a prompt without a token, or messages that the chat template refuses or that have none.
    """
    found: list[list[int] | None] = []
    faults: list[str] = []
    for turn in turns:
        try:
            prompt = _prompt_text(turn, tokenizer)
        except TemplateFault as error:
            faults.append(str(error))
            continue
        ids = tokenizer(prompt, add_special_tokens=isinstance(turn.prompt, str))["input_ids"]
        if not ids:
            faults.append(f"line {turn.line}: its prompt has no token")
        found.append(ids if len(ids) < max_length else None)
    raise_faults("the data", faults)
    return found, found.count(None)


def _prompt_text(turn: Turn, tokenizer: Any) -> str:
    if isinstance(turn.prompt, str):
        return turn.prompt
    if not tokenizer.chat_template:
        raise DataError(
            f"line {turn.line} has messages, and the model's tokenizer has no chat template: use prompt and response "
            "rows, or a chat model"
        )
    for i in range(len(turn.prompt)):
        # templates leave the reasoning of earlier turns out
        _check_written(turn, tokenizer, turn.prompt, i, PARTS_OF_ANSWERS)
    return _rendered(turn, tokenizer, turn.prompt, add_generation_prompt=True)


def _texts(turn: Turn, tokenizer: Any) -> tuple[str, str]:
    prompt = _prompt_text(turn, tokenizer)
    if isinstance(turn.prompt, str):
        return prompt, f"{prompt}{turn.response}{tokenizer.eos_token or ''}"
    given = turn.response
    answer: dict[str, Any] = {"role": "assistant", "content": given} if isinstance(given, str) else given
    said = answer | {"content": answer.get("content") or ""}
    _check_written(turn, tokenizer, [*turn.prompt, said], len(turn.prompt), frozenset())
    return prompt, _rendered(turn, tokenizer, [*turn.prompt, answer], add_generation_prompt=False)


def _check_written(
    turn: Turn, tokenizer: Any, messages: list[dict[str, Any]], index: int, optional: frozenset[str]
) -> None:
    """Raises if the chat template leaves out a part of a message, which then would be neither seen nor learned.

    Args:
        optional: parts that a template may leave out of this message
    """
    message = messages[index]
    for name in sorted(message.keys() - KNOWN_TO_TEMPLATES - optional):
        # False and 0 say something that a template may not read
        if message[name] is None or message[name] in ("", [], {}):
            continue
        without = {key: value for key, value in message.items() if key != name}
        texts = [
            _rendered(turn, tokenizer, [*messages[:index], one, *messages[index + 1 :]], add_generation_prompt=False)
            for one in (message, without)
        ]
        if texts[0] == texts[1]:
            raise TemplateFault(
                f"line {turn.line}: the model's chat template leaves {name} of message {index} out, so it would not "
                f"be learned: put it into 'content', take a model whose template writes {name}, or leave it out"
            )


def _rendered(turn: Turn, tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Returns what the chat template writes.

    Raises:
        TemplateFault: the template refuses the messages, or cannot write them out.
    """
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=turn.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        raise TemplateFault(
            f"line {turn.line}: the chat template does not take its messages: {error or type(error).__name__}; "
            "write them as the model's template wants them, or leave the row out"
        ) from error


def collate(samples: Sequence[Mapping[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
    """Returns a batch padded on the right: input_ids, attention_mask and labels, each int64 (batch, length)."""
    import torch

    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(s[name]) + [fill] * (length - len(s[name])) for s in samples])

    num_tokens = torch.tensor([[len(sample["input_ids"])] for sample in samples])
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": (torch.arange(length) < num_tokens).long(),
        "labels": padded("labels", IGNORED_LABEL),
    }
