"""Models of images and text: image tokens of a prompt are prompt tokens, and adapters go on the text decoder alone."""

import copy
import functools

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from preft_hf import PreftConfig
from tests.hf.oracle import adapted_copy, greedy_from
from tests.hf.zoo import COMMON, METHODS, make_config

IMAGE = 63
SPECIAL = 60
"""Tokens from here on stand for images, and are not generated."""
NUM_NEW = 6
TOLERANCE = 1e-4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
GREEDY = {"max_new_tokens": NUM_NEW, "do_sample": False, "suppress_tokens": list(range(SPECIAL, 64))}


def llava() -> PreTrainedModel:
    text = LlamaConfig(**COMMON)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    )


def gemma3() -> PreTrainedModel:
    text = Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=6)
    vision = SiglipVisionConfig(**VISION)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4)
    )


def qwen() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4}
    vision |= {"patch_size": 14, "window_size": 28, "fullatt_block_indexes": [1]}
    special = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=COMMON | {"rope_parameters": rope}, **special)
    )


MODELS = {"llava": llava, "gemma3": gemma3, "qwen2_5_vl": qwen}


def inputs_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Returns a batch of two prompts of 9 tokens that begin with an image of four."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SPECIAL, (2, 9), generator=generator)
    ids[:, 1:5] = IMAGE
    if kind != "qwen2_5_vl":
        found = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
        return found | ({"token_type_ids": (ids == IMAGE).long()} if kind == "gemma3" else {})
    ids[:, 0], ids[:, 5] = 61, 60
    pixels = torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=generator)
    grids = torch.tensor([[1, 4, 4]] * 2)
    types = (ids == IMAGE).long()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}


@functools.cache
def models(kind: str, method: str) -> tuple[PreTrainedModel, PreTrainedModel, PeftModel]:
    """Returns the base, a copy with the adapter on every token, and the PreFT model."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.generation_config.eos_token_id = None
    base = copy.deepcopy(model)
    torch.manual_seed(1)
    preft = get_peft_model(model, make_config(method))
    weights = get_peft_model_state_dict(preft, save_embedding_layers=False)
    return base, adapted_copy(base, method, weights, preft.peft_config["default"].scaling), preft.eval()


@torch.no_grad()
def oracle(kind: str, method: str) -> tuple[Tensor, Tensor]:
    base, adapted, _ = models(kind, method)
    output = adapted(**inputs_of(kind), use_cache=True)
    if kind == "qwen2_5_vl":
        # positions of later tokens, which the model counts from its prompt's images
        base.model.rope_deltas = adapted.model.rope_deltas
    return greedy_from(output, base, NUM_NEW, allowed=SPECIAL)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_generate_equals_the_two_phase_loop(kind, method):
    model, inputs = models(kind, method)[2], inputs_of(kind)
    tokens, logits = oracle(kind, method)
    with torch.no_grad():
        base = models(kind, method)[0](**inputs).logits[:, -1]
    assert (logits[:, 0] - base).abs().max() > 0.05, "an adapter that does nothing"
    output = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, 9:], tokens)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_training_sees_what_is_served(kind, method):
    """Logits of a row with labels are those of the two phases; the gradient reaches the adapter alone."""
    model, inputs = models(kind, method)[2], inputs_of(kind)
    tokens, logits = oracle(kind, method)
    row = dict(inputs)
    row["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in row:
            row[name] = torch.nn.functional.pad(row[name], (0, NUM_NEW - 1))
    labels = row["input_ids"].clone()
    labels[:, :9] = -100
    output = model.train()(**row, labels=labels)
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.eval()
    assert (output.logits[:, 8:] - logits).abs().max() <= TOLERANCE
    assert all(grad is not None for grad in gradients)
    assert any(grad.abs().max() > 0 for grad in gradients if grad is not None)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_outside_of_the_text_decoder_are_left_out_and_refused_by_name(kind):
    chosen = [name for name, _ in models(kind, "lora")[2].named_parameters() if "preft" in name]
    assert chosen
    assert all(".language_model.layers." in name for name in chosen)
    name = "qkv" if kind == "qwen2_5_vl" else "q_proj"
    with pytest.raises(ValueError, match=r"outside the text decoder model\.language_model.*target_modules such as"):
        get_peft_model(MODELS[kind](), PreftConfig(target_modules=[name]))
    some = get_peft_model(MODELS[kind](), PreftConfig(target_modules=r"model\.language_model\..*q_proj"))
    assert len([name for name, _ in some.named_parameters() if "preft_A" in name]) == 2


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded(kind, tmp_path):
    model, inputs = models(kind, "lora")[2], inputs_of(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(models(kind, "lora")[0]), tmp_path).eval()
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("method", ["lora", "direft"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_with_its_own_adapter(kind, method):
    model, inputs = models(kind, method)[2], inputs_of(kind)
    base = models(kind, method)[0].generate(**inputs, **GREEDY)
    output = model.generate(**inputs, **GREEDY, adapter_names=["default", "__base__"])
    assert torch.equal(output[0, 9:], oracle(kind, method)[0][0])
    assert torch.equal(output[1], base[1])
