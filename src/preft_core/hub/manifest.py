"""A set of adapters in one file, preft.toml: name -> location, a directory or a Hub id."""

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
    """Returns the locations of a manifest's adapters by name, in the file's order: absolute directories and Hub ids.

        [adapters]                                  or JSON:  {"adapters": {"acme": "org/acme-tone"}}
        acme = "org/acme-tone@0123...cdef"
        tax = "./adapters/tax"                      relative to the manifest

    A location that begins with ./, ../ or / is always a directory. Any other is a directory if it exists, otherwise a
    Hub id.

    Args:
        path: of a TOML file, or of a JSON file if it ends in .json; up to 16 MiB and 100,000 adapters
    Raises:
        AdapterError: a file that cannot be read or is not such a table, or an invalid name or location.
    """
    file = Path(path)
    # some editors write a byte order mark
    data = read_limited(file, MAX_MANIFEST_BYTES).removeprefix(codecs.BOM_UTF8)
    if file.suffix == ".json":
        table = parse_json(data, str(file))
    else:
        try:
            table = tomllib.loads(data.decode("utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise AdapterError(f"{file} is not TOML: {error}") from error
    adapters = table.get("adapters") if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(adapters, Mapping) or set(table) != {"adapters"}:
        raise AdapterError(
            f"{file} must contain one table `adapters` and nothing else: write [adapters], then one line per adapter, "
            "name = location"
        )
    _check(file, adapters)
    return {name: _read_location(file, location) for name, location in adapters.items()}


def _check(file: Path, adapters: Mapping[str, object]) -> None:
    if not 0 < len(adapters) <= MAX_ADAPTERS:
        raise AdapterError(f"{file} has {len(adapters)} adapters: allowed: 1 to {MAX_ADAPTERS}")
    faults = [f"name {name[:60]!r}: {reason}" for name in adapters if (reason := name_fault(name))]
    faults += [
        f"{name[:60]} is {str(location)[:60]!r}: give a directory or org/name@revision"
        for name, location in adapters.items()
        if not isinstance(location, str) or not 0 < len(location) <= 4096
    ]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise AdapterError(f"{file}: " + "; ".join(faults[:20]) + more)


def name_fault(name: str) -> str | None:
    """Returns why a name is not allowed for an adapter; None if it is allowed."""
    if name.startswith("__"):
        return "names that begin with __ are reserved"
    if not _NAME.fullmatch(name) or ".." in name:
        return "use up to 255 letters, digits and . _ @ : / + -, without two consecutive dots"
    return None


def write_manifest(path: str | Path, adapters: Mapping[str, str]) -> None:
    """Writes a manifest atomically: TOML, or JSON if its name ends in .json.

    Args:
        path: of the manifest
        adapters: name -> Hub id or directory. An existing directory is written so that it is never read as a Hub id:
            with a leading ./ if it is below the manifest's directory, otherwise as an absolute path
    Raises:
        AdapterError: adapters that `read_manifest` would refuse. Nothing is written.
        OSError: the file cannot be written.
    """
    file = Path(path)
    _check(file, adapters)
    locations = {name: _written_location(file, location) for name, location in adapters.items()}
    if file.suffix == ".json":
        text = json.dumps({"adapters": locations}, indent=1) + "\n"
    else:
        # a JSON string is a TOML string, key or value
        lines = [f"{json.dumps(name)} = {json.dumps(location)}\n" for name, location in locations.items()]
        text = "[adapters]\n" + "".join(lines)
    with staging_in(file.parent) as staging:
        with (staging / file.name).open("w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(staging / file.name, file)


def _read_location(file: Path, location: str) -> str:
    """Returns a directory as an absolute path, a Hub id unchanged."""
    directory = os.path.abspath(file.parent / location)
    is_path = location.startswith(("./", "../")) or os.path.isabs(location)
    return directory if is_path or os.path.isdir(directory) else location


def _written_location(file: Path, location: str) -> str:
    """Returns the location in a form that `_read_location` reads back under any working directory."""
    folder = Path(os.path.abspath(file.parent))
    directory = next((path for path in (folder / location, Path(os.path.abspath(location))) if path.is_dir()), None)
    if directory is None:
        return location
    directory = Path(os.path.abspath(directory))
    return f"./{directory.relative_to(folder).as_posix()}" if directory.is_relative_to(folder) else str(directory)
