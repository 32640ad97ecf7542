"""SFT with TRL: `python examples/sft.py --model ID --data rows.jsonl`. Rows: prompt and completion, or messages."""

import argparse

from datasets import Dataset, load_dataset
from tiny import load, output_folder
from trl import SFTConfig, SFTTrainer

from preft_hf import PreftConfig, expand_turns
from preft_hf.trl import check_trainer


def read(path: str) -> Dataset:
    """Returns rows of prompt and completion: of messages one for each assistant turn, as most servers see them."""
    data = load_dataset("json", data_files=path, split="train")
    if "messages" not in data.column_names:
        return data
    others = [name for name in data.column_names if name != "messages"]
    samples = []
    for row in data:
        samples += [{name: row[name] for name in others} | sample for sample in expand_turns(row["messages"])]
    return Dataset.from_list(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--data", help="JSONL")
    parser.add_argument("--output", help="folder; default preft-sft, with --smoke a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    if options.data is None and not options.smoke:
        parser.error("--data is missing: give a JSONL file, or try --smoke")
    with output_folder(options.output, "preft-sft", options.smoke) as output:
        train(options, output)


def train(options: argparse.Namespace, output: str) -> None:
    model, tokenizer = load(options.model, options.smoke)
    if options.smoke:
        data = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 1} w{i}"} for i in range(16)])
    else:
        data = read(options.data)
    trainer = SFTTrainer(
        model=model,
        # a prompt's tokens are adapted, a completion's are not, and the loss is on the completion
        peft_config=PreftConfig(method="lora", r=16, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=output,
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
    trainer.model.save_pretrained(output)
    print(f"saved in {output}")


if __name__ == "__main__":
    main()
