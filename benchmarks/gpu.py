"""Prefill-only adapters against all-token LoRA on a GPU: `python -m benchmarks.gpu [--smoke]`.

Random weights in the shapes of real models. Prompts are prefilled in forwards of 8192 tokens; a decode step is a CUDA
graph. All-token LoRA runs the same kernels, in prefill and inside the graph. A case whose slots, weights and cache do
not fit in memory is listed as skipped.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu_model import Adapters, Decoder
from benchmarks.run import RESULTS, device_name
from preft_core.ops import add_direft_, add_lora_, lora_linear, reference
from preft_core.planner import DEVICES, SHAPES, Planner, Shape
from preft_core.pool.layout import Bucket, Layout, Site
from preft_core.rule.tokens import Segments

SHARD_70B = replace(
    SHAPES["llama-3.1-70b"], name="llama-3.1-70b, 1 of 4", intermediate_size=7168, num_heads=16, num_kv_heads=2
)
SMOKE = Shape("smoke", 64, 96, 2, 4, 2, 16, 128)
SECTIONS = "kernels", "forwards", "serving", "left_out"
TOLERANCE = {torch.bfloat16: 0.08, torch.float32: 1e-3}
"""Largest allowed difference to the float32 reference, as a fraction of the largest value of an op's result."""


@dataclass(frozen=True)
class Setting:
    """The sizes of a run: prompt tokens, timed decode steps, tokens of one prefill forward, repeats, and counts."""

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
    """Times a call in seconds: with CUDA events on a GPU, with the clock elsewhere."""

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
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128, help="decode steps of a whole run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
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
    report: dict[str, Any] = {"environment": environment(), **{section: [] for section in SECTIONS}}
    file = options.results / f"serving-{device_name()}.json"
    if not options.smoke and file.exists():
        report = json.loads(file.read_text())
        if report["environment"] != environment():
            parser.error(f"{file} was measured with {report['environment']}: move it away, or name another --results")
    with torch.no_grad():
        for shape in shapes:
            found = {"kernels": kernels(shape, setting)} | serving(shape, setting, console)
            report = merged(report, found)
            if not options.smoke:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report, indent=1) + "\n")
    for shown in tables(report):
        console.print(shown)


def merged(report: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns a report in which new cases replace old ones of the same model, system, rank and load."""

    def key(case: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple((name, value) for name, value in case.items() if isinstance(value, (str, int)))

    result = {"environment": report["environment"]}
    for section in SECTIONS:
        cases = {key(case): case for case in report[section]} | {key(case): case for case in found[section]}
        result[section] = list(cases.values())
    return result


def environment() -> dict[str, str]:
    try:
        import triton
    except ImportError:
        version = "none"
    else:
        version = triton.__version__
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"command": "python -m benchmarks.gpu", "device": name, "torch": torch.__version__, "triton": version}


def alternated(runs: dict[str, Callable[[], Any]], setting: Setting) -> dict[str, dict[str, Any]]:
    """Returns median and quartiles of each, in seconds: two warm-up runs each, then all in turn, repeatedly."""
    watch = Stopwatch(setting.device)
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(setting.repeats):
        for name, run in runs.items():
            times[name].append(watch(run))
    return {
        name: {"median": statistics.median(found), "quartiles": statistics.quantiles(found, n=4)[::2]}
        for name, found in times.items()
    }


def replay(run: Callable[[], Any], setting: Setting) -> tuple[Callable[[], Any], Any]:
    """Returns the replay of a CUDA graph of a call and the call's result; without a GPU, the call itself."""
    if setting.device != "cuda":
        return run, run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def host_seconds(run: Callable[[], Any], setting: Setting) -> float:
    """Returns the host time of a call in seconds, without waiting for the device."""
    times = []
    for _ in range(5):
        if setting.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            run()
        times.append((time.perf_counter() - start) / 20)
    return min(times)


def kernels(shape: Shape, setting: Setting) -> list[dict[str, Any]]:
    """Times each op on one prefill forward, with its base matrix product and the bytes that it must move.

    "op" adds to an existing output; "layer" is product and updates together (`lora_linear`).
    """
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
        output = x if name == "block" else x @ weight.T
        kind = "block" if name == "block" else "linear"
        paths = tuple(str(i) for i in range(len(widths)))
        for rank in setting.ranks:
            layout = Layout([Site(name, kind, paths, width, widths)], Bucket(kind, rank))
            for count in setting.adapters:
                slab = torch.randn(count, layout.num_elements, dtype=setting.dtype, device=setting.device) * 0.02
                weights = layout.views(slab)[name]
                segments = segments_of(count, tokens, count, setting.device)

                def op(output: Tensor = output, x: Tensor = x, weights: Any = weights, s: Any = segments) -> None:
                    if weights.bias is None:
                        add_lora_(output, x, weights.a, weights.b, weights.widths, s)
                    else:
                        add_direft_(output, weights.a[:, 0], weights.b, weights.bias, s)

                def layer(x: Tensor = x, m: Tensor = weight, weights: Any = weights, s: Any = segments) -> Tensor:
                    return lora_linear(x, m, weights.a, weights.b, weights.widths, s)

                check_op(op, output, x, weights, segments)
                runs: dict[str, Callable[[], Any]] = {"base": lambda x=x, weight=weight: x @ weight.T, "op": op}
                if weights.bias is None:
                    check_layer(layer, x, weight, weights, segments)
                    runs["layer"] = layer
                times = alternated({name: replay(run, setting)[0] for name, run in runs.items()}, setting)
                moved = slab.nbytes + (x.nbytes + 2 * output.nbytes if name != "block" else 2 * x.nbytes)
                facts = {"model": shape.name, "name": name, "rank": rank, "adapters": count, "tokens": tokens}
                found.append(facts | {"bytes": moved, "host_s": host_seconds(op, setting)} | times)
    return found


def check_op(run: Callable[[], None], output: Tensor, x: Tensor, weights: Any, segments: Segments) -> None:
    """Compares one op with the float32 reference and restores its output.

    Raises:
        RuntimeError: a wrong result, which is not timed.
    """
    before = output.clone()
    right = output.to(torch.float32, copy=True)
    if weights.bias is None:
        wide = (x.float(), weights.a.float(), weights.b.float())
        reference.add_lora_(right, *wide, weights.widths, segments)
    else:
        reference.add_direft_(right, weights.a[:, 0].float(), weights.b.float(), weights.bias.float(), segments)
    run()
    found = output.clone()
    output.copy_(before)
    compare("an op", found, right)


def check_layer(run: Callable[[], Tensor], x: Tensor, weight: Tensor, weights: Any, segments: Segments) -> None:
    """Compares product and updates with the reference in float32.

    Raises:
        RuntimeError: a wrong result; it is not timed.
    """
    wide = (x.float(), weight.float(), weights.a.float(), weights.b.float())
    right = reference.lora_linear(*wide, weights.widths, segments)
    compare("a layer", run(), right)


def compare(name: str, found: Tensor, right: Tensor) -> None:
    difference = float((found.float() - right).abs().max() / right.abs().max())
    if difference > TOLERANCE[found.dtype]:
        raise RuntimeError(f"{name}'s result differs by {difference:.2e} of the largest value: not timed")


def segments_of(num_requests: int, num_rows: int, num_adapters: int, device: str) -> Segments:
    """Returns segments of num_requests requests that share the rows, with the adapters in turn."""
    edges = [num_rows * i // num_requests for i in range(num_requests + 1)]
    lengths = [end - begin for begin, end in pairwise(edges)]
    return Segments.of_lengths([i % num_adapters for i in range(num_requests)], lengths, device)


def serving(shape: Shape, setting: Setting, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Times forwards of prompts and decode steps: base, then each method, rank and number of adapters."""
    decoder = Decoder(shape, setting.num_rows, setting.prompt + setting.steps, setting.device, setting.dtype)
    ids = torch.randint(0, shape.vocab_size, (setting.num_rows, setting.prompt), device=setting.device)
    found: dict[str, list[dict[str, Any]]] = {"forwards": [], "serving": [], "left_out": []}
    for rank in setting.ranks:
        for count in setting.adapters:
            case = {"model": shape.name, "rank": rank, "adapters": count}
            adapters: dict[str, Adapters] = {}
            for method, system in (("lora", "lora-p"), ("direft", "direft-p")):
                planner = Planner(shape, DEVICES["h100"], method, rank)  # type: ignore[arg-type]
                if count * planner.slot_bytes > free_bytes(setting):
                    found["left_out"].append(case | {"system": system, "slots_bytes": count * planner.slot_bytes})
                    continue
                adapters[system] = Adapters.random(shape, method, rank, count, decoder.embedding)
                check_serving(decoder, ids, adapters[system], count, setting)
            console.print(f"{shape.name}: rank {rank}, {count} adapters: {', '.join(adapters)}", style="dim")
            found["forwards"] += forwards(decoder, adapters, case, setting)
            found["serving"] += whole_runs(decoder, ids, adapters, case, setting)
            del adapters
    return found


def free_bytes(setting: Setting) -> float:
    if setting.device != "cuda":
        return 1e9
    torch.cuda.empty_cache()
    # a forward's activations take some gigabytes
    return torch.cuda.mem_get_info()[0] - 6e9


def forwards(
    decoder: Decoder, adapters: dict[str, Adapters], case: dict[str, Any], setting: Setting
) -> list[dict[str, Any]]:
    """Times one forward of prefill_tokens with all adapters in it: more adapters, shorter prompts."""
    requests = max(case["adapters"], min(64, setting.num_rows))
    length = setting.prefill_tokens // requests
    if requests > setting.num_rows or length > setting.prompt + setting.steps:
        return []
    ids = torch.randint(0, decoder.shape.vocab_size, (requests, length), device=setting.device)
    slots = [i % case["adapters"] for i in range(requests)]

    def run(one: Adapters | None) -> Tensor:
        segments = None if one is None else Segments.of_lengths(slots, [length] * requests, setting.device)
        return decoder.prefill(ids, 0, one, segments)

    runs = {name: lambda one=one: run(one) for name, one in ({"base": None} | adapters).items()}
    common = case | {"requests": requests, "tokens": requests * length}
    return [common | {"system": name, "forward": times} for name, times in alternated(runs, setting).items()]


def whole_runs(
    decoder: Decoder, ids: Tensor, adapters: dict[str, Adapters], case: dict[str, Any], setting: Setting
) -> list[dict[str, Any]]:
    """Times forwards of prompts, tables of adapters included, and decode steps; a whole run is the sum of them all."""
    count, rows = case["adapters"], max(1, setting.prefill_tokens // setting.prompt)
    num_forwards = -(-len(ids) // rows)
    turn = counter()

    def forward(one: Adapters | None) -> Tensor:
        first = next(turn) % num_forwards * rows
        return prefill(decoder, ids[first : first + rows], first, one, count, setting)

    runs = {name: lambda one=one: forward(one) for name, one in ({"base": None} | adapters).items()}
    times = alternated(runs, setting)
    steps = {"base": step_of(decoder, ids, None, 1, setting)}
    if "lora-p" in adapters:
        steps["all-token"] = step_of(decoder, ids, adapters["lora-p"], count, setting)
        times["all-token"] = times["lora-p"]
    step_times = alternated(steps, setting)
    common = case | {"rows": len(ids), "prompt": setting.prompt, "steps": setting.steps, "forwards": num_forwards}
    found = []
    for system, time_of_forward in times.items():
        # the graph of a prefill-only adapter's decode step is the base's own
        step = step_times.get(system, step_times["base"])
        whole = num_forwards * time_of_forward["median"] + setting.steps * step["median"]
        found.append(common | {"system": system, "forward": time_of_forward, "step": step, "whole_s": whole})
    return found


def prefill(
    decoder: Decoder, ids: Tensor, first: int, adapters: Adapters | None, count: int, setting: Setting
) -> Tensor:
    """Prefills rows first... in one forward; row i has adapter i modulo count."""
    segments = None
    if adapters is not None:
        slots = [(first + i) % count for i in range(len(ids))]
        segments = Segments.of_lengths(slots, [ids.shape[1]] * len(ids), setting.device)
    return decoder.prefill(ids, first, adapters, segments)


def step_of(
    decoder: Decoder, ids: Tensor, adapters: Adapters | None, count: int, setting: Setting
) -> Callable[[], Any]:
    """Returns one decode step of all rows at the middle of the answer: the replay of a CUDA graph on a GPU.

    Raises:
        RuntimeError: the replay gives other logits than the step run op by op; it is not timed.
    """
    tokens = ids[:, 0].contiguous()
    position = torch.tensor(setting.prompt + setting.steps // 2, device=setting.device)
    segments = None if adapters is None else segments_of(len(ids), len(ids), count, setting.device)

    def step() -> Tensor:
        return decoder.decode(tokens, position, adapters, segments)

    run, result = replay(step, setting)
    run()
    right = step().float()
    difference = float((result.float() - right).abs().max() / right.std())
    if difference > 5 * TOLERANCE[setting.dtype]:
        raise RuntimeError(f"a captured decode step differs from the same step run by {difference:.2e}: not timed")
    return run


def check_serving(decoder: Decoder, ids: Tensor, adapters: Adapters, count: int, setting: Setting) -> None:
    """Compares a mixed prefill with each of a few rows alone, and with the base model.

    Raises:
        RuntimeError: a wrong result, or adapters that change nothing; it is not timed.
    """
    rows = min(len(ids), max(1, setting.prefill_tokens // setting.prompt))
    mixed = prefill(decoder, ids[:rows], 0, adapters, count, setting)
    for row in sorted({0, rows // 2, rows - 1}):
        alone = prefill(decoder, ids[row : row + 1], row, adapters, count, setting)[0].float()
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
    device = report["environment"]["device"]
    ops = Table(title=f"one op of a prefill forward, {device}")
    for column in ("model", "op", "rank", "adapters", "op / base", "layer / base", "GB/s of the op", "host, us"):
        ops.add_column(column)
    for case in report["kernels"]:
        base, op = case["base"]["median"], case["op"]["median"]
        layer = f"{case['layer']['median'] / base:.3f}" if "layer" in case else ""
        rate = f"{case['bytes'] / op / 1e9:.0f}"
        named = case["model"], case["name"], str(case["rank"]), str(case["adapters"])
        ops.add_row(*named, f"{op / base:.3f}", layer, rate, f"{1e6 * case['host_s']:.0f}")
    once = Table(title=f"one forward of prompts with all adapters in it, {device}")
    for column in ("model", "system", "rank", "adapters", "tokens", "ms", "/ base"):
        once.add_column(column)
    runs = Table(title=f"prompts, decode step, whole run, {device}")
    columns = (
        "model",
        "system",
        "rank",
        "adapters",
        "load",
        "forward, ms",
        "/ base",
        "step, ms",
        "/ base",
        "all-token / this",
    )
    for column in columns:
        runs.add_column(column)
    base: dict[str, Any] = {}
    for case in report["forwards"]:
        base = case if case["system"] == "base" else base
        named = case["model"], case["system"], str(case["rank"]), str(case["adapters"]), str(case["tokens"])
        seconds = case["forward"]["median"]
        once.add_row(*named, f"{1e3 * seconds:.1f}", f"{seconds / base['forward']['median']:.3f}")
    whole = {_load(case): case["whole_s"] for case in report["serving"] if case["system"] == "all-token"}
    for case in report["serving"]:
        base = case if case["system"] == "base" else base
        lora, seconds, step = whole.get(_load(case)), case["forward"]["median"], case["step"]["median"]
        runs.add_row(
            *(case["model"], case["system"], str(case["rank"]), str(case["adapters"])),
            f"{case['rows']} x {case['prompt']} + {case['steps']}",
            *(f"{1e3 * seconds:.1f}", f"{seconds / base['forward']['median']:.3f}"),
            *(f"{1e3 * step:.2f}", f"{step / base['step']['median']:.3f}"),
            f"{lora / case['whole_s']:.2f}" if lora else "",
        )
    return [ops, once, runs]


def _load(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("model", "rank", "adapters", "rows", "prompt", "steps"))


if __name__ == "__main__":
    main()
