"""Adapters of the residual stream after a decoder layer: DiReFT-P and LoReFT."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.ops import add_direft_, direft_update, loreft_update
from preft_hf.config import PreftConfig
from preft_hf.layers.linear import PreftLayer, dropout_of
from preft_hf.layers.per_thread import untraced
from preft_hf.layers.phase import ForwardPhase, RoutedRows, SharedPhase
from preft_hf.layers.rows import cast, check_present, check_slots, flat, masked, rows_added, rows_of


class PreftBlock(nn.Module, PreftLayer):
    """DiReFT-P or LoReFT adapters of one decoder layer: h <- h + update(h) on prefill tokens.

    Is the child `preft` of the decoder layer and edits the layer's output in a forward hook. So the layer keeps its
    class, its attributes and its parameter names, and `output_hidden_states` shows the edit.
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
        self.preft_dropout[adapter_name] = dropout_of(config)
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
        if isinstance(phase, RoutedRows) and not self._disable_adapters:
            edited = self._edit_routed(hidden, phase)
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

    @untraced
    def _edit_routed(self, hidden: Tensor, phase: RoutedRows) -> Tensor:
        """Returns the stream with the update of each row's adapter."""
        edited = flat(hidden, phase.shape).clone()
        for name, rows in phase.held.items():
            if name in self.preft_A:
                edited[rows] += self._update(edited[rows], name)
        for bucket, segments in phase.pooled.items():
            weights = self.pooled.get(bucket)
            if weights is not None and weights.bias is not None:
                check_slots(weights.a, hidden)
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
        check_present(a, hidden)
        x = cast(self.preft_dropout[name](hidden), a)
        if self.method[name] == "loreft":
            update = loreft_update(x, a, self.preft_R[name], bias)
        else:
            update = direft_update(x, a, self.preft_B[name], bias, self.scaling[name])
        return update.to(hidden.dtype)
