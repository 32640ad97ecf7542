"""The variables of an operator, read from the environment once and checked before anything is started."""

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preft_core.format.config import AdapterError
from preft_core.hub.manifest import name_fault, read_manifest
from preft_core.pool.layout import RANKS, Bucket

FIXES = ("graphs", "names", "rows", "options", "unknown")
"""Faults of TGI 3.3.7 with its own LORA_ADAPTERS that are fixed, see docs/how-to/tgi.md."""
DEFAULT_PREFIX_TOKENS = 16_384
BASE_IDS = frozenset({"", "tgi", "__base_model__"})
"""Adapter ids that name the base model, beside the served model's own."""
# what Kubernetes sets in every pod for a Service called preft or preft-x
_SERVICE_LINK = re.compile(
    r"PREFT_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*|PREFT_(\w+_)?PORT=\w+://.*"
)
_ENTRY = re.compile(r"([^=@]+)(?:=([^@]+))?(?:@(.+))?")


class SettingsError(ValueError):
    """Variables that cannot be used, all in one message."""


def check_prefix_caching(value: str) -> None:
    """Raises SettingsError if PREFIX_CACHING has this value and turns TGI's own prefix cache on."""
    if value.lower() in {"1", "true"}:
        raise SettingsError(
            "PREFIX_CACHING is on, and TGI's prefix cache does not keep adapters apart: remove it or set it to 0; "
            "PREFT_PREFIX_CACHE=1 turns on one that does"
        )


def check_ids(adapters: Iterable[str], base_ids: set[str], others: set[str]) -> None:
    """Checks that no id of a PreFT adapter names the base model, or an adapter of TGI's LORA_ADAPTERS.

    Raises:
        SettingsError: requests for such an id would be served without the adapter.
    """
    base = sorted({*adapters} & {*base_ids, *BASE_IDS})
    twice = sorted({*adapters} & others)
    faults = [f"{', '.join(base)} stands for the base model"] if base else []
    faults += [f"{', '.join(twice)} is in LORA_ADAPTERS too"] if twice else []
    if faults:
        raise SettingsError(f"PREFT_ADAPTERS: {'; '.join(faults)}: give the adapter another id")


def is_service_link(name: str, value: str) -> bool:
    """Returns whether Kubernetes set a variable for a Service whose name begins with preft."""
    return _SERVICE_LINK.fullmatch(f"{name}={value}") is not None


def private_directory(directory: Path) -> Path:
    """Makes a directory that only this user can write to, or checks that it is one.

    Raises:
        SettingsError: it is a link, another user's, or writable by others, who could pose as the shards.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SettingsError(
            f"PREFT_CONTROL_DIR: {directory} is {stat.filemode(found.st_mode)} of user {found.st_uid}: it must be a "
            f"directory that only user {os.getuid()} can write to; remove it, or choose another"
        )
    return directory


def control_directory(port: int | None = None) -> Path:
    """Returns the default of PREFT_CONTROL_DIR: one directory for each user and port."""
    # os.getuid is missing on Windows
    user = getattr(os, "getuid", lambda: 0)()
    return Path(tempfile.gettempdir()) / ("-".join(map(str, ["preft-tgi", user, *([port] if port else [])])))


@dataclass(frozen=True)
class Settings:
    """The variables PREFT_*.

    Attributes:
        disabled: PREFT_DISABLE=1, TGI without PreFT
        adapters: PREFT_ADAPTERS and PREFT_ADAPTERS_FILE: id -> directory or "org/name@revision"
        reserve: PREFT_RESERVE, kinds and ranks of adapters that are added later: "lora:16,direft:8"
        slots: PREFT_SLOTS, slots of each kind and rank; None is the number of listed adapters, from 8 to 64
        host_bytes: PREFT_HOST_BYTES, for copies of adapters in host memory
        lazy: PREFT_ADAPTER_SOURCE=hub, an unknown id of the form org/name is loaded from the Hub
        organisations: PREFT_ALLOWED_ORGS, whose adapters may be loaded so; "*" is any
        max_adapters: PREFT_MAX_ADAPTERS, registered at once
        max_bytes: PREFT_MAX_ADAPTER_BYTES, of one adapter's weights
        base_models: PREFT_BASE_MODEL, other names of the served model that adapters may have been trained on
        prefix_tokens: PREFT_PREFIX_CACHE=1 and PREFT_PREFIX_TOKENS, prompt tokens whose KV is kept for later requests
            of the same adapter; 0 is none
        control: PREFT_CONTROL_DIR, directory of the sockets between gateway and shards
        admin_token: PREFT_ADMIN_TOKEN; empty turns the admin routes off
        fixes: PREFT_LORA_FIXES, some of FIXES
        host: PREFT_HOST, address that the gateway listens on; --hostname sets it too
        admin_port: PREFT_ADMIN_PORT, port of the admin routes; None is the public port
        access_log: PREFT_ACCESS_LOG=1, one log line for each request
        timeout_s: PREFT_TIMEOUT_S, seconds without a byte from TGI until a request gets a 504; None is no limit
        router_port: PREFT_ROUTER_PORT, port of TGI's router on loopback; None is the public port plus or minus 10000
    """

    disabled: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)
    reserve: tuple[Bucket, ...] = ()
    slots: int | None = None
    host_bytes: int = 16 << 30
    lazy: bool = False
    organisations: tuple[str, ...] = ()
    max_adapters: int = 1024
    max_bytes: int = 4 << 30
    base_models: tuple[str, ...] = ()
    prefix_tokens: int = 0
    control: Path = field(default_factory=control_directory)
    admin_token: str = field(default="", repr=False)
    fixes: tuple[str, ...] = FIXES
    host: str = "0.0.0.0"
    router_port: int | None = None
    admin_port: int | None = None
    access_log: bool = False
    timeout_s: int | None = None

    @property
    def active(self) -> bool:
        """Whether PreFT adapters are served."""
        return not self.disabled and bool(self.adapters or self.reserve)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Returns the settings of an environment.

    Raises:
        SettingsError: variables that are unknown or cannot be used, all in one message.
    """
    faults: list[str] = []
    reader = _Reader(environment, faults)
    if reader.flag("PREFT_DISABLE"):
        # the kill switch works whatever else is wrong
        return Settings(disabled=True)
    settings = Settings(
        adapters=_adapters(reader),
        reserve=_reserve(reader),
        slots=reader.number("PREFT_SLOTS", None, 1, 1 << 20),
        host_bytes=reader.number("PREFT_HOST_BYTES", Settings.host_bytes, 0, 1 << 50) or 0,
        lazy=reader.choice("PREFT_ADAPTER_SOURCE", ("", "hub")) == "hub",
        organisations=tuple(reader.words("PREFT_ALLOWED_ORGS")),
        max_adapters=reader.number("PREFT_MAX_ADAPTERS", Settings.max_adapters, 1, 100_000) or 1,
        max_bytes=reader.number("PREFT_MAX_ADAPTER_BYTES", Settings.max_bytes, 1, 1 << 40) or 1,
        base_models=tuple(reader.words("PREFT_BASE_MODEL")),
        prefix_tokens=_prefix_tokens(reader),
        control=Path(reader.text("PREFT_CONTROL_DIR") or control_directory()),
        admin_token=reader.text("PREFT_ADMIN_TOKEN"),
        fixes=_fixes(reader),
        host=reader.text("PREFT_HOST") or Settings.host,
        router_port=reader.number("PREFT_ROUTER_PORT", None, 1, 65_535),
        admin_port=reader.number("PREFT_ADMIN_PORT", None, 1, 65_535),
        access_log=reader.flag("PREFT_ACCESS_LOG"),
        timeout_s=reader.number("PREFT_TIMEOUT_S", None, 1, 1 << 20),
    )
    if settings.lazy and not settings.organisations:
        faults.append(
            "PREFT_ADAPTER_SOURCE is hub and PREFT_ALLOWED_ORGS is empty: name the organisations to load from, or *"
        )
    if settings.lazy and not settings.adapters and not settings.reserve:
        faults.append("PREFT_ADAPTER_SOURCE is hub and PREFT_RESERVE is empty: reserve slots, such as lora:16")
    if len(settings.adapters) > settings.max_adapters:
        faults.append(
            f"{len(settings.adapters)} adapters are listed and PREFT_MAX_ADAPTERS is {settings.max_adapters}: raise it"
        )
    if settings.prefix_tokens and not settings.adapters and not settings.reserve:
        faults.append("PREFT_PREFIX_CACHE is set and there are no PreFT adapters: remove it, TGI has its own")
    reader.check_unknown()
    if faults:
        raise SettingsError("; ".join(faults))
    return settings


def parse_adapters(text: str) -> dict[str, str]:
    """Returns id -> location of a list in the syntax of LORA_ADAPTERS: "org/a,name=org/b@revision,local=/data/dir".

    Raises:
        SettingsError: malformed entries, or an id twice.
    """
    found: dict[str, str] = {}
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None or entry.count("=") > 1 or entry.count("@") > 1:
            faults.append(f"{entry!r} is not id, id=location or id=location@revision")
            continue
        name, location, revision = match.groups()
        reason = name_fault(name)
        if reason is not None:
            faults.append(f"id {name!r}: {reason}")
        elif name in found:
            faults.append(f"id {name!r} is listed twice")
        found[name] = (location or name) + (f"@{revision}" if revision else "")
    if faults:
        raise SettingsError("PREFT_ADAPTERS: " + "; ".join(faults))
    return found


class _Reader:
    def __init__(self, environment: Mapping[str, str], faults: list[str]):
        self._environment = {n: v for n, v in environment.items() if not is_service_link(n, v)}
        self._read = {"PREFT_TGI_PYTHON", "PREFT_CACHE"}
        self.faults = faults

    def text(self, name: str) -> str:
        self._read.add(name)
        return self._environment.get(name, "").strip()

    def words(self, name: str) -> list[str]:
        return [word for word in (part.strip() for part in self.text(name).split(",")) if word]

    def flag(self, name: str) -> bool:
        return self.choice(name, ("", "0", "1", "true", "false")) in {"1", "true"}

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name).lower()
        if value not in allowed:
            self.faults.append(
                f"{name} is {value!r}: it must be one of {', '.join(word or 'nothing' for word in allowed)}"
            )
        return value

    def number(self, name: str, default: int | None, low: int, high: int) -> int | None:
        text = self.text(name)
        if not text:
            return default
        if not text.isdecimal() or not low <= int(text) <= high:
            self.faults.append(f"{name} is {text!r}: it must be a whole number from {low} to {high}")
            return default
        return int(text)

    def check_unknown(self) -> None:
        known = sorted(self._read)
        self.faults += [
            f"{name} is not a variable of PreFT: remove it, or use one of {', '.join(known)}"
            for name in sorted(self._environment)
            if name.startswith("PREFT_") and name not in self._read
        ]


def _adapters(reader: _Reader) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        found = parse_adapters(reader.text("PREFT_ADAPTERS"))
    except SettingsError as error:
        reader.faults.append(str(error))
    file = reader.text("PREFT_ADAPTERS_FILE")
    if file:
        try:
            listed = read_manifest(file)
        except AdapterError as error:
            reader.faults.append(f"PREFT_ADAPTERS_FILE: {error}")
        else:
            twice = sorted(set(found) & set(listed))
            if twice:
                reader.faults.append(f"{', '.join(twice)} is in PREFT_ADAPTERS and in PREFT_ADAPTERS_FILE")
            found |= listed
    return found


def _reserve(reader: _Reader) -> tuple[Bucket, ...]:
    found = []
    for word in reader.words("PREFT_RESERVE"):
        kind, _, rank = word.partition(":")
        if kind not in {"lora", "direft"} or not rank.isdecimal() or not 1 <= int(rank) <= RANKS[-1]:
            reader.faults.append(
                f"PREFT_RESERVE has {word!r}: use lora:RANK or direft:RANK, RANK from 1 to {RANKS[-1]}"
            )
            continue
        slot_rank = next(size for size in RANKS if size >= int(rank))
        found.append(Bucket("linear" if kind == "lora" else "block", slot_rank))
    return tuple(dict.fromkeys(found))


def _prefix_tokens(reader: _Reader) -> int:
    wanted = reader.flag("PREFT_PREFIX_CACHE")
    tokens = reader.number("PREFT_PREFIX_TOKENS", DEFAULT_PREFIX_TOKENS, 1, 1 << 30) or 0
    return tokens if wanted else 0


def _fixes(reader: _Reader) -> tuple[str, ...]:
    words = reader.words("PREFT_LORA_FIXES")
    if not words:
        return FIXES
    if words == ["none"]:
        return ()
    unknown = [word for word in words if word not in FIXES]
    if unknown:
        reader.faults.append(f"PREFT_LORA_FIXES has {', '.join(unknown)}: use some of {', '.join(FIXES)}, or none")
    return tuple(word for word in words if word in FIXES)
