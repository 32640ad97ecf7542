"""Prefill-only adapters against all-token LoRA on a GPU: `python -m benchmarks.gpu [--smoke]`.

Random weights in the shapes of real models. Prompts are prefilled in forwards of 8192 tokens; a decode step is a CUDA
graph. All-token LoRA runs the same kernels, in prefill and inside the graph: only their place differs. A case whose
slots, weights and cache do not fit the memory is listed as left out.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu_model import Adapters, Decoder
from benchmarks.run import RESULTS, device_name
from preft_core.layout import Bucket, Layout, Site
from preft_core.ops import add_direft_, add_lora_, reference
from preft_core.planner import DEVICES, SHAPES, Planner, Shape
from preft_core.tokens import Segments

SHARD_70B = replace(
    SHAPES["llama-3.1-70b"], name="llama-3.1-70b, 1 of 4", intermediate_size=7168, num_heads=16, num_kv_heads=2
)
SMOKE = Shape("smoke", 64, 96, 2, 4, 2, 16, 128)
TOLERANCE = {torch.bfloat16: 0.08, torch.float32: 1e-3}
"""Largest difference to the reference in float32, as a share of the largest value of an op's result."""


@dataclass(frozen=True)
class Setting:
    """What is run: tokens of prompt, decode steps timed, tokens of one prefill forward, repeats, and the counts."""

    device: str
    dtype: torch.dtype
    prompt: int
    steps: int
    prefill_tokens: int
    repeats: int
    ranks: tuple[int, ...]
    adapters: tuple[int, ...]
    num_rows: int


@dataclass
class Stopwatch:
    """Times a call in seconds: CUDA events on a GPU, the clock elsewhere."""

    device: str

    def __call__(self, run: Callable[[], Any]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything in small, on any machine; saves nothing")
    parser.add_argument("--models", default="llama-3.1-8b,qwen2.5-0.5b,70b-shard", help="which shapes")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--adapters", default="1,32,128,512")
    parser.add_argument("--rows", type=int, default=512, help="requests at once")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a whole run")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    console = Console()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device: use --smoke to try the script itself")
    ranks, counts = (tuple(map(int, text.split(","))) for text in (options.ranks, options.adapters))
    setting = Setting(
        "cuda", torch.bfloat16, options.prompt, options.steps, 8192, options.repeats, ranks, counts, options.rows
    )
    shapes = [SHARD_70B if name == "70b-shard" else SHAPES[name] for name in options.models.split(",")]
    if options.smoke:
        setting = Setting("cpu", torch.float32, 8, 3, 32, 5, (8, 16), (1, 3, 6), 6)
        shapes = [SMOKE]
    report: dict[str, Any] = {"environment": environment(), "kernels": [], "serving": [], "left_out": []}
    with torch.no_grad():
        for shape in shapes:
            report["kernels"] += kernels(shape, setting)
            serving(shape, setting, report, console)
            if not options.smoke:
                file = RESULTS / f"serving-{device_name()}.json"
                file.write_text(json.dumps(report, indent=1) + "\n")
    for shown in tables(report):
        console.print(shown)


def environment() -> dict[str, str]:
    try:
        import triton
    except ImportError:
        version = "none"
    else:
        version = triton.__version__
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"command": "python -m benchmarks.gpu", "device": name, "torch": torch.__version__, "triton": version}


def median(run: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """Returns median and quartiles in seconds, after two runs to warm up."""
    watch = Stopwatch(setting.device)
    for _ in range(2):
        run()
    times = [watch(run) for _ in range(setting.repeats)]
    return {"median": statistics.median(times), "quartiles": statistics.quantiles(times, n=4)[::2]}


def kernels(shape: Shape, setting: Setting) -> list[dict[str, Any]]:
    """Times each op on one prefill forward, beside its base matrix product and the bytes it must move."""
    found, tokens = [], setting.prefill_tokens
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    groups = {
        "qkv": (hidden, (queries, kv, kv)),
        "o": (queries, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
        "block": (hidden, (hidden,)),
    }
    for name, (width, widths) in groups.items():
        x = torch.randn(tokens, width, dtype=setting.dtype, device=setting.device)
        weight = torch.randn(sum(widths), width, dtype=setting.dtype, device=setting.device) * width**-0.5
        base = median(lambda x=x, weight=weight: x @ weight.T, setting)
        output = x if name == "block" else x @ weight.T
        kind = "block" if name == "block" else "linear"
        paths = tuple(str(i) for i in range(len(widths)))
        for rank in setting.ranks:
            layout = Layout([Site(name, kind, paths, width, widths)], Bucket(kind, rank))
            for count in setting.adapters:
                slab = torch.randn(count, layout.num_elements, dtype=setting.dtype, device=setting.device) * 0.02
                weights = layout.views(slab)[name]
                segments = segments_of(count, tokens, count, setting.device)

                def run(output: Tensor = output, x: Tensor = x, weights: Any = weights, s: Any = segments) -> None:
                    if weights.bias is None:
                        add_lora_(output, x, weights.a, weights.b, weights.widths, s)
                    else:
                        add_direft_(output, weights.a[:, 0], weights.b, weights.bias, s)

                check_op(run, output, x, weights, segments, setting)
                moved = slab.nbytes + (x.nbytes + 2 * output.nbytes if name != "block" else 2 * x.nbytes)
                found.append(
                    {
                        "model": shape.name,
                        "op": name,
                        "rank": rank,
                        "adapters": count,
                        "tokens": tokens,
                        "bytes": moved,
                    }
                    | {"base": base, "op_s": median(run, setting)}
                )
    return found


def check_op(run: Callable[[], None], output: Tensor, x: Tensor, weights: Any, segments: Segments, s: Setting) -> None:
    """Compares one op with the reference in float32; leaves output as it was.

    Raises:
        RuntimeError: a wrong result; it is not timed.
    """
    before = output.clone()
    right = output.to(torch.float32, copy=True)
    if weights.bias is None:
        wide = (x.float(), weights.a.float(), weights.b.float())
        reference.add_lora_(right, *wide, weights.widths, segments)
    else:
        reference.add_direft_(right, weights.a[:, 0].float(), weights.b.float(), weights.bias.float(), segments)
    run()
    difference = float((output.float() - right).abs().max() / right.abs().max())
    output.copy_(before)
    if difference > TOLERANCE[s.dtype]:
        raise RuntimeError(f"an op's result differs by {difference:.2e} of the largest value: not timed")


def segments_of(num_requests: int, num_rows: int, num_adapters: int, device: str) -> Segments:
    """Returns segments of num_requests requests that share the rows, with the adapters in turn."""
    edges = [num_rows * i // num_requests for i in range(num_requests + 1)]
    lengths = [end - begin for begin, end in pairwise(edges)]
    return Segments.of_lengths([i % num_adapters for i in range(num_requests)], lengths, device)


def serving(shape: Shape, setting: Setting, report: dict[str, Any], console: Console) -> None:
    """Times prefill of all rows and a decode step: base, then each method, rank and number of adapters."""
    decoder = Decoder(shape, setting.num_rows, setting.prompt + setting.steps, setting.device, setting.dtype)
    ids = torch.randint(0, shape.vocab_size, (setting.num_rows, setting.prompt), device=setting.device)
    base_prefill = median(lambda: prefill_all(decoder, ids, None, 1, setting), setting)
    base_step = median(step_of(decoder, ids, None, 1, setting), setting)
    whole = base_prefill["median"] + setting.steps * base_step["median"]
    common = {"model": shape.name, "rows": setting.num_rows, "prompt": setting.prompt, "steps": setting.steps}
    report["serving"].append(common | {"system": "base", "prefill": base_prefill, "step": base_step, "whole_s": whole})
    for rank in setting.ranks:
        for count in setting.adapters:
            for method in ("lora", "direft"):
                planner = Planner(shape, DEVICES["h100"], method, rank)  # type: ignore[arg-type]
                case = common | {"method": method, "rank": rank, "adapters": count}
                if count * planner.slot_bytes > free_bytes(setting):
                    report["left_out"].append(case | {"slots_bytes": count * planner.slot_bytes})
                    continue
                console.print(f"{shape.name}: {method}, rank {rank}, {count} adapters", style="dim")
                adapters = Adapters.random(shape, method, rank, count, decoder.embedding)
                check_serving(decoder, ids, adapters, count, setting)
                prefill = median(lambda a=adapters, n=count: prefill_all(decoder, ids, a, n, setting), setting)
                # the graph of a prefill-only adapter's decode step is the base's own
                step = median(step_of(decoder, ids, None, 1, setting), setting)
                whole = prefill["median"] + setting.steps * step["median"]
                name = "lora-p" if method == "lora" else "direft-p"
                report["serving"].append(case | {"system": name, "prefill": prefill, "step": step, "whole_s": whole})
                if method == "lora":
                    step = median(step_of(decoder, ids, adapters, count, setting), setting)
                    whole = prefill["median"] + setting.steps * step["median"]
                    case["system"] = "all-token"
                    report["serving"].append(case | {"prefill": prefill, "step": step, "whole_s": whole})
                del adapters


def free_bytes(setting: Setting) -> float:
    if setting.device != "cuda":
        return 1e9
    torch.cuda.empty_cache()
    # a forward's activations take some gigabytes
    return torch.cuda.mem_get_info()[0] - 6e9


def prefill_all(decoder: Decoder, ids: Tensor, adapters: Adapters | None, count: int, setting: Setting) -> Tensor:
    """Prefills all rows in forwards of at most prefill_tokens; row i has adapter i modulo count."""
    rows = max(1, setting.prefill_tokens // ids.shape[1])
    logits = []
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        segments = None
        if adapters is not None:
            slots = [(first + i) % count for i in range(len(part))]
            segments = Segments.of_lengths(slots, [ids.shape[1]] * len(part), setting.device)
        logits.append(decoder.prefill(part, first, adapters, segments))
    return torch.cat(logits)


def step_of(
    decoder: Decoder, ids: Tensor, adapters: Adapters | None, count: int, setting: Setting
) -> Callable[[], Any]:
    """Returns one decode step of all rows at the middle of the answer: the replay of a CUDA graph on a GPU."""
    tokens = ids[:, 0].contiguous()
    position = torch.tensor(setting.prompt + setting.steps // 2, device=setting.device)
    segments = None
    if adapters is not None:
        segments = segments_of(len(ids), len(ids), count, setting.device)

    def step() -> Tensor:
        return decoder.decode(tokens, position, adapters, segments)

    if setting.device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_serving(decoder: Decoder, ids: Tensor, adapters: Adapters, count: int, setting: Setting) -> None:
    """Compares a mixed prefill with each of a few rows alone, and with the base model.

    Raises:
        RuntimeError: a wrong result, or adapters that change nothing; it is not timed.
    """
    mixed = prefill_all(decoder, ids, adapters, count, setting)
    for row in sorted({0, len(ids) // 2, len(ids) - 1}):
        segments = Segments.of_lengths([row % count], [ids.shape[1]], setting.device)
        alone = decoder.prefill(ids[row : row + 1], row, adapters, segments)[0].float()
        plain = decoder.prefill(ids[row : row + 1], row, None, None)[0].float()
        spread = float(alone.std())
        difference = float((mixed[row].float() - alone).abs().max()) / spread
        if difference > 5 * TOLERANCE[setting.dtype]:
            raise RuntimeError(
                f"row {row} of a mixed prefill differs from the row alone by {difference:.2e}: not timed"
            )
        if float((plain - alone).abs().max()) / spread < 0.2:
            raise RuntimeError("the adapters change nothing, so the comparison would prove nothing")


def tables(report: dict[str, Any]) -> list[Table]:
    made = report["environment"]
    ops = Table(title=f"one op at T = prefill tokens, {made['device']}")
    for column in ("model", "op", "rank", "adapters", "op / base product", "GB/s of what it must move"):
        ops.add_column(column)
    for case in report["kernels"]:
        ratio = case["op_s"]["median"] / case["base"]["median"]
        rate = case["bytes"] / case["op_s"]["median"] / 1e9
        cells = (case["model"], case["op"], str(case["rank"]), str(case["adapters"]), f"{ratio:.3f}", f"{rate:.0f}")
        ops.add_row(*cells)
    shown = Table(title="prefill of all rows, decode step, whole run")
    columns = "model", "system", "rank", "adapters", "prefill, ms", "/ base", "step, ms", "/ base", "all-token / this"
    for column in columns:
        shown.add_column(column)
    base: dict[str, Any] = {}
    whole = {
        (case["model"], case["rank"], case["adapters"]): case["whole_s"]
        for case in report["serving"]
        if case["system"] == "all-token"
    }
    for case in report["serving"]:
        base = case if case["system"] == "base" else base
        lora = whole.get((case["model"], case.get("rank"), case.get("adapters")))
        shown.add_row(
            case["model"],
            case["system"],
            str(case.get("rank", "")),
            str(case.get("adapters", "")),
            f"{1e3 * case['prefill']['median']:.1f}",
            f"{case['prefill']['median'] / base['prefill']['median']:.3f}",
            f"{1e3 * case['step']['median']:.2f}",
            f"{case['step']['median'] / base['step']['median']:.3f}",
            f"{lora / case['whole_s']:.2f}" if lora else "",
        )
    return [ops, shown]


if __name__ == "__main__":
    main()
