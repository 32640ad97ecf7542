"""Where a served adapter comes from: a directory, or a repository on the Hub at one commit."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from preft_core.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterConfig, AdapterError, load_adapter
from preft_core.config import read_config

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter whose config was read and whose weights are still where they are.

    Attributes:
        location: a directory, or "org/name@commit"
        options: token, cache_dir, local_files_only for the Hub
    """

    location: str
    config: AdapterConfig
    options: dict[str, Any]

    def load(self) -> Adapter:
        """Returns the adapter, checked; downloads its weights first if they are on the Hub and in no cache.

        Raises:
            AdapterError: it cannot be had, or the format does not allow it.
        """
        repository = _repository(self.location)
        if repository is None:
            return load_adapter(self.location)
        return load_adapter(_download(*repository, WEIGHTS_NAME, self.options).parent)


def find_adapter(location: str | os.PathLike[str], **options: Any) -> AdapterSource:
    """Returns the source of an adapter, having read its config. A Hub revision is pinned to the commit found now.

    Args:
        location: a directory, "org/name" or "org/name@revision". What exists as a directory is one
        options: token, cache_dir, local_files_only for the Hub
    Raises:
        AdapterError: no such directory or repository, or a config that the format does not allow.
    """
    location = os.fspath(location)
    repository = _repository(location)
    if repository is None:
        if not Path(location).is_dir():
            raise AdapterError(
                f"{location!r} is no directory, and no Hub id of the form org/name or org/name@revision: give one of "
                "them"
            )
        return AdapterSource(location, read_config(Path(location)), options)
    name, revision = repository
    config = _download(name, revision, CONFIG_NAME, options)
    # The cache keeps the files of a commit in a directory of its name.
    return AdapterSource(f"{name}@{config.parent.name}", read_config(config), options)


def _repository(location: str) -> tuple[str, str | None] | None:
    match = _HUB_ID.fullmatch(location)
    return None if match is None or Path(location).exists() else (match[1], match[2])


def _download(name: str, revision: str | None, file: str, options: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(name, file, revision=revision, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"{file} of {name}@{revision or 'main'} cannot be had from the Hub: {error}") from error
