"""Adapters to the Hub and back: checked before they leave, checked when they arrive, one commit or nothing."""

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

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, load_adapter, publish_files
from preft_core.format.config import HubError
from preft_core.format.staging import staging_in
from preft_core.hub.card import CARD_NAME, model_card, read_card
from preft_core.hub.source import TRANSPORT_ERRORS, AdapterSource, find_adapter, hub_id
from preft_core.hub.workers import worker_threads


@dataclass(frozen=True)
class Pushed:
    """What a push made: the commit, and the pull request that holds it if one was asked for."""

    repository: str
    commit: str
    url: str
    pull_request: str | None


@dataclass(frozen=True)
class Pulled:
    """What became of one adapter: its place and commit, or the error."""

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
    """Checks a saved adapter and makes one commit of its two files and a model card.

    Args:
        directory: of the adapter. A README.md in it, or one in the repository, keeps its own text
        repo_id: "org/name", made if it does not exist; private says how
        revision, create_pr, commit_message: as in huggingface_hub
        subfolder: of the repository, for the adapter's files
        facts: lines for the card's table, such as training data and metrics
    Raises:
        AdapterError: not an adapter, or one without a fingerprint that fits. Nothing was sent.
        ValueError: a card that cannot be read. There is no commit; if it is the folder's, nothing was sent.
        HfHubHTTPError: the Hub refused. There is no commit.
        HubError: the Hub cannot be reached. There is no commit, unless its answer was what got lost.
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
    """Downloads an adapter, checks it, and returns its source, pinned to a commit, and its directory.

    Args:
        location: "org/name" or "org/name@revision", or a directory
        output: a directory to put a copy into, in one step; without it the adapter stays in the Hub's cache
        options: token, cache_dir, local_files_only
    Raises:
        AdapterError: it cannot be had, or the format does not allow it. The output is as it was.
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
            raise AdapterError(f"{location} changed while it was copied: pull it again")
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
    """Pulls many adapters at once. One that fails leaves the others alone; what is there already is not fetched again.

    Ctrl-C ends it when the downloads that run have ended.

    Args:
        adapters: name -> place, as in a manifest
        output: a directory with one folder per name; a directory among the places is copied into it
        max_workers: downloads at once
        progress: called when one has ended
    Returns:
        in the order of adapters.
    Raises:
        ValueError: max_workers below 1, or a name that is no folder in output. Nothing was pulled.
    """
    if max_workers < 1:
        raise ValueError(f"max_workers is {max_workers}: 1 or more")
    outside = [name for name in adapters if not name or Path(name).is_absolute() or ".." in Path(name).parts]
    if outside and output is not None:
        raise ValueError(f"names that are no folder in {output}: {', '.join(map(repr, outside))}; name them otherwise")

    def pull(name: str, place: str) -> Pulled:
        try:
            source, directory = pull_adapter(place, None if output is None else Path(output) / name, **options)
        except (AdapterError, OSError) as error:
            return Pulled(name, place, None, str(error))
        return Pulled(name, source.location, directory, None)

    found: dict[str, Pulled] = {}
    with worker_threads(max_workers) as threads:
        tasks = [threads.submit(pull, name, place) for name, place in adapters.items()]
        for task in as_completed(tasks):
            done = task.result()
            found[done.name] = done
            progress(done)
    return [found[name] for name in adapters]


def pinned(pulled: Sequence[Pulled]) -> dict[str, str]:
    """Returns name -> place for a manifest: Hub ids at the commits that were found, directories as absolute paths."""
    return {
        one.name: one.location if hub_id(one.location) else os.path.abspath(one.location)
        for one in pulled
        if one.error is None
    }


@contextmanager
def _connection(repo_id: str) -> Iterator[None]:
    """What the Hub answers is raised as it is; a connection that broke is said in our words."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except TRANSPORT_ERRORS as error:
        raise HubError(
            f"{repo_id}: the connection to the Hub broke: {error}; look whether the commit is there, and push again"
        ) from error


def _card_of(repo_id: str, file: str, revision: str | None, token: str | bool | None) -> str | None:
    """Returns the repository's own card, None if it has none. Not from the cache: an older card is another's loss."""
    with tempfile.TemporaryDirectory(prefix="preft-card-") as folder:
        try:
            found = hf_hub_download(repo_id, file, revision=revision, token=token, cache_dir=folder)
        except LocalEntryNotFoundError as error:
            # huggingface_hub's word for a Hub that did not answer, and an EntryNotFoundError as well
            raise HubError(
                f"{file} of {repo_id} cannot be read, whose own text would be lost, so there is no commit: "
                f"{error.__cause__ or error}; push again when the Hub answers"
            ) from error
        except EntryNotFoundError:
            return None
        return read_card(Path(found), f"{file} of {repo_id}")


def _license_of(base: str | None, token: str | bool | None) -> str | None:
    """Returns the licence of the base model where the Hub knows it."""
    if not base or Path(base).exists():
        return None
    try:
        data = HfApi(token=token).model_info(base).card_data
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError):
        return None
    return data.get("license") if data is not None else None
