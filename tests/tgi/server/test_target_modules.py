"""Target modules of a TGI model and the shards of adapters, on layers made like TGI's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from tests.tgi.server.small_model import CONFIG, HIDDEN, INNER, Other, adapter_in, model_of
from tgi_patch.server.layers import lora_faults
from tgi_patch.server.target_modules import UnsupportedModel, find_target_modules, fix_layer_names, shard_adapter


@pytest.mark.parametrize("packed", [False, True])
def test_shards_together_compute_what_one_would(tmp_path, packed):
    whole_model = find_target_modules(model_of(packed=packed), CONFIG)
    source = adapter_in(tmp_path / "a", whole_model)
    adapter = source.load()
    x, inner = torch.randn(5, HIDDEN), torch.randn(5, INNER)
    for index, target in enumerate(whole_model):
        if target.whole.kind == "block":
            continue
        parts = [find_target_modules(model_of(packed=packed, shards=2), CONFIG, rank, 2) for rank in range(2)]
        for path, width in zip(target.whole.paths, target.whole.widths, strict=True):
            leaves = adapter.modules()[path]
            found = [shard_adapter(adapter, part).modules()[path] for part in parts]
            row = target.whole.name.endswith(("o_proj", "down_proj"))
            given_x = inner if "down" in path else x
            expected = linear(linear(given_x, leaves["preft_A"]), leaves["preft_B"])
            if row:
                halves = [part[index].columns for part in parts]
                total = sum(
                    linear(linear(given_x[:, cut], f["preft_A"]), f["preft_B"])
                    for cut, f in zip(halves, found, strict=True)
                )
                assert torch.allclose(total, expected, atol=1e-4)
                continue
            rebuilt = torch.zeros(5, width)
            for part, f in zip(parts, found, strict=True):
                rebuilt[:, part[index].rows[path]] = linear(linear(given_x, f["preft_A"]), f["preft_B"])
            assert torch.allclose(rebuilt, expected, atol=1e-5)
            if path.endswith("qkv_proj"):
                # a shard's half of q, of k and of v, as TGI lays its packed weight out
                assert parts[1][index].rows[path].tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]


def test_names_are_those_of_transformers_whatever_tgi_calls_them():
    for prefix in ("", "model.layers.0.self_attn."):
        model = model_of(prefix=prefix)
        paths = [path for target in find_target_modules(model, CONFIG) for path in target.whole.paths]
        assert paths[:4] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
        assert fix_layer_names(model) == (8 if prefix else 0)
        assert model.model.layers[0].self_attn.query_key_value.layer_names == ["q_proj", "k_proj", "v_proj"]
        assert model.model.layers[0].mlp.down_proj.layer_name == "down_proj"


def test_models_without_places_are_refused():
    with pytest.raises(UnsupportedModel, match="has no target modules"):
        find_target_modules(model_of(Other), CONFIG)
    with pytest.raises(UnsupportedModel, match="has no target modules"):
        find_target_modules(nn.Module(), CONFIG)
    wrong = SimpleNamespace(**(vars(CONFIG) | {"intermediate_size": 50}))
    with pytest.raises(UnsupportedModel, match=r"has weights \[32, 48\]"):
        find_target_modules(model_of(), wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("layers_to_transform", [1]),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("peft_type", "IA3"),
    ],
)
def test_options_that_tgi_drops(field, value):
    fine = {"peft_type": "LORA", "r": 8, "bias": "none", "target_modules": ["q_proj", "v_proj"], "use_dora": False}
    assert lora_faults(fine) == []
    (fault,) = lora_faults(fine | {field: value})
    assert field in fault
