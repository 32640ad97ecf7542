"""On a CUDA device: kernels, static caches in CUDA graphs and the pool give what the two-phase loop gives on a CPU.

float32 on both sides, without TF32. Skipped where there is no device.
"""

import copy

import pytest
import torch

from preft_hf import PreftPool
from tests.hf.cases import GREEDY, case, prompt, run_together
from tests.hf.forward.test_continuous_batching import expected, ragged, run
from tests.hf.many_adapters import BASE, NAMES, prompts, saved_adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    # transformers' and the compiler's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-3
MODES = {
    "dynamic": {},
    "static, compiled": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
}


def check(output, expected: torch.Tensor, logits: torch.Tensor, length: int) -> None:
    assert torch.equal(output.sequences[:, length:].cpu(), expected)
    assert (torch.stack(output.logits, 1).cpu() - logits).abs().max() <= TOLERANCE


def pooled(num_slots: int = 4, **options):
    model = copy.deepcopy(saved_adapters().base).to("cuda")
    PreftPool.from_pretrained(model, saved_adapters().paths, num_slots=num_slots, **options)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
def test_one_adapter(method, mode):
    c, ids = case("llama", method), prompt()
    model = copy.deepcopy(c.model).to("cuda")
    output = model.generate(input_ids=ids.to("cuda"), **MODES[mode], **GREEDY)
    check(output, *c.oracle(ids), ids.shape[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["held", "pooled", "both"])
def test_a_mixed_batch_equals_each_row_alone(kind, mode):
    c, ids = saved_adapters(), prompts()
    model = c.model(kind, device="cuda")
    output = model.generate(input_ids=ids.to("cuda"), adapter_names=NAMES, **MODES[mode], **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids), ids.shape[1])


def test_left_padding():
    c, ids = saved_adapters(), prompts()
    mask = torch.ones_like(ids)
    for row, length in ((1, 4), (2, 8), (5, 1)):
        mask[row, :length] = 0
    inputs = {"input_ids": (ids * mask).to("cuda"), "attention_mask": mask.to("cuda")}
    output = pooled().generate(**inputs, adapter_names=NAMES, **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids, mask), ids.shape[1])


def test_after_a_warm_up():
    c, ids, model = saved_adapters(), prompts(), copy.deepcopy(saved_adapters().base).to("cuda")
    pool = PreftPool.from_pretrained(model, saved_adapters().paths, num_slots=4)
    assert pool.warm_up() > 0
    output = model.generate(input_ids=ids.to("cuda"), adapter_names=NAMES, **GREEDY)
    check(output, *c.oracle_rows(NAMES, ids), ids.shape[1])


def test_more_adapters_than_slots_and_nothing_kept_on_the_host():
    c, model = saved_adapters(), pooled(num_slots=2, max_host_bytes=0)
    names = [name for name in c.paths if name != BASE]
    for step in range(12):
        some, ids = [names[step % len(names)], names[(step + 2) % len(names)]], prompt(2, 6, seed=step)
        output = model.generate(input_ids=ids.to("cuda"), adapter_names=some, **GREEDY)
        check(output, *c.oracle_rows(some, ids), ids.shape[1])


def test_continuous_batching():
    known, found = saved_adapters(), ragged(len(NAMES))
    assert run(pooled(), found, NAMES) == expected(known, found, NAMES)


def test_threads_on_streams_of_their_own():
    c, model = saved_adapters(), pooled(num_slots=2)
    faults: list[object] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(6):
                    name, ids = ("wide", "edit", "few")[(number + step) % 3], prompt(1, 6, seed=10 * number + step)
                    output = model.generate(input_ids=ids.to("cuda"), adapter_names=[name], **GREEDY)
                    check(output, *c.oracle_rows([name], ids), ids.shape[1])
        except BaseException as error:
            faults.append(error)

    run_together(work, 3)
    assert not faults, faults


def test_a_decode_step_launches_no_kernel_of_ours():
    model, ids = pooled(), prompts().to("cuda")

    def launches(num_new: int) -> int:
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CUDA, kind.CPU]) as profile:
            model.generate(input_ids=ids, adapter_names=NAMES, **GREEDY | {"max_new_tokens": num_new})
        return sum(event.count for event in profile.key_averages() if event.key in ("shrink_kernel", "expand_kernel"))

    assert launches(1) == launches(8) > 0
