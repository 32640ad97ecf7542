"""The output folder of `preft train` and `preft distill`: the run's options, resumption checks, metrics."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preft_hf.training.sft import CHECKPOINTS, last_checkpoint
from preft_hf.training.turns import DataError

RUN = "run.json"
METRICS = "metrics.json"


def run_facts(options: Any, data: Path, free: Collection[str]) -> dict[str, Any]:
    """Returns everything that determines the losses of a run, as JSON values.

    Args:
        options: a dataclass
        free: names of options that may change between a run and its resumption without changing a loss
    Raises:
        DataError: the data cannot be read.
    """
    facts = {name: value for name, value in _plain(options).items() if name not in free}
    try:
        content = data.read_bytes()
    except OSError as error:
        raise DataError(f"{data} cannot be read: {error}; give a JSONL file in UTF-8") from error
    return facts | {"data_sha256": hashlib.sha256(content).hexdigest()}


def check_output(output: Path, resume: bool, facts: dict[str, Any]) -> None:
    """Raises a ValueError if the output is not a folder, or belongs to another run.

    A run that ended before its first complete checkpoint cannot be resumed: another may start in its folder.
    """
    if output.is_file():
        raise ValueError(f"--output {output} is a file: give a folder")
    if not resume and last_checkpoint(output / CHECKPOINTS) is not None:
        raise ValueError(
            f"--output {output} has the checkpoints of another run: continue it with --resume, or give another folder"
        )
    file = output / RUN
    if resume and file.exists():
        before = json.loads(file.read_text())
        faults = [
            f"{name} was {before.get(name)!r} and is {facts[name]!r}"
            for name in facts
            if before.get(name) != facts[name]
        ]
        if faults:
            raise ValueError(
                f"--resume continues the run in {output}, but {'; '.join(faults)}: give the same options, or "
                "another --output for another run"
            )


def write_facts(output: Path, facts: dict[str, Any]) -> None:
    """Creates the folder and writes the run's facts into it."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RUN).write_text(json.dumps(facts, indent=1) + "\n")


def write_metrics(output: Path, options: Any, metrics: dict[str, Any]) -> None:
    """Writes a finished run's options and figures."""
    (output / METRICS).write_text(json.dumps({"options": _plain(options)} | metrics, indent=1) + "\n")


def _plain(options: Any) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
