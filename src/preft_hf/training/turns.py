"""Conversations as one training sample per assistant turn."""

from collections.abc import Mapping, Sequence
from typing import Any


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
