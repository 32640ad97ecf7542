"""A model of layers made like TGI's, without TGI, and adapters for it."""

from types import SimpleNamespace

import torch
from torch import nn

from preft_core.format.adapter import save_adapter
from preft_core.format.config import AdapterConfig
from preft_core.hub.source import find_adapter
from tgi_patch.server.registry import Registry
from tgi_patch.server.target_modules import find_target_modules, modules_of
from tgi_patch.settings import Settings

HIDDEN, HEADS, KV_HEADS, INNER = 32, 4, 2, 48
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=INNER
)
HEAD = HIDDEN // HEADS


def base(width_in, width_out):
    return SimpleNamespace(linear=SimpleNamespace(weight=torch.zeros(width_out, width_in)))


class TensorParallelMultiAdapterLinear(nn.Module):
    def __init__(self, width_out, names, sizes):
        super().__init__()
        self.layer_names, self.sizes = names, sizes
        self.base_layer = base(HIDDEN, width_out)


class TensorParallelAdapterRowLinear(nn.Module):
    def __init__(self, width_in, name):
        super().__init__()
        self.layer_name = name
        self.base_layer = base(width_in, HIDDEN)


class FlashLlamaLayer(nn.Module):
    def __init__(self, shards=1, packed=False, prefix=""):
        super().__init__()
        attention, mlp = nn.Module(), nn.Module()
        widths = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        names = ["qkv_proj"] if packed else [prefix + name for name in ("q_proj", "k_proj", "v_proj")]
        sizes = None if packed else widths
        attention.query_key_value = TensorParallelMultiAdapterLinear(sum(widths) // shards, names, sizes)
        attention.o_proj = TensorParallelAdapterRowLinear(HIDDEN // shards, prefix + "o_proj")
        gate_up = None if packed else [prefix + "gate_proj", prefix + "up_proj"]
        mlp.gate_up_proj = TensorParallelMultiAdapterLinear(2 * INNER // shards, gate_up, gate_up and [INNER, INNER])
        mlp.down_proj = TensorParallelAdapterRowLinear(INNER // shards, prefix + "down_proj")
        self.self_attn, self.mlp = attention, mlp


class Other(nn.Module):
    pass


def model_of(layer=FlashLlamaLayer, **others):
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer(**others), layer(**others)])
    return model


def adapter_in(directory, targets, method="lora", r=4, seed=0, **fields):
    """Saves a random adapter of all target modules of its kind."""
    torch.manual_seed(seed)
    tensors = {}
    for target in targets:
        if (target.whole.kind == "linear") != (method == "lora"):
            continue
        for path, width in zip(target.whole.paths, target.whole.widths, strict=True):
            name = f"base_model.model.{path}"
            tensors[f"{name}.preft_A"] = torch.randn(r, target.whole.in_features)
            tensors[f"{name}.preft_B"] = torch.randn(width, r)
            if method != "lora":
                tensors[f"{name}.preft_bias"] = torch.randn(r)
    names = tuple(sorted({name.rsplit(".", 2)[1] for name in tensors})) if method == "lora" else None
    config = AdapterConfig(method=method, r=r, lora_alpha=2.0 * r, target_modules=names, **fields)
    save_adapter(directory, config, tensors)
    return find_adapter(directory)


class ServedModel:
    """A model with a registry of three LoRA-P adapters and one DiReFT-P adapter, one slot of each kind."""

    def __init__(self, root):
        self.root = root
        model = model_of()
        self.targets = find_target_modules(model, CONFIG)
        for module, site in modules_of(self.targets):
            module.site = site
        self.sources = {f"l{i}": adapter_in(root / f"l{i}", self.targets, seed=i) for i in range(3)}
        self.sources["d"] = adapter_in(root / "d", self.targets, "direft", seed=9)
        self.registry = Registry(self.targets, Settings(adapters={"x": "y"}, slots=1), "base", self.sources)
