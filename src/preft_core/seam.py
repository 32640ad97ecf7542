"""Seams: functions of another program that are replaced, each only if its source is the one that was read.

Knows nothing of the program and needs the standard library alone. `check` looks at everything and says all faults at
once, `apply` replaces all or nothing, `revert` restores every original object.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_MARK = "__preft_seam__"


class PatchError(RuntimeError):
    """The server is not the one that these seams were made for. Nothing is patched."""


@dataclass(frozen=True)
class Seam:
    """One function of the program that is replaced, or that a replacement relies on.

    Attributes:
        target: "package.module:Class.function", where the program defines it
        digest: of its source, as `digest_of` gives it
        replacement: takes the original and returns the function that stands in for it; None for a function that stays,
            and must be the one that was read
        why: one sentence
        uses: modules that hold the function under a name of their own, "package.module:name", by `from x import f`
    """

    target: str
    digest: str
    replacement: Callable[[Any], Any] | None
    why: str
    uses: tuple[str, ...] = ()


@dataclass
class _Place:
    """A name that holds an original: the object whose attribute it is, and whether that object had it of its own."""

    owner: Any
    name: str
    original: Any
    own: bool


@dataclass
class Applied:
    """Seams in place. `revert` takes them out; a second call does nothing."""

    seams: tuple[Seam, ...]
    _places: list[_Place] = field(default_factory=list)

    def revert(self) -> None:
        """Restores every original object, the last replaced first."""
        while self._places:
            place = self._places.pop()
            if place.own:
                setattr(place.owner, place.name, place.original)
            else:
                delattr(place.owner, place.name)

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *args: object) -> None:
        self.revert()


def digest_of(function: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a function's source, without trailing blanks.

    Raises:
        OSError: there is no source, as for a compiled function.
        TypeError: not a function or class.
    """
    lines = [line.rstrip() for line in inspect.getsource(_plain(function)).splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check(seams: Iterable[Seam]) -> list[str]:
    """Returns what keeps the seams from being applied, one sentence each; empty if nothing does. Changes nothing."""
    faults: list[str] = []
    seen: set[str] = set()
    for seam in seams:
        if seam.target in seen:
            faults.append(f"{seam.target} has two seams: make them one")
        seen.add(seam.target)
        found = _find(seam.target, faults)
        if found is None:
            continue
        original = found.original
        if getattr(_plain(original), _MARK, None) is not None:
            faults.append(f"{seam.target} is patched already: revert that first")
            continue
        try:
            digest = digest_of(original)
        except (OSError, TypeError) as error:
            faults.append(f"{seam.target} has no source to compare: {error}")
            continue
        if digest != seam.digest:
            faults.append(f"{seam.target} has digest {digest}, and the seam was made for {seam.digest}")
        for use in seam.uses:
            place = _find(use, faults)
            if place is not None and _plain(place.original) is not _plain(original):
                faults.append(f"{use} is not {seam.target}: another patch took its place")
        if seam.replacement is not None:
            faults += _missed(seam, original)
    return faults


def apply(seams: Sequence[Seam]) -> Applied:
    """Replaces the seams' functions at every place that names them, and returns how to take that back.

    Raises:
        PatchError: one of them cannot be replaced; all faults in one message, and nothing is changed.
    """
    faults = check(seams)
    if faults:
        raise PatchError(
            f"{len(faults)} of the seams do not fit this server, so nothing was patched: " + "; ".join(faults)
        )
    applied = Applied(tuple(seams))
    try:
        for seam in seams:
            if seam.replacement is None:
                continue
            places = [_find(name, faults) for name in (seam.target, *seam.uses)]
            assert all(place is not None for place in places)
            function = _plain(places[0].original)  # type: ignore[union-attr]
            replacement = seam.replacement(function)
            setattr(replacement, _MARK, seam.target)
            for place in places:
                assert place is not None
                applied._places.append(place)
                setattr(place.owner, place.name, _like(place.original, replacement))
    except BaseException:
        applied.revert()
        raise
    return applied


def _find(target: str, faults: list[str]) -> _Place | None:
    module_name, _, path = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError as error:
        faults.append(f"{target}: the module {module_name} cannot be imported: {error}")
        return None
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
        if owner is None:
            faults.append(f"{target}: {module_name} has no {parent}")
            return None
    # as it is stored, so that a static or class method stays one
    own = name in vars(owner)
    original = vars(owner)[name] if own else inspect.getattr_static(owner, name, None)
    if original is None:
        faults.append(f"{target}: {module_name} has no {path}")
        return None
    return _Place(owner, name, original, own)


def _missed(seam: Seam, original: Any) -> list[str]:
    """Returns the loaded modules of the program that hold the function and are no place of the seam."""
    module_name, _, path = seam.target.partition(":")
    if "." in path:
        # a method is looked up on its class
        return []
    package = module_name.partition(".")[0]
    known = {seam.target, *seam.uses}
    missed = []
    for name, module in sorted(sys.modules.items()):
        if not isinstance(module, ModuleType) or not f"{name}.".startswith(f"{package}."):
            continue
        for attribute, value in list(vars(module).items()):
            if value is original and f"{name}:{attribute}" not in known:
                missed.append(f"{name}:{attribute} holds {seam.target} too, and the seam does not name it")
    return missed


def _plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, (staticmethod, classmethod)) else function


def _like(original: Any, replacement: Any) -> Any:
    """Returns the replacement as the kind of method that the original is."""
    return type(original)(replacement) if isinstance(original, (staticmethod, classmethod)) else replacement
