"""What helps LoRA-P: alpha, layers, modules, and a task's own tokens at the end of the prompt."""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.quality.methods import adapted
from benchmarks.quality.prompts import with_prompts
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.study import Bench, score
from preft_hf.training.data import Sample

RANK = 16
RATES = (1e-3, 3e-3)
NUM_STEPS = 120
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TASK_TEXT = "City card in the form NAME / Country ~ people:\n"
# what differs from the default, which is alpha = 2 r on all linear layers
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha = r": {"lora_alpha": RANK},
    "alpha = 4 r": {"lora_alpha": 4 * RANK},
    "attention alone": {"target_modules": ATTENTION},
    "MLP alone": {"target_modules": MLP},
    "first half of the layers": {"layers": (0.0, 0.5)},
    "second half of the layers": {"layers": (0.5, 1.0)},
    "task text at the end of the prompt": {"suffix": TASK_TEXT},
}


def plan(seeds: int) -> Iterator[tuple[str, float, int]]:
    """Yields (variant, learning rate, seed)."""
    for seed in range(seeds):
        for variant in VARIANTS:
            for rate in RATES:
                yield variant, rate, seed


def run(bench: Bench, store: Store, variant: str, rate: float, seed: int, report: Callable[[str], None]) -> Result:
    """Returns a variant's result at one learning rate."""
    facts = {"task": bench.task.name, "variant": variant, "rank": RANK, "lr": rate, "steps": NUM_STEPS, "seed": seed}
    return store.once("helps", facts, report, partial(_trained, bench, variant, rate, seed))


def _trained(bench: Bench, variant: str, rate: float, seed: int) -> Result:
    options = dict(VARIANTS[variant])
    suffix = options.pop("suffix", "")
    num_layers = bench.base.config.num_hidden_layers
    if "layers" in options:
        begin, end = (round(share * num_layers) for share in options.pop("layers"))
        options["layers_to_transform"] = list(range(begin, end))
    gc.collect()
    model = adapted(copy.deepcopy(bench.base), "lora-p", RANK, seed, **options)
    samples, test = with_suffix(bench.train, suffix, bench.tokenizer), with_suffix(bench.test, suffix, bench.tokenizer)
    train(model, samples, bench.pad, NUM_STEPS, rate, seed)
    # answers are generated from the rows' own prompts
    scored = {} if suffix else score(bench, model)
    return evaluate(model, test, bench.pad) | scored


def with_suffix(samples: list[Sample], suffix: str, tokenizer: Any) -> list[Sample]:
    """Returns the samples with a text's tokens between prompt and response."""
    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    return with_prompts(samples, lambda prompt: prompt + ids)
