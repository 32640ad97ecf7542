"""The image's build steps in order, on a machine where TGI cannot be imported, and the entry point."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.tgi.server.image import DOCKERFILE, Build, build_context, is_ignored, real_tgi

ENTRY_POINT = DOCKERFILE.with_name("entrypoint.sh")
SERVE = ["-P", "-m", "tgi_patch", "serve", "--"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tgi = real_tgi()
    if tgi is None:
        pytest.skip("no TGI environment, whose sources the check compares; name its Python with PREFT_TGI_PYTHON")
    build = Build(tmp_path_factory.mktemp("image"), tgi)
    build.run()
    return build


def test_the_steps_succeed_where_tgi_cannot_be_imported(built):
    """A builder has no GPU, and TGI's modules raise there: the check reads their files."""
    python = "/usr/src/.venv/bin/python"
    with pytest.raises(AssertionError, match="System cpu doesn't support flash/paged attention"):
        built.shell(f"{python} -P -c 'import text_generation_server.models'")
    said = built.shell("/usr/src/.venv/bin/preft-tgi check")
    assert "all 23 entries fit" in said
    assert os.readlink(built.root / "usr/src/.venv/bin/text-generation-server") == "preft-tgi-server"
    # the package comes from the wheel, in both environments
    for one in (python, "/opt/preft/bin/python"):
        where = built.shell(f"{one} -P -c 'import tgi_patch, preft_core; print(tgi_patch.__file__)'")
        assert where.startswith(str(built.root / "usr/src/.venv"))


def test_the_check_fails_for_another_tgi(built):
    file = next(built.root.glob("usr/src/.venv/lib/*/site-packages/text_generation_server/layers/lora.py"))
    before = file.read_text()
    file.write_text(before.replace("class TensorParallelAdapterRowLinear", "class Renamed"))
    try:
        with pytest.raises(AssertionError, match=r"1 of 23 entries.*\n.*has no TensorParallelAdapterRowLinear"):
            built.shell("/usr/src/.venv/bin/preft-tgi check")
    finally:
        file.write_text(before)


def test_no_package_of_tgis_environment_is_replaced(built):
    """The gateway's packages are installed beside TGI's environment."""
    for package in ("aiohttp", "yarl", "multidict", "attrs"):
        where = built.shell(f"/opt/preft/bin/python -P -c 'import {package}; print({package}.__file__)'")
        assert where.startswith(str(built.root / "opt" / "preft"))
        with pytest.raises(AssertionError, match="No module named"):
            built.shell(f"/usr/src/.venv/bin/python -P -c 'import {package}'")
    where = built.shell("/opt/preft/bin/python -P -c 'import torch; print(torch.__file__)'")
    assert where.startswith(str(built.root / "usr/src/.venv"))


def test_the_build_context_is_small():
    names = build_context()
    assert {name.split("/")[0] for name in names} == {"LICENSE", "README.md", "pyproject.toml", "src", "tgi_patch"}
    patterns = ["*", "!src", "**/__pycache__"]
    assert is_ignored("docs/tgi.md", patterns)
    assert is_ignored("src/a/__pycache__/b.pyc", patterns)
    assert not is_ignored("src/a/b.py", patterns)


def started(tmp_path, *arguments, **variables):
    """Runs the entry point with a stub for Python. Returns its exit status, the service's arguments and variables."""
    script = ENTRY_POINT.read_text()
    for folder in ("/usr/src/.venv", "/opt/preft"):
        assert folder in script
        script = script.replace(folder, str(tmp_path / "root"))
    stub = tmp_path / "root" / "bin" / "python"
    stub.parent.mkdir(parents=True, exist_ok=True)
    (stub.parent / "activate").write_text("VENV_IS_ACTIVE=1\nexport VENV_IS_ACTIVE\n")
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$STUB_OUTPUT"\nenv > "$STUB_OUTPUT.env"\n')
    stub.chmod(0o755)
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", "-c", script, "entry-point", *arguments],
        env={"PATH": "/usr/bin:/bin", "PORT": "80", "STUB_OUTPUT": str(output)} | variables,
        capture_output=True,
        text=True,
    )
    if not output.exists():
        return done.returncode, done.stderr, {}
    lines = Path(f"{output}.env").read_text().splitlines()
    return done.returncode, output.read_text().splitlines(), dict(line.split("=", 1) for line in lines if "=" in line)


def test_arguments_reach_the_launcher_as_they_are(tmp_path):
    status, arguments, variables = started(tmp_path, "--model-id", "a b", "--json-output", MODEL_ID="org/x")
    assert (status, arguments) == (0, [*SERVE, "--model-id", "a b", "--json-output"])
    assert variables["VENV_IS_ACTIVE"] == "1"
    assert variables["MODEL_ID"] == "org/x"
    assert started(tmp_path)[1] == SERVE


def test_sagemaker_runs_the_image_with_serve(tmp_path):
    """As TGI's SageMaker image: its variables win, the port is 8080, and `serve` is no argument of the launcher."""
    given = {
        "HF_MODEL_ID": "org/model",
        "HF_MODEL_REVISION": "main",
        "SM_NUM_GPUS": "4",
        "HF_MODEL_QUANTIZE": "awq",
        "HF_MODEL_TRUST_REMOTE_CODE": "true",
    }
    status, arguments, variables = started(tmp_path, "serve", MODEL_ID="org/other", **given)
    assert (status, arguments) == (0, [*SERVE, "--port", "8080"])
    names = ("MODEL_ID", "REVISION", "NUM_SHARD", "QUANTIZE", "TRUST_REMOTE_CODE")
    assert [variables[name] for name in names] == list(given.values())
    _, arguments, variables = started(tmp_path, "serve", HF_MODEL_ID="/opt/ml/model")
    assert arguments == [*SERVE, "--port", "8080"]
    assert variables["MODEL_ID"] == "/opt/ml/model"
    assert not {"REVISION", "NUM_SHARD", "QUANTIZE", "TRUST_REMOTE_CODE"} & set(variables)
    status, said, _ = started(tmp_path, "serve", MODEL_ID="org/other")
    assert (status, "HF_MODEL_ID is not set" in said) == (1, True)
