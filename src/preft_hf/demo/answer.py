"""Answers prompts with a saved adapter in a separate process: `python -m preft_hf.demo.answer QUESTIONS ANSWERS`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16) -> list[str]:
    """Returns the greedy response to each prompt, up to its end-of-text token."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    responses: list[str] = []
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[i : i + batch_size]), return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        responses += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return responses


def main(questions: str, answers: str) -> None:
    from peft import PeftModel

    from preft_hf.demo.operations import compare_operations
    from preft_hf.embedded_model import load_demo_model

    asked = json.loads(Path(questions).read_text())
    base, tokenizer = load_demo_model()
    model = PeftModel.from_pretrained(base, asked["adapter"])
    responses = answer(model, tokenizer, asked["prompts"], asked["max_new_tokens"])
    ids = tokenizer(asked["prompts"][0], return_tensors="pt")["input_ids"]
    result = {"responses": responses, "operations": compare_operations(model, ids)}
    Path(answers).write_text(json.dumps(result))


if __name__ == "__main__":
    import preft_hf  # noqa: F401

    main(*sys.argv[1:])
