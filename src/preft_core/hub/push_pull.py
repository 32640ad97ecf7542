"""Uploads and downloads adapters: checked before a push and after a pull, in one commit or none."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, load_adapter
from preft_core.format.config import HubError
from preft_core.format.staging import publish_files, staging_in
from preft_core.hub.card import CARD_NAME, model_card, read_card
from preft_core.hub.source import TRANSPORT_ERRORS, AdapterSource, find_adapter, hub_id
from preft_core.hub.workers import worker_threads


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        repository: "org/name"
        commit: its hash
        url: of the commit
        pull_request: its URL if one was requested, else None
    """

    repository: str
    commit: str
    url: str
    pull_request: str | None


@dataclass(frozen=True)
class Pulled:
    """The result of one pull.

    Attributes:
        name: as given
        location: a directory, or "org/name@commit"; as given if the pull failed
        directory: of the adapter's files, None if the pull failed
        error: the message, None if the pull succeeded
    """

    name: str
    location: str
    directory: Path | None
    error: str | None


def push_adapter(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str = "",
    commit_message: str = "Upload prefill-only adapter",
    facts: Mapping[str, Any] | None = None,
) -> Pushed:
    """Checks a saved adapter and uploads its two files and a model card in one commit.

    Args:
        directory: of the adapter. The text of a README.md there, or in the repository, is kept
        repo_id: "org/name"; created if it does not exist
        token: of huggingface_hub; None uses the saved one, False none
        private: visibility of a new repository; None uses the account's default
        revision, create_pr, commit_message: as in huggingface_hub
        subfolder: of the repository, for the adapter's files
        facts: rows for the card's table, such as training data and metrics
    Raises:
        AdapterError: not an adapter, or a fingerprint that does not match. Nothing was sent.
        ValueError: a card that cannot be read. There is no commit; if it is the directory's, nothing was sent.
        HfHubHTTPError: the Hub refused. There is no commit.
        HubError: the Hub cannot be reached. There is no commit, unless only its response was lost.
    """
    source = Path(directory)
    adapter = load_adapter(source)
    own_card = read_card(source / CARD_NAME)
    subfolder = subfolder.strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    api = HfApi(token=token)
    with _connection(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = model_card(
            adapter,
            own_card if own_card is not None else _card_of(repo_id, prefix + CARD_NAME, revision, token),
            repository=repo_id,
            subfolder=subfolder,
            license=_license_of(adapter.config.base_model_name_or_path, token),
            facts=facts,
        )
        operations = [
            CommitOperationAdd(prefix + CONFIG_NAME, (source / CONFIG_NAME).read_bytes()),
            CommitOperationAdd(prefix + WEIGHTS_NAME, str(source / WEIGHTS_NAME)),
            CommitOperationAdd(prefix + CARD_NAME, card.encode()),
        ]
        made = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return Pushed(repo_id, made.oid, made.commit_url, made.pr_url)


def pull_adapter(
    location: str, output: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[AdapterSource, Path]:
    """Downloads and checks an adapter; returns its source, pinned to a commit, and its directory.

    Args:
        location: "org/name", "org/name@revision", or a directory
        output: a directory that the adapter is copied into atomically; None leaves it in the Hub's cache
        options: token, cache_dir, local_files_only of huggingface_hub
    Raises:
        AdapterError: it cannot be downloaded, or the format does not allow it. The output is unchanged.
        HubError: the same, where trying again later may help.
        OSError: the output cannot be written. It is unchanged.
    """
    source = find_adapter(location, **options)
    directory = source.fetch()
    adapter = load_adapter(directory)
    if output is None:
        return source, directory
    target = Path(output)
    with staging_in(target) as staging:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(directory / name, staging / name)
        if load_adapter(staging).fingerprint != adapter.fingerprint:
            raise AdapterError(f"{location} changed during the copy: pull it again")
        publish_files(staging, target)
    return source, target


def pull_adapters(
    adapters: Mapping[str, str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_workers: int = 8,
    progress: Callable[[Pulled], None] = lambda pulled: None,
    **options: Any,
) -> list[Pulled]:
    """Pulls many adapters in parallel. A failed pull does not affect the others; cached commits are not fetched again.

    Ctrl-C cancels pulls that have not started and waits for the others.

    Args:
        adapters: name -> location, as in a manifest
        output: a directory for one folder per name; local directories are copied into it too. None leaves the
            adapters in the Hub's cache
        max_workers: parallel pulls, 1 or more
        progress: called after each pull, in this thread
        options: token, cache_dir, local_files_only of huggingface_hub
    Returns: one result per adapter, in the order of adapters.
    Raises:
        ValueError: max_workers below 1, or a name that is not a folder inside output. Nothing was pulled.
    """
    if max_workers < 1:
        raise ValueError(f"max_workers is {max_workers}: allowed: 1 or more")
    outside = [name for name in adapters if not name or Path(name).is_absolute() or ".." in Path(name).parts]
    if outside and output is not None:
        raise ValueError(f"names that are not a folder inside {output}: {', '.join(map(repr, outside))}; rename them")

    def pull(name: str, location: str) -> Pulled:
        try:
            source, directory = pull_adapter(location, None if output is None else Path(output) / name, **options)
        except (AdapterError, OSError) as error:
            return Pulled(name, location, None, str(error))
        return Pulled(name, source.location, directory, None)

    found: dict[str, Pulled] = {}
    with worker_threads(max_workers) as threads:
        tasks = [threads.submit(pull, name, location) for name, location in adapters.items()]
        for task in as_completed(tasks):
            done = task.result()
            found[done.name] = done
            progress(done)
    return [found[name] for name in adapters]


def pinned(pulled: Sequence[Pulled]) -> dict[str, str]:
    """Returns name -> location for a manifest: Hub ids at the pulled commits, directories as absolute paths.

    Failed pulls are left out.
    """
    return {
        one.name: one.location if hub_id(one.location) else os.path.abspath(one.location)
        for one in pulled
        if one.error is None
    }


@contextmanager
def _connection(repo_id: str) -> Iterator[None]:
    """Raises HubError where the connection to the Hub breaks; the Hub's own errors pass through."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except TRANSPORT_ERRORS as error:
        raise HubError(
            f"Could not push to {repo_id}: the connection to the Hub broke ({error}); check whether the commit "
            "exists, then push again"
        ) from error


def _card_of(repo_id: str, file: str, revision: str | None, token: str | bool | None) -> str | None:
    """Returns the repository's card, None if it has none. Bypasses the cache: the push overwrites the newest card."""
    with tempfile.TemporaryDirectory(prefix="preft-card-") as folder:
        try:
            found = hf_hub_download(repo_id, file, revision=revision, token=token, cache_dir=folder)
        except LocalEntryNotFoundError as error:
            # raised by huggingface_hub when the Hub does not answer; it is an EntryNotFoundError too
            raise HubError(
                f"Could not push to {repo_id}: its {file}, whose text is kept, cannot be read "
                f"({error.__cause__ or error}); nothing was committed, try again when the Hub answers"
            ) from error
        except EntryNotFoundError:
            return None
        return read_card(Path(found), f"{file} of {repo_id}")


def _license_of(base: str | None, token: str | bool | None) -> str | None:
    """Returns the licence of the base model, None if the Hub does not have it."""
    if not base or Path(base).exists():
        return None
    try:
        data = HfApi(token=token).model_info(base).card_data
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError):
        return None
    return data.get("license") if data is not None else None
