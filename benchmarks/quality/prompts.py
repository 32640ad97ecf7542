"""Forms of a prompt: does prefill-only gain from more tokens to act on?

The response's tokens are the same in every form, and so are the rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.data import Sample

PLAIN, TEXT, CHAT = "as it is", "task text at its end", "chat template"
TASK_TEXT = " (what a chat robot answers, in a sentence or two)"


def _chat(ids: list[int], tokenizer: Any) -> list[int]:
    question = tokenizer.decode(ids).removeprefix("Q: ").removesuffix("\nA:")
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


# from a prompt's token ids and the tokenizer to the token ids of its form
FORMS: dict[str, Callable[[list[int], Any], list[int]]] = {
    PLAIN: lambda ids, tokenizer: ids,
    TEXT: lambda ids, tokenizer: ids + tokenizer(TASK_TEXT, add_special_tokens=False)["input_ids"],
    CHAT: _chat,
}


def in_form(samples: Sequence[Sample], form: str, tokenizer: Any) -> list[Sample]:
    """Returns the samples with their prompts in a form of FORMS."""
    return with_prompts(samples, lambda ids: FORMS[form](ids, tokenizer))


def with_prompts(samples: Sequence[Sample], changed: Callable[[list[int]], list[int]]) -> list[Sample]:
    """Returns the samples with other prompts, whose token ids `changed` makes of theirs, and the same responses."""
    made = []
    for sample in samples:
        begin = sample["labels"].count(IGNORED_LABEL)
        ids = changed(sample["input_ids"][:begin])
        labels = [IGNORED_LABEL] * len(ids) + sample["labels"][begin:]
        made.append({"input_ids": ids + sample["input_ids"][begin:], "labels": labels})
    return made
