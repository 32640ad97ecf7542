"""Compares training with PEFT's LoRA at equal rank: `python -m benchmarks.training [--repeats N] [--rank R]`.

Steps of the two alternate in one process, on the same rows. Activation memory is exact: the bytes that autograd saves
for the backward pass.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

from benchmarks.quality.methods import METHODS, adapted
from benchmarks.run import RESULTS, device_name, environment
from preft_hf.embedded_model import load_demo_model

# rows, prompt tokens, response tokens
SHAPES = ((8, 16, 16), (4, 96, 32), (4, 32, 96))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each side, at least 5")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats is {options.repeats}: give 5 or more")
    console = Console()
    transformers.utils.logging.set_verbosity_error()
    base = load_demo_model()[0]
    models = {method: adapted(copy.deepcopy(base), method, options.rank, seed=0).train() for method in METHODS}
    results = []
    for shape in SHAPES:
        result = measure(base, models, shape, options.repeats, console)
        results.append(result | {"rank": options.rank})
        for method in METHODS[1:]:
            one = result[method]
            low, high = one["step_quartiles"]
            console.print(
                f"{shape[0]} rows of {shape[1]} + {shape[2]} tokens, r={options.rank}: {method} / LoRA: step time "
                f"{one['step_ratio']:.3f} ({low:.3f} to {high:.3f}), {one['tokens_per_s']:.0f} against "
                f"{result['lora']['tokens_per_s']:.0f} tokens/s; activations {one['activation_ratio']:.3f}"
            )
    file = RESULTS / f"training-{device_name()}.json"
    report = {"environment": environment("python -m benchmarks.training"), "results": results}
    file.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"Saved {file.name}")


def measure(
    base: Any, models: dict[str, Any], shape: tuple[int, int, int], repeats: int, console: Console | None = None
) -> dict[str, Any]:
    """Returns for each method the median time of a step, its ratio to LoRA's in the same turn, and activation bytes.

    Raises:
        RuntimeError: a new adapter's loss differs from the base model's.
    """
    rows, prompt, response = shape
    ids = torch.randint(
        3, min(base.config.vocab_size, 1000), (rows, prompt + response), generator=torch.Generator().manual_seed(0)
    )
    labels = ids.clone()
    labels[:, :prompt] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        expected = float(base(**batch).loss)
    kept = {}
    for method, model in models.items():
        kept[method], loss = activation_bytes(model, batch)
        if abs(loss - expected) > 1e-3:
            raise RuntimeError(f"{method}'s loss is {loss} and the base model's {expected}: not timed")
    times: dict[str, list[float]] = {method: [] for method in models}
    names = list(models)
    for turn in track(range(repeats), description=str(shape), console=console, disable=console is None):
        for method in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            models[method](**batch).loss.backward()
            times[method].append(time.perf_counter() - began)
            models[method].zero_grad()
    result: dict[str, Any] = {"rows": rows, "prompt": prompt, "response": response, "repeats": repeats}
    for method in models:
        ratios = [one / lora for one, lora in zip(times[method], times["lora"], strict=True)]
        result[method] = {
            "step_s": statistics.median(times[method]),
            "tokens_per_s": ids.numel() / statistics.median(times[method]),
            "step_ratio": statistics.median(ratios),
            "step_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "activation_bytes": kept[method],
            "activation_ratio": kept[method] / kept["lora"],
        }
    return result


def activation_bytes(model: Any, batch: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Returns the bytes that a forward saves for its backward, without weights and inputs, and the loss."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values())
    loss.backward()
    model.zero_grad()
    return total, loss.item()


if __name__ == "__main__":
    main()
