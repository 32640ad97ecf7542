"""What a user of PEFT expects of any adapter: several, switched, disabled, copied, removed, in threads."""

import copy
import threading
import warnings

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from preft_hf import PreftConfig
from tests.hf.cases import GREEDY, case, prompt, run_together
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import METHODS, make_base, make_config, make_preft


def tokens_of(model, ids=None) -> torch.Tensor:
    return model.generate(input_ids=prompt() if ids is None else ids, **GREEDY).sequences


def test_several_adapters_of_all_methods_on_one_model():
    model = make_preft(make_base(), "lora")
    for i, method in enumerate(["direft", "loreft", "lora"]):
        torch.manual_seed(10 + i)
        model.add_adapter(f"{method}-{i}", make_config(method, r=2 + i))
    found = {}
    for name in ["default", "direft-0", "loreft-1", "lora-2"]:
        model.set_adapter(name)
        config = model.peft_config[name]
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        adapted = adapted_copy(make_base(), config.method, weights, config.scaling)
        tokens, _ = two_phase_greedy(adapted, make_base(), prompt(), 8)
        found[name] = tokens_of(model)[:, 9:]
        assert torch.equal(found[name], tokens), name
    assert len({tuple(t.flatten().tolist()) for t in found.values()}) == 4


def test_two_active_adapters_add_up():
    model = make_preft(make_base(), "lora")
    torch.manual_seed(7)
    model.add_adapter("second", make_config("lora", r=3))
    model.base_model.set_adapter(["default", "second"])
    base = make_base()
    for name in ("default", "second"):
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        base = adapted_copy(base, "lora", weights, model.peft_config[name].scaling)
    with torch.no_grad():
        found = model(input_ids=prompt()).logits
        assert torch.allclose(found, base(input_ids=prompt()).logits, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_disable_delete_and_set(method):
    model, base = make_preft(make_base(), method), tokens_of(make_base())
    adapted = tokens_of(model)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(tokens_of(model), base)
    assert torch.equal(tokens_of(model), adapted)
    torch.manual_seed(3)
    model.add_adapter("second", make_config(method))
    model.set_adapter("second")
    second = tokens_of(model)
    assert not torch.equal(second, adapted)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(tokens_of(model), adapted)
    assert not any("second" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_unload_gives_the_base_model_back(method):
    base = make_base()
    names, hooks = [name for name, _ in base.named_modules()], len(base._forward_hooks)
    model = make_preft(base, method)
    tokens_of(model)
    restored = model.unload()
    assert restored is base
    assert [name for name, _ in base.named_modules()] == names
    assert len(base._forward_hooks) == hooks
    assert not base._forward_pre_hooks
    assert not any(layer._forward_hooks for layer in base.model.layers)
    assert not {"generate", "prepare_inputs_for_generation", "generate_batch"} & base.__dict__.keys()
    assert torch.equal(tokens_of(base), tokens_of(make_base()))
    again = make_preft(base, method)
    assert torch.equal(tokens_of(again), tokens_of(make_preft(make_base(), method)))


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_is_a_model_of_its_own(method):
    model = make_preft(make_base(), method)
    before = tokens_of(model)
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        if "preft_A" in name:
            parameter.data.mul_(-1)
    assert torch.equal(tokens_of(model), before)
    changed = tokens_of(copied)
    assert not torch.equal(changed, before)
    del model
    assert torch.equal(tokens_of(copied), changed)
    copied.unload()
    assert torch.equal(tokens_of(copied.get_base_model()), tokens_of(make_base()))


@pytest.mark.parametrize("method", METHODS)
def test_a_pickled_model_comes_back(method, tmp_path):
    model = make_preft(make_base(), method)
    torch.save(model, tmp_path / "model")
    assert torch.equal(tokens_of(torch.load(tmp_path / "model", weights_only=False)), tokens_of(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing_and_only_it_trains(method):
    model = get_peft_model(make_base(), PreftConfig(method=method, r=4))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "preft_" in name}
    model.eval()
    with torch.no_grad():
        difference = model(input_ids=prompt()).logits - make_base()(input_ids=prompt()).logits
    assert difference.abs().max() <= (1e-5 if method == "loreft" else 0)
    assert model.get_nb_trainable_parameters()[0] == sum(model.get_parameter(name).numel() for name in trainable)


def test_targets():
    def chosen(**fields: object) -> list[str]:
        model = get_peft_model(make_base(), PreftConfig(**fields))  # type: ignore[arg-type]
        return sorted({name.split(".preft_")[0][17:] for name, _ in model.named_parameters() if "preft_" in name})

    everything = chosen()
    assert len(everything) == 14
    assert "lm_head" not in everything
    assert chosen(target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert chosen(target_modules=r".*layers\.1\..*(q|k)_proj", exclude_modules=["k_proj"]) == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert chosen(target_modules=["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    assert chosen(exclude_modules=r".*mlp.*") == [name for name in everything if "mlp" not in name]
    assert chosen(method="direft", layers_to_transform=[1]) == ["model.layers.1.preft"]


def test_threads_do_not_see_each_others_phase():
    """Prefill and decode forwards of one model run at the same time in several threads."""
    c = case("llama", "lora")
    ids = [prompt(seed=seed) for seed in range(4)]
    expected = [c.oracle(one)[0] for one in ids]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(5):
            if not torch.equal(tokens_of(c.model, ids[i])[:, 9:], expected[i]):
                wrong.append(i)

    run_together(serve, 4)
    assert wrong == []


def test_a_forward_in_another_thread_is_not_taken_for_one_that_misses_layers():
    model = make_preft(make_base())
    ran = []

    def run_another(module, args):
        if not ran:
            ran.append(threading.Thread(target=model, kwargs={"input_ids": prompt(), "prefill_mask": False}))
            ran[0].start()
            ran[0].join()

    model.get_base_model().model.layers[1].register_forward_pre_hook(run_another)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=prompt())
    assert ran


def test_low_rank_names_and_counts_in_peft_reports():
    model = make_preft(make_base())
    status = model.get_model_status()
    assert status.num_adapter_layers == 14
    assert status.merged_adapters == []
    assert status.active_adapters == ["default"]
    assert {layer.name.rpartition(".")[2] for layer in model.get_layer_status()} >= {"q_proj", "down_proj"}
