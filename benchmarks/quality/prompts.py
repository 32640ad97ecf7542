"""Forms of a prompt: does prefill-only gain from more tokens to act on?

The response's tokens are the same in every form, and so are the rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

from preft_hf.data import Sample
from preft_hf.training import IGNORED_LABEL

PLAIN, TEXT, CHAT = "as it is", "task text at its end", "chat template"
TASK_TEXT = " (what a chat robot answers, in a sentence or two)"


def _chat(prompt: str, tokenizer: Any) -> str:
    question = prompt.removeprefix("Q: ").removesuffix("\nA:")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


FORMS: dict[str, Callable[[str, Any], str]] = {
    PLAIN: lambda prompt, tokenizer: prompt,
    TEXT: lambda prompt, tokenizer: prompt + TASK_TEXT,
    CHAT: _chat,
}


def in_form(samples: Sequence[Sample], form: str, tokenizer: Any) -> list[Sample]:
    """Returns the samples with their prompts in another form of FORMS."""
    if form == PLAIN:
        return list(samples)
    made = []
    for sample in samples:
        begin = sample["labels"].count(IGNORED_LABEL)
        prompt = FORMS[form](tokenizer.decode(sample["input_ids"][:begin]), tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        labels = [IGNORED_LABEL] * len(ids) + sample["labels"][begin:]
        made.append({"input_ids": ids + sample["input_ids"][begin:], "labels": labels})
    return made
