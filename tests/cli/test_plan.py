"""`preft plan`."""

import json

import pytest

from preft_cli import planning
from preft_cli.app import app
from preft_core.planner import SHAPES, Shape
from tests.hf.zoo import make_base


def run(*arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        app(["plan", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_table_and_json(capsys, tmp_path):
    shown = run("--adapters", "64", capsys=capsys)
    assert "llama-3.1-8b" in shown
    assert "not measured" in shown
    found = json.loads(run("--adapters", "64", "--json", "--plot", str(tmp_path / "a" / "b.png"), capsys=capsys))
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    lora, direft = found["methods"]["lora"], found["methods"]["direft"]
    assert direft["ratio_to_all_token_lora"] > lora["ratio_to_all_token_lora"] > 1
    assert lora["prefill_adapters"] == 32  # 8192 tokens of prompts of 256
    assert lora["all_adapters_bytes"] == 64 * lora["slot_bytes"]


def test_a_config_file_is_read(tmp_path, capsys):
    model = make_base("llama")
    model.save_pretrained(tmp_path)
    shape = planning.shape_of(str(tmp_path))
    assert isinstance(shape, Shape)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.num_parameters == model.num_parameters() - norms
    assert planning.shape_of("Llama-3.1-8B") is SHAPES["llama-3.1-8b"]


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give llama-3\.1-8b"):
        planning.shape_of("nothing")
    with pytest.raises(ValueError, match="Could not download org/not-cached@main"):
        planning.shape_of("org/not-cached")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        planning.shape_of(str(tmp_path))
    for config in ("[]", '"x"', '{"text_config": []}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match="expected a JSON object"):
            planning.shape_of(str(tmp_path))
    make_base("llama").save_pretrained(tmp_path)
    right = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(right | {"head_dim": [8]}))
    with pytest.raises(ValueError, match="no positive head_dim"):
        planning.shape_of(str(tmp_path))
    with pytest.raises(ValueError, match="--gpu is 'tpu'"):
        planning.device_of("tpu", 1.0, None, None)
    with pytest.raises(ValueError, match="flops is -1"):
        planning.device_of("h100", None, -1.0, None)
    assert planning.device_of("own", 1000, 2, 3).flops == 2e12
