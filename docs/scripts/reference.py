"""Hook of mkdocs: fills the reference pages from the code.

A page asks with a comment: `<!-- modules preft_core.ops -->` becomes the API of each module of a folder, `<!-- exports
preft_hf -->` that of each name in a module's `__all__`, `<!-- fields preft_hf.config.PreftConfig -->` a table of a
dataclass' fields, and `<!-- commands -->` the help of each command. Code is read, not imported, but for the commands.
"""

import ast
import html
import pkgutil
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from preft_cli.app import app

WIDE = {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
MARK = re.compile(r"^<!-- (modules|exports|fields|commands)(?: ([\w.]+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page with its marks replaced."""
    return MARK.sub(_filled, markdown)


def _filled(mark: re.Match[str]) -> str:
    kind, name = mark.groups()
    writers = {"modules": modules, "exports": exports, "fields": fields}
    return "\n".join(commands() if kind == "commands" else writers[kind](name))


def modules(package: str) -> Iterator[str]:
    """Yields a mkdocstrings entry for a package and each of its modules."""
    spec = find_spec(package)
    assert spec is not None
    folders = spec.submodule_search_locations or []
    for name in (package, *(f"{package}.{one.name}" for one in pkgutil.iter_modules(folders))):
        yield f"::: {name}\n    options:\n      show_root_full_path: true\n      filters: ['!^_']\n"


def exports(module: str) -> Iterator[str]:
    """Yields a mkdocstrings entry for each name in the module's __all__."""
    (names,) = (
        ast.literal_eval(one.value)
        for one in _parsed(module).body
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "__all__"
    )
    for name in names:
        yield f"::: {module}.{name}\n"


def fields(name: str) -> Iterator[str]:
    """Yields a table of the fields of a dataclass that have a help text."""
    module, _, class_name = name.rpartition(".")
    (found,) = (one for one in _parsed(module).body if getattr(one, "name", "") == class_name)
    assert isinstance(found, ast.ClassDef)
    yield from ("| field | type | default | meaning |", "|---|---|---|---|")
    for one in found.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in one.value.keywords}
            parts = (one.target, one.annotation, given["default"])
            # a bar would end the cell, also inside of code
            cells = [f"<code>{html.escape(ast.unparse(part)).replace('|', '&#124;')}</code>" for part in parts]
            yield f"| {' | '.join([*cells, ast.literal_eval(given['metadata'])['help']])} |"


def commands() -> Iterator[str]:
    """Yields a section with the help text of each command."""
    runner = CliRunner()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        shown = runner.invoke(app, [name, "--help"], prog_name="preft", env=WIDE).output
        yield f"## preft {name}\n\n```text\n{shown.strip()}\n```\n"


def _parsed(module: str) -> ast.Module:
    """Returns the syntax tree of a top-level package or of a module in one."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin
    init = Path(spec.origin)
    return ast.parse((init.parent.joinpath(*rest).with_suffix(".py") if rest else init).read_text())
