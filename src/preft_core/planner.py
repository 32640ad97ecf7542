"""A first-order cost model of serving many adapters: bytes moved and arithmetic done, divided by a device's rates.

Only the memory traffic and the arithmetic of one base step overlap; kernel launches cost nothing. It shows where the
time goes and how it scales, to within tens of per cent. It does not predict what a given server will reach.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from preft_core.pool.layout import RANKS, Bucket, Layout, Site

Method = Literal["lora", "direft"]
METHODS: tuple[Method, ...] = ("lora", "direft")
LINEAR_SETS = {
    "all-linear": ("q", "k", "v", "o", "gate", "up", "down"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "qv": ("q", "v"),
}
FUSED = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linear layers that share their input, which is read once per group."""


@dataclass(frozen=True)
class Device:
    """A device: achievable memory bandwidth (bytes/s), achievable FLOP/s of 16-bit matrix products, memory (bytes)."""

    name: str
    bandwidth: float
    flops: float
    memory: float


DEVICES = {
    device.name: device
    for device in (
        # achievable rates: about 90 % of the data sheet's bandwidth and 70 % of its dense bf16 FLOP/s
        Device("h100", 3.0e12, 700e12, 80e9),
        Device("h200", 4.3e12, 700e12, 141e9),
        Device("a100-80gb", 1.8e12, 220e12, 80e9),
        Device("a100-40gb", 1.4e12, 220e12, 40e9),
        Device("l40s", 0.78e12, 250e12, 48e9),
        Device("a10g", 0.54e12, 50e12, 24e9),
        Device("l4", 0.27e12, 85e12, 24e9),
    )
}


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder-only transformer with gated MLPs; fields as in config.json."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the linear layers of one decoder layer: name -> (in, out)."""
        hidden, inner, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_dim
        queries = self.num_heads * self.head_dim
        shapes = {"q": (hidden, queries), "k": (hidden, kv), "v": (hidden, kv), "o": (queries, hidden)}
        return shapes | {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}

    @property
    def num_parameters(self) -> int:
        """Weights of linear layers and embeddings."""
        per_layer = sum(width_in * width_out for width_in, width_out in self.linears().values())
        return self.num_layers * per_layer + (1 if self.tied else 2) * self.vocab_size * self.hidden_size

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers * element_bytes

    @classmethod
    def of_config(cls, config: object, name: str) -> "Shape":
        """Returns the shape that a decoded config.json describes.

        Args:
            name: of the model
        Raises:
            ValueError: not a JSON object, a missing or non-positive field, or a mixture of experts.
        """
        config = config.get("text_config", config) if isinstance(config, dict) else config
        if not isinstance(config, dict):
            raise ValueError(
                f"the config of {name} is {str(config)[:60]!r}: expected a JSON object; give a model's config.json"
            )
        if any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise ValueError(f"{name} is a mixture of experts: the planner supports dense decoder-only models")
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if not isinstance(config.get(key), int) or config[key] < 1]
        optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key)]
        missing += [key for key in optional if not isinstance(config[key], int) or config[key] < 1]
        if missing:
            raise ValueError(
                f"the config of {name} has no positive {', '.join(missing)}: give a dense decoder-only model"
            )
        heads = config["num_attention_heads"]
        return cls(
            name,
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        Shape("llama-3.1-70b", 8192, 28672, 80, 64, 8, 128, 128256),
        Shape("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 64, 151936, tied=True),
        Shape("qwen2.5-7b", 3584, 18944, 28, 28, 4, 128, 152064),
        Shape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
    )
}


@dataclass(frozen=True)
class Workload:
    """Requests that run at the same time and cycle through num_adapters adapters.

    Attributes:
        prompt, output: tokens per request
        prefill_tokens: most tokens of one prefill forward
    """

    num_adapters: int
    num_requests: int
    prompt: int
    output: int
    prefill_tokens: int = 8192

    def __post_init__(self) -> None:
        faults = [f"{f.name} is {getattr(self, f.name)}: 1 or more" for f in fields(self) if getattr(self, f.name) < 1]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class Prefill:
    """Seconds of one prefill forward: of the base model, and what adapters add, by cause."""

    base: float
    adapter_bytes: float
    activations: float
    arithmetic: float

    @property
    def total(self) -> float:
        """Seconds of base and adapters."""
        return self.base + self.adapter_bytes + self.activations + self.arithmetic

    @property
    def overhead(self) -> float:
        """The time that adapters add, as a fraction of the base's."""
        return self.total / self.base - 1


@dataclass(frozen=True)
class Planner:
    """The cost model for one base model, device and kind of adapter.

    Args:
        shape: of the base model
        device: one of DEVICES, or your own
        method: "lora" (LoRA-P) or "direft" (DiReFT-P, on every decoder layer)
        rank: of all adapters, 1 to 128
        linears: a key of LINEAR_SETS; ignored for DiReFT-P
        tensor_parallel: devices that share all work evenly, a divisor of the heads; communication costs nothing
        element_bytes: bytes per element of weights, KV and activations
        fused: assumes kernels that add the update while the base output is on chip, without activation traffic
    Raises:
        ValueError: an argument out of range. All faults in one message.
    """

    shape: Shape
    device: Device
    method: Method = "lora"
    rank: int = 16
    linears: str = "all-linear"
    tensor_parallel: int = 1
    element_bytes: int = 2
    fused: bool = False

    def __post_init__(self) -> None:
        faults = []
        if self.method not in METHODS:
            faults.append(f"method is {self.method!r}: {' or '.join(METHODS)}")
        if not 1 <= self.rank <= RANKS[-1]:
            faults.append(f"rank is {self.rank}: 1 to {RANKS[-1]}")
        if self.linears not in LINEAR_SETS:
            faults.append(f"linears is {self.linears!r}: {', '.join(LINEAR_SETS)}")
        if self.tensor_parallel < 1 or self.shape.num_heads % max(self.tensor_parallel, 1):
            faults.append(f"tensor_parallel is {self.tensor_parallel}: a divisor of {self.shape.num_heads} heads")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one adapter's weights at its own rank, on all devices together."""
        if self.method == "direft":
            return self.shape.num_layers * (2 * self.shape.hidden_size + 1) * self.rank * self.element_bytes
        widths = sum(sum(self.shape.linears()[name]) for name in LINEAR_SETS[self.linears])
        return self.shape.num_layers * widths * self.rank * self.element_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of the pool, where ranks are padded, on all devices together."""
        bucket = Bucket("block" if self.method == "direft" else "linear", next(r for r in RANKS if r >= self.rank))
        return self.shape.num_layers * Layout(self._sites(), bucket).num_elements * self.element_bytes

    def _sites(self) -> list[Site]:
        hidden = self.shape.hidden_size
        if self.method == "direft":
            return [Site("block", "block", ("block",), hidden, (hidden,))]
        shapes = self.shape.linears()
        return [Site(n, "linear", (n,), shapes[n][0], (shapes[n][1],)) for n in LINEAR_SETS[self.linears]]

    def prefill(self, num_tokens: int, num_adapters: int) -> Prefill:
        """Returns the time of one forward of num_tokens prompt tokens with num_adapters different adapters.

        base          = max(2 P T / flops, P bytes / bandwidth)         P parameters, T tokens
        adapter_bytes = adapters * bytes of one / bandwidth             each is read once
        activations   = LoRA-P: x once per fused group and y twice per layer; DiReFT-P: h three times
        arithmetic    = LoRA-P: 2 T (parameters of one adapter) / flops; DiReFT-P: hidden behind its traffic
        """
        parallel, width = self.tensor_parallel, self.element_bytes
        base = max(2 * self.shape.num_parameters * num_tokens / self.device.flops, self._weights_seconds() * parallel)
        elements = 3 * self.shape.hidden_size
        arithmetic = 0.0
        if self.method == "lora":
            shapes, chosen = self.shape.linears(), LINEAR_SETS[self.linears]
            groups = [[name for name in group if name in chosen] for group in FUSED]
            elements = sum(shapes[group[0]][0] for group in groups if group)
            elements += sum(2 * shapes[name][1] for name in chosen)
            arithmetic = 2 * num_tokens * self.adapter_bytes / width / self.device.flops
        elements = 0 if self.fused else elements
        traffic = elements * num_tokens * self.shape.num_layers * width / self.device.bandwidth
        read = num_adapters * self.adapter_bytes / self.device.bandwidth
        return Prefill(base / parallel, read / parallel, traffic / parallel, arithmetic / parallel)

    def decode_step(self, num_requests: int, context: float, num_adapters: int = 0) -> float:
        """Returns the seconds of one decode step.

        Args:
            context: mean tokens of KV per request
            num_adapters: all-token LoRAs, whose weights every step reads; 0 for PreFT and for the base
        """
        kv = num_requests * context * self.shape.kv_bytes(self.element_bytes) / self.device.bandwidth
        arithmetic = 2 * self.shape.num_parameters * num_requests / self.device.flops
        base = max(self._weights_seconds() + kv / self.tensor_parallel, arithmetic / self.tensor_parallel)
        return base + num_adapters * self.adapter_bytes / self.device.bandwidth / self.tensor_parallel

    def _weights_seconds(self) -> float:
        return self.shape.num_parameters * self.element_bytes / self.device.bandwidth / self.tensor_parallel

    def seconds(self, work: Workload, system: Literal["base", "preft", "all-token"]) -> float:
        """Returns the seconds for all requests of a workload: prefill, then decode."""
        tokens = work.num_requests * work.prompt
        per_forward = min(tokens, work.prefill_tokens)
        adapters = min(work.num_adapters, work.num_requests, max(1, -(-per_forward // work.prompt)))
        step = self.prefill(per_forward, adapters)
        prefill = (step.base if system == "base" else step.total) * tokens / per_forward
        resident = min(work.num_adapters, work.num_requests) if system == "all-token" else 0
        return prefill + (work.output - 1) * self.decode_step(
            work.num_requests, work.prompt + work.output / 2, resident
        )

    def throughput(self, work: Workload, system: Literal["base", "preft", "all-token"]) -> float:
        """Returns output tokens per second."""
        return work.num_requests * work.output / self.seconds(work, system)

    def ratio(self, work: Workload) -> float:
        """Returns the throughput of this method relative to all-token LoRA of the same rank on all linear layers."""
        lora = replace(self, method="lora")
        return lora.seconds(work, "all-token") / self.seconds(work, "preft")

    def adapters_that_fit(self, work: Workload, usable: float = 0.9) -> int:
        """Returns how many adapters fit into slots, beside the weights and the workload's KV.

        Args:
            usable: fraction of the memory that may be used
        """
        free = usable * self.device.memory * self.tensor_parallel
        free -= self.shape.num_parameters * self.element_bytes
        free -= work.num_requests * (work.prompt + work.output) * self.shape.kv_bytes(self.element_bytes)
        return max(0, int(free // self.slot_bytes))
