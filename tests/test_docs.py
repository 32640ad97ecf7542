"""The code in README and docs runs, on a tiny model in place of the one it names."""

import json
import re
import runpy
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks import readme
from preft_core.format.adapter import load_adapter
from tests.core.hub.conftest import hub  # noqa: F401
from tests.hf.cases import prompt
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import METHODS, make_base, make_preft

ROOT = Path(__file__).parents[1]
RAW = "raw.githubusercontent.com"
# the tutorial's blocks run in tests/docs/test_tutorial.py, the others below
RUN = {
    "explain/format",
    "explain/semantics",
    "get-started/tutorial",
    "how-to/hub",
    "how-to/train",
    "how-to/transformers",
}
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


# peft and transformers call each other's old names
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_readmes_example(tmp_path, monkeypatch, capsys):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (code,) = python_blocks("README.md")
    lines = [line for line in code.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 14
    # the tiny tokenizer knows other words
    for text, tiny in (
        (MODEL, str(tmp_path / "base")),
        ('"2 + 2 ="', '"w05 w06"'),
        ('"2 + 2 = five"', '"w05 w06 w09"'),
    ):
        assert text in code
        code = code.replace(text, tiny)
    exec(code, {})
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.1
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


def test_the_chats_of_the_semantics_page():
    """Turn 2 of the continued cache is what a loop gives that adapts the user's tokens alone."""
    model = make_preft(make_base())
    first, second = prompt(1), prompt(1)[:, :5] + 1
    scope = {"model": model, "torch": torch, "first_turn": first, "user_turns": [second]}
    continued, fresh = (code.replace("max_new_tokens=64", "max_new_tokens=4") for code in semantics_blocks())
    exec(continued, scope)
    exec(fresh, scope)
    found: torch.Tensor = scope["continued"]  # type: ignore[assignment]
    mask = torch.zeros(1, found.shape[1], dtype=torch.bool)
    mask[:, : first.shape[1]] = True
    mask[:, first.shape[1] + 4 : first.shape[1] + 9] = True
    logits = model(input_ids=found, prefill_mask=mask).logits
    assert logits[0, -5:-1].argmax(-1).tolist() == found[0, -4:].tolist()
    again: torch.Tensor = scope["fresh"]  # type: ignore[assignment]
    mask[:, : first.shape[1] + 9] = True
    logits = model(input_ids=again, prefill_mask=mask).logits
    assert logits[0, -5:-1].argmax(-1).tolist() == again[0, -4:].tolist()


def semantics_blocks() -> list[str]:
    blocks = python_blocks("docs/explain/semantics.md")
    assert len(blocks) == 2
    return blocks


@pytest.mark.filterwarnings("ignore")
def test_the_hubs_examples(hub, tmp_path):  # noqa: F811
    """Each line on its own: push, then the three ways of loading what was pushed."""
    make_base().save_pretrained(tmp_path / "base")
    model = make_preft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    (code,) = python_blocks("docs/how-to/hub.md")
    push, *loads = code.splitlines()
    assert len(loads) == 3
    scope = {"model": model, "PeftModel": PeftModel, "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM}
    commit = eval(push.partition("#")[0], scope).commit
    expected = model.generate(input_ids=prompt(), max_new_tokens=4)
    for line in loads:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = eval(line.partition("#")[0].replace("0123abc", commit), scope | {"base": base})
        served = base if line.startswith("base.") else loaded
        tokens = served.eval().generate(input_ids=prompt(), max_new_tokens=4)
        assert tokens.tolist() == expected.tolist(), line


def test_every_page_with_python_is_run():
    run = {"README.md", *(f"docs/{name}.md" for name in RUN)}
    found = {str(file.relative_to(ROOT)) for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    assert {name for name in found if python_blocks(name)} == run


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
    """The README's links are absolute, so that they work on PyPI too; they name files of the main branch."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    places = urls["Repository"] + "/blob/main/", urls["Repository"].replace("github.com", RAW) + "/main/"
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
            here = [link.removeprefix(place) for place in places if link.startswith(place)]
            assert file.name != "README.md" or "://" in link
            if here:
                assert (ROOT / here[0]).exists(), f"{file.name}: {link}"
            else:
                assert "://" in link or (file.parent / link).exists(), f"{file.name}: {link}"
        for path in re.findall(r"`((?:src|tests|docs|benchmarks|preft_\w+|tgi_patch)/[\w/]+\.\w+)`", file.read_text()):
            assert (ROOT / path).exists() or (ROOT / "src" / path).exists(), f"{file.name}: {path}"


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "scripts" / "draw_method.py"))
    assert script["FILE"].read_text() == script["picture"]()


def shown(name: str, start: str, end: str) -> str:
    return (ROOT / name).read_text().partition(start)[2].partition(end)[0]


def test_the_figures_are_the_committed_ones():
    many, single, serving, vllm = (
        sorted(readme.RESULTS.glob(f"{name}-*.json")) for name in ("many-adapters", "cpu", "serving", "vllm")
    )
    page = "docs/explain/speed.md"
    for name, start, end, section, files in (
        ("README.md", readme.HEADLINE_START, readme.HEADLINE_END, readme.headline_section, serving),
        (page, readme.MANY_START, readme.MANY_END, readme.many_section, many),
        (page, readme.START, readme.END, readme.all_figures, many),
        (page, readme.SINGLE_START, readme.SINGLE_END, readme.section, single),
        (page, readme.GPU_START, readme.GPU_END, readme.gpu_section, serving),
        ("docs/how-to/vllm.md", readme.VLLM_START, readme.VLLM_END, readme.vllm_section, vllm),
    ):
        assert files
        assert shown(name, start, end) == "\n".join(map(section, files))


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/explain/speed.md"])
def test_the_headline_is_the_measured_one(name):
    (file,) = readme.RESULTS.glob("serving-*.json")
    text = " ".join((ROOT / name).read_text().split())
    runs: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for run in json.loads(file.read_text())["serving"]:
        if run["model"] == "llama-3.1-8b":
            runs.setdefault((run["adapters"], run["prompt"]), {})[run["system"]] = run
    step = runs[512, 64]["all-token"]["step"]["median"] / runs[512, 64]["base"]["step"]["median"]
    assert f"all-token LoRA takes {step:.2f} times the base model's step" in text
    for adapters in (32, 512):
        found = [runs[adapters, prompt] for prompt in (64, 128)]
        least, most = sorted(run["all-token"]["whole_s"] / run["lora-p"]["whole_s"] for run in found)
        assert f"{least:.2f} to {most:.2f} times" in text
