"""SFT with TRL: `python examples/sft.py --model ID --data rows.jsonl`. Rows: prompt and completion, or messages."""

import argparse

from datasets import Dataset, load_dataset
from tiny import load
from trl import SFTConfig, SFTTrainer

from preft_hf import PreftConfig
from preft_hf.trl import check_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--data", help="JSONL")
    parser.add_argument("--output", default="preft-sft")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data is missing: give a JSONL file, or try --smoke")
    model, tokenizer = load(options.model, options.smoke)
    if options.smoke:
        data = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 1} w{i}"} for i in range(16)])
    else:
        data = load_dataset("json", data_files=options.data, split="train")
    trainer = SFTTrainer(
        model=model,
        # a prompt's tokens are adapted, a completion's are not, and the loss is on the completion
        peft_config=PreftConfig(method="lora", r=16, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=options.output,
            learning_rate=1e-3,
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
    trainer.model.save_pretrained(options.output)
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
