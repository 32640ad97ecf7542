"""The seams for TGI 3.3.7: functions that are replaced or relied on, the digest of their source, and why.

`python -m tgi_patch check` compares the installed TGI with it. If a source differs, nothing is patched.
"""

from dataclasses import replace
from functools import partial

from preft_core.seam import Seam
from tgi_patch.server import layers
from tgi_patch.server.shard import Shard

_S = "text_generation_server"
_BATCH = f"{_S}.models.flash_causal_lm:FlashCausalLMBatch"
_MODEL = f"{_S}.models.flash_causal_lm:FlashCausalLM"
_LORA = f"{_S}.layers.lora"
_CUSTOM = f"{_S}.models.custom_modeling"

SEAMS = (
    Seam(
        f"{_S}.models:get_model_with_lora_adapters",
        "d0fefcf1289dd89d",
        layers.model_with_adapters,
        "The slots are allocated when the model is loaded and before the KV cache is sized.",
        uses=(f"{_S}.server:get_model_with_lora_adapters",),
    ),
    Seam(
        f"{_BATCH}.from_tokenized",
        "b8479ed26e5f57fc",
        layers.from_tokenized,
        "Resolves a request's adapter before its batch exists; TGI serves an unknown one as the base model.",
    ),
    Seam(
        f"{_MODEL}.generate_token",
        "e218dd8775cec06a",
        layers.generate_token,
        "One route per prefill forward instead of metadata over all adapters at every step.",
    ),
    Seam(
        f"{_MODEL}.warmup",
        "d0eee8f3304311e9",
        layers.warmup,
        "The memory of an adapted prefill is measured before the KV cache is sized.",
    ),
    Seam(
        f"{_MODEL}.forward",
        "f5b667b21499f9ba",
        layers.model_forward,
        "A CUDA graph captured without adapters is not replayed for a batch with an all-token LoRA (fix graphs).",
    ),
    Seam(
        f"{_LORA}:TensorParallelMultiAdapterLinear.forward",
        "543bd668796985ae",
        layers.column_forward,
        "LoRA-P on q, k, v, gate, up and the packed layers of phi3, on prefill rows.",
    ),
    Seam(
        f"{_LORA}:TensorParallelAdapterRowLinear.forward",
        "3761da4bb3adc340",
        layers.row_forward,
        "LoRA-P on o and down, added before the sum over shards; all-token LoRA likewise (fix rows).",
    ),
    Seam(
        f"{_S}.adapters.lora:LoraConfig.load",
        "abeb43e91c5a5c13",
        layers.lora_config_load,
        "An all-token LoRA with options that TGI ignores is refused at start (fix options).",
    ),
)
"""What is replaced. `bound_to` gives the replacements the shard that they call."""

RELIED_ON = tuple(
    Seam(target, digest, None, why)
    for target, digest, why in (
        (f"{_BATCH}.prepare_for_prefill", "afba406e8c8e937f", "Rows of a prefill forward lie request after request."),
        (
            f"{_BATCH}.filter",
            "29f2947d3968cc45",
            "It keeps the stopping criteria, which carry the tickets.",
        ),
        (
            f"{_BATCH}.concatenate",
            "2650ae7d1ba8ffec",
            "It keeps the stopping criteria, which carry the tickets.",
        ),
        (
            f"{_S}.utils.tokens:StoppingCriteria.__init__",
            "2d36c6733a07dbbd",
            "Carries a request's ticket.",
        ),
        (f"{_LORA}:LoraLinear.forward_layer_type", "ce6828851dc68707", "The replaced row layer calls it."),
        (
            f"{_S}.layers.tensor_parallel:TensorParallelRowLinear.forward",
            "996397ab29e34bd9",
            "reduce=False leaves out the sum over shards.",
        ),
        (
            f"{_S}.server:TextGenerationService.Prefill",
            "9c058dad934dc10d",
            "An error in from_pb leaves its cache unchanged.",
        ),
        (
            f"{_CUSTOM}.flash_llama_modeling:FlashLlamaLayer.forward",
            "93e790cd7126c0da",
            "Returns two tensors whose sum is the residual stream.",
        ),
        (
            f"{_CUSTOM}.flash_mistral_modeling:MistralLayer.forward",
            "56f0b0a086ee001b",
            "Returns two tensors whose sum is the residual stream.",
        ),
        (f"{_CUSTOM}.flash_qwen2_modeling:Qwen2Layer.forward", "5ba78179e6c3325a", "Returns the residual stream."),
        (
            f"{_CUSTOM}.flash_gemma2_modeling:FlashGemma2Layer.forward",
            "5f5d3ae1ac54965f",
            "Returns two tensors whose sum is the residual stream.",
        ),
        (
            f"{_CUSTOM}.flash_gemma3_modeling:FlashGemma3Layer.forward",
            "17d33315ddcb3545",
            "Returns two tensors whose sum is the residual stream.",
        ),
        (
            f"{_CUSTOM}.flash_llama_modeling:load_attention",
            "b35531213cca85ab",
            "Names and widths of the packed layer.",
        ),
        (
            f"{_CUSTOM}.flash_qwen2_modeling:load_attention",
            "e5cd91d40e1b408e",
            "Names and widths of the packed layer.",
        ),
        (
            f"{_CUSTOM}.flash_starcoder2_modeling:load_attention",
            "7684235bbca0d393",
            "Names and widths of the packed layer.",
        ),
    )
)
"""What stays, and must have this source."""

ALL = (*SEAMS, *RELIED_ON)


def bound_to(shard: Shard) -> tuple[Seam, ...]:
    """Returns the table with replacements that call this shard, as `preft_core.seam.apply` takes it."""
    return tuple(
        seam if seam.replacement is None else replace(seam, replacement=partial(seam.replacement, shard))
        for seam in ALL
    )
