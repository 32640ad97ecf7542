"""The image's build steps in order, on a machine where TGI cannot be imported, and the entry point."""

import os

import pytest

from tests.tgi.server.image import Build, build_context, is_ignored, real_tgi


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
