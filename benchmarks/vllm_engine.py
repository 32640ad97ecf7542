"""Decode in vLLM with an adapter per request: `python -m benchmarks.vllm_engine [--model NAME] [--threads N] ...`.

Base, all-token LoRA, LoRA-P and DiReFT-P alternate in one engine with the plugin's grouped CPU kernels; all-token LoRA
also runs with vLLM's CPU kernels (with one slot free, since they are wrong when all are in use). The decode rate is
that of the tokens after the first: the time of a whole run minus that of a run of one token, with all adapters in
their slots. Outputs are compared before anything is timed: prefill-only adapters with the two-phase loop, all-token
LoRA with transformers and PEFT. PREFT_VLLM_PYTHON names the Python of vLLM's environment.
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import RESULTS, environment
from preft_core.format.plain_lora import to_lora
from preft_hf import PreftConfig
from preft_hf.embedded_model import load_demo_model

PYTHON = Path(os.environ.get("PREFT_VLLM_PYTHON", "~/.cache/preft/vllm/bin/python")).expanduser()
SYSTEMS = ("base", "all-token LoRA", "LoRA-P", "DiReFT-P")
STOCK = "all-token LoRA, vLLM's kernels"
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("random", "smollm2"), default="random", help="random: a small Llama")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=16, help="requests at once, each with an adapter of its own")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=7, help="turns, at least 5")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats is {options.repeats}: give 5 or more")
    base = load_demo_model()[0] if options.model == "smollm2" else random_model()
    threads, repeats = options.threads, options.repeats
    report = measure(base, options.adapters, options.rank, options.prompt, options.new, repeats, threads)
    label = "SmolLM2-135M-Instruct" if options.model == "smollm2" else "Llama of random parameters"
    report["model"] = f"{label}, {report['model']}"
    given = f"--model {options.model} --threads {threads} --prompt {options.prompt} --repeats {repeats}"
    report["environment"]["command"] = f"python -m benchmarks.vllm_engine {given}"
    console = Console()
    for name, one in report["systems"].items():
        low, high = one["ratio_quartiles"]
        console.print(
            f"{name}: decode {one['decode_tokens_per_s']:.0f} tokens/s, {one['ratio']:.3f} of base ({low:.3f} to "
            f"{high:.3f}); whole run {one['seconds']:.2f} s",
            highlight=False,
        )
    file = RESULTS / f"vllm-cpu-{threads}-threads-{options.model}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    device = report["environment"]["device"]
    console.print(f"{device}, {threads} thread(s), {report['model']}. Saved {file.name}")


def random_model(**shape: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = SHAPE | {"vocab_size": 8192} | shape
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=1024, eos_token_id=2, **settings)).eval()


def measure(
    base: Any, num_adapters: int, rank: int, prompt: int, new: int, repeats: int, threads: int = 1
) -> dict[str, Any]:
    """Returns for each system its decode rate and its ratio to base within a turn, medians and quartiles.

    Raises:
        RuntimeError: output tokens differ from the two-phase loop's.
    """
    draw = random.Random(0)
    prompts = [[draw.randrange(3, base.config.vocab_size) for _ in range(prompt)] for _ in range(num_adapters)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base.save_pretrained(root / "base")
        places, expected = make_adapters(base, root, num_adapters, rank, prompts)
        job = {"model": str(root / "base"), "adapters": places, "prompts": prompts, "expected": expected}
        job |= {"stock": STOCK, "new": new, "repeats": repeats, "rank": rank}
        (root / "job.json").write_text(json.dumps(job))
        command = [PYTHON, Path(__file__).with_name("vllm_driver.py"), root / "job.json", root / "result.json"]
        root_folder = Path(__file__).parents[1]
        sources = os.pathsep.join([str(root_folder / "src"), str(root_folder)])
        variables = os.environ | {"PYTHONPATH": sources, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        # the copy under root has another name than what the adapters were made on
        variables["PREFT_BASE_MODEL"] = base.name_or_path
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"vLLM's process failed, nothing is timed: {done.stderr[-2000:]}")
        result = json.loads((root / "result.json").read_text())
    rates = {
        name: [(new - 1) * num_adapters / (whole - first) for whole, first in times]
        for name, times in result["times"].items()
    }
    systems = {}
    for name, own in rates.items():
        ratios = [rate / reference for rate, reference in zip(own, rates["base"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        systems[name] = {
            "decode_tokens_per_s": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "seconds": statistics.median(whole for whole, _ in result["times"][name]),
        }
    size = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    return {
        "environment": environment("python -m benchmarks.vllm_engine")
        | {"threads": str(threads), "vllm": result["vllm"]},
        "model": f"{size:.1f} M, float32, r={rank} on all linear layers, {num_adapters} "
        f"requests with an adapter each, {prompt} + {new} tokens, median of {repeats} turns",
        "systems": systems,
    }


def make_adapters(
    base: Any, root: Path, num_adapters: int, rank: int, prompts: list[list[int]]
) -> tuple[dict[str, list[str]], dict[str, list[list[int]]]]:
    """Returns the directories of each system's adapters, and the expected tokens of the first two of each."""
    places: dict[str, list[str]] = {name: [] for name in SYSTEMS[1:]}
    expected: dict[str, list[list[int]]] = {name: [] for name in SYSTEMS[1:]}
    for name, method in (("LoRA-P", "lora"), ("DiReFT-P", "direft")):
        for i in range(num_adapters):
            torch.manual_seed(i + 1)
            settings = PreftConfig(method=method, r=rank, task_type="CAUSAL_LM", init_weights=False)
            model = get_peft_model(copy.deepcopy(base), settings).eval()
            place = root / f"{method}-{i}"
            model.save_pretrained(place)
            places[name].append(str(place))
            if method == "lora":
                to_lora(place, root / f"plain-{i}")
                places["all-token LoRA"].append(str(root / f"plain-{i}"))
            if i < 2:
                expected[name].append(answer(model, prompts[i]))
                if method == "lora":
                    plain = PeftModel.from_pretrained(copy.deepcopy(base), root / f"plain-{i}")
                    expected["all-token LoRA"].append(answer(plain, prompts[i]))
    places[STOCK], expected[STOCK] = places["all-token LoRA"], expected["all-token LoRA"]
    return places, expected


def answer(model: PeftModel, prompt: list[int]) -> list[int]:
    """Returns the first tokens that a transformers or PEFT model generates."""
    ids = torch.tensor([prompt])
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    return found[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
