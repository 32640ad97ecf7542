"""Seams: functions of another program that are replaced, each only if its source has the expected digest.

Needs the standard library alone. `check_sources` compares the installed source files and imports nothing, `check`
compares the imported objects; both report all faults at once. `apply` replaces all or nothing, `revert` restores every
original object.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

_MARK = "__preft_seam__"


class PatchError(RuntimeError):
    """The installed program differs from the one that the seams were made for. Nothing is patched."""


@dataclass(frozen=True)
class Seam:
    """One function of the program that is replaced, or that a replacement relies on.

    Attributes:
        target: "package.module:Class.function", where the program defines it
        digest: of its source, as `digest_of` gives it
        replacement: takes the original and returns its replacement; None for a function that stays, whose source must
            have the digest
        why: one sentence
        uses: other names of the function, "package.module:name", made by `from x import f`
    """

    target: str
    digest: str
    replacement: Callable[..., Any] | None
    why: str
    uses: tuple[str, ...] = ()


@dataclass
class _Binding:
    """A name that holds an original: its owner, and whether it is in the owner's own namespace or inherited."""

    owner: Any
    name: str
    original: Any
    own: bool


@dataclass
class Applied:
    """Applied seams. `revert` takes them back; calling it again is a no-op."""

    seams: tuple[Seam, ...]
    _bindings: list[_Binding] = field(default_factory=list)

    def revert(self) -> None:
        """Restores every original object, the last replaced first."""
        while self._bindings:
            binding = self._bindings.pop()
            if binding.own:
                setattr(binding.owner, binding.name, binding.original)
            else:
                delattr(binding.owner, binding.name)

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *args: object) -> None:
        self.revert()


def digest_of(function: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a function's source, trailing blanks removed.

    Raises:
        OSError: there is no source, as for a compiled function.
        TypeError: not a function or class.
    """
    return _digest(inspect.getsource(_plain(function)).splitlines())


def check_sources(seams: Iterable[Seam]) -> list[str]:
    """Returns how the installed source files differ from the seams, one sentence each; empty if they do not.

    No module of the program is imported, so a machine on which the program cannot start gives the same answer. A
    patch that another program applies when it is imported is not seen here: `apply` compares the objects again.
    """
    faults: list[str] = []
    parsed: dict[str, tuple[ast.Module, list[str]] | None] = {}
    for seam in seams:
        for name in (seam.target, *seam.uses):
            module_name, _, path = name.partition(":")
            if module_name not in parsed:
                parsed[module_name] = _parse(module_name)
            source = parsed[module_name]
            if source is None:
                faults.append(f"{name}: the module {module_name} is not installed")
                continue
            tree, lines = source
            if name != seam.target:
                if not _imports(tree, path):
                    faults.append(f"{name}: {module_name} does not import {path}")
                continue
            digests = [_digest(inspect.getblock(lines[line - 1 :])) for line in _first_lines(tree, path)]
            if not digests:
                faults.append(f"{name}: {module_name} has no {path}")
            elif seam.digest not in digests:
                faults.append(_differs(seam, digests[0]))
    return faults


def check(seams: Iterable[Seam]) -> list[str]:
    """Returns the reasons why the seams cannot be applied, one sentence each; empty if they can. Changes nothing."""
    faults: list[str] = []
    seen: set[str] = set()
    for seam in seams:
        if seam.target in seen:
            faults.append(f"{seam.target} has two seams: merge them")
        seen.add(seam.target)
        found = _find(seam.target, faults)
        if found is None:
            continue
        original = found.original
        if getattr(_plain(original), _MARK, None) is not None:
            faults.append(f"{seam.target} is patched already: revert that patch first")
            continue
        try:
            digest = digest_of(original)
        except (OSError, TypeError) as error:
            faults.append(f"{seam.target} has no source to compare: {error}")
            continue
        if digest != seam.digest:
            faults.append(_differs(seam, digest))
        for use in seam.uses:
            binding = _find(use, faults)
            if binding is not None and _plain(binding.original) is not _plain(original):
                faults.append(f"{use} is not {seam.target}: another patch has replaced it")
        if seam.replacement is not None:
            faults += _missed(seam, original)
    return faults


def apply(seams: Sequence[Seam]) -> Applied:
    """Replaces the seams' functions under all their names. Returns the applied seams, which can be reverted.

    Raises:
        PatchError: a seam cannot be applied; all faults in one message, and nothing is changed.
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
            bindings = [_find(name, faults) for name in (seam.target, *seam.uses)]
            assert all(binding is not None for binding in bindings)
            function = _plain(bindings[0].original)  # type: ignore[union-attr]
            replacement = seam.replacement(function)
            setattr(replacement, _MARK, seam.target)
            for binding in bindings:
                assert binding is not None
                applied._bindings.append(binding)
                setattr(binding.owner, binding.name, _like(binding.original, replacement))
    except BaseException:
        applied.revert()
        raise
    return applied


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(line.rstrip() for line in lines).encode()).hexdigest()[:16]


def _differs(seam: Seam, digest: str) -> str:
    return f"{seam.target} has digest {digest}, and the seam was made for {seam.digest}"


def _parse(module_name: str) -> tuple[ast.Module, list[str]] | None:
    """Returns the syntax tree and the lines of a module's file; None where there is none."""
    top, *rest = module_name.split(".")
    # of the top package only: `find_spec` imports the parents of a submodule
    spec = importlib.util.find_spec(top)
    folders = [] if spec is None else spec.submodule_search_locations or []
    names = ["/".join([*rest, "__init__.py"]), *(["/".join(rest) + ".py"] if rest else [])]
    file = next((file for folder in folders for name in names if (file := Path(folder, name)).is_file()), None)
    if file is None:
        return None
    text = file.read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines(keepends=True)


def _first_lines(tree: ast.Module, path: str) -> list[int]:
    """Returns where a function or class is defined, decorators included; several times where branches define it."""
    found: list[Any] = [tree]
    for name in path.split("."):
        found = [node for scope in found for node in _definitions(scope) if node.name == name]
    return [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in found]


def _definitions(scope: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields the functions and classes of a module or class, also those under `if` and `try`."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
        elif isinstance(node, (ast.stmt, ast.ExceptHandler)):
            yield from _definitions(node)


def _imports(tree: ast.Module, name: str) -> bool:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name == (alias.asname or alias.name) for node in nodes for alias in node.names)


def _find(target: str, faults: list[str]) -> _Binding | None:
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
    # the stored object, so that a static or class method stays one
    own = name in vars(owner)
    original = vars(owner)[name] if own else inspect.getattr_static(owner, name, None)
    if original is None:
        faults.append(f"{target}: {module_name} has no {path}")
        return None
    return _Binding(owner, name, original, own)


def _missed(seam: Seam, original: Any) -> list[str]:
    """Returns the names in loaded modules of the program that hold the function and that the seam does not list."""
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
