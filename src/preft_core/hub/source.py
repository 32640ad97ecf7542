"""Where a served adapter comes from: a directory, or a repository on the Hub at one commit."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterConfig, AdapterError, load_adapter
from preft_core.format.config import MAX_CONFIG_BYTES, HubError, read_config
from preft_core.format.header import HEADER_START_BYTES, MAX_FILE_BYTES, TensorInfo, header_length, parse_header
from preft_core.hub.workers import worker_threads

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
# huggingface_hub lets its transport's errors through: requests before 1.0, then httpx, then httpx2
_TRANSPORTS = [find_spec(name) and import_module(name) for name in ("httpx2", "httpx", "requests")]
TRANSPORT_ERRORS = tuple(
    getattr(module, "HTTPError" if hasattr(module, "TransportError") else "RequestException")
    for module in _TRANSPORTS
    if module is not None
)
# what the Hub does not have, or does not show
_MISSING = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter whose config was read and whose weights are still where they are.

    Attributes:
        location: a directory, or "org/name@commit"
        options: token, cache_dir, local_files_only for the Hub; not in repr, which goes into logs
        directory: absolute, None on the Hub: what was found as a directory is never asked for on the Hub when it is
            gone, where "adapters/tone" may be a stranger's
    """

    location: str
    config: AdapterConfig
    options: dict[str, Any] = field(repr=False)
    directory: Path | None = None

    def fetch(self) -> Path:
        """Returns the directory of the adapter's files; downloads the weights if they are on the Hub and in no cache.

        Raises:
            AdapterError: they cannot be had, or have more bytes than is read; HubError where another time may help.
        """
        if self.directory is not None:
            return self.directory
        name, _, commit = self.location.partition("@")
        return _download(name, commit, WEIGHTS_NAME, MAX_FILE_BYTES, self.options).parent

    def load(self) -> Adapter:
        """Returns the adapter, checked; downloads its weights first if they are on the Hub and in no cache.

        Raises:
            AdapterError: it cannot be had, or the format does not allow it.
        """
        return load_adapter(self.fetch())

    def header(self) -> dict[str, TensorInfo]:
        """Returns what the weights' file says of its tensors, without downloading them: two requests for byte ranges.

        Raises:
            AdapterError: it cannot be had, or the format does not allow it.
        """
        if self.directory is not None:
            raise ValueError(f"{self.location} is a directory: use read_header")
        name, _, commit = self.location.partition("@")
        with hub_errors(WEIGHTS_NAME, name, commit):
            url = hf_hub_url(name, WEIGHTS_NAME, revision=commit)
            api = HfApi(token=self.options.get("token"))
            size = get_hf_file_metadata(url, token=self.options.get("token")).size or 0
            start = _bytes_of(api, url, 0, HEADER_START_BYTES)
            length = header_length(start, size, self.location)
            text = _bytes_of(api, url, HEADER_START_BYTES, HEADER_START_BYTES + length)
        return parse_header(text, size, self.location)


def find_adapter(location: str | os.PathLike[str], **options: Any) -> AdapterSource:
    """Returns the source of an adapter, having read its config. A Hub revision is pinned to the commit found now.

    Args:
        location: a directory, "org/name" or "org/name@revision". What exists as a directory is one
        options: token, cache_dir, local_files_only for the Hub
    Raises:
        AdapterError: no such directory or repository, or a config that the format does not allow.
        HubError: the Hub did not answer, or failed.
    """
    location = os.fspath(location)
    repository = hub_id(location)
    if repository is None:
        if not Path(location).is_dir():
            raise AdapterError(
                f"{location!r} is no directory, and no Hub id of the form org/name or org/name@revision: give one of "
                "them"
            )
        return AdapterSource(location, read_config(Path(location)), options, Path(location).absolute())
    name, revision = repository
    config = _download(name, revision, CONFIG_NAME, MAX_CONFIG_BYTES, options)
    # The cache keeps the files of a commit in a directory of its name.
    return AdapterSource(f"{name}@{config.parent.name}", read_config(config), options)


def hub_id(location: str) -> tuple[str, str | None] | None:
    """Returns (org/name, revision) of a Hub id, None for anything else and for what exists as a path."""
    match = _HUB_ID.fullmatch(location)
    return None if match is None or Path(location).exists() else (match[1], match[2])


def same_place(location: str, known: str) -> bool:
    """Whether a location is that of a known source; of one on the Hub it may leave the revision out."""
    repository = hub_id(known)
    return location == known or (repository is not None and location == repository[0])


@contextmanager
def hub_errors(file: str, name: str, revision: str | None) -> Iterator[None]:
    """Says in our words why a file of a repository cannot be had: HubError where another time may help."""
    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        *TRANSPORT_ERRORS,
        OSError,
    ) as error:
        missing = isinstance(error, _MISSING) and not isinstance(error, LocalEntryNotFoundError)
        kind = AdapterError if missing else HubError
        raise kind(f"{file} of {name}@{revision or 'main'} cannot be had from the Hub: {error}") from error


def _download(name: str, revision: str | None, file: str, max_bytes: int, options: dict[str, Any]) -> Path:
    with hub_errors(file, name, revision):
        if not options.get("local_files_only") and not _cached(name, revision, file, options):
            url = hf_hub_url(name, file, revision=revision)
            try:
                size = get_hf_file_metadata(url, token=options.get("token")).size
            except (*TRANSPORT_ERRORS, OfflineModeIsEnabled):
                # no way to the Hub: hf_hub_download answers from its cache, or says so
                size = None
            if size is not None and size > max_bytes:
                raise AdapterError(
                    f"{file} of {name}@{revision or 'main'} has {size} bytes: at most {max_bytes} are read; nothing "
                    "was downloaded"
                )
        path = Path(hf_hub_download(name, file, revision=revision, **options))
    if path.stat().st_size > max_bytes:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes: at most {max_bytes} are read")
    return path


def _cached(name: str, revision: str | None, file: str, options: dict[str, Any]) -> bool:
    """True for a file of a commit that is in the cache, for which nothing has to be asked."""
    if revision is None or not _COMMIT.fullmatch(revision):
        return False
    try:
        hf_hub_download(name, file, revision=revision, cache_dir=options.get("cache_dir"), local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _bytes_of(api: HfApi, url: str, begin: int, end: int) -> bytes:
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {**api._build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        data = b""
        for part in response.iter_bytes():
            data += part
            if len(data) >= end - begin:
                break
    if response.status_code != 206 or len(data) != end - begin:
        raise AdapterError(f"{url}: the server did not answer with the bytes {begin} to {end} that were asked for")
    return data


def find_all(locations: Mapping[str, str], fetch: bool = False) -> dict[str, AdapterSource]:
    """Returns a source for each name -> location, several looked up at once; with fetch, downloaded too.

    Raises:
        AdapterError: adapters that cannot be had, all in one message.
    """

    def find(item: tuple[str, str]) -> AdapterSource | str:
        try:
            source = find_adapter(item[1])
            if fetch:
                source.fetch()
        except AdapterError as error:
            return f"{item[0]!r}: {error}"
        return source

    with worker_threads(8) as threads:
        found = dict(zip(locations, threads.map(find, locations.items()), strict=True))
    faults = [fault for fault in found.values() if isinstance(fault, str)]
    if faults:
        raise AdapterError("adapters that cannot be had: " + "; ".join(faults))
    return {name: source for name, source in found.items() if isinstance(source, AdapterSource)}
