import os
import random
from pathlib import Path

# No test may reach a network: everything is made here or found in a local cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    # the kernels' tests run in Triton's interpreter, which has to be chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

TGI_PYTHON = Path(os.environ.get("PREFT_TGI_PYTHON", "~/.cache/preft/tgi/bin/python")).expanduser()
VLLM_PYTHON = Path(os.environ.get("PREFT_VLLM_PYTHON", "~/.cache/preft/vllm/bin/python")).expanduser()


@pytest.fixture(autouse=True)
def _same_seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """For tests that count graphs: torch.compile counts its recompilations of a function over a whole process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "tgi": None if TGI_PYTHON.exists() else f"no TGI Python at {TGI_PYTHON}; name one with PREFT_TGI_PYTHON",
        "vllm": None if VLLM_PYTHON.exists() else f"no vLLM Python at {VLLM_PYTHON}; name one with PREFT_VLLM_PYTHON",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
