"""TGI's own LORA_ADAPTERS beside PreFT adapters: right on every token, where 3.3.7 alone is not."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from preft_hf.tuner.targets import linear_layers
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.tgi.server.test_serving import check, mixed, tiny_model
from tests.tgi.server_process import request, serving, some_ids

pytestmark = pytest.mark.tgi
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def all_token_lora(model, **options):
    """Saves a plain PEFT LoRA and returns its directory and a copy of the model that has it on every token."""
    torch.manual_seed(31)
    weights, files = {}, {}
    for name in linear_layers(model.adapters.base):
        module = model.adapters.base.get_submodule(name)
        if name.endswith("lm_head"):
            continue
        a, b = torch.randn(4, module.in_features) * 0.3, torch.randn(module.out_features, 4) * 0.3
        weights |= {f"{name}.preft_A": a, f"{name}.preft_B": b}
        files |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    directory = Path(tempfile.mkdtemp(prefix="preft-lora-"))
    save_file(files, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": TARGETS, "bias": "none"}
    config |= {"base_model_name_or_path": str(model.directory), "task_type": "CAUSAL_LM"} | options
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory, adapted_copy(model.adapters.base, "lora", weights, 2.0)


@pytest.mark.parametrize(("architecture", "world_size"), [("llama", 1), ("qwen2", 1), ("llama", 2)])
def test_all_tokens_beside_prompts_only(architecture, world_size):
    model = tiny_model(architecture)
    directory, adapted = all_token_lora(model)
    ids = some_ids(9, 61)
    expected = two_phase_greedy(adapted, adapted, torch.tensor([ids]), 8)[0][0].tolist()
    assert expected != model.expected(None, ids, 8)
    with serving(model, "flashdecoding-ipex", world_size, LORA_ADAPTERS=f"everywhere={directory}") as server:
        assert server.run([request(ids, "everywhere", 8)]) == [expected]
        cases = mixed()
        requests = [request(i, name, new, **others) for name, i, new, others in cases]
        found = server.run([*requests, request(ids, "everywhere", 8, arrive=1)])
        assert found[-1] == expected
        assert found[:-1] == [model.expected(name, i, new) for name, i, new, _ in cases]
        check(server, model, [(None, ids, 8, {})])


def test_options_that_tgi_would_drop_stop_the_server():
    model = tiny_model("llama")
    directory, _ = all_token_lora(model, use_dora=True)
    with (
        pytest.raises(AssertionError, match="use_dora is True"),
        serving(model, LORA_ADAPTERS=f"everywhere={directory}"),
    ):
        pass


@pytest.mark.parametrize(
    ("architecture", "world_size", "left"), [("qwen2", 1, "rows,options"), ("llama", 2, "options")]
)
def test_without_the_fixes_tgi_is_wrong(architecture, world_size, left):
    model = tiny_model(architecture)
    directory, adapted = all_token_lora(model)
    ids = some_ids(9, 61)
    expected = two_phase_greedy(adapted, adapted, torch.tensor([ids]), 8)[0][0].tolist()
    variables = {"LORA_ADAPTERS": f"everywhere={directory}", "PREFT_LORA_FIXES": left}
    with serving(model, "flashdecoding-ipex", world_size, **variables) as server:
        assert server.run([request(ids, "everywhere", 8)]) != [expected]
        # ours are right all the same
        check(server, model, mixed())
