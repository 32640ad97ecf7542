"""Files that are written beside the ones that they replace, so that a failed write leaves those alone."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def staging_in(directory: Path) -> Iterator[Path]:
    """Yields a new folder inside a directory, which is made if it is not there; the folder is gone afterwards.

    Raises:
        OSError: weights that could not be written, as on a full disk; safetensors has an error of its own for that.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".preft-", dir=directory))
    try:
        yield staging
    except SafetensorError as error:
        raise OSError(f"{directory} was left as it was, the weights cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
