"""DPO with TRL: `python examples/dpo.py --model ID --data pairs.jsonl`. Rows of prompt, chosen and rejected."""

import argparse

from datasets import Dataset, load_dataset
from tiny import load, output_folder
from trl import DPOConfig, DPOTrainer

from preft_hf import PreftConfig
from preft_hf.trl import check_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--data", help="JSONL")
    parser.add_argument("--output", help="folder; default preft-dpo, with --smoke a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data is missing: give a JSONL file, or try --smoke")
    with output_folder(options.output, "preft-dpo", options.smoke) as output:
        train(options, output)


def train(options: argparse.Namespace, output: str) -> None:
    model, tokenizer = load(options.model, options.smoke)
    if options.smoke:
        row = {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7"}
        data = Dataset.from_list([row] * 16)
    else:
        data = load_dataset("json", data_files=options.data, split="train")
    trainer = DPOTrainer(
        model=model,
        # the reference is the base model: the adapter switched off
        peft_config=PreftConfig(method="lora", r=16, task_type="CAUSAL_LM"),
        args=DPOConfig(
            output_dir=output,
            learning_rate=1e-4,
            max_steps=4 if options.smoke else -1,
            per_device_train_batch_size=4,
            use_cpu=options.smoke,
            bf16=False,
            report_to=[],
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    check_trainer(trainer)
    trainer.train()
    trainer.model.save_pretrained(output)
    print(f"saved in {output}")


if __name__ == "__main__":
    main()
