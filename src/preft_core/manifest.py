"""A set of adapters in one file, preft.toml: name -> directory or Hub id."""

import json
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from preft_core.config import AdapterError, parse_json, read_limited

MAX_MANIFEST_BYTES = 16 << 20
MAX_ADAPTERS = 100_000
_NAME = re.compile(r"[\w][\w.@:/+-]{0,254}")


def read_manifest(path: str | Path) -> dict[str, str]:
    """Returns the adapters of a manifest by name, in the file's order.

        [adapters]                                  or JSON:  {"adapters": {"acme": "org/acme-tone"}}
        acme = "org/acme-tone@0123...cdef"
        tax = "adapters/tax"                        a directory beside the manifest

    Raises:
        AdapterError: a file that cannot be read, is no such table, or names something that can be no adapter.
    """
    file = Path(path)
    data = read_limited(file, MAX_MANIFEST_BYTES)
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
    return {name: _beside(file, place) for name, place in adapters.items()}


def name_fault(name: str) -> str | None:
    """Returns why a name can be no adapter's; None if it can."""
    if name.startswith("__"):
        return "names that begin with __ are our own"
    if not _NAME.fullmatch(name) or ".." in name:
        return "letters, digits and . _ @ : / + - without two dots, up to 255"
    return None


def write_manifest(path: str | Path, adapters: Mapping[str, str]) -> None:
    """Writes a manifest in one step, TOML or, for a name that ends in .json, JSON."""
    file = Path(path)
    if file.suffix == ".json":
        text = json.dumps({"adapters": dict(adapters)}, indent=1) + "\n"
    else:
        # a JSON string is a TOML string, key or value
        text = "[adapters]\n" + "".join(f"{json.dumps(n)} = {json.dumps(place)}\n" for n, place in adapters.items())
    handle, staging = tempfile.mkstemp(prefix=".preft-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(staging, file)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def _beside(file: Path, place: str) -> str:
    """Returns a relative directory as one beside the manifest, a Hub id as it is."""
    directory = file.parent / place
    return str(directory) if directory.is_dir() else place
