"""Conversations: labels on whole ones against one sample a turn, each judged under both ways of serving.

A server that prefills every turn afresh adapts earlier answers; one that continues a cache leaves them base.
"""

import copy
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.quality.methods import adapted
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from preft_hf import expand_turns
from preft_hf.demo.cities import city_rows
from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.data import Sample, encode_turns
from preft_hf.training.turns import Turn

NUM_TURNS = 3
NUM_TEST = 96
NUM_TRAIN = 400
NUM_STEPS = 100
CONVERSATIONS_A_STEP = 4
RANK = 16
RATE = 3e-3
WHOLE, EXPANDED = "whole conversations", "one sample a turn"
WAYS = (("lora", WHOLE), ("lora-p", WHOLE), ("lora-p", EXPANDED))
FRESH, CACHED = "fresh prefill", "continued cache"

Conversation = list[dict[str, str]]


def plan(seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yields (method, form of the data, seed)."""
    for seed in range(seeds):
        for method, form in WAYS:
            yield method, form, seed


def conversations(num: int, seed: int = 0) -> list[Conversation]:
    """Returns conversations of three city cards, in which each card counts all people so far."""
    rows = city_rows(NUM_TURNS * num, seed=1)
    random.Random(seed).shuffle(rows)
    made = []
    for i in range(num):
        messages: Conversation = []
        total = 0
        for row in rows[NUM_TURNS * i : NUM_TURNS * (i + 1)]:
            total += int(row.response.rpartition("~")[2].strip(" k"))
            messages.append({"role": "user", "content": row.prompt.strip()})
            messages.append({"role": "assistant", "content": f"{row.response}; {total}k so far"})
        made.append(messages)
    return made


def expanded(messages: Conversation, tokenizer: Any) -> list[Sample]:
    """Returns one sample for each answer, everything before it being the prompt."""
    turns = [Turn(one["prompt"], one["completion"][0], 0) for one in expand_turns(messages)]
    return encode_turns(turns, tokenizer, 1024)[0]


def whole(messages: Conversation, tokenizer: Any) -> Sample:
    """Returns the conversation as one sample with a label on every token of an answer."""
    turns = expanded(messages, tokenizer)
    ids = turns[-1]["input_ids"]
    labels = [IGNORED_LABEL] * len(ids)
    for turn in turns:
        end, begin = len(turn["input_ids"]), turn["labels"].count(IGNORED_LABEL)
        if ids[:end] != turn["input_ids"]:
            raise ValueError("the chat template writes a turn differently once another follows")
        labels[begin:end] = ids[begin:end]
    return {"input_ids": ids, "labels": labels}


def run(
    base: Any, tokenizer: Any, store: Store, method: str, form: str, seed: int, report: Callable[[str], None]
) -> Result:
    """Returns the losses of a trained adapter by way of serving and by turn."""
    facts = {"method": method, "form": form, "rank": RANK, "steps": NUM_STEPS, "lr": RATE, "seed": seed}
    return store.once("turns", facts, report, partial(_trained, base, tokenizer, method, form, seed))


def _trained(base: Any, tokenizer: Any, method: str, form: str, seed: int) -> Result:
    made = conversations(NUM_TEST + NUM_TRAIN)
    test, rows = made[:NUM_TEST], made[NUM_TEST:]
    if form == WHOLE:
        samples, batch = [whole(row, tokenizer) for row in rows], CONVERSATIONS_A_STEP
    else:
        # as many answers a step as whole conversations have
        samples = [sample for row in rows for sample in expanded(row, tokenizer)]
        batch = NUM_TURNS * CONVERSATIONS_A_STEP
    gc.collect()
    model = adapted(copy.deepcopy(base), method, RANK, seed)
    pad = tokenizer.pad_token_id
    losses, seconds = train(model, samples, pad, NUM_STEPS, RATE, seed, batch_size=batch)
    served = {FRESH: by_turn(model, [expanded(row, tokenizer) for row in test], pad)}
    served[CACHED] = by_turn(model, [split(whole(row, tokenizer)) for row in test], pad)
    return {"train_losses": losses, "seconds": seconds, "served": served}


def split(sample: Sample) -> list[dict[str, list[int]]]:
    """Returns the conversation once for each answer: its label on that answer alone, earlier ones marked as base."""
    labels = sample["labels"]
    starts = [i for i in range(1, len(labels)) if labels[i] != IGNORED_LABEL and labels[i - 1] == IGNORED_LABEL]
    found = []
    for start in starts:
        end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED_LABEL), len(labels))
        own = [label if start <= i < end else IGNORED_LABEL for i, label in enumerate(labels[:end])]
        mask = [int(label == IGNORED_LABEL) for label in labels[:end]]
        found.append({"input_ids": sample["input_ids"][:end], "labels": own, "prefill_mask": mask})
    return found


def by_turn(model: Any, rows: Sequence[Sequence[dict[str, list[int]]]], pad: int) -> list[float]:
    """Returns the mean loss of the first, second and third answers, in nats a token."""
    return [evaluate(model, [row[turn] for row in rows], pad)["loss"] for turn in range(NUM_TURNS)]
