"""Distillation of an all-token LoRA on city cards: what plain conversion loses, and how much a student regains."""

import copy
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.quality.methods import adapted
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.study import Bench, score
from preft_hf import PreftConfig
from preft_hf.embedded_model import cache_directory
from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.data import Sample
from preft_hf.training.distill import agreement, distillation_loss, load_teacher, responses, widened

RANK = 4
TEACHER_RATE = 1e-2
NUM_PROMPTS = 600
NUM_STEPS = 150
RATE = 3e-3
CONVERSION, FROM_TEACHER, FROM_ZERO = "conversion", "from the teacher", "from zero"
# The student's start and its rank; a conversion is not trained.
STUDENTS = ((CONVERSION, RANK), (FROM_TEACHER, 4 * RANK), (FROM_ZERO, 4 * RANK), (FROM_TEACHER, RANK))


def plan(seeds: int) -> Iterator[tuple[str, int, int]]:
    """Yields (start, rank, seed)."""
    for seed in range(seeds):
        for start, rank in STUDENTS:
            yield start, rank, seed


def run(bench: Bench, store: Store, start: str, rank: int, seed: int, report: Callable[[str], None]) -> Result:
    """Returns a student's result; teacher and responses are made once a seed and kept in the user's cache."""
    num_steps = 0 if start == CONVERSION else NUM_STEPS
    facts = {"task": bench.task.name, "start": start, "rank": rank, "steps": num_steps, "lr": RATE, "seed": seed}
    return store.once("distill", facts, report, partial(_student, bench, store, start, rank, seed, report))


def _student(bench: Bench, store: Store, start: str, rank: int, seed: int, report: Callable[[str], None]) -> Result:
    folder = cache_directory() / "quality" / f"teacher-{seed}"
    _teach(bench, store, folder, seed, report)
    gc.collect()
    base = copy.deepcopy(bench.base)
    teacher = load_teacher(base, folder)
    samples = _responses(bench, teacher, folder / "responses.json", seed, report)
    report(f"student {start}, r={rank}, seed {seed}")
    torch.manual_seed(seed)
    if start == FROM_ZERO:
        student: Any = get_peft_model(base, PreftConfig(r=rank, task_type="CAUSAL_LM"))
    else:
        student = widened(base, folder, rank)
    losses: list[float] = []
    if start != CONVERSION:
        loss = distillation_loss(teacher)
        losses, _ = train(student, samples, bench.pad, NUM_STEPS, RATE, seed, loss_of=loss)
    near = agreement(teacher, student, bench.test, bench.pad)
    result = {"train_losses": losses} | asdict(near) | evaluate(student, bench.test, bench.pad)
    return result | score(bench, student)


def _teach(bench: Bench, store: Store, folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """Trains the teacher and keeps it, if it is not there."""
    steps = bench.task.num_steps
    facts = {"task": bench.task.name, "rank": RANK, "steps": steps, "lr": TEACHER_RATE, "seed": seed}
    key = store.key(part="teacher", **facts)
    if store.get(key) is not None and (folder / "adapter_config.json").exists():
        return
    report(key)
    teacher = adapted(copy.deepcopy(bench.base), "lora", RANK, seed)
    train(teacher, bench.train, bench.pad, steps, TEACHER_RATE, seed)
    (folder / "responses.json").unlink(missing_ok=True)
    teacher.save_pretrained(str(folder))
    store.put(key, facts | evaluate(teacher, bench.test, bench.pad) | score(bench, teacher))


def _responses(bench: Bench, teacher: Any, file: Path, seed: int, report: Callable[[str], None]) -> list[Sample]:
    """Returns prompts of the training rows with responses that the teacher draws at temperature 1."""
    if not file.exists():
        prompts = []
        for sample in bench.train[:NUM_PROMPTS]:
            prompts.append(sample["input_ids"][: sample["labels"].count(IGNORED_LABEL)])
        report(f"responses of teacher {seed}")
        torch.manual_seed(seed)
        drawn = responses(teacher, bench.tokenizer, prompts, 32, temperature=1.0)
        samples = [
            {"input_ids": prompt + response, "labels": [IGNORED_LABEL] * len(prompt) + response}
            for prompt, response in zip(prompts, drawn, strict=True)
        ]
        file.write_text(json.dumps(samples))
    return json.loads(file.read_text())
