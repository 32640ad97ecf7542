"""Damaged and hostile adapter files: every loader says one AdapterError with the file's name, and changes nothing."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from preft_core.format.adapter import AdapterError
from preft_hf import PreftPool
from tests.hf.cases import GREEDY, prompt
from tests.hf.tuner.test_failed_loads import state
from tests.hf.zoo import make_base, make_preft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edited(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return change


def config(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return edited(CONFIG, edit)


def weights(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return edited(WEIGHTS, edit)


def fields(**changed: object) -> Callable[[Path], None]:
    return config(lambda data: json.dumps(json.loads(data) | {"fingerprint": None} | changed).encode())


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields()(folder)
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return change


def header(edit: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def change(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        edit(found)
        text = json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return weights(change)


def a_folder_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def first(found: dict[str, object]) -> str:
    return min(name for name in found if "preft_A" in name)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "config is empty": config(lambda data: b""),
    "config is cut": config(lambda data: data[: len(data) // 2]),
    "config is a list": config(lambda data: b"[" + data + b"]"),
    "config is a text": config(lambda data: b'"PREFT"'),
    "config is null": config(lambda data: b"null"),
    "config is not UTF-8": config(lambda data: b"\xff\xfe" + data),
    "config is deep": config(lambda data: b"[" * 100_000),
    "config is large": config(lambda data: data + b" " * (2 << 20)),
    "config names a key twice": config(lambda data: data.replace(b'"r": 4', b'"r": 4, "r": 4')),
    "config has no type": config(lambda data: data.replace(b'"peft_type"', b'"peft_typo"')),
    "config has a text for r": fields(r="4"),
    "config has a huge r": fields(r=10**9),
    "config has an expression that does not end": fields(target_modules="(a+)+$"),
    "config has an unknown field": fields(use_fancy=True),
    "weights are gone": lambda folder: (folder / WEIGHTS).unlink(),
    "weights are a folder": a_folder_for_weights,
    "weights are empty": weights(lambda data: b""),
    "weights are cut": weights(lambda data: data[:-100]),
    "weights are padded": weights(lambda data: data + b"\0" * 100),
    "header has 2^60 bytes": weights(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "header is not JSON": weights(lambda data: data[:8] + b"x" + data[9:]),
    "header is a list": weights(lambda data: struct.pack("<Q", 2) + b"[]" + data[8:]),
    "header has an unknown dtype": header(lambda found: found[first(found)].update(dtype="F4")),
    "header has offsets that overlap": header(lambda found: found[first(found)].update(data_offsets=[256, 768])),
    "header has a huge shape": header(lambda found: found[first(found)].update(shape=[1 << 40, 1 << 40])),
    "weights have NaN": tensors(lambda found: found[first(found)].fill_(float("nan"))),
    "weights have foreign names": tensors(lambda found: found.update({"evil": found.pop(first(found))})),
    "weights have other values": weights(lambda data: data[:-4] + b"\0\0\0\1"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_every_loader_says_which_file(fault, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    trained = make_preft(make_base(), target_modules=["q_proj"])
    for config_ in trained.peft_config.values():
        config_.base_model_name_or_path = str(tmp_path / "base")
    trained.save_pretrained(tmp_path / "good")
    trained.save_pretrained(tmp_path / "hostile")
    HOSTILE[fault](tmp_path / "hostile")
    folder = str(tmp_path / "hostile")
    base, adapted = make_base(), PeftModel.from_pretrained(make_base(), tmp_path / "good").eval()
    expected, before = adapted.generate(input_ids=prompt(), **GREEDY).sequences, (state(base), state(adapted))
    loaders = {
        "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(base, folder),
        "PeftModel.load_adapter": lambda: adapted.load_adapter(folder, "bad"),
        "over an adapter": lambda: adapted.load_adapter(folder, "default"),
        "transformers": lambda: base.load_adapter(folder),
        "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "PreftPool": lambda: load_into_pool(base, folder),
    }
    for name, load in loaders.items():
        with pytest.raises(AdapterError) as caught:
            load()
        text = str(caught.value)
        assert "hostile" in text, (name, text)
        assert len(text) < 2000, (name, text)
    assert (state(base), state(adapted)) == before
    assert torch.equal(adapted.generate(input_ids=prompt(), **GREEDY).sequences, expected)


def load_into_pool(base, folder: str) -> None:
    with PreftPool.from_pretrained(base, {"bad": folder}) as pool:
        pool.preload(["bad"])


def test_configs_of_other_methods_pass_as_before(tmp_path):
    lora = get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    # PEFT reads both of these
    for text in ('{"peft_type": "LORA", "r": 2, "r": 2}', '{"peft_type": "LORA", "r": 2}' + " " * (2 << 20)):
        (tmp_path / CONFIG).write_text(text)
        assert PeftConfig.from_pretrained(tmp_path).r == 2  # type: ignore[attr-defined]
    (tmp_path / CONFIG).write_text('{"r": 4}')
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 4
