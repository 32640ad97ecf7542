"""Base output plus the adapter's update on prefill tokens: linear layers (LoRA-P) and decoder layers (DiReFT-P)."""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from preft_core.layout import Bucket, Weights
from preft_core.ops import add_direft_, add_lora_, direft_update, lora_update, loreft_update
from preft_hf.config import REFERENCE_NAME, PreftConfig
from preft_hf.phase import ForwardPhase, RoutedRows, SharedPhase
from preft_hf.rows import add_rows_, cast, flat, masked, rows_added, rows_of


class PreftLayer(BaseTunerLayer):
    """What both kinds of adapter layer share: parameters by adapter name, and no merging.

    A merged weight would act on every token, so every form of merging raises.

    Attributes:
        pooled: weights of the slots of a pool at this layer, by bucket
    """

    preft_A: nn.ParameterDict

    def _init_adapters(self, phase: ForwardPhase) -> None:
        self.phase = phase
        self.pooled: dict[Bucket, Weights] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters = []

    def _place(self, adapter_name: str, device: torch.device, parameters: dict[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            placed = getattr(self, name)
            if adapter_name == REFERENCE_NAME and "default" in placed and placed["default"].shape == tensor.shape:
                tensor = placed["default"].detach().clone()
            placed[adapter_name] = nn.Parameter(tensor.to(device))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        target = device or self._base_device()
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name].data = parameters[adapter_name].data.to(target)

    def _base_device(self) -> torch.device:
        raise NotImplementedError

    def is_live(self) -> bool:
        """True if an active adapter is here and not disabled."""
        return bool(self.live_adapters())

    def live_adapters(self) -> list[str]:
        """Returns the active adapters that are here and not disabled."""
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.preft_A]

    def state_of(self, adapter_name: str) -> tuple[object, ...]:
        """Returns what changes when the adapter's weights here do, by PyTorch's own count of changes."""
        found = [getattr(self, leaf) for leaf in self.adapter_layer_names]
        tensors = [parameters[adapter_name] for parameters in found if adapter_name in parameters]
        return self.scaling.get(adapter_name), *((id(t), t.data_ptr(), t._version) for t in tensors)

    def _active_here(self) -> list[str]:
        """Returns the names of the adapters that act on this layer's prefill tokens."""
        if self.phase.reached is not None and not self._disable_adapters:
            self.phase.reached.add(id(self))
        return self.live_adapters()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


MERGE_REFUSED = (
    "a PreFT adapter cannot be merged or unmerged: a merged weight would also change decode tokens. Keep the adapter "
    "attached (decoding already runs at base speed), or take it off with unload()"
)


class PreftLinear(nn.Module, PreftLayer):
    """A linear layer with LoRA-P adapters: y = W x, plus scaling * B A x on prefill tokens.

    Wraps any module that maps (..., in_features) to (..., out_features), quantised ones included.
    """

    adapter_layer_names = ("preft_A", "preft_B")
    other_param_names = ("scaling", "preft_dropout")

    def __init__(self, base_layer: nn.Module, features: tuple[int, int], phase: ForwardPhase):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.preft_A = nn.ParameterDict()
        self.preft_B = nn.ParameterDict()
        self.preft_dropout = nn.ModuleDict()
        # The backward of these two does not read their output; that of a quantised subclass may.
        self._output_is_ours = type(base_layer) in (nn.Linear, Conv1D)
        self._init_adapters(phase)

    def _base_device(self) -> torch.device:
        return device_of(self.get_base_layer())

    def add_adapter(self, adapter_name: str, config: PreftConfig) -> None:
        """Adds a LoRA-P adapter in float32: A (r, in), B (out, r); B = 0 unless config.init_weights is False."""
        a = torch.empty(config.r, self.in_features, dtype=torch.float32)
        b = torch.zeros(self.out_features, config.r, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(b, std=config.r**-0.5)
        self._place(adapter_name, self._base_device(), {"preft_A": a, "preft_B": b})
        self.preft_dropout[adapter_name] = _dropout(config)
        self.scaling[adapter_name] = config.scaling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The short way of decode forwards. _modules spares nn.Module's attribute search, a third of our cost here.
        output = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        phase = self.phase.snapshot()
        if phase is False:
            return output
        if isinstance(phase, RoutedRows):
            return self._add_routed(output, x, phase)  # pyright: ignore[reportCallIssue]
        if names := self._active_here():
            phase = self.phase.current()
            for name in names:
                output = self._add_update(output, x, phase, name)
        return output

    def _add_update(self, output: Tensor, x: Tensor, phase: SharedPhase, name: str) -> Tensor:
        a, b, scaling = self.preft_A[name], self.preft_B[name], self.scaling[name]
        x = self.preft_dropout[name](x)
        if phase is True:
            if self._output_is_ours and a.dtype == x.dtype == output.dtype and not torch.is_grad_enabled():
                output.view(-1, output.shape[-1]).addmm_(linear(x, a).flatten(0, -2), b.T, alpha=scaling)
                return output
            return output + lora_update(cast(x, a), a, b, scaling).to(output.dtype)
        if phase is False:
            return output
        index = phase.index
        if index is not None and x.dtype == a.dtype and not torch.is_autocast_enabled(x.device.type):
            # Rows are chosen after A: rows of x would be a copy that autograd keeps, another at each of q, k, v.
            low = linear(flat(x, tuple(phase.mask.shape)), a).index_select(0, index.to(x.device))
            update = (linear(low, b) * scaling).to(output.dtype)
        else:
            update = lora_update(cast(rows_of(x, phase), a), a, b, scaling).to(output.dtype)
        if index is None:
            return output + masked(update, phase, output.shape)
        add_rows = add_rows_ if self._output_is_ours else rows_added
        return add_rows(output, index.to(x.device), update)

    @torch.compiler.disable
    def _add_routed(self, output: Tensor, x: Tensor, phase: RoutedRows) -> Tensor:
        """Adds to each row the update of its own adapter."""
        self._active_here()
        rows_in = flat(x, phase.shape)
        output = output if self._output_is_ours else output.clone()
        rows_out = output.view(-1, output.shape[-1])
        for name, rows in phase.held.items():
            if name in self.preft_A:
                a, b = self.preft_A[name], self.preft_B[name]
                update = lora_update(cast(rows_in[rows], a), a, b, self.scaling[name])
                rows_out[rows] += update.to(output.dtype)
        for bucket, segments in phase.pooled.items():
            weights = self.pooled.get(bucket)
            if weights is not None:
                # Under autocast, or around a quantised layer, the output may have another dtype than the slots.
                same = rows_out.dtype == weights.a.dtype
                target = rows_out if same else rows_out.to(weights.a.dtype)
                add_lora_(target, rows_in.to(target.dtype), weights.a, weights.b, weights.widths, segments)
                if not same:
                    rows_out.copy_(target)
        return output

    def __repr__(self) -> str:
        return "preft." + super().__repr__()


class PreftBlock(nn.Module, PreftLayer):
    """DiReFT-P or LoReFT adapters of one decoder layer: h <- h + update(h) on prefill tokens.

    Lives inside the decoder layer as its child `preft` and edits the layer's output from a forward hook, so that the
    layer keeps its class, its attributes and its parameter names, and `output_hidden_states` shows the edit.
    """

    adapter_layer_names = ("preft_A", "preft_B", "preft_R", "preft_bias")
    other_param_names = ("scaling", "preft_dropout", "method")

    def __init__(self, hidden_size: int, phase: ForwardPhase):
        super().__init__()
        self.hidden_size = hidden_size
        self.preft_A = nn.ParameterDict()
        self.preft_B = nn.ParameterDict()
        self.preft_R = nn.ParameterDict()
        self.preft_bias = nn.ParameterDict()
        self.preft_dropout = nn.ModuleDict()
        self.method: dict[str, str] = {}
        self._device = torch.device("cpu")
        self._init_adapters(phase)

    def _base_device(self) -> torch.device:
        return self._device

    def add_adapter(self, adapter_name: str, config: PreftConfig, device: torch.device) -> None:
        """Adds an adapter in float32: A (r, hidden), bias (r,), and B (hidden, r) or, for LoReFT, R (r, hidden).

        It changes nothing until it is trained (B = 0; for LoReFT A = R), unless config.init_weights is False.
        """
        rank, hidden = config.r, self.hidden_size
        a = torch.empty(rank, hidden, dtype=torch.float32)
        bias = torch.zeros(rank, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.method == "loreft":
            rotation = nn.init.orthogonal_(torch.empty(rank, hidden, dtype=torch.float32))
            parameters = {"preft_A": rotation.clone() if config.init_weights else a, "preft_R": rotation}
        else:
            b = torch.zeros(hidden, rank, dtype=torch.float32)
            if not config.init_weights:
                nn.init.normal_(b, std=rank**-0.5)
            parameters = {"preft_A": a, "preft_B": b}
        if not config.init_weights:
            nn.init.normal_(bias, std=0.1)
        self._device = device
        self._place(adapter_name, device, parameters | {"preft_bias": bias})
        self.preft_dropout[adapter_name] = _dropout(config)
        self.scaling[adapter_name] = config.scaling
        self.method[adapter_name] = config.method

    def edit_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the decoder layer, whose output is (batch, length, hidden) or a sequence that starts so."""
        phase = self.phase.snapshot()
        if phase is False:
            return None
        several = isinstance(output, (tuple, list))
        hidden = output[0] if several else output
        names = self._active_here()
        if isinstance(phase, RoutedRows):
            edited = self._edit_routed(hidden, phase)  # pyright: ignore[reportCallIssue]
        elif names:
            edited = self._edit(hidden, self.phase.current(), names)
        else:
            return None
        return (list if isinstance(output, list) else tuple)([edited, *output[1:]]) if several else edited

    def _edit(self, hidden: Tensor, phase: SharedPhase, names: list[str]) -> Tensor:
        if phase is True:
            return hidden + self._updates(hidden, names)
        if phase is False:
            return hidden
        update, index = self._updates(rows_of(hidden, phase), names), phase.index
        if index is None:
            return hidden + masked(update, phase, hidden.shape)
        return rows_added(hidden, index.to(hidden.device), update)

    @torch.compiler.disable
    def _edit_routed(self, hidden: Tensor, phase: RoutedRows) -> Tensor:
        """Returns the stream with the update of its own adapter on each row."""
        edited = flat(hidden, phase.shape).clone()
        for name, rows in phase.held.items():
            if name in self.preft_A:
                edited[rows] += self._update(edited[rows], name)
        for bucket, segments in phase.pooled.items():
            weights = self.pooled.get(bucket)
            if weights is not None and weights.bias is not None:
                target = edited.to(weights.a.dtype)
                add_direft_(target, weights.a[:, 0], weights.b, weights.bias, segments)
                edited = target.to(hidden.dtype)
        return edited.view(hidden.shape)

    def _updates(self, hidden: Tensor, names: list[str]) -> Tensor:
        total = self._update(hidden, names[0])
        for name in names[1:]:
            total = total + self._update(hidden, name)
        return total

    def _update(self, hidden: Tensor, name: str) -> Tensor:
        a, bias = self.preft_A[name], self.preft_bias[name]
        x = cast(self.preft_dropout[name](hidden), a)
        if self.method[name] == "loreft":
            update = loreft_update(x, a, self.preft_R[name], bias)
        else:
            update = direft_update(x, a, self.preft_B[name], bias, self.scaling[name])
        return update.to(hidden.dtype)


def _dropout(config: PreftConfig) -> nn.Module:
    return nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()


def device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
