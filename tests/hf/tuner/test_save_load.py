"""An adapter on disk: what is loaded is what was saved, or an error says what is wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from preft_core.format.adapter import AdapterError, load_adapter
from preft_hf import PreftConfig
from tests.hf.cases import GREEDY, prompt
from tests.hf.zoo import ARCHITECTURES, METHODS, VOCABULARY, make_base, make_preft


def tokens_of(model) -> torch.Tensor:
    return model.generate(input_ids=prompt(), **GREEDY).sequences


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "preft_" in name}


@pytest.fixture(params=METHODS)
def saved(request, tmp_path):
    """A saved base model and a saved adapter of each method, and what the adapted model generates."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    model = make_preft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), request.param)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip_is_bit_identical(saved, low_cpu_mem_usage):
    path, model = saved
    base = AutoModelForCausalLM.from_pretrained(path / "base")
    loaded = PeftModel.from_pretrained(base, path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    expected, found = weights_of(model), weights_of(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(tokens_of(loaded), tokens_of(model))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, tmp_path):
    model = make_preft(make_base(architecture))
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(architecture), tmp_path)), tokens_of(model))


# said by peft whenever transformers adds a second adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_every_way_to_load(saved):
    path, model = saved
    expected, adapter = tokens_of(model), str(path / "adapter")
    assert torch.equal(tokens_of(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    assert torch.equal(tokens_of(AutoModelForCausalLM.from_pretrained(adapter)), expected)
    plain = AutoModelForCausalLM.from_pretrained(path / "base")
    untouched = tokens_of(plain)
    assert not torch.equal(untouched, expected)
    plain.load_adapter(adapter)
    assert torch.equal(tokens_of(plain), expected)
    plain.disable_adapters()
    assert torch.equal(tokens_of(plain), untouched)
    plain.enable_adapters()
    assert torch.equal(tokens_of(plain), expected)
    plain.load_adapter(adapter, adapter_name="second")
    plain.set_adapter("second")
    assert torch.equal(tokens_of(plain), expected)
    plain.set_adapter("default")
    plain.delete_adapter("second")
    assert torch.equal(tokens_of(plain), expected)


def test_pipeline(saved):
    path, model = saved
    words = {f"w{i:02}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w00"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w00", eos_token="w02")
    text = " ".join(f"w{i:02}" for i in prompt(1)[0].tolist())
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = AutoModelForCausalLM.from_pretrained(path / "adapter")
    found = pipeline("text-generation", model=plain, tokenizer=fast)(text, **settings)[0]["generated_text"]
    ids = model.generate(input_ids=prompt(1), max_new_tokens=8, do_sample=False)[0, 9:]
    assert found == fast.decode(ids, skip_special_tokens=True)


def test_saved_config_says_what_is_needed_and_reads_back(saved):
    path, model = saved
    data = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert data["peft_type"] == "PREFT"
    assert data["format_version"] == 1
    assert data["inference_mode"] is True
    assert data["base_model_name_or_path"] == str(path / "base")
    assert data["fingerprint"] == load_adapter(path / "adapter").fingerprint
    config = PeftConfig.from_pretrained(path / "adapter")
    assert isinstance(config, PreftConfig)
    assert config.scaling == model.peft_config["default"].scaling
    assert "import preft_hf" in (path / "adapter" / "README.md").read_text()
    assert sorted(os.listdir(path / "adapter")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def edit_weights(directory: Path, edit) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **fields) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def drop_one(weights):
    del weights[min(weights)]


def add_one(weights):
    name = min(weights)
    weights[name.replace("layers.0", "layers.7")] = weights[name].clone()


def widen_one(weights):
    name = min(weights)
    weights[name] = torch.cat([weights[name], weights[name]], -1)


def spoil_one(weights):
    weights[min(weights)].flatten()[0] = float("nan")


def change_one(weights):
    weights[min(weights)].flatten()[0] += 1


FAULTS = [
    (drop_one, "missing"),
    (add_one, "unexpected|layers.7.preft has no"),
    (widen_one, "shape|preft_A"),
    (spoil_one, "NaN"),
    (change_one, "fingerprint"),
]


@pytest.mark.parametrize(("edit", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("route", ["peft", "peft-low-memory", "transformers", "auto", "peft-second"])
def test_wrong_weights_are_refused_on_every_route(tmp_path, edit, message, route):
    make_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    make_preft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "direft").save_pretrained(adapter)
    edit_weights(adapter, edit)
    if edit is not change_one:
        edit_config(adapter, fingerprint=None)
    loads = {
        "peft": lambda: PeftModel.from_pretrained(base, adapter),
        "peft-low-memory": lambda: PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=True),
        "transformers": lambda: base.load_adapter(str(adapter)),
        "auto": lambda: AutoModelForCausalLM.from_pretrained(adapter),
        "peft-second": lambda: make_preft(base, "direft").load_adapter(str(adapter), "second"),
    }
    with pytest.raises(AdapterError, match=message if edit is not drop_one else "missing|has no preft_A"):
        loads[route]()


@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_pickles_are_refused(tmp_path, route):
    make_preft(make_base()).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickle"):
        if route == "peft":
            PeftModel.from_pretrained(make_base(), tmp_path)
        else:
            make_base().load_adapter(str(tmp_path))
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"format_version": 2}, "upgrade preft-hf"), ({"use_fancy": True}, "unknown field 'use_fancy'")],
)
def test_configs_of_a_newer_format_are_refused(tmp_path, fields, message):
    make_preft(make_base()).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(make_base(), tmp_path)
    with pytest.raises(ValueError, match=message):
        make_base().load_adapter(str(tmp_path))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_an_adapter_whose_weights_never_came_does_not_run(tmp_path):
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    make_preft(make_base()).save_pretrained(tmp_path)
    base = make_base()
    inject_adapter_in_model(PreftConfig.from_pretrained(tmp_path), base)
    with pytest.raises(RuntimeError, match=r"adapter default .* weights were not\s+loaded"):
        base(input_ids=prompt())
    set_peft_model_state_dict(base, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(tokens_of(base), tokens_of(PeftModel.from_pretrained(make_base(), tmp_path)))


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = make_preft(make_base())
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.preft_B.default").add_(1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr("peft.peft_model.safe_save_file", full_disk)
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path)), tokens_of(model))


def full_disk(*args, **kwargs):
    raise OSError(28, "no space on the disk")


def test_a_save_that_stops_between_its_steps_is_refused(tmp_path, monkeypatch):
    model = make_preft(make_base())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.preft_B.default").add_(1)
    replaced = []
    replace = os.replace

    def once(source, target):
        if target.parent == tmp_path:
            if replaced:
                raise KeyboardInterrupt
            replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("preft_core.format.staging.os.replace", once)
        model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="interrupted"):
        PeftModel.from_pretrained(make_base(), tmp_path)


def test_refused_ways_to_save(tmp_path):
    model = make_preft(make_base())
    with pytest.raises(ValueError, match=r"never a pickle.*holds no embeddings"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False, save_embedding_layers=True)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_several_adapters_are_saved_side_by_side(tmp_path):
    model = make_preft(make_base(), "lora")
    torch.manual_seed(5)
    model.add_adapter("second", PreftConfig(method="direft", r=2, init_weights=False))
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).config.method == "lora"
    assert load_adapter(tmp_path / "second").config.method == "direft"
    model.set_adapter("second")
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path / "second")), tokens_of(model))


def test_transformers_own_save(tmp_path):
    model = make_base()
    torch.manual_seed(1)
    model.add_adapter(PreftConfig(r=2, init_weights=False))
    model.eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path)), tokens_of(model))
    with torch.no_grad():
        for parameter in weights_of(model):
            model.get_parameter(parameter).mul_(0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path)), tokens_of(model))
