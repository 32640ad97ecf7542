"""The reference names all that is public: functions and classes, commands, and variables of the environment."""

import ast
import re
from pathlib import Path

import pytest

import preft_hf
from preft_cli.app import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("format", "ops", "pool", "hub")
# written in a test as a misspelt name
NOT_VARIABLES = {"PREFT_SLOT"}


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
    assert "--learning-rate" not in page
    assert "--patience" in page


def test_every_variable_is_there_and_no_other():
    files = [file for folder in ("src", "tgi_patch", "tests") for file in (ROOT / folder).rglob("*")]
    text = "".join(file.read_text() for file in files if file.suffix in {".py", ".sh", ".yaml"})
    used = set(re.findall(r"\bPREFT_[A-Z_]*[A-Z]\b", text)) - NOT_VARIABLES
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert used == set(re.findall(r"`(PREFT_[A-Z_]+)`", page))
