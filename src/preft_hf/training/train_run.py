"""What `preft train` and `preft generate` do: load the base model, the data and the adapter, and report."""

import json
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from preft_hf.config import PreftConfig
from preft_hf.training.data import Sample, encode_turns
from preft_hf.training.run_folder import check_output, run_facts, write_facts, write_metrics
from preft_hf.training.sft import TrainingPlan, evaluate, steps_of, train
from preft_hf.training.turns import DataError, Turn, read_turns

DEMO_MODEL = "demo"
# what may change between a run and its resumption without changing a loss
FREE_OPTIONS = {"output", "data", "resume", "save_every", "eval_every", "base_name"}


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `preft train`, in its order."""

    model: str
    data: Path
    output: Path
    method: str
    rank: int
    alpha: float | None
    learning_rate: float
    steps: int | None
    epochs: float
    batch_size: int
    max_length: int
    eval_split: float
    eval_every: int
    save_every: int
    seed: int
    dtype: str
    resume: bool
    base_name: str | None = None


def finetune(options: FinetuneOptions, console: Console) -> bool:
    """Trains an adapter and saves it; returns False if Ctrl-C stopped it, with a checkpoint.

    Raises:
        ValueError: invalid options, data or base model, or an output folder of another run.
    """
    import torch
    from peft import get_peft_model

    if options.base_name is not None:
        _check_base_name(options.base_name)
    facts = run_facts(options, options.data, FREE_OPTIONS)
    check_output(options.output, options.resume, facts)
    turns = read_turns(options.data)
    base, tokenizer = load_base(options.model, options.dtype)
    train_samples, eval_samples, num_long = _samples(turns, options, tokenizer)
    check_context(base, train_samples + eval_samples)
    if num_long:
        console.print(f"[yellow]{num_long} rows have more than {options.max_length} tokens and are skipped[/]")
    torch.manual_seed(options.seed)
    config = PreftConfig(
        method=options.method,  # type: ignore[arg-type]
        r=options.rank,
        lora_alpha=options.alpha,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    if options.base_name is not None:
        model.peft_config["default"].base_model_name_or_path = options.base_name
    plan = _plan(options, len(train_samples))
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"{options.method} of rank {options.rank}: {trained:,} of {total:,} parameters; {len(train_samples)} rows, "
        f"{len(eval_samples)} held out, {plan.num_steps} steps of {options.batch_size}"
    )
    pad = tokenizer.pad_token_id
    before = None if options.resume or not eval_samples else evaluate(model, eval_samples, pad)
    write_facts(options.output, facts)
    result = train(model, train_samples, eval_samples, plan, pad, console, options.resume)
    if result.interrupted:
        console.print(
            f"Stopped at step {result.num_steps} of {plan.num_steps}. To continue: the same command with --resume"
        )
        return False
    after = evaluate(model, eval_samples, pad) if eval_samples else None
    model.save_pretrained(str(options.output))
    tokenizer.save_pretrained(str(options.output))
    metrics = {
        "num_train_rows": len(train_samples),
        "num_eval_rows": len(eval_samples),
        "num_rows_too_long": num_long,
        "num_steps": result.num_steps,
        "eval_loss": {"before": before, "after": after},
    }
    write_metrics(options.output, options, metrics)
    if after is not None:
        start = f"{before:.3f} to " if before is not None else ""
        console.print(f"Held-out loss: {start}{after:.3f} nats per response token")
    console.print(f"The adapter is in [bold]{options.output}[/]")
    return True


def _check_base_name(name: str) -> None:
    """Raises a ValueError if the name is no Hub id of a model."""
    try:
        validate_repo_id(name)
        is_id = "/" in name
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(f"--base-name is {name!r}: give the Hub id of the base model, org/model")


def load_base(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Returns the base model in eval mode and its tokenizer, with a pad token.

    Raises:
        ValueError: no model of that name, or an adapter, which transformers would load together with its base model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == DEMO_MODEL:
        from preft_hf.embedded_model import demo_model_directory

        name = str(demo_model_directory())
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(_not_a_base(name, json.loads(adapter.read_text())))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the base model {name} cannot be loaded: {first} Give a Hub id, a folder, or demo"
        ) from error
    loaded = getattr(model, "peft_config", None) if getattr(model, "_hf_peft_config_loaded", False) else None
    if loaded:
        raise ValueError(_not_a_base(name, next(iter(loaded.values())).to_dict()))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has neither a pad nor an end-of-text token: give it one and save it"
        )
    return model.eval(), tokenizer


def _not_a_base(name: str, config: dict[str, Any]) -> str:
    """Returns what is said of an adapter in the place of a base model."""
    is_lora = config.get("peft_type") == "LORA"
    return (
        f"--model is {name}, which is {'a plain LoRA' if is_lora else 'an adapter'} of "
        f"{config.get('base_model_name_or_path') or 'a base model'}: give the base model"
        + ("; `preft distill` or `preft convert` makes a prefill-only adapter of a LoRA" if is_lora else "")
    )


def stream_answer(
    adapter: Path,
    prompt: str,
    model_name: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    without_adapter: bool,
) -> None:
    """Prints the response to a prompt while it is generated.

    Raises:
        ValueError: the adapter or the base model cannot be loaded, or an empty prompt.
    """
    import torch
    from peft import PeftModel
    from transformers import TextStreamer

    from preft_core.format.adapter import read_config
    from preft_hf.training.plain import plain_generation

    config = read_config(adapter)
    name = model_name or config.base_model_name_or_path
    if name is None:
        raise ValueError(f"the config of {adapter} names no base model: give it with --model")
    base, tokenizer = load_base(name)
    model = base if without_adapter else PeftModel.from_pretrained(base, str(adapter)).eval()
    if chat:
        prompt = _as_chat(prompt, tokenizer, name)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty: give one with --prompt or on standard input")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with nullcontext() if temperature > 0 else plain_generation(model):
        model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def _as_chat(prompt: str, tokenizer: Any, name: str) -> str:
    """Returns the prompt that the chat template makes of a user's message.

    Raises:
        ValueError: there is no template, or it does not take the message.
    """
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {name} has no chat template: omit --chat")
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"--chat: the chat template of {name} refuses a user's message: {error}; omit --chat and write "
            "the prompt in the model's format"
        ) from error


def check_context(model: Any, samples: list[Sample]) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(sample["input_ids"]) for sample in samples)
    if context is not None and longest > context:
        raise ValueError(
            f"the longest row has {longest} tokens and the model's context {context}: skip longer rows with "
            f"--max-length {context}"
        )


def _samples(turns: list[Turn], options: FinetuneOptions, tokenizer: Any) -> tuple[list[Sample], list[Sample], int]:
    """Returns training samples, held-out samples, and the number of turns that were too long for either."""
    train_turns, eval_turns = split(turns, options.eval_split, options.seed, options.data)
    train_samples, num_long = encode_turns(train_turns, tokenizer, options.max_length)
    if not eval_turns:
        return train_samples, [], num_long
    eval_samples, num_long_eval = encode_turns(eval_turns, tokenizer, options.max_length)
    return train_samples, eval_samples, num_long + num_long_eval


def split(turns: list[Turn], share: float, seed: int, data: Path) -> tuple[list[Turn], list[Turn]]:
    """Returns the training turns and the held-out turns. Turns of one row share text, so they stay together.

    Raises:
        DataError: no row is left for training.
    """
    lines = list(dict.fromkeys(turn.line for turn in turns))
    random.Random(seed).shuffle(lines)
    num_eval = math.ceil(share * len(lines)) if share > 0 else 0
    if num_eval >= len(lines):
        raise DataError(
            f"{data} has {len(lines)} rows and --eval-split {share} holds out {num_eval}, so no row "
            "is left for training: give more rows, or --eval-split 0"
        )
    by_line: dict[int, list[Turn]] = {}
    for turn in turns:
        by_line.setdefault(turn.line, []).append(turn)
    train_turns, eval_turns = (
        [turn for line in part for turn in by_line[line]] for part in (lines[num_eval:], lines[:num_eval])
    )
    return train_turns, eval_turns


def _plan(options: FinetuneOptions, num_rows: int) -> TrainingPlan:
    steps = steps_of(options.steps, options.epochs, num_rows, options.batch_size)
    return TrainingPlan(
        output=options.output,
        num_steps=steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        eval_every=options.eval_every,
        save_every=options.save_every,
        seed=options.seed,
    )
