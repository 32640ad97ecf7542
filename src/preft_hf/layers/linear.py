"""Linear layers with LoRA-P adapters: base output plus update on prefill tokens; the base of all adapter layers."""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from preft_core.ops import add_lora_, lora_update
from preft_core.ops.weights import Weights
from preft_core.pool.layout import Bucket
from preft_hf.config import REFERENCE_NAME, PreftConfig
from preft_hf.layers.per_thread import untraced
from preft_hf.layers.phase import ForwardPhase, RoutedRows, SharedPhase
from preft_hf.layers.rows import add_rows_, cast, check_present, check_slots, flat, masked, rows_added, rows_of
from preft_hf.layers.weight_versions import version_of


class PreftLayer(BaseTunerLayer):
    """Base of both kinds of adapter layer: parameters by adapter name, and no merging.

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
        """Returns True if this layer has an active adapter that is not disabled."""
        return bool(self.live_adapters())

    def live_adapters(self) -> list[str]:
        """Returns the active adapters of this layer; none if they are disabled."""
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.preft_A]

    def state_of(self, adapter_name: str) -> tuple[object, ...]:
        """Returns a value that changes with the adapter's weights in this layer, by their version."""
        # Every prefill forward asks every layer: nn.Module's attribute search would take most of the time.
        modules, state = self.__dict__["_modules"], [self.scaling.get(adapter_name), self._disable_adapters]
        for leaf in self.adapter_layer_names:
            tensor = modules[leaf]._parameters.get(adapter_name)
            if tensor is not None:
                state += id(tensor), tensor.data_ptr(), version_of(tensor)
        return tuple(state)

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
    "attached (decoding already runs at base speed), or remove it with unload()"
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
        self._may_write_output = type(base_layer) in (nn.Linear, Conv1D)
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
        self.preft_dropout[adapter_name] = dropout_of(config)
        self.scaling[adapter_name] = config.scaling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The fast path of decode forwards. _modules avoids nn.Module's attribute search, a third of the overhead here.
        output = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        phase = self.phase.snapshot()
        if phase is False:
            return output
        if isinstance(phase, RoutedRows):
            return self._add_routed(output, x, phase)
        if names := self._active_here():
            phase = self.phase.current()
            for name in names:
                output = self._add_update(output, x, phase, name)
        return output

    def _add_update(self, output: Tensor, x: Tensor, phase: SharedPhase, name: str) -> Tensor:
        a, b, scaling = self.preft_A[name], self.preft_B[name], self.scaling[name]
        check_present(a, x)
        x = self.preft_dropout[name](x)
        if phase is True:
            if self._may_write_output and a.dtype == x.dtype == output.dtype and not torch.is_grad_enabled():
                output.view(-1, output.shape[-1]).addmm_(linear(x, a).flatten(0, -2), b.T, alpha=scaling)
                return output
            return output + lora_update(cast(x, a), a, b, scaling).to(output.dtype)
        if phase is False:
            return output
        index = phase.index
        if index is not None and x.dtype == a.dtype and not torch.is_autocast_enabled(x.device.type):
            # Rows are selected after A. Rows of x would be a copy that autograd keeps, one for each of q, k and v.
            low = linear(flat(x, tuple(phase.mask.shape)), a).index_select(0, index.to(x.device))
            update = (linear(low, b) * scaling).to(output.dtype)
        else:
            update = lora_update(cast(rows_of(x, phase), a), a, b, scaling).to(output.dtype)
        if index is None:
            return output + masked(update, phase, output.shape)
        add_rows = add_rows_ if self._may_write_output else rows_added
        return add_rows(output, index.to(x.device), update)

    @untraced
    def _add_routed(self, output: Tensor, x: Tensor, phase: RoutedRows) -> Tensor:
        """Adds to each row the update of its adapter."""
        self._active_here()
        if self._disable_adapters:
            return output
        rows_in = flat(x, phase.shape)
        output = output if self._may_write_output else output.clone()
        rows_out = output.view(-1, output.shape[-1])
        for name, rows in phase.held.items():
            if name in self.preft_A:
                a, b = self.preft_A[name], self.preft_B[name]
                check_present(a, x)
                update = lora_update(cast(rows_in[rows], a), a, b, self.scaling[name])
                rows_out[rows] += update.to(output.dtype)
        for bucket, segments in phase.pooled.items():
            weights = self.pooled.get(bucket)
            if weights is not None:
                check_slots(weights.a, x)
                # Under autocast, or around a quantised layer, the output may have another dtype than the slots.
                same = rows_out.dtype == weights.a.dtype
                target = rows_out if same else rows_out.to(weights.a.dtype)
                add_lora_(target, rows_in.to(target.dtype), weights.a, weights.b, weights.widths, segments)
                if not same:
                    rows_out.copy_(target)
        return output

    def __repr__(self) -> str:
        return "preft." + super().__repr__()


def dropout_of(config: PreftConfig) -> nn.Module:
    """Returns the dropout on a new adapter's input."""
    return nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()


def device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
