"""Adapters on 16-bit, mixed and quantised layers: dtypes, bits, and what PEFT reports of them."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache

from preft_hf import preft_phase
from preft_hf.forward.caches import cache_of
from tests.hf.cases import GREEDY, prompt
from tests.hf.zoo import METHODS, make_base, make_config, make_preft


def tokens_of(model, ids=None) -> torch.Tensor:
    return model.generate(input_ids=prompt() if ids is None else ids, **GREEDY).sequences


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


@pytest.mark.parametrize("method", METHODS)
def test_without_autocast_each_adapter_has_the_dtype_of_its_layer(method):
    base = make_base().to(torch.bfloat16)
    # such as layers that transformers keeps in float32
    base.model.layers[1].to(torch.float16)
    model = get_peft_model(base, make_config(method), autocast_adapter_dtype=False)
    found = {
        (int(name.split(".layers.")[1][0]), parameter.dtype)
        for name, parameter in model.named_parameters()
        if "preft_" in name
    }
    assert found == {(0, torch.bfloat16), (1, torch.float16)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_bitsandbytes_layers_name_their_backend(kind):
    plain = make_base(hidden_size=64, intermediate_size=128).model.layers
    weights = [layer.self_attn.q_proj.weight for layer in plain]
    model = make_preft(with_bitsandbytes(kind))
    for layer, weight in zip(model.get_base_model().model.layers, weights, strict=True):
        adapted = layer.self_attn.q_proj
        assert type(adapted.quantization_backend).__name__ == f"Bnb{kind}Backend"
        assert (adapted.get_base_weight() - weight).abs().max() < 0.2 * weight.abs().max()
    plain = make_preft(make_base()).get_base_model().model.layers[0].self_attn.q_proj
    assert plain.quantization_backend is None


def replica_of(model: nn.Module) -> nn.Module:
    """Returns what DataParallel runs on another device: shallow copies of all modules, with their tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if name in copied._buffers:
                copied._buffers[name] = tensor
            elif tensor is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, tensor.view_as(tensor))
    return copies[model]


@pytest.mark.filterwarnings("ignore:nn.ParameterDict is being used with nn.DataParallel:UserWarning")
def test_replicas_of_data_parallel_do_not_warn_of_adapters_that_ran():
    model = make_preft(make_base())
    replica = replica_of(model.get_base_model())
    with torch.no_grad():
        # warnings are errors here
        found = replica(input_ids=prompt()).logits
        assert torch.equal(found, model(input_ids=prompt()).logits)
        assert not torch.allclose(found, make_base()(input_ids=prompt()).logits, atol=1e-2)
