"""The planner's laws: sizes are the real pool's, times grow with the work, and the table computed by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preft_core.format.config import AdapterConfig
from preft_core.planner import DEVICES, LINEAR_SETS, SHAPES, Planner, Shape, Workload
from preft_core.pool.layout import Bucket, Site
from preft_core.pool.slots import SlotPool

H100 = DEVICES["h100"]
SMALL = Shape("small", 32, 48, 2, 4, 2, 8, 96)


# by hand, 3.0 TB/s and 700 TFLOP/s: overhead in per cent of one forward of 8192 tokens
@pytest.mark.parametrize(
    ("name", "parallel", "rank", "megabytes", "bytes_of", "activations", "arithmetic", "direft"),
    [
        ("llama-3.1-8b", 1, 16, (83.9, 8.4), (0.0, 0.5, 7.6), 10.5, 0.5, (1.1, 1.2, 1.9)),
        ("llama-3.1-8b", 1, 64, (335.5, 33.6), (0.1, 1.9, 30.5), 10.5, 2.1, (1.1, 1.3, 4.2)),
        ("llama-3.1-70b", 4, 16, (414.2, 41.9), (0.0, 0.3, 4.3), 5.9, 0.3, (0.7, 0.7, 1.1)),
        ("qwen2.5-0.5b", 1, 16, (17.6, 1.4), (0.0, 1.6, 26.0), 37.3, 1.8, (3.1, 3.2, 5.1)),
    ],
)
def test_the_table(name, parallel, rank, megabytes, bytes_of, activations, arithmetic, direft):
    lora = Planner(SHAPES[name], H100, rank=rank, tensor_parallel=parallel)
    edit = replace(lora, method="direft")
    assert [planner.adapter_bytes / 1e6 for planner in (lora, edit)] == pytest.approx(megabytes, abs=0.06)
    steps = [lora.prefill(8192, number) for number in (1, 32, 512)]
    assert [100 * step.adapter_bytes / step.base for step in steps] == pytest.approx(bytes_of, abs=0.055)
    assert 100 * steps[0].activations / steps[0].base == pytest.approx(activations, abs=0.055)
    assert 100 * steps[0].arithmetic / steps[0].base == pytest.approx(arithmetic, abs=0.055)
    found = [100 * edit.prefill(8192, number).overhead for number in (1, 32, 512)]
    assert found == pytest.approx(direft, abs=0.055)


@pytest.mark.parametrize(("name", "rank", "ratio"), [("llama-3.1-8b", 16, 1.85), ("qwen2.5-0.5b", 16, 3.14)])
def test_the_tables_decode_steps(name, rank, ratio):
    planner = Planner(SHAPES[name], H100, rank=rank)
    assert planner.decode_step(512, 512, 512) / planner.decode_step(512, 512) == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("qwen2.5-0.5b", 0.494)]
)
def test_parameters_are_the_published_ones(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("rank", [1, 8, 12, 128])
@pytest.mark.parametrize("method", ["lora", "direft"])
def test_slot_bytes_are_the_pools(method, rank):
    planner = Planner(SMALL, H100, method, rank, element_bytes=4)
    shapes = SMALL.linears()
    sites = [
        Site(f"{i}.{name}", "linear", (f"{i}.{name}",), *(shapes[name][0], (shapes[name][1],)))
        for i in range(SMALL.num_layers)
        for name in LINEAR_SETS["all-linear"]
    ]
    sites += [Site(f"{i}", "block", (f"{i}",), 32, (32,)) for i in range(SMALL.num_layers)]
    bucket = Bucket("linear" if method == "lora" else "block", max(8, 1 << (rank - 1).bit_length()))
    pool = SlotPool(sites, {bucket: 3}, dtype=torch.float32)
    assert pool.num_bytes == 3 * planner.slot_bytes
    assert AdapterConfig(method=method, r=rank, lora_alpha=1.0, format_version=1).r == rank


planners = st.builds(
    Planner,
    st.sampled_from(sorted(SHAPES.values(), key=lambda shape: shape.name)),
    st.sampled_from(sorted(DEVICES.values(), key=lambda device: device.name)),
    st.sampled_from(["lora", "direft"]),
    st.integers(1, 128),
    st.sampled_from(sorted(LINEAR_SETS)),
)
workloads = st.builds(Workload, *[st.integers(1, 600)] * 2, *[st.integers(1, 4000)] * 2, st.integers(1, 16384))


@given(planners, workloads, st.integers(1, 64))
def test_more_work_takes_longer(planner, work, more):
    for system in ("base", "preft", "all-token"):
        now = planner.seconds(work, system)
        assert now <= planner.seconds(replace(work, num_adapters=work.num_adapters + more), system)
        assert now < planner.seconds(replace(work, output=work.output + more), system)
    assert planner.seconds(work, "base") <= planner.seconds(work, "preft") <= planner.seconds(work, "all-token")
    if planner.rank + more <= 128:
        assert planner.seconds(work, "preft") <= replace(planner, rank=planner.rank + more).seconds(work, "preft")
    assert replace(planner, fused=True).seconds(work, "preft") < planner.seconds(work, "preft")


@given(planners, workloads)
def test_what_fits_fits(planner, work):
    number = planner.adapters_that_fit(work)
    kept = planner.shape.num_parameters * 2 + work.num_requests * (work.prompt + work.output) * planner.shape.kv_bytes(
        2
    )
    assert number == 0 or number * planner.slot_bytes + kept <= 0.9 * planner.device.memory
    assert (number + 1) * planner.slot_bytes + kept > 0.9 * planner.device.memory


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"method is 'x'.*rank is 0.*linears is 'y'.*tensor_parallel is 3"):
        Planner(SHAPES["llama-3.1-8b"], H100, "x", 0, "y", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_adapters is 0.*output is -1"):
        Workload(0, 1, 1, -1)
    with pytest.raises(ValueError, match="mixture of experts"):
        Shape.of_config({"num_experts": 8}, "it")
    with pytest.raises(ValueError, match="no positive hidden_size, intermediate_size"):
        Shape.of_config({"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 5}, "it")
