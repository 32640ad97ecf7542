"""The benchmarks: they run in small and refuse wrong results, and the planner is held against what they measured."""

import json

import pytest
import torch

from benchmarks import gpu, plan_check
from benchmarks.gpu_model import Adapters, Decoder
from preft_core.rule.tokens import Segments

RESULTS = sorted(plan_check.RESULTS.glob("many-adapters-cpu-*.json"))
ENGINE = sorted(plan_check.RESULTS.glob("serving-*.json"))
SMALL = gpu.Setting("cpu", torch.float32, 8, 3, 24, 5, (8,), (1, 4), 4)


@torch.no_grad()
def test_serving_in_small():
    found = {"kernels": gpu.kernels(gpu.SMOKE, SMALL)}
    found |= gpu.serving(gpu.SMOKE, SMALL, gpu.Console(quiet=True))
    systems = ["base", "lora-p", "direft-p"]
    assert [case["system"] for case in found["forwards"]] == systems * 2
    assert [case["system"] for case in found["serving"]] == [*systems, "all-token"] * 2
    assert len(found["kernels"]) == 5 * 2
    report = {"environment": gpu.environment(), **{section: [] for section in gpu.SECTIONS}}
    report = gpu.merged(report, found)
    assert [table.row_count for table in gpu.tables(report)] == [10, 6, 8]
    # the same cases again take the place of the old ones; another load stands beside them
    again = {name: [dict(case) for case in cases] for name, cases in found.items()}
    again["serving"] = [case | {"whole_s": 0.0} for case in again["serving"]]
    again["serving"].append(again["serving"][0] | {"prompt": 99})
    assert [case["whole_s"] for case in gpu.merged(report, again)["serving"]] == [0.0] * 9


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
    wrong = {"add_lora_": lambda output, *rest: output.add_(1), "lora_linear": lambda x, weight, *rest: x @ weight.T}
    for name, function in wrong.items():
        with monkeypatch.context() as patched:
            patched.setattr(gpu, name, function)
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


@pytest.mark.parametrize("file", ENGINE, ids=lambda file: file.stem)
def test_the_planner_against_a_gpu(file):
    """Of large models; on small ones the host's launches decide, which the planner leaves out."""
    rows = [row for row in plan_check.compare_engine(json.loads(file.read_text())) if row["case"].startswith("llama")]
    assert rows
    for row in rows:
        predicted, measured = row["prefill"]
        assert measured == pytest.approx(predicted, abs=0.05), row
        predicted, measured = row["against_lora"]
        assert measured == pytest.approx(predicted, rel=0.1), row
