"""A set of adapters in one file, preft.toml: name -> directory or Hub id."""

import codecs
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from preft_core.format.config import AdapterError, parse_json, read_limited
from preft_core.format.staging import staging_in

MAX_MANIFEST_BYTES = 16 << 20
MAX_ADAPTERS = 100_000
_NAME = re.compile(r"[\w][\w.@:/+-]{0,254}")


def read_manifest(path: str | Path) -> dict[str, str]:
    """Returns the adapters of a manifest by name, in the file's order: absolute directories and Hub ids.

        [adapters]                                  or JSON:  {"adapters": {"acme": "org/acme-tone"}}
        acme = "org/acme-tone@0123...cdef"
        tax = "./adapters/tax"                      a directory beside the manifest

    A place that begins with ./, ../ or / is a directory and never asked of the Hub. Without that it is one if it is
    there, and else a Hub id.

    Raises:
        AdapterError: a file that cannot be read, is no such table, or names something that can be no adapter.
    """
    file = Path(path)
    # some editors begin a file with a mark of its encoding
    data = read_limited(file, MAX_MANIFEST_BYTES).removeprefix(codecs.BOM_UTF8)
    if file.suffix == ".json":
        table = parse_json(data, str(file))
    else:
        try:
            table = tomllib.loads(data.decode("utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise AdapterError(f"{file} is no TOML: {error}") from error
    adapters = table.get("adapters") if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(adapters, Mapping) or set(table) != {"adapters"}:
        raise AdapterError(
            f"{file} holds no table `adapters` alone: write [adapters] and then name = place, one a line"
        )
    _check(file, adapters)
    return {name: _place(file, place) for name, place in adapters.items()}


def _check(file: Path, adapters: Mapping[str, object]) -> None:
    if not 0 < len(adapters) <= MAX_ADAPTERS:
        raise AdapterError(f"{file} names {len(adapters)} adapters: 1 to {MAX_ADAPTERS}")
    faults = [f"name {name[:60]!r}: {reason}" for name in adapters if (reason := name_fault(name))]
    faults += [
        f"{name[:60]} is {str(place)[:60]!r}: a directory or org/name@revision"
        for name, place in adapters.items()
        if not isinstance(place, str) or not 0 < len(place) <= 4096
    ]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise AdapterError(f"{file}: " + "; ".join(faults[:20]) + more)


def name_fault(name: str) -> str | None:
    """Returns why a name can be no adapter's; None if it can."""
    if name.startswith("__"):
        return "names that begin with __ are our own"
    if not _NAME.fullmatch(name) or ".." in name:
        return "letters, digits and . _ @ : / + - without two dots, up to 255"
    return None


def write_manifest(path: str | Path, adapters: Mapping[str, str]) -> None:
    """Writes a manifest in one step, TOML or, for a name that ends in .json, JSON.

    Args:
        adapters: name -> Hub id or directory. A directory that is there is written so that it is never taken for a
            Hub id: below the manifest's own with a leading ./, elsewhere as an absolute path
    Raises:
        AdapterError: adapters that read_manifest would refuse. Nothing is written.
    """
    file = Path(path)
    _check(file, adapters)
    places = {name: _written(file, place) for name, place in adapters.items()}
    if file.suffix == ".json":
        text = json.dumps({"adapters": places}, indent=1) + "\n"
    else:
        # a JSON string is a TOML string, key or value
        text = "[adapters]\n" + "".join(f"{json.dumps(n)} = {json.dumps(place)}\n" for n, place in places.items())
    with staging_in(file.parent) as staging:
        with (staging / file.name).open("w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(staging / file.name, file)


def _place(file: Path, place: str) -> str:
    """Returns a directory as an absolute path, a Hub id as it is."""
    directory = os.path.abspath(file.parent / place)
    is_path = place.startswith(("./", "../")) or os.path.isabs(place)
    return directory if is_path or os.path.isdir(directory) else place


def _written(file: Path, place: str) -> str:
    """Returns the place as `_place` reads it back, whatever the working directory is by then."""
    folder = Path(os.path.abspath(file.parent))
    directory = next((path for path in (folder / place, Path(os.path.abspath(place))) if path.is_dir()), None)
    if directory is None:
        return place
    directory = Path(os.path.abspath(directory))
    return f"./{directory.relative_to(folder).as_posix()}" if directory.is_relative_to(folder) else str(directory)
