"""The files of adapters that a worker has loaded, kept open so that the same content can be loaded again."""

import resource
import shutil
import tempfile
from collections import OrderedDict
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path

from preft_core.format.adapter import WEIGHTS_NAME as WEIGHTS
from preft_core.format.adapter import Adapter, AdapterError, load_adapter
from preft_core.format.config import CONFIG_NAME as CONFIG
from preft_core.hub.source import find_adapter
from preft_vllm.stamp import Stamp


class OpenFiles:
    """Loads adapters by their stamps. After the first load, an adapter's directory is no longer needed.

    A preempted request computes its prompt again, when its adapter may have left host memory. Files that were deleted
    or replaced meanwhile are read through the open ones, which takes no disk space. Files that were overwritten in
    place are refused.

    Args:
        limit: adapters whose files stay open, two each; the least recently loaded are closed. None uses half of the
            process's limit of open files
    """

    def __init__(self, limit: int | None = None):
        self.limit = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4) if limit is None else limit
        self._files: OrderedDict[Stamp, dict[str, BufferedReader]] = OrderedDict()

    def load(self, stamp: Stamp) -> Adapter:
        """Returns the adapter of a stamp. Its values are not checked again: the API server process has done that.

        Raises:
            AdapterError: it cannot be read, or its content is not that of the stamp.
        """
        files = self._files.pop(stamp, None)
        files = _opened(find_adapter(stamp.location).fetch()) if files is None else files
        with ExitStack() as closing:
            for file in files.values():
                closing.enter_context(file)
            adapter = _read(files, stamp.location)
            if adapter.fingerprint != stamp.fingerprint:
                raise AdapterError(
                    f"{stamp.location} has changed: its fingerprint is {adapter.fingerprint} and requests were taken "
                    f"for {stamp.fingerprint}; load the new content under another lora_int_id, and replace files by "
                    "renaming, not in place"
                )
            closing.pop_all()
        self._files[stamp] = files
        self._shrink_to(self.limit)
        return adapter

    def close(self) -> None:
        """Closes all files. For tests."""
        self._shrink_to(0)

    def _shrink_to(self, limit: int) -> None:
        while len(self._files) > limit:
            for file in self._files.popitem(last=False)[1].values():
                file.close()


def _opened(directory: Path) -> dict[str, BufferedReader]:
    with ExitStack() as closing:
        try:
            files = {name: closing.enter_context((directory / name).open("rb")) for name in (CONFIG, WEIGHTS)}
        except OSError as error:
            raise AdapterError(f"{error.filename} cannot be read: {error.strerror}; load the adapter again") from error
        closing.pop_all()
    return files


def _read(files: dict[str, BufferedReader], location: str) -> Adapter:
    """Returns the adapter in open files, through a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="preft-vllm-") as folder:
        for name, file in files.items():
            file.seek(0)
            with (Path(folder) / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        try:
            return load_adapter(folder, check_values=False)
        except AdapterError as error:
            raise AdapterError(str(error).replace(folder, location)) from error
