"""The benchmarks: they run in small and refuse wrong results, and the planner is held against what they measured."""

import json

import pytest
import torch
from benchmarks import gpu, plan_check
from benchmarks.gpu_model import Adapters, Decoder

from preft_core.tokens import Segments

RESULTS = sorted(plan_check.RESULTS.glob("many-adapters-*.json"))
SMALL = gpu.Setting("cpu", torch.float32, 8, 3, 24, 5, (8,), (1, 4), 4)


@torch.no_grad()
def test_serving_in_small():
    report: dict = {
        "environment": gpu.environment(),
        "kernels": gpu.kernels(gpu.SMOKE, SMALL),
        "serving": [],
        "left_out": [],
    }
    gpu.serving(gpu.SMOKE, SMALL, report, gpu.Console(quiet=True))
    systems = [case["system"] for case in report["serving"]]
    assert systems == ["base"] + ["lora-p", "all-token", "direft-p"] * 2
    assert len(report["kernels"]) == 5 * 2
    assert [table.row_count for table in gpu.tables(report)] == [10, 7]


@torch.no_grad()
def test_prefill_and_decode_are_one_model():
    """A prompt of n + 1 tokens and a prompt of n with one decode step end in the same logits."""
    ids = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(gpu.SMOKE, 3, 12, "cpu", torch.float64)
    for method in ("lora", "direft"):
        adapters = Adapters.random(gpu.SMOKE, method, 8, 3, decoder.embedding)
        slots = [2, 0, 1]
        whole = decoder.prefill(ids, 0, adapters, Segments.of_lengths(slots, [9] * 3))
        decoder.prefill(ids[:, :8], 0, adapters, Segments.of_lengths(slots, [8] * 3))
        step = decoder.decode(ids[:, 8], torch.tensor(8), adapters, Segments.of_lengths(slots, [1] * 3))
        torch.testing.assert_close(step, whole)
        decoder.prefill(ids[:, :8], 0, adapters, Segments.of_lengths(slots, [8] * 3))
        assert (decoder.decode(ids[:, 8], torch.tensor(8), None, None) - whole).abs().max() > 1e-3


@torch.no_grad()
def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "add_lora_", lambda output, *rest: output.add_(1))
    with pytest.raises(RuntimeError, match="not timed"):
        gpu.kernels(gpu.SMOKE, SMALL)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_planner_against_what_was_measured(file):
    """Prefill and decode of PreFT within a fifth of what it says; PEFT may be slower than bytes say, not faster."""
    for row in plan_check.compare(json.loads(file.read_text())):
        for figure in ("prefill", "decode"):
            predicted, measured = row[figure]
            assert measured == pytest.approx(predicted, rel=0.2), row
        predicted, measured = row["against_lora"]
        assert measured > 0.85 * predicted, row
