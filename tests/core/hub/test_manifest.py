"""A manifest says the same to whoever reads it, from wherever: a folder is never taken for somebody's repository."""

import codecs
import json
import os
import stat

import pytest

from preft_core.format.config import AdapterError
from preft_core.hub.manifest import read_manifest, write_manifest
from preft_core.hub.push_pull import Pulled, pinned
from preft_core.hub.source import find_adapter, hub_id

PLACES = {"hub": "org/name@" + "0" * 40, "tax": "m/tax", "up": "other", "beside": "sub/deep"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """m/tax, other and m/sub/deep, with tmp_path as working directory."""
    for name in ("m/tax", "other", "m/sub/deep", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["m/preft.toml", "m/preft.json"])
def test_folders_stay_folders_wherever_a_manifest_is_read(folders, monkeypatch, name):
    write_manifest(name, PLACES)
    expected = {"hub": PLACES["hub"], "up": str(folders / "other")}
    expected |= {"tax": str(folders / "m" / "tax"), "beside": str(folders / "m" / "sub" / "deep")}
    assert read_manifest(name) == expected
    monkeypatch.chdir(folders / "elsewhere")
    assert read_manifest(folders / name) == expected
    # a set that moves takes its folders along, and one that is gone is no repository of that name
    (folders / "m").rename(folders / "moved")
    found = read_manifest(folders / name.replace("m/", "moved/"))
    assert found["tax"] == str(folders / "moved" / "tax")
    for folder in ("tax", "sub/deep", "sub"):
        (folders / "moved" / folder).rmdir()
    (folders / "other").rmdir()
    again = read_manifest(folders / name.replace("m/", "moved/"))
    assert again == found
    assert [key for key, place in again.items() if hub_id(place) is not None] == ["hub"]


def test_what_was_pulled_is_pinned_by_absolute_paths(folders, monkeypatch):
    found = pinned([Pulled("tax", "m/tax", None, None), Pulled("x", "org/x@" + "0" * 40, None, None)])
    assert found == {"tax": str(folders / "m" / "tax"), "x": "org/x@" + "0" * 40}


@pytest.mark.parametrize("name", ["preft.toml", "preft.json"])
def test_a_mark_of_the_encoding_is_no_fault(tmp_path, name):
    write_manifest(tmp_path / name, {"a": "org/x"})
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (tmp_path / name).read_bytes())
    assert read_manifest(tmp_path / name) == {"a": "org/x"}


@pytest.mark.parametrize("adapters", [{}, {"": "org/x"}, {"/abs": "org/x"}, {"a b": "org/x"}, {"a": ""}])
def test_what_would_not_be_read_is_not_written(tmp_path, adapters):
    with pytest.raises(AdapterError):
        write_manifest(tmp_path / "preft.toml", adapters)
    (tmp_path / "preft.json").write_text(json.dumps({"adapters": adapters}))
    with pytest.raises(AdapterError):
        read_manifest(tmp_path / "preft.json")
    assert os.listdir(tmp_path) == ["preft.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_manifest_is_for_those_whom_the_umask_lets_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_manifest(tmp_path / "preft.toml", {"a": "org/x"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "preft.toml").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("location", ["./tone", "../tone", "./tone@main"])
def test_a_path_is_never_looked_for_on_the_hub(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("preft_core.hub.source._download", lambda *_: pytest.fail("a path was looked for on the Hub"))
    with pytest.raises(AdapterError, match="is neither a directory nor a Hub id"):
        find_adapter(location)
