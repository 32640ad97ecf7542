"""Runs in vLLM's environment: an engine for each job, waves of requests, what it answered.

For each line of its input, a folder, it forks a process that reads job.json there and writes result.json and log;
then it prints the exit status. So vLLM is imported once, which takes longer than an engine of a tiny model. A job:

    {"model": dir, "engine": {...}, "break": null, "waves": [[{"ids": [...], "adapter": [name, number, path] or null,
     "new": 6, "params": {more SamplingParams}}, ...], ...]}

The engine is the real one, in this process; our entry point has to be found by vLLM itself.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

JOB_SECONDS = 120
COMPILED_JOB_SECONDS = 600

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


def break_it(name: str | None) -> None:
    """Puts a wrong rule in place of ours, to see the checks fail."""
    import preft_vllm.steps as steps

    if name == "chunk":
        # "the whole chunk is prefill if it begins in the prompt"
        steps.prefill_rows = lambda scheduled, computed, prompt: (computed < prompt) * scheduled
    elif name == "always":
        steps.prefill_rows = lambda scheduled, computed, prompt: scheduled
    elif name == "hash":
        from vllm.v1.core import block_pool, kv_cache_utils

        stock = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__
        kv_cache_utils.generate_block_hash_extra_keys = stock
        block_pool.generate_block_hash_extra_keys = stock


def watch_schedules(swap: list[str | None]) -> list[int]:
    """Returns a list that grows with the number of requests of each step.

    swap: filled when the coming step shall find a directory changed: files of the first become the second's, or the
        directory is gone if there is no second
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    original, counts = Scheduler.schedule, [0]

    def counting(self, *args, **kwargs):
        if swap:
            place, other = swap
            swap.clear()
            if other is None:
                shutil.rmtree(place)
            else:
                shutil.copytree(other, place, dirs_exist_ok=True)
        output = original(self, *args, **kwargs)
        counts.append(len(output.num_scheduled_tokens))
        return output

    Scheduler.schedule = counting
    return counts


def compile_on_cpu() -> None:
    """Compiles models ahead of time as on a GPU, with vLLM's LoRA kernels, which Dynamo can trace.

    vLLM does not compile with LoRA on a CPU.
    """
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    # names operators that only a CUDA build has
    FixFunctionalizationPass.__call__ = lambda self, graph: None
    original = CpuPlatform.check_and_update_config.__func__

    def check(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.backend = "inductor"
        vllm_config.compilation_config.compile_sizes = []
        stock = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: stock)

    CpuPlatform.check_and_update_config = classmethod(check)


def answer_of(output) -> dict:
    answer = {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
    scores = output.prompt_logprobs
    if scores is not None:
        # nothing comes before the first token
        answer["scores"] = [found[i].logprob for i, found in zip(output.prompt_token_ids[1:], scores[1:], strict=True)]
    return answer


def has_plugin(worker) -> bool:
    from preft_vllm import plugin

    return plugin.active()


def names_without_last_layer(worker, place: str) -> list[str]:
    """Returns what a worker takes of an adapter when the last layer is with another worker of the pipeline."""
    from vllm.model_executor.models.utils import PPMissingLayer

    from preft_core.format.adapter import load_adapter
    from preft_vllm.adapters import to_vllm
    from preft_vllm.stamp import Stamp

    runner = worker.model_runner
    manager = runner.lora_manager._adapter_manager
    layers = manager.model.model.layers
    last = len(layers) - 1
    layers[last] = PPMissingLayer()
    for name in [name for name in manager.modules if f".layers.{last}." in name]:
        del manager.modules[name]
    adapter = load_adapter(place)
    taken = to_vllm(adapter, Stamp(adapter.fingerprint, place), manager, runner.lora_config, 1)
    names = list(taken.loras)
    manager.add_adapter(taken)
    manager.activate_adapter(taken.id)
    return names


def main() -> None:
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_model_runner  # noqa: F401

    for line in sys.stdin:
        folder = Path(line.strip())
        child = os.fork()
        if child == 0:
            in_child(folder)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def in_child(folder: Path) -> NoReturn:
    """Does a folder's job and ends this process. A job that takes too long is ended by a signal."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, file)
    status = 1
    try:
        job = json.loads((folder / "job.json").read_text())
        signal.alarm(COMPILED_JOB_SECONDS if job.get("compiled") else JOB_SECONDS)
        os.environ.update(job["environment"])
        (folder / "result.json").write_text(json.dumps(run(job)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from preft_vllm import plugin
    from preft_vllm.api_server import DIRECTORY

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "enable_lora": True,
        "max_loras": 8,
        "max_lora_rank": 16,
        "block_size": 32,
        "disable_log_stats": False,
        "seed": 0,
    }
    if job.get("break") == "seam":
        # a server whose scheduler is another one
        from vllm.v1.core.sched.scheduler import Scheduler

        Scheduler.schedule = lambda self, *args, stock=Scheduler.schedule: stock(self, *args)
    if job.get("compiled"):
        compile_on_cpu()
    if not job.get("installed", True):
        # where our entry point is found
        sys.path[:] = [path for path in sys.path if not list(Path(path).glob("preft_hf.egg-info"))]
    llm = LLM(model=job["model"], **defaults | job["engine"])
    expected = job["plugin"] and job.get("installed", True) and job.get("break") != "seam"
    assert plugin.active() == expected, "vLLM did not load the plugin"
    break_it(job.get("break"))
    swap: list[str | None] = []
    peak = watch_schedules(swap)
    waves, errors = [], []
    for i, wave in enumerate(job["waves"]):
        if i == len(job["waves"]) - 1:
            # after the last wave's requests were taken
            swap += job.get("swap", [])
        if job.get("forget"):
            # as another API server would, which counts ids from the start
            vars(llm.llm_engine.input_processor).pop(DIRECTORY, None)
        requests = [r["adapter"] and LoRARequest(*r["adapter"]) for r in wave]
        fixed = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=r["new"], **fixed, **r.get("params", {})) for r in wave]
        prompts = [{"prompt_token_ids": r["ids"]} for r in wave]
        try:
            outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        except Exception as error:
            if not job.get("errors"):
                raise
            waves.append(None)
            errors.append(str(error))
            continue
        waves.append([answer_of(output) for output in outputs])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    # each worker says whether it has our steps in place of vLLM's
    workers = llm.collective_rpc(has_plugin)
    result = {"waves": waves, "errors": errors, "peak": max(peak), "counters": counters, "workers": workers}
    if "without_last_layer" in job:
        place = job["without_last_layer"]
        result["taken"] = llm.collective_rpc(lambda worker: names_without_last_layer(worker, place))[0]
    return result


if __name__ == "__main__":
    main()
