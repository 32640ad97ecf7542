"""Each script in examples/ runs with --smoke, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preft_core.format.adapter import load_adapter
from tests.hf.training.test_trainers import CHATS, tokenizer
from tests.hf.zoo import make_base

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(
    place: Path, name: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        capture_output=True,
        text=True,
    )


def has_learned(adapter: Path) -> bool:
    weights = load_adapter(adapter).tensors
    return any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "preft_B" in name)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_the_example_runs(name, tmp_path):
    done = run(tmp_path, name, "--smoke", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert has_learned(tmp_path / "out")


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "multi_adapter"])
def test_the_smoke_run_leaves_nothing(name, tmp_path):
    """Neither in the current folder, nor in the temporary one, nor in the checkout."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    before = files_of(EXAMPLES.parent)
    # a cache of torch's that outlives the process
    environment = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = run(work, name, "--smoke", environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "multi_adapter":
        assert [line.partition(":")[0] for line in done.stdout.splitlines()[:3]] == ["one", "two", "__base__"]
    assert list(work.iterdir()) == []
    assert list(temporary.iterdir()) == []
    assert files_of(EXAMPLES.parent) == before


def files_of(checkout: Path) -> list[Path]:
    """Returns what stands in the checkout's folder and in its examples, without caches."""
    found = [*checkout.iterdir(), *EXAMPLES.rglob("*")]
    return sorted(path for path in found if "cache" not in str(path.relative_to(checkout)))


def test_sft_reads_messages(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    arguments = ("--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    done = run(tmp_path, "sft", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert has_learned(tmp_path / "out")


def test_sft_makes_a_row_of_each_assistant_turn(tmp_path):
    user, one, two = ({"role": role, "content": role[0]} for role in ("user", "assistant", "assistant"))
    file, tools = tmp_path / "rows.jsonl", [{"type": "function"}]
    file.write_text(json.dumps({"messages": [user, one, user, two], "tools": tools}))
    code = "import json, sys, sft; print(json.dumps(sft.read(sys.argv[1]).to_list()))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=EXAMPLES, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [
        {"tools": tools, "prompt": [user], "completion": [one]},
        {"tools": tools, "prompt": [user, one, user], "completion": [two]},
    ]


def test_there_is_no_other_example():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"sft", "dpo", "grpo", "multi_adapter", "tiny"}
