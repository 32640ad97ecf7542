"""The source of an adapter: a directory, or a repository on the Hub at one commit."""

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
    GatedRepoError,
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

# "./name" and "../name" are folders, also where there is none
_HUB_ID = re.compile(r"(?!\.{1,2}/)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
# huggingface_hub does not wrap the errors of its transport: requests before 1.0, then httpx, then httpx2
_TRANSPORTS = [find_spec(name) and import_module(name) for name in ("httpx2", "httpx", "requests")]
TRANSPORT_ERRORS = tuple(
    getattr(module, "HTTPError" if hasattr(module, "TransportError") else "RequestException")
    for module in _TRANSPORTS
    if module is not None
)
# missing on the Hub, or not accessible
_MISSING = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter whose config was read and whose weights were not.

    Attributes:
        location: a directory, or "org/name@commit"
        config: as read
        options: token, cache_dir, local_files_only for the Hub; not in repr, which may be logged
        directory: absolute, None on the Hub. A directory that is deleted later is never looked up on the Hub, where
            "adapters/tone" may belong to someone else
    """

    location: str
    config: AdapterConfig
    options: dict[str, Any] = field(repr=False)
    directory: Path | None = None

    def fetch(self) -> Path:
        """Returns the directory of the adapter's files; downloads the weights if they are not in the Hub's cache.

        Raises:
            AdapterError: they cannot be downloaded, or are larger than 16 GiB.
            HubError: the same, where trying again later may help.
        """
        if self.directory is not None:
            return self.directory
        name, _, commit = self.location.partition("@")
        return _download(name, commit, WEIGHTS_NAME, MAX_FILE_BYTES, self.options).parent

    def load(self) -> Adapter:
        """Returns the checked adapter; downloads its weights if they are not in the Hub's cache.

        Raises:
            AdapterError: it cannot be downloaded, or the format does not allow it.
            HubError: the same, where trying again later may help.
        """
        return load_adapter(self.fetch())

    def header(self) -> dict[str, TensorInfo]:
        """Returns dtype, shape and offsets of the tensors on the Hub, by name: two range requests, no download.

        Raises:
            AdapterError: it cannot be downloaded, or the format does not allow it.
            HubError: the same, where trying again later may help.
            ValueError: the source is a directory.
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
    """Reads the config of an adapter and returns its source. A Hub revision is pinned to its current commit.

    Args:
        location: a directory, "org/name" or "org/name@revision". An existing directory takes precedence
        options: token, cache_dir, local_files_only of huggingface_hub
    Raises:
        AdapterError: no such directory or repository, or a config that the format does not allow.
        HubError: the Hub does not answer, or failed.
    """
    location = os.fspath(location)
    repository = hub_id(location)
    if repository is None:
        if not Path(location).is_dir():
            raise AdapterError(
                f"{location!r} is neither a directory nor a Hub id: give an existing directory, org/name or "
                "org/name@revision"
            )
        return AdapterSource(location, read_config(Path(location)), options, Path(location).absolute())
    name, revision = repository
    config = _download(name, revision, CONFIG_NAME, MAX_CONFIG_BYTES, options)
    # the cache keeps the files of a commit in a directory of that name
    return AdapterSource(f"{name}@{config.parent.name}", read_config(config), options)


def hub_id(location: str) -> tuple[str, str | None] | None:
    """Returns (org/name, revision) of a Hub id; None for anything else.

    Args:
        location: "org/name" or "org/name@revision". An existing path is not a Hub id, nor is "./name"
    Returns: the revision is None if it is omitted.
    """
    match = _HUB_ID.fullmatch(location)
    return None if match is None or Path(location).exists() else (match[1], match[2])


def same_place(location: str, known: str) -> bool:
    """Returns whether a location names a known source. A Hub id may omit the revision."""
    repository = hub_id(known)
    return location == known or (repository is not None and location == repository[0])


@contextmanager
def hub_errors(file: str, name: str, revision: str | None) -> Iterator[None]:
    """Raises AdapterError if a file of a repository cannot be downloaded; HubError where trying again may help."""
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
        reason = _reason(error, file)
        raise kind(f"Could not download {name}@{revision or 'main'}: {reason}") from error


def _reason(error: Exception, file: str) -> str:
    """Returns why a file could not be downloaded, and the next step."""
    # huggingface_hub raises the first of these for a file that is not in its cache, whatever kept it from the Hub
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    match cause:
        case None | OfflineModeIsEnabled():
            return f"{file} is not in the cache and downloads are off (HF_HUB_OFFLINE or local_files_only)"
        case GatedRepoError():
            return "the repository is gated; request access on its page, then log in with `hf auth login`"
        case RepositoryNotFoundError():
            return "the Hub has no such repository, or your token cannot access it; check the name and the token"
        case RevisionNotFoundError():
            return "the repository has no such revision; check it"
        case EntryNotFoundError():
            return f"the repository has no {file}; check the name and the revision"
        case HFValidationError():
            return str(cause)
        case HfHubHTTPError():
            return f"the Hub returned an error ({' '.join(str(cause).split())}); try again later"
        case _ if isinstance(cause, TRANSPORT_ERRORS):
            return f"the Hub does not answer ({cause}); check the connection and try again"
    return str(cause)


def _download(name: str, revision: str | None, file: str, max_bytes: int, options: dict[str, Any]) -> Path:
    with hub_errors(file, name, revision):
        if not options.get("local_files_only") and not _cached(name, revision, file, options):
            url = hf_hub_url(name, file, revision=revision)
            try:
                size = get_hf_file_metadata(url, token=options.get("token")).size
            except (*TRANSPORT_ERRORS, OfflineModeIsEnabled):
                # the Hub cannot be reached: hf_hub_download uses its cache, or raises
                size = None
            if size is not None and size > max_bytes:
                raise AdapterError(
                    f"{file} of {name}@{revision or 'main'} has {size} bytes: the maximum is {max_bytes}; nothing was "
                    "downloaded"
                )
        path = Path(hf_hub_download(name, file, revision=revision, **options))
    if path.stat().st_size > max_bytes:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes: the maximum is {max_bytes}")
    return path


def _cached(name: str, revision: str | None, file: str, options: dict[str, Any]) -> bool:
    """Returns whether a file of a commit is in the cache, so that no request is needed."""
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
        raise AdapterError(f"{url}: the server did not return the requested bytes {begin} to {end}")
    return data


def find_all(locations: Mapping[str, str], fetch: bool = False) -> dict[str, AdapterSource]:
    """Returns the sources of many adapters by name, looked up in parallel.

    Args:
        locations: name -> location, as for `find_adapter`
        fetch: downloads the weights too
    Raises:
        AdapterError: adapters that cannot be found or downloaded, all in one message.
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
        raise AdapterError("; ".join(faults))
    return {name: source for name, source in found.items() if isinstance(source, AdapterSource)}
