"""Many adapters in one batch: `python examples/multi_adapter.py --model ID --adapters preft.toml --prompt "..."`."""

import argparse
import tempfile
from pathlib import Path

from peft import get_peft_model
from tiny import load

from preft_hf import PreftConfig, PreftPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--adapters", help="manifest: [adapters], then name = place, one a line")
    parser.add_argument("--prompt", default="Write a greeting.")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model with adapters that do nothing yet")
    options = parser.parse_args()
    if options.adapters is None and not options.smoke:
        parser.error("--adapters is missing: give a manifest, or try --smoke")
    if not options.smoke:
        answer(options, options.adapters)
        return
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: Path(folder) / name for name in ("one", "two")}
        for path, method in zip(adapters.values(), ("lora", "direft"), strict=True):
            get_peft_model(load("", True)[0], PreftConfig(method=method, r=4)).save_pretrained(path)
        answer(options, adapters)


def answer(options: argparse.Namespace, adapters: str | dict[str, Path]) -> None:
    """Prints each adapter's answer to the prompt, and the base model's."""
    model, tokenizer = load(options.model, options.smoke)
    model.eval()
    with PreftPool.from_pretrained(model, adapters, num_slots=64) as pool:
        names = [*pool.names(), "__base__"]
        prompt = "w1 w2 w3" if options.smoke else options.prompt
        inputs = tokenizer([prompt] * len(names), return_tensors="pt", return_token_type_ids=False)
        found = model.generate(**inputs, adapter_names=names, max_new_tokens=8 if options.smoke else 64)
        for name, text in zip(names, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            print(f"{name}: {text}")
        print(pool.counters())


if __name__ == "__main__":
    main()
