"""Reinforcement learning on city cards: all-token LoRA and LoRA-P from one warm start, TRL's GRPO, the same budget."""

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.quality.methods import NAMES, adapted
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.study import Bench, score
from preft_hf.demo.cities import NUM_FIELDS, num_right_fields
from preft_hf.embedded_model import cache_directory
from preft_hf.trl import check_trainer

METHODS = ("lora", "lora-p")
RANK = 16
WARM_STEPS, WARM_RATE = 40, 3e-3
NUM_STEPS = 40
RATE = 3e-4
PROMPTS_A_STEP, COMPLETIONS = 4, 8
MAX_TOKENS = 28


def plan(seeds: int) -> Iterator[tuple[str, int]]:
    """Yields (method, seed)."""
    for seed in range(seeds):
        for method in METHODS:
            yield method, seed


def run(bench: Bench, store: Store, method: str, seed: int, report: Callable[[str], None]) -> Result:
    """Returns the rewards of all steps, and what greedy answers to held-out rows score afterwards."""
    facts = {"task": bench.task.name, "method": method, "rank": RANK, "steps": NUM_STEPS, "lr": RATE, "seed": seed}
    return store.once("rl", facts, report, partial(_trained, bench, store, method, seed, report))


def _trained(bench: Bench, store: Store, method: str, seed: int, report: Callable[[str], None]) -> Result:
    warm = warm_start(bench, store, report)
    gc.collect()
    report(f"GRPO of {NAMES[method]}, seed {seed}")
    model = adapted(warm, method, RANK, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, bench, seed, folder)
        check_trainer(trainer)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    curve = {name: [entry[name] for entry in history] for name in ("reward", "reward_std", "completions/mean_length")}
    result = {"curve": curve, "last_reward": statistics.fmean(curve["reward"][-10:])}
    return result | evaluate(model, bench.test, bench.pad) | score(bench, model)


def warm_start(bench: Bench, store: Store, report: Callable[[str], None]) -> Any:
    """Returns the base model after a short supervised run whose adapter was merged: where all methods begin."""
    folder = cache_directory() / "quality" / "warm-start"
    facts = {"task": bench.task.name, "rank": RANK, "steps": WARM_STEPS, "lr": WARM_RATE}
    key = store.key(part="warm-start", **facts)
    if store.get(key) is None or not (folder / "config.json").exists():
        report(key)
        model = adapted(copy.deepcopy(bench.base), "lora", RANK, seed=0)
        train(model, bench.train, bench.pad, WARM_STEPS, WARM_RATE, seed=0)
        merged = model.merge_and_unload().eval()
        merged.save_pretrained(str(folder))
        store.put(key, facts | evaluate(merged, bench.test, bench.pad) | score(bench, merged))
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=bench.base.dtype).to(bench.base.device)


def make_trainer(model: Any, bench: Bench, seed: int, folder: str) -> Any:
    """Returns TRL's GRPOTrainer over the training rows, with the share of right fields as reward."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": row.prompt, "expected": row.response} for row in bench.task.train[: PROMPTS_A_STEP * 256]]
    args = GRPOConfig(
        output_dir=folder,
        max_steps=NUM_STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=PROMPTS_A_STEP * COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        bf16=False,
        use_cpu=bench.base.device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=right_fields,
        processing_class=bench.tokenizer,
    )


def right_fields(completions: list[str], expected: list[str], **others: Any) -> list[float]:
    """Returns the share of right fields of each completion, 0 to 1."""
    pairs = zip(completions, expected, strict=True)
    return [num_right_fields(text, answer) / NUM_FIELDS for text, answer in pairs]
