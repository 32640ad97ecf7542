"""The tutorial's blocks run in their order, for 3 customers on a tiny model instead of 30 on the one it names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from preft_cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "get-started" / "tutorial.md"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
# what stands in for `preft` in the shell: it only notes its arguments, one call a line
NOTE = """#!/usr/bin/env bash
printf '%s\\x1f' "$@" >> calls
echo >> calls
"""


def blocks() -> list[tuple[str, str]]:
    """Returns the language and the text of each block of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def save_tiny_model(folder: Path, data: Path) -> None:
    """Saves a model and a tokenizer that knows the words of the data."""
    text = " ".join(message["content"] for file in data.iterdir() for row in file.read_text().splitlines()
                    for message in json.loads(row)["messages"])  # fmt: skip
    words = ["<pad>", "<end>", "<unk>", "user", "assistant", *sorted(set(text.split()))]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_in_shell(code: str, capture: pytest.CaptureFixture[str]) -> list[str]:
    """Runs a block of shell and returns what its calls of preft printed; they run in this process, which is faster."""
    shim = Path("bin/preft")
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(NOTE)
    shim.chmod(0o700)
    Path("calls").unlink(missing_ok=True)
    path = f"{shim.parent.resolve()}:{Path(shutil.which('bash') or '/bin/bash').parent}:/usr/bin:/bin"
    subprocess.run(["bash", "-eu", "-c", code], check=True, env={"PATH": path})
    printed = []
    for call in Path("calls").read_text().splitlines():
        capture.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app(call.split("\x1f")[:-1])
        assert stopped.value.code == 0
        printed.append(capture.readouterr().out)
    return printed


@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    printed = []
    for language, code in blocks():
        code = code.replace(MODEL, "tiny").replace("range(30)", "range(3)").replace("customer-07", "customer-01")
        code = code.replace("customer-03", "customer-00").replace("--epochs 5", "--epochs 12 --lr 0.02")
        if language == "python":
            exec(code, scope)
        else:
            assert language == "bash"
            printed.append(run_in_shell(code, capsys))
        if not Path("tiny").exists():
            save_tiny_model(Path("tiny"), Path("data"))
    plan, train, look, verify = printed
    assert "decode step, all-token LoRA" in plan[0]
    assert len(train) == 3
    for text in train:
        before, after = map(float, re.findall(r"Held-out loss: ([\d.]+) to ([\d.]+)", text)[0])
        assert after < before
    assert len(verify) == 1
    # one batch of several adapters gives what each gives alone by the command
    first, second, base = scope["answers"]  # type: ignore[misc]
    assert look[1].strip() == second.strip()
    assert look[2].strip() == base.strip()
    assert len({first, second, base}) == 3
    assert scope["counters"].loads >= 2  # type: ignore[attr-defined]
