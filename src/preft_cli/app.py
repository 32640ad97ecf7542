"""The command line `preft`. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from preft_cli import distillation, doctor, hub
from preft_cli.options import Method, Precision, learning_rate, quiet
from preft_core.format.config import HubError

HELP = """Prefill-only finetuning: adapters that act on prompt tokens only; decoding runs the base model.

\b
    preft demo          train, save, load and check an adapter on a real small model
    preft train --model ID --data rows.jsonl --output my-adapter
    preft distill my-lora --data prompts.jsonl --output my-adapter
    preft generate --adapter my-adapter --prompt "Tumbes, PE, 96946"
    preft inspect my-adapter
    preft push my-adapter --to org/name
    preft pull preft.toml
    preft plan --model llama-3.1-8b --adapters 512
    preft doctor

Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C. PREFT_DEBUG=1 shows tracebacks.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line. An error is one sentence on stderr; PREFT_DEBUG=1 shows the traceback.

    OpenMP threads wait passively, unless OMP_WAIT_POLICY is set: spinning ones slow down a CPU that is shared.
    """
    # read when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except HubError as error:
        _fail(str(error), 1)
    except (ValueError, TypeError, FileNotFoundError, NotImplementedError) as error:
        _fail(str(error), 2)
    except (RuntimeError, OSError, ImportError) as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("PREFT_DEBUG") == "1" and sys.exc_info()[0] is not None:
        raise
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"preft: {message}", markup=False)
    sys.exit(code)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"preft {version('preft-hf')}")
        raise typer.Exit


@app.callback(help=HELP)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Takes the options that stand before the command."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapter, plot and summary.")] = Path("preft-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 4 rows.")] = 100,
    method: Annotated[Method, typer.Option(help="LoRA-P, DiReFT-P or LoReFT.")] = Method.lora,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapter.")] = 0,
    eval_rows: Annotated[int, typer.Option(min=1, help="Number of held-out cities to answer.")] = 48,
) -> None:
    """Finetune SmolLM2-135M on city cards, load the adapter in a new process, and count the operations of decoding.

    Takes about two minutes on two CPU cores. The first run also downloads the model (93 MB).
    """
    quiet()
    from preft_hf.demo.run import DemoPlan, run_demo

    plan = DemoPlan(output=output, num_steps=steps, method=method.value, rank=rank, seed=seed, num_eval_rows=eval_rows)
    run_demo(plan, Console())


@app.command()
def train(
    model: Annotated[str, typer.Option(help='Base model: Hub id or folder, or "demo" for the demo\'s.')],
    data: Annotated[Path, typer.Option(help="JSONL file with prompt and response, or messages, in each row.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter and its checkpoints.")],
    method: Annotated[Method, typer.Option(help="LoRA-P, DiReFT-P or LoReFT.")] = Method.lora,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scaling: alpha / rank. Default 2 * rank, for direft rank.")
    ] = None,
    lr: Annotated[
        float,
        typer.Option(callback=learning_rate, help="Learning rate of AdamW; 3e-3 suits rank 16 at 135 M parameters."),
    ] = 1e-3,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row in tokens; longer rows are skipped.")] = 1024,
    eval_split: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of rows held out.")] = 0.1,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: at the end.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of split, order and adapter.")] = 0,
    dtype: Annotated[
        Precision, typer.Option(help="Data type of the base model; 16 bits are slow on most CPUs.")
    ] = Precision.float32,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")] = False,
    base_name: Annotated[
        str | None, typer.Option(help="Hub id of the base model for the adapter's config, if --model is a folder.")
    ] = None,
) -> None:
    """Finetune a prefill-only adapter.

    The adapter acts on the prompt, the base model reads the response, and the loss is on the response. A row of
    messages becomes one sample for each assistant turn. Ctrl-C stops after the current step and writes a checkpoint;
    --resume continues from it.

    \b
        {"prompt": "Tumbes, PE, 96946", "response": "TUMBES / Peru ~ 97k"}
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello"}]}
    """
    quiet()
    from preft_hf.training.train_run import FinetuneOptions, finetune

    options = FinetuneOptions(
        model, data, output, method.value, rank, alpha, lr, steps, epochs, batch_size, max_length, eval_split,
        eval_every, save_every, seed, dtype.value, resume, base_name,
    )  # fmt: skip
    if not finetune(options, Console()):
        raise typer.Exit(130)


@app.command()
def generate(
    adapter: Annotated[Path, typer.Option(help="Folder of a saved adapter.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt. Default: standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one in the adapter's config.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Format the prompt with the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Run without the adapter, to compare.")] = False,
) -> None:
    """Generate a response: the adapter acts on the prompt, and the base model decodes."""
    quiet()
    from preft_hf.training.train_run import stream_answer

    text = sys.stdin.read() if prompt is None else prompt
    stream_answer(adapter, text, model, chat, max_new_tokens, temperature, seed, base)


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter, or org/name[@revision] on the Hub.")],
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for the Hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check an adapter and show its method, layers, size, norms, base model and fingerprint.

    For an adapter on the Hub, only its config and the header of its weights are downloaded.
    """
    from preft_cli.inspection import facts_of, remote_facts_of, show_facts
    from preft_core.hub.source import hub_id

    facts = facts_of(adapter) if hub_id(adapter) is None else remote_facts_of(adapter, token)
    if json:
        import json as format

        print(format.dumps(facts, indent=1))
    else:
        show_facts(facts, Console())


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Known shape, folder with a config.json, or Hub id.")] = "llama-3.1-8b",
    gpu: Annotated[str, typer.Option(help="h100, h200, a100-80gb, a100-40gb, l40s, a10g, l4, or any name.")] = "h100",
    method: Annotated[str, typer.Option(help="lora, direft or both.")] = "both",
    rank: Annotated[int, typer.Option(help="Rank of the adapters, 1 to 128.")] = 16,
    linears: Annotated[str, typer.Option(help="all-linear, attention, mlp or qv; for LoRA-P.")] = "all-linear",
    adapters: Annotated[int, typer.Option(help="Number of adapters in use.")] = 512,
    requests: Annotated[int, typer.Option(help="Number of concurrent requests.")] = 512,
    prompt: Annotated[int, typer.Option(help="Prompt tokens per request.")] = 256,
    output: Annotated[int, typer.Option(help="Output tokens per request.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt tokens per prefill forward.")] = 8192,
    tensor_parallel: Annotated[int, typer.Option(help="Number of GPUs of tensor parallelism.")] = 1,
    element_bytes: Annotated[int, typer.Option(min=1, max=4, help="Bytes per weight.")] = 2,
    fused: Annotated[
        bool, typer.Option("--fused", help="Assume fused adapter kernels: no extra activation traffic.")
    ] = False,
    bandwidth: Annotated[float | None, typer.Option(help="Memory bandwidth in GB/s, instead of the GPU's.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Compute in TFLOP/s, instead of the GPU's.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory in GB, instead of the GPU's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the ratio over the number of adapters to this PNG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the cost of serving many adapters: throughput against all-token LoRA, memory, adapters that fit."""
    from preft_cli import planning
    from preft_core.planner import METHODS, Planner, Workload
    from preft_core.planner import Method as Method_

    if method not in (*METHODS, "both"):
        raise ValueError(f"--method is {method!r}: lora, direft or both")
    shape, device = planning.shape_of(model), planning.device_of(gpu, bandwidth, tflops, memory)
    planners: dict[Method_, Planner] = {
        known: Planner(shape, device, known, rank, linears, tensor_parallel, element_bytes, fused)
        for known in METHODS
        if method in (known, "both")
    }
    work = Workload(adapters, requests, prompt, output, prefill_tokens)
    found = planning.plan(planners, work)
    if plot is not None:
        planning.plot(next(iter(planners.values())), work, plot)
    if json:
        import json as format

        print(format.dumps(found, indent=1))
    else:
        planning.show(found, Console())


for command in (distillation.distill, hub.push, hub.pull, hub.verify, hub.convert, hub.export, doctor.doctor):
    app.command()(command)


if __name__ == "__main__":
    main()
