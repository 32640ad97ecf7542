"""Models that torch.compile wraps, whole or in part: the same tokens, and names on disk that every model reads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from preft_core.format.adapter import AdapterError, load_adapter
from preft_core.format.plain_lora import from_lora
from preft_hf import PreftPool
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.zoo import METHODS, make_base, make_config, make_preft

WEIGHTS = "adapter_model.safetensors"


def tokens_of(model, **options) -> torch.Tensor:
    return model.generate(input_ids=prompt(), **options, **GREEDY).sequences[:, 9:]


def compiled(module: nn.Module) -> nn.Module:
    # what wraps is the question here, not what the compiler does
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def whole() -> nn.Module:
    return compiled(make_base())


def one_layer() -> nn.Module:
    base = make_base()
    base.model.layers[0] = compiled(base.model.layers[0])
    return base


def one_linear() -> nn.Module:
    base = make_base()
    base.model.layers[1].mlp.up_proj = compiled(base.model.layers[1].mlp.up_proj)
    return base


def attached(base: nn.Module, method: str) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, make_config(method)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [whole, one_layer, one_linear])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_names_are_those_of_the_plain_model(make, method, tmp_path):
    expected, _ = case("llama", method).oracle(prompt())
    model = attached(make(), method)
    assert torch.equal(tokens_of(model), expected)
    with torch.no_grad():
        logits = model(input_ids=prompt(), prefill_mask=True).logits
        assert torch.allclose(logits, case("llama", method).adapted(input_ids=prompt()).logits, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if "_orig_mod" in name]
    assert not [name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "_orig_mod" in name]
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    for base in (make_base(), make()):
        assert torch.equal(tokens_of(PeftModel.from_pretrained(base, tmp_path).eval()), expected)  # type: ignore
    base = make()
    base.load_adapter(str(tmp_path))
    assert torch.equal(tokens_of(base.eval()), expected)
    restored = model.unload()
    assert torch.equal(tokens_of(restored), tokens_of(make_base()))


@pytest.mark.parametrize("make", [whole, one_layer])
@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_pool_on_a_wrapped_model(make, method, tmp_path):
    make_preft(make_base(), method).save_pretrained(tmp_path)
    expected, _ = case("llama", method).oracle(prompt())
    with PreftPool.from_pretrained(make(), {"one": tmp_path}) as pool:
        assert torch.equal(tokens_of(pool.model, adapter_names=["one", "one"]), expected)


def with_names(folder, old: str, new: str) -> None:
    weights = {name.replace(old, new): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": None}))


def test_files_with_wrappers_names_are_read(tmp_path):
    make_preft(make_base()).save_pretrained(tmp_path)
    with_names(tmp_path, "model.layers.0.", "_orig_mod.model.layers.0._orig_mod.")
    expected, _ = case("llama", "lora").oracle(prompt())
    assert not [name for name in load_adapter(tmp_path).tensors if "_orig_mod" in name]
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path)), expected)
    base = make_base()
    base.load_adapter(str(tmp_path))
    assert torch.equal(tokens_of(base), expected)
    with PreftPool.from_pretrained(make_base(), {"one": tmp_path}) as pool:
        assert torch.equal(tokens_of(pool.model, adapter_names=["one", "one"]), expected)


def test_a_name_with_and_without_a_wrapper_is_refused(tmp_path):
    make_preft(make_base(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = min(weights)
    weights[name.replace("model.layers", "_orig_mod.model.layers")] = weights[name] + 1
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="stands 2 times"):
        load_adapter(tmp_path)


def test_a_lora_of_a_compiled_model_is_converted(tmp_path):
    lora = get_peft_model(whole(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # type: ignore
    lora.save_pretrained(tmp_path / "lora")
    assert any("_orig_mod" in name for name in load_file(tmp_path / "lora" / WEIGHTS))
    from_lora(tmp_path / "lora", tmp_path / "preft")
    assert not [name for name in load_adapter(tmp_path / "preft").tensors if "_orig_mod" in name]
    PeftModel.from_pretrained(make_base(), tmp_path / "preft")
