"""A disk that is full while adapters arrive: nothing half-written, others are served, and it heals."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants

from preft_core.format.adapter import load_adapter
from preft_hf.hub import pull_adapters
from tests.core.hub.conftest import hub  # noqa: F401
from tests.hf.zoo import make_base, make_preft
from tests.tgi.gateway.test_proxy import Shards
from tgi_patch.gateway import adapters as adapters_module
from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.errors import RequestRejected
from tgi_patch.settings import Settings

pytestmark = [
    # huggingface_hub says beforehand that the disk may not do, and calls an old way of its transport
    pytest.mark.filterwarnings("ignore:Not enough free disk space"),
    pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A cache on a file system of 64 KiB; call what is yielded to give it more."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that this user has not")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path / "cache"))
        yield path, lambda: subprocess.run(["mount", "-o", "remount,size=16m", str(path)], check=True)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def publish(hub, folder: Path, name: str) -> None:  # noqa: F811
    """An adapter whose weights are larger than the small disk."""
    make_preft(make_base(), r=64).save_pretrained(folder)
    hub.put(f"org/{name}", {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})


def test_a_pull_leaves_nothing_half_written_and_heals(hub, small_disk, tmp_path):  # noqa: F811
    disk, enlarge = small_disk
    publish(hub, tmp_path / "large", "large")
    (found,) = pull_adapters({"large": "org/large"}, disk / "out")
    assert found.error is not None
    assert "No space left on device" in found.error
    assert not (disk / "out" / "large" / "adapter_config.json").exists()
    assert not list(disk.rglob("*.safetensors"))
    enlarge()
    (found,) = pull_adapters({"large": "org/large"}, disk / "out")
    assert found.error is None
    assert load_adapter(disk / "out" / "large").config.r == 64


def test_a_server_goes_on_with_the_adapters_it_has(hub, small_disk, tmp_path, monkeypatch):  # noqa: F811
    _, enlarge = small_disk
    publish(hub, tmp_path / "large", "large")
    monkeypatch.setattr(adapters_module, "FAILED_FOR_S", 0.0)
    monkeypatch.setattr(adapters_module, "REJECTED_FOR_S", 1000.0)

    async def scenario() -> None:
        shards = Shards()
        settings = Settings(adapters={"acme": "org/acme"}, organisations=("org",), lazy=True)
        adapters = AdapterManager(settings, 2, {"meta/base"}, set(), ask=shards.ask)
        await adapters.start()
        with pytest.raises(RequestRejected) as first:
            await adapters.add("large", "org/large")
        assert (first.value.response.status, bool(first.value.response.retry_after_s)) == (503, True)
        assert "No space left on device" in first.value.response.message
        with adapters.lease({"acme"}):
            pass
        assert all("large" not in known for known in shards.known)
        enlarge()
        await adapters.add("large", "org/large")
        with adapters.lease({"large"}):
            pass
        await adapters.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_save_that_does_not_fit_leaves_the_adapter_that_was_there(small_disk):
    disk, _ = small_disk
    make_preft(make_base(), "direft", r=1).save_pretrained(disk / "mine")
    before = load_adapter(disk / "mine").fingerprint
    with pytest.raises(OSError, match=r"mine is unchanged.*No space left"):
        make_preft(make_base(), r=64).save_pretrained(disk / "mine")
    assert load_adapter(disk / "mine").fingerprint == before
    assert not [name for name in os.listdir(disk / "mine") if name.startswith(".preft")]
