"""GRPO with TRL and transformers' generate: `python examples/grpo.py --model ID`. Reward: short completions."""

import argparse
from typing import Any

from datasets import Dataset
from tiny import load, output_folder
from trl import GRPOConfig, GRPOTrainer

from preft_hf import PreftConfig
from preft_hf.trl import check_trainer

PROMPTS = ["Say hello.", "Name a colour.", "What is 2 + 2?", "Name a city."]


def brevity(completions: list[str], **others: Any) -> list[float]:
    return [-len(completion) / 100 for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--output", help="folder; default preft-grpo, with --smoke a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few steps")
    options = parser.parse_args()
    with output_folder(options.output, "preft-grpo", options.smoke) as output:
        train(options, output)


def train(options: argparse.Namespace, output: str) -> None:
    model, tokenizer = load(options.model, options.smoke)
    prompts = ["w1 w2 w3", "w4 w5"] if options.smoke else PROMPTS
    trainer = GRPOTrainer(
        model=model,
        peft_config=PreftConfig(method="lora", r=16, task_type="CAUSAL_LM"),
        # generation adapts the prompt and decodes with the base model; a vLLM server would merge the adapter instead
        args=GRPOConfig(
            output_dir=output,
            learning_rate=1e-4,
            max_steps=2 if options.smoke else 100,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8 if options.smoke else 64,
            use_vllm=False,
            use_cpu=options.smoke,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts * 8]),
        reward_funcs=brevity,
        processing_class=tokenizer,
    )
    check_trainer(trainer)
    trainer.train()
    trainer.model.save_pretrained(output)
    print(f"saved in {output}")


if __name__ == "__main__":
    main()
