"""Training rows for `preft train`: read from JSONL, checked, and turned into tokens with labels on the response."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.turns import expand_turns

MAX_FAULTS = 20
# what other programs put beside messages and give to the chat template, or read as tools
UNKNOWN_TO_TEMPLATES = ("chat_template_kwargs", "documents", "functions")
# what an answer may consist of besides its content
PARTS_OF_ANSWERS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Sample = dict[str, list[int]]
"""input_ids and labels of one row, of the same length, -100 on the prompt."""


class DataError(ValueError):
    """A row of the data cannot be trained on: the message names its line."""


class TemplateFault(DataError):
    """A chat template does not write a row out: the message names its line."""


@dataclass(frozen=True)
class Turn:
    """A prompt and its response: texts, or chat messages that the chat template writes out.

    Attributes:
        response: the whole assistant message where the prompt is messages; "" if it is yet to be sampled
        line: where it stands in the file, from 1
        tools: what the chat template is told that the model can call; None for nothing
    """

    prompt: str | list[dict[str, Any]]
    response: str | dict[str, Any]
    line: int
    tools: list[dict[str, Any]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing stands in the response, so that it is yet to be sampled."""
        if isinstance(self.response, str):
            return not self.response
        return not any(value for name, value in self.response.items() if name != "role")


def read_turns(path: str | Path, prompts_alone: bool = False) -> list[Turn]:
    """Returns the turns of a JSONL file, one JSON object a line.

        {"prompt": "Tumbes, PE, 96946\\n", "response": "TUMBES / Peru ~ 97k"}
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

    Messages give one turn for each assistant message, everything before it being the prompt. They are given to the
    chat template as they are, with what else they have (tool_calls, reasoning_content), and so are the row's "tools".

    Args:
        prompts_alone: take rows without a response too, and messages that end with another role's
    Raises:
        DataError: a file that cannot be read or is empty, or lines of another form; up to 20 of them, by number.
    """
    file = Path(path)
    try:
        # not splitlines, which also splits at separators that may stand inside a JSON text
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; give a JSONL file in UTF-8") from error
    turns: list[Turn] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                _check_characters(row)
            turns += _turns_of(row, number, prompts_alone)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
        except RecursionError:
            faults.append(f"line {number}: its lists and objects are nested too deeply to be read")
    if not turns and not faults:
        faults.append("there is no row in it")
    _raise(f"{file}", faults)
    return turns


def _turns_of(row: object, line: int, prompts_alone: bool) -> list[Turn]:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    unknown = [name for name in UNKNOWN_TO_TEMPLATES if row.get(name)]
    if unknown:
        raise ValueError(f"has {' and '.join(unknown)}, which is not passed on to the chat template: leave it out")
    tools = row.get("tools") or None
    if "messages" in row:
        messages = row["messages"]
        _check_messages(messages)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError("'tools' is no list of objects, as the chat template takes them")
        open_end = prompts_alone and bool(messages) and messages[-1].get("role") != "assistant"
        samples = [] if open_end and not _has_answer(messages) else expand_turns(messages)
        turns = [Turn(sample["prompt"], sample["completion"][0], line, tools) for sample in samples]
        return [*turns, Turn(messages, "", line, tools)] if open_end else turns
    if tools is not None:
        raise ValueError("has 'tools' and no 'messages': only a chat template writes tools into a prompt")
    needed = ("prompt",) if prompts_alone and "response" not in row else ("prompt", "response")
    missing = [name for name in needed if not isinstance(row.get(name), str) or not row[name]]
    if missing:
        raise ValueError(f"has no text in {' and '.join(missing)}, nor 'messages'; it has {sorted(row)}")
    return [Turn(row["prompt"], row.get("response", ""), line)]


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("'messages' is no list of objects")
    for message in messages:
        # a message that calls tools may say nothing besides
        says_nothing = message.get("content") is None and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not says_nothing:
            raise ValueError("a message has no text in 'content'")


def _check_characters(row: object) -> None:
    """Raises if a text of the row has half of a character that JSON writes as two, which is no text."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"has {half}, half of a character (a lone surrogate): write the whole character") from error


def _has_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message.get("role") == "assistant" for message in messages)


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
    _raise("the data", faults)
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
    _raise("the data", faults)
    return found, found.count(None)


def _prompt_text(turn: Turn, tokenizer: Any) -> str:
    if isinstance(turn.prompt, str):
        return turn.prompt
    if not tokenizer.chat_template:
        raise DataError(
            f"line {turn.line} has messages, and the model's tokenizer has no chat template: use prompt and response "
            "rows, or a chat model"
        )
    return _rendered(turn, tokenizer, turn.prompt, add_generation_prompt=True)


def _texts(turn: Turn, tokenizer: Any) -> tuple[str, str]:
    prompt = _prompt_text(turn, tokenizer)
    if isinstance(turn.prompt, str):
        return prompt, f"{prompt}{turn.response}{tokenizer.eos_token or ''}"
    given = turn.response
    answer: dict[str, Any] = {"role": "assistant", "content": given} if isinstance(given, str) else given
    _check_written(turn, tokenizer, turn.prompt, answer)
    return prompt, _rendered(turn, tokenizer, [*turn.prompt, answer], add_generation_prompt=False)


def _check_written(turn: Turn, tokenizer: Any, before: list[dict[str, Any]], answer: dict[str, Any]) -> None:
    """Raises if the chat template leaves out a part of the answer, which then would not be learned."""
    said = answer | {"content": answer.get("content") or ""}
    for name in PARTS_OF_ANSWERS:
        if not answer.get(name):
            continue
        texts = [
            _rendered(turn, tokenizer, [*before, message], add_generation_prompt=False)
            for message in (said, {key: value for key, value in said.items() if key != name})
        ]
        if texts[0] == texts[1]:
            raise TemplateFault(
                f"line {turn.line}: the model's chat template leaves {name} of the answer out, so it would not be "
                f"learned: put it into 'content', take a model whose template writes {name}, or leave it out"
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


def _raise(subject: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise DataError(f"{subject}: " + "; ".join(faults[:MAX_FAULTS]) + more)
