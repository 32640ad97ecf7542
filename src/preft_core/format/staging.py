"""Writes files to a temporary directory first, so that a failed write leaves existing files unchanged."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
