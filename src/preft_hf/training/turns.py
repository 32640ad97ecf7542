"""Training rows for `preft train`: read from JSONL, checked, and split into turns of prompt and response."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_FAULTS = 20
# what describes a row or a message and changes nothing in training
INERT = frozenset({"id", "idx", "index", "metadata", "source", "timestamp"})
ROW_OF_MESSAGES = frozenset({"messages", "tools"})
ROW_OF_TEXTS = frozenset({"prompt", "response"})
# what a message says of its own training, and the values of "train it" and "leave it out of the loss"
MARKS: dict[str, tuple[Any, Any]] = {
    "weight": (1, 0),
    "train": (True, False),
    "loss": (True, False),
    "loss_weight": (1, 0),
}


class DataError(ValueError):
    """A row of the data cannot be trained on: the message names its line."""


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

    Messages give one turn for each assistant message, everything before it being the prompt. The chat template gets
    them as they are, with what else they have (tool_calls, reasoning_content), and the row's "tools". An assistant
    message with "weight": 0, "train": false, "loss": false or "loss_weight": 0 is context: it is part of later prompts
    and is not learned.

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
    raise_faults(f"{file}", faults)
    return turns


def _turns_of(row: object, line: int, prompts_alone: bool) -> list[Turn]:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if "messages" in row:
        return _turns_of_messages(row, line, prompts_alone)
    needed = ("prompt",) if prompts_alone and "response" not in row else ("prompt", "response")
    missing = [name for name in needed if not isinstance(row.get(name), str) or not row[name]]
    if missing:
        raise ValueError(f"has no text in {' and '.join(missing)}, nor 'messages'; it has {sorted(row)}")
    _check_names(row, ROW_OF_TEXTS)
    return [Turn(row["prompt"], row.get("response", ""), line)]


def _turns_of_messages(row: dict[str, Any], line: int, prompts_alone: bool) -> list[Turn]:
    _check_names(row, ROW_OF_MESSAGES)
    messages, tools = row["messages"], row.get("tools") or None
    _check_messages(messages)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' is no list of objects, as the chat template takes them")
    open_end = prompts_alone and bool(messages) and messages[-1].get("role") != "assistant"
    has_answer = any(message.get("role") == "assistant" and is_trained(message, []) for message in messages)
    samples = expand_turns(messages) if has_answer or not open_end else []
    turns = [Turn(sample["prompt"], sample["completion"][0], line, tools) for sample in samples]
    if not prompts_alone and any(turn.is_open for turn in turns):
        raise ValueError(
            "an assistant message is empty, so there is nothing to learn: fill in its content, mark it with "
            '"train": false, or leave it out'
        )
    return [*turns, Turn(list(map(_unmarked, messages)), "", line, tools)] if open_end else turns


def _check_names(row: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises if the row has something besides what is read, and besides what describes a row."""
    unknown = sorted(
        name
        for name, value in row.items()
        if name not in known | INERT and value is not None and value not in ("", [], {})
    )
    if not unknown:
        return
    hint = ""
    if "system" in unknown and known is ROW_OF_TEXTS:
        hint = "write the system prompt into 'prompt', or give 'messages', or "
    elif "tools" in unknown:
        hint = "only a chat template writes 'tools' into a prompt, so give 'messages', or "
    elif {"images", "image", "videos", "audio"} & set(unknown):
        hint = "training reads text alone; "
    raise ValueError(
        f"has {' and '.join(unknown)}, which is not read beside {' and '.join(sorted(known & row.keys()))}: {hint}"
        "leave it out"
    )


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("'messages' is no list of objects")
    for message in messages:
        # a message that calls tools may say nothing besides
        says_nothing = message.get("content") is None and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not says_nothing:
            raise ValueError("a message has no text in 'content'")
        if "loss_mask" in message:
            raise ValueError('a message has loss_mask: mark what is not learned with "train": false')


def _check_characters(row: object) -> None:
    """Raises if a text of the row has half of a character that JSON writes as two, which is no text."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"has {half}, half of a character (a lone surrogate): write the whole character") from error


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

    An assistant turn marked with "weight": 0, "train": False, "loss": False or "loss_weight": 0 gives no sample; it
    stays in the prompts of later ones. The marks are taken off.

    Args:
        messages: dicts with "role" and "content", in order
    Raises:
        ValueError: a message without a role, an assistant turn with nothing before it, no assistant turn to learn, or
            a mark of another value.
    """
    faults = [f"message {i} has no 'role'" for i, message in enumerate(messages) if "role" not in message]
    if messages and messages[0].get("role") == "assistant" and is_trained(messages[0], faults=[]):
        faults.append("message 0 is an assistant turn, so nothing before it could be its prompt")
    trained = [is_trained(message, faults) for message in messages]
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        faults.append("no message has the role 'assistant'")
    elif not any(trained[i] for i in turns):
        faults.append("each assistant message is marked as not to be trained")
    if faults:
        raise ValueError(f"expand_turns: {'; '.join(faults)}: give messages that end a prompt with an assistant turn")
    return [
        {"prompt": [_unmarked(m) for m in messages[:i]], "completion": [_unmarked(messages[i])]}
        for i in turns
        if trained[i]
    ]


def is_trained(message: Mapping[str, Any], faults: list[str]) -> bool:
    """Returns whether a message is to be learned by its marks; what is wrong in them goes to faults."""
    is_answer, trained = message.get("role") == "assistant", True
    for name, (yes, no) in MARKS.items():
        value = message.get(name)
        if value is None or value == no:
            trained &= value is None
        elif value != yes:
            faults.append(f"{name} is {value!r}: it is {yes!r} or {no!r}")
        elif not is_answer:
            faults.append(
                f"{name} is {value!r} on a message of {message.get('role')}: only the assistant's are learned"
            )
    return trained


def _unmarked(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in MARKS}


def raise_faults(subject: str, faults: list[str]) -> None:
    """Raises a DataError with the first 20 faults, if there are any."""
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise DataError(f"{subject}: " + "; ".join(faults[:MAX_FAULTS]) + more)
