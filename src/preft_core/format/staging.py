"""Writes files to a temporary directory first, so that a failed write leaves existing files unchanged."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from preft_core.format.config import CONFIG_NAME, WEIGHTS_NAME


@contextmanager
def staging_in(directory: Path) -> Iterator[Path]:
    """Yields a new temporary directory inside a directory, which is created if needed; deletes it at the end.

    Raises:
        OSError: weights that cannot be written, as on a full disk. safetensors raises its own error there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".preft-", dir=directory))
    try:
        yield staging
    except SafetensorError as error:
        raise OSError(f"the weights cannot be written and {directory} is unchanged: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_config(directory: Path, data: Mapping[str, Any]) -> None:
    """Writes CONFIG_NAME into a directory that no reader uses yet. Not atomic."""
    (directory / CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish_files(staging: Path, directory: Path) -> None:
    """Moves config and weights from a staging directory to their final directory, on the same file system.

    Each file is replaced atomically, the config first. A reader in between finds the new config with the old weights
    or none, which the config's fingerprint refuses. The weights get the config's file mode.

    Args:
        staging: of both files; the config must contain its fingerprint
        directory: exists
    """
    # safetensors 0.8 creates files that only their owner can read, and a server often runs as another user
    shutil.copymode(staging / CONFIG_NAME, staging / WEIGHTS_NAME)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (staging / name).open("rb+") as file:
            os.fsync(file.fileno())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        os.replace(staging / name, directory / name)
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
