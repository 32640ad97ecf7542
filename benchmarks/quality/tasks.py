"""The study's data, each with its source and licence: prompts and responses, split once, the same for every run."""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from preft_hf.demo.cities import ATTRIBUTION, Row, city_rows
from preft_hf.training.data import Sample, encode_turns
from preft_hf.training.turns import Turn

NUM_TEST = 256
NUM_VALIDATION = 64
MAX_LENGTH = 320
DEVIL = Path("/usr/share/dictd/devil.dict.dz")
ENTRY = re.compile(
    r"([A-Z][A-Z' -]+), (n|adj|adv|v\.t|v\.i|pp|p\.p|interj|pron|n\.pl|v|prep|conj)\.  ?(.+)", re.DOTALL
)


@dataclass(frozen=True)
class Task:
    """Rows of one task. num_steps: optimizer steps of a full run, at 8 rows a step."""

    name: str
    attribution: str
    num_steps: int
    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def samples(self, rows: Sequence[Row], tokenizer: Any) -> list[Sample]:
        """Returns the rows as token ids with labels on the response; longer ones than MAX_LENGTH are left out."""
        turns = [Turn(row.prompt, row.response, i) for i, row in enumerate(rows)]
        return encode_turns(turns, tokenizer, MAX_LENGTH)[0]


def cities() -> Task:
    """City cards: a format, and facts that stand in the prompt."""
    return _split("cities", ATTRIBUTION, 200, city_rows(NUM_TEST + NUM_VALIDATION + 4096))


def devil() -> Task:
    """The Devil's Dictionary: a style, and responses of up to 300 tokens.

    Raises:
        FileNotFoundError: the dictionary is not installed.
    """
    if not DEVIL.exists():
        raise FileNotFoundError(f"{DEVIL} is missing: apt-get install dict-devil, or choose other --tasks")
    # a dictd file is a gzip file whose extra field gzip readers skip
    text = zlib.decompress(DEVIL.read_bytes(), wbits=31).decode("utf-8", "replace")
    rows = {}
    for paragraph in re.split(r"\n\n(?=[A-Z][A-Z' -]+, )", text):
        entry = ENTRY.match(paragraph.strip())
        if entry:
            word, kind, definition = entry.groups()
            rows[word] = Row(f"{word.lower()} ({kind}.)\n", " ".join(definition.split()))
    source = "Ambrose Bierce, The Devil's Dictionary (public domain), as Debian's package dict-devil ships it."
    return _split("devil", source, 150, list(rows.values()))


def chatterbot() -> Task:
    """Questions and answers of the ChatterBot corpus: short answers from memory.

    Raises:
        ModuleNotFoundError: chatterbot-corpus is not installed.
    """
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("chatterbot_corpus is missing: pip install chatterbot-corpus==1.3.3")
    import yaml

    rows = {}
    for file in sorted(Path(spec.submodule_search_locations[0]).glob("data/english/*.yml")):
        for conversation in yaml.safe_load(file.read_text())["conversations"]:
            question, answer = str(conversation[0]).strip(), str(conversation[1]).strip()
            # The first answer to a question, so that no question is on both sides of the split.
            rows.setdefault(question.lower(), Row(f"Q: {question}\nA:", f" {answer}"))
    source = "ChatterBot corpus 1.3.3 (BSD 3-Clause), English."
    return _split("chatterbot", source, 150, list(rows.values()))


TASKS: dict[str, Callable[[], Task]] = {"cities": cities, "devil": devil, "chatterbot": chatterbot}


def _split(name: str, attribution: str, num_steps: int, rows: list[Row]) -> Task:
    held_out = NUM_TEST + NUM_VALIDATION
    if len(rows) < 2 * held_out:
        raise ValueError(
            f"task {name} has {len(rows)} rows and needs {2 * held_out}: its source is not the one expected"
        )
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return Task(name, attribution, num_steps, rows[held_out:], rows[NUM_TEST:held_out], rows[:NUM_TEST])
