"""The reference names all that is public: functions and classes, commands, and variables of the environment."""

import ast
import re
from pathlib import Path

import pytest

import preft_hf
from preft_cli.app import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("format", "ops", "pool", "hub")


def test_every_public_name_of_preft_hf_is_there(site, pages):
    ids = pages[site / "reference" / "preft_hf.html"].ids
    assert not [name for name in preft_hf.__all__ if f"preft_hf.{name}" not in ids]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_public_function_of_preft_core_is_there(folder, site, pages):
    ids = pages[site / "reference" / "preft_core.html"].ids
    public = []
    for file in sorted((ROOT / "src" / "preft_core" / folder).glob("*.py")):
        module = f"preft_core.{folder}" + ("" if file.stem == "__init__" else f".{file.stem}")
        for one in ast.parse(file.read_text()).body:
            if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and not one.name.startswith("_"):
                public.append(f"{module}.{one.name}")
    assert public
    assert not [name for name in public if name not in ids]


def test_every_command_is_there_with_its_options(site):
    page = (site / "reference" / "cli.html").read_text()
    names = [one.name or one.callback.__name__ for one in app.registered_commands if one.callback]
    assert "train" in names
    assert not [name for name in names if f'id="preft-{name}"' not in page]
    for option in ("--patience", "--output"):
        assert option in page


def test_every_variable_is_there_and_no_other():
    code = "".join(file.read_text() for folder in ("src", "tgi_patch") for file in sources(folder))
    used = set(re.findall(r"\bPREFT_[A-Z_]*[A-Z]\b", code))
    # tests write other names too, to see them refused
    for file in sources("tests"):
        used |= set(re.findall(r"environ(?:\.get|\.pop)?[(\[]\"(PREFT_[A-Z_]+)", file.read_text()))
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert used == set(re.findall(r"`(PREFT_[A-Z_]+)`", page))


def sources(folder: str) -> list[Path]:
    return [file for file in (ROOT / folder).rglob("*") if file.suffix in {".py", ".sh", ".yaml"}]
