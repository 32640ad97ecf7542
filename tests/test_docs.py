"""The code in README and docs runs, on a tiny model in place of the one it names."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from preft_core.format.adapter import load_adapter
from tests.hf.cases import prompt
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import METHODS, make_base, make_preft

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


# peft and transformers call each other's old names
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_readmes_example(tmp_path, monkeypatch):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (code,) = python_blocks("README.md")
    assert len(code.splitlines()) <= 14
    scope: dict[str, object] = {}
    exec(code.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "base")), scope)
    assert isinstance(PeftModel.from_pretrained(make_base(), tmp_path / "my-adapter"), PeftModel)


def test_the_training_example():
    (code,) = python_blocks("docs/how-to/train.md")
    ids = prompt()
    exec(code, {"base": make_base(), "ids": ids, "labels": ids.masked_fill(torch.arange(9) < 4, -100)})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_serving_examples(tmp_path):
    model = make_base()
    for seed, (name, method) in enumerate({"acme": "lora", "tax": "direft"}.items()):
        make_preft(make_base(), method, seed=seed).save_pretrained(tmp_path / name)
    first, second = python_blocks("docs/how-to/transformers.md")
    scope = {"model": model, "acme": tmp_path / "acme", "tax": tmp_path / "tax", "prompts": {"input_ids": prompt(3)}}
    exec(first.replace("pool.close()", ""), scope)
    assert scope["answers"].shape == (3, 9 + 16)  # type: ignore[attr-defined]
    scope["generation_config"] = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    # by itself transformers takes most of the free memory for the cache
    small = ContinuousBatchingConfig(page_size=4, num_blocks=256, max_batch_tokens=64)
    scope["model"] = SimpleNamespace(generate_batch=partial(model.generate_batch, continuous_batching_config=small))
    exec(second, scope)
    assert [len(tokens) for tokens in scope["tokens"]] == [4, 4]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_the_fingerprint_of_the_docs(tmp_path, method):
    make_preft(make_base(), method).save_pretrained(tmp_path)
    (code,) = python_blocks("docs/explain/format.md")
    scope: dict[str, object] = {}
    exec(code, scope)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    found = scope["fingerprint"](config, str(tmp_path / "adapter_model.safetensors"))  # type: ignore[operator]
    assert found == load_adapter(tmp_path).fingerprint


def test_links_point_at_files():
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert "://" in link or (file.parent / link).exists(), f"{file.name}: {link}"
        for path in re.findall(r"`((?:src|tests|docs|benchmarks|preft_hf|preft_core)/[\w/]+\.\w+)`", file.read_text()):
            assert (ROOT / path).exists() or (ROOT / "src" / path).exists(), f"{file.name}: {path}"


def test_the_readmes_figures_are_the_committed_ones():
    from benchmarks import readme

    many, single = sorted(readme.RESULTS.glob("many-adapters-*.json")), sorted(readme.RESULTS.glob("cpu-*.json"))
    right = {
        "README.md": [readme.many_section(file) for file in many],
        "docs/how-to/transformers.md": readme.page_sections(many, single),
    }
    for name, sections in right.items():
        shown = (ROOT / name).read_text().partition(readme.START)[2].partition(readme.END)[0]
        assert shown == "\n".join(sections)
        assert shown
    measured = sorted(readme.RESULTS.glob("serving-*.json"))
    page = (ROOT / "docs/how-to/transformers.md").read_text()
    shown = page.partition(readme.GPU_START)[2].partition(readme.GPU_END)[0]
    assert measured
    assert shown == "\n".join(map(readme.gpu_section, measured))
    case = {"model": "llama-3.1-8b", "rank": 16, "adapters": 512, "prompt": 64}
    runs = json.loads(measured[0].read_text())["serving"]
    steps = {run["system"]: run["step"]["median"] for run in runs if case.items() <= run.items()}
    assert f"LoRA takes {steps['all-token'] / steps['base']:.2f} times the base's" in (ROOT / "README.md").read_text()
    measured = sorted(readme.RESULTS.glob("vllm-*.json"))
    shown = (ROOT / "docs/how-to/vllm.md").read_text().partition(readme.VLLM_START)[2].partition(readme.VLLM_END)[0]
    assert measured
    assert shown == "\n".join(map(readme.vllm_section, measured))
