"""What a user of PEFT expects of any adapter: several, switched, disabled, copied, removed, in threads."""

import copy
import threading
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import DynamicCache

from preft_hf import PreftConfig, preft_phase
from preft_hf.forward.caches import cache_of
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


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bit_base_with_float32_adapter_or_not(method):
    base = make_base().to(torch.bfloat16)
    model = make_preft(base, method)
    assert {p.dtype for name, p in model.named_parameters() if "preft_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "preft_" not in name} == {torch.bfloat16}
    assert model(input_ids=prompt()).logits.dtype == torch.bfloat16
    tokens_of(model)
    other = make_base().to(torch.bfloat16)
    torch.manual_seed(1)
    small = get_peft_model(other, make_config(method), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    close = (small(input_ids=prompt()).logits - model(input_ids=prompt()).logits).abs().mean()
    assert close < 0.1 * model(input_ids=prompt()).logits.abs().mean()


@pytest.mark.parametrize("route", ["peft", "peft, little memory", "transformers"])
def test_loading_into_a_sixteen_bit_base_keeps_the_adapters_bits(tmp_path, route):
    saved = make_preft(make_base())
    saved.save_pretrained(tmp_path)
    base = make_base().to(torch.bfloat16)
    if route == "transformers":
        base.load_adapter(str(tmp_path))
    else:
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage="memory" in route)
    found = {name: p for name, p in base.named_parameters() if "preft_" in name}
    for name, parameter in saved.get_base_model().named_parameters():
        if "preft_" in name:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], parameter)


class Quantised(nn.Module):
    """A linear layer of an unknown backend: int8 weights, widths under GPTQ's names, no nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_linear_layers_of_any_backend_take_an_adapter(tmp_path):
    def quantised() -> nn.Module:
        base = make_base()
        for layer in base.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, Quantised(child))
        return base

    model = make_preft(quantised())
    assert len({name for name, _ in model.named_parameters() if "preft_A" in name}) == 14
    plain = quantised()
    with torch.no_grad(), preft_phase("decode"):
        assert torch.equal(model(input_ids=prompt()).logits, plain(input_ids=prompt()).logits)
    with torch.no_grad():
        cache = cache_of(model(input_ids=prompt(), use_cache=True))
        assert not torch.allclose(model(input_ids=prompt()).logits, plain(input_ids=prompt()).logits, atol=1e-2)
        assert isinstance(cache, DynamicCache)
    labels = prompt().masked_fill(torch.arange(9) < 5, -100)
    model.train()(input_ids=prompt(), labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(quantised(), tmp_path)), tokens_of(model.eval()))


def with_bitsandbytes(kind: str) -> nn.Module:
    backend = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = make_base(hidden_size=64, intermediate_size=128)
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if not isinstance(child, nn.Linear):
                    continue
                widths, weight = (child.in_features, child.out_features), child.weight.data
                if kind == "4bit":
                    linear = backend.nn.Linear4bit(*widths, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                    linear.weight = backend.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                else:
                    linear = backend.nn.Linear8bitLt(*widths, bias=False, has_fp16_weights=False)
                    linear.weight = backend.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
                setattr(parent, name, linear.to("cpu"))
    return base.eval()


# bitsandbytes on a CPU says that it casts to float16, and what torch deprecates
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_bitsandbytes_layers(kind):
    base, ids = with_bitsandbytes(kind), prompt()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = make_preft(base)
        with preft_phase("decode"):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=0.1)
        output = model.generate(input_ids=ids, **GREEDY)
        row = output.sequences[:, :-1]
        mask = (torch.arange(row.shape[1]) < ids.shape[1]).expand_as(row)
        forced = model(input_ids=row, prefill_mask=mask).logits[:, ids.shape[1] - 1 :]
    assert (forced - torch.stack(output.logits, 1)).abs().max() <= 1e-4
    # a model of its own: 4-bit layers that ran in eval mode on a CPU have changed to a form without a backward
    trained = make_preft(with_bitsandbytes(kind).train()).train()
    trained(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 5, -100)).loss.backward()
    gradients = [p.grad for name, p in trained.named_parameters() if "preft_B" in name]
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients)


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
