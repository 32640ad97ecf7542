"""Each script in examples/ runs with --smoke, as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preft_core.adapter import load_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "multi_adapter"])
def test_the_example_runs(name, tmp_path):
    arguments = [] if name == "multi_adapter" else ["--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--smoke", *arguments],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "multi_adapter":
        assert [line.partition(":")[0] for line in done.stdout.splitlines()[:3]] == ["one", "two", "__base__"]
    else:
        weights = load_adapter(tmp_path / "out").tensors
        assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "preft_B" in name)


def test_there_is_no_other_example():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"sft", "dpo", "grpo", "multi_adapter", "tiny"}
