"""add_lora_ and add_direft_, each way of computing them, against float64 row by row.

Without a GPU the kernels run in Triton's interpreter, which shows their arithmetic and their indices, but no races and
not the GPU's own 16-bit products. With one, everything here runs there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_core.ops import add_direft_, add_lora_, cpu, reference
from preft_core.ops.launch import launch_for, tile_counts
from preft_core.rule.tokens import BASE, Segments

triton = pytest.importorskip("preft_core.ops.triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = {"reference": reference, "cpu": cpu, "triton": triton}

# Largest error against float64 in units of the dtype's epsilon times the size of the result: the output is rounded
# once (1/2); cpu and triton also round the R intermediate values in 16 bit, whose errors add up like a random walk.
TOLERANCE = {torch.float32: 16, torch.float16: 4, torch.bfloat16: 4}


def exact_lora(output, x, a, b, widths, slots):
    result = output.double()
    for row, slot in enumerate(slots):
        begin = 0
        for part, width in enumerate(widths):
            low = a[slot, part].double() @ x[row].double() if slot != BASE else None
            if low is not None:
                result[row, begin : begin + width] += b[slot, begin : begin + width].double() @ low
            begin += width
    return result


def assert_close(found, exact, scale):
    error = (found.double() - exact).abs()
    allowed = TOLERANCE[found.dtype] * torch.finfo(found.dtype).eps * (exact.abs() + scale)
    assert (error <= allowed).all(), f"{(error / allowed).max():.1f} times what is allowed"


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


CASES = st.fixed_dictionaries(
    {
        "requests": st.lists(
            st.tuples(st.integers(BASE, 3), st.sampled_from([0, 1, 2, 15, 16, 17, 63, 100])), max_size=6
        ),
        "width": st.sampled_from([1, 63, 64, 100]),
        "widths": st.sampled_from([(1,), (63,), (100,), (64, 32, 32), (33, 1, 100), (130, 130)]),
        "rank": st.sampled_from([1, 2, 8, 12, 16, 64, 128]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "tile_rows": st.sampled_from([None, 16, 64]),
    }
)


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=40)
@given(case=CASES)
def test_lora_of_a_ragged_batch(way, case):
    slots = [slot for slot, _ in case["requests"]]
    segments = Segments.of_lengths(slots, [length for _, length in case["requests"]], DEVICE, case["tile_rows"])
    rows, width, widths, rank, dtype = segments.num_rows, case["width"], case["widths"], case["rank"], case["dtype"]
    x = random((rows, width), dtype, 1)
    a = random((4, len(widths), rank, width), dtype, 2) / width**0.5
    b = random((4, sum(widths), rank), dtype, 3) / rank**0.5
    output = random((rows, sum(widths)), dtype, 4)
    slot_of_row = [slot for slot, length in case["requests"] for _ in range(length)]
    exact = exact_lora(output, x, a.to(dtype), b.to(dtype), widths, slot_of_row)
    found = output.clone()
    WAYS[way].add_lora_(found, x, a.to(dtype), b.to(dtype), widths, segments)
    assert_close(found, exact, scale=3)
    untouched = torch.tensor([slot == BASE for slot in slot_of_row], dtype=torch.bool)
    assert torch.equal(found[untouched], output[untouched]), "a decode or base row was touched"


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=30)
@given(case=CASES, everywhere=st.booleans())
def test_a_linear_layer_with_its_updates(way, case, everywhere):
    requests = case["requests"]
    if everywhere:
        # no base rows: the updates are written first, and the product is added to them
        requests = [(max(slot, 0), length) for slot, length in requests]
    slots = [slot for slot, _ in requests]
    segments = Segments.of_lengths(slots, [length for _, length in requests], DEVICE, case["tile_rows"])
    rows, width, widths, rank, dtype = segments.num_rows, case["width"], case["widths"], case["rank"], case["dtype"]
    x = random((rows, width), dtype, 1)
    a = (random((4, len(widths), rank, width), dtype, 2) / width**0.5).to(dtype)
    b = (random((4, sum(widths), rank), dtype, 3) / rank**0.5).to(dtype)
    weight = (random((sum(widths), width), dtype, 4) / width**0.5).to(dtype)
    slot_of_row = [slot for slot, length in requests for _ in range(length)]
    exact = exact_lora(x.double() @ weight.double().T, x, a, b, widths, slot_of_row)
    assert_close(WAYS[way].lora_linear(x, weight, a, b, widths, segments), exact, scale=6)


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=30)
@given(case=CASES)
def test_direft_of_a_ragged_batch(way, case):
    slots = [slot for slot, _ in case["requests"]]
    segments = Segments.of_lengths(slots, [length for _, length in case["requests"]], DEVICE, case["tile_rows"])
    rows, width, rank, dtype = segments.num_rows, case["width"], case["rank"], case["dtype"]
    hidden = random((rows, width), dtype, 1)
    a, bias = (random((4, rank, width), dtype, 2) / width**0.5).to(dtype), random((4, rank), dtype, 3)
    b = (random((4, width, rank), dtype, 4) / rank**0.5).to(dtype)
    exact = hidden.double()
    slot_of_row = [slot for slot, length in case["requests"] for _ in range(length)]
    for row, slot in enumerate(slot_of_row):
        if slot != BASE:
            low = a[slot].double() @ hidden[row].double() + bias[slot].double()
            exact[row] += b[slot].double() @ low
    found = hidden.clone()
    WAYS[way].add_direft_(found, a, b, bias, segments)
    assert_close(found, exact, scale=3)
    untouched = torch.tensor([slot == BASE for slot in slot_of_row], dtype=torch.bool)
    assert torch.equal(found[untouched], hidden[untouched])


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_inputs_may_be_strided(way):
    segments = Segments.of_lengths([1, BASE, 0, 1], [5, 3, 20, 1], DEVICE)
    whole = random((29, 50), torch.float32, 1)
    x = random((20, 29), torch.float32, 2).T
    a, b = random((2, 2, 8, 20), torch.float32, 3), random((2, 16, 8), torch.float32, 4)
    expected = exact_lora(whole[:, 7:23], x, a, b, (10, 6), [1] * 5 + [BASE] * 3 + [0] * 20 + [1])
    beside = whole.clone()
    WAYS[way].add_lora_(whole[:, 7:23], x, a, b, (10, 6), segments)
    assert_close(whole[:, 7:23], expected, scale=60)
    assert torch.equal(whole[:, :7], beside[:, :7])
    assert torch.equal(whole[:, 23:], beside[:, 23:])
    columns = random((16, 29), torch.float32, 5).T
    expected = exact_lora(columns, x, a, b, (10, 6), [1] * 5 + [BASE] * 3 + [0] * 20 + [1])
    WAYS[way].add_lora_(columns, x, a, b, (10, 6), segments)
    assert_close(columns, expected, scale=60)


@pytest.mark.parametrize("way", ["cpu", "triton"])
@pytest.mark.parametrize("device_only", [False, True], ids=["known to the host", "known to the device"])
def test_segments_of_a_mask_give_the_same(way, device_only):
    mask = (torch.rand(4, 33, generator=torch.Generator().manual_seed(0)) < 0.7).to(DEVICE)
    segments = Segments.of_mask(mask, [2, BASE, 0, 2])
    if device_only:
        from preft_core.rule.tiles import tiles_on_device

        segments = Segments(mask.numel(), *tiles_on_device(mask, [2, BASE, 0, 2], 16), None)
    x, output = random((132, 24), torch.float32, 1), random((132, 40), torch.float32, 2)
    a, b = random((3, 1, 16, 24), torch.float32, 3), random((3, 40, 16), torch.float32, 4)
    slots = [slot if bit else BASE for slot, row in zip([2, BASE, 0, 2], mask.tolist(), strict=True) for bit in row]
    exact = exact_lora(output, x, a, b, (40,), slots)
    WAYS[way].add_lora_(output, x, a, b, (40,), segments)
    assert_close(output, exact, scale=60)


def test_scratch_memory_is_written_before_it_is_read(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    segments = Segments.of_lengths([0, BASE, 1], [17, 4, 5], DEVICE)
    x, output = random((26, 2048), torch.float32, 1), torch.zeros(26, 33, device=DEVICE)
    a, b = random((2, 1, 16, 2048), torch.float32, 2), random((2, 33, 16), torch.float32, 3)
    expected = output.clone()
    reference.add_lora_(expected, x, a, b, (33,), segments)
    triton.add_lora_(output, x, a, b, (33,), segments)  # few tiles and a long input: the sums are cut into parts
    assert torch.isfinite(output).all()
    assert (output - expected).abs().max() < 1e-3 * expected.abs().max()


def test_float16_sums_may_leave_the_range_of_float16():
    """x @ A^T is 1e6 here, and B brings it back: a kernel that stores the sum in float16 gives infinity."""
    segments = Segments.of_lengths([0], [16], DEVICE)
    x = torch.full((16, 64), 1000.0, dtype=torch.float16, device=DEVICE)
    a = torch.full((1, 1, 8, 64), 16.0, dtype=torch.float16, device=DEVICE)
    b = torch.full((1, 4, 8), 1e-4, dtype=torch.float16, device=DEVICE)
    output = torch.zeros(16, 4, dtype=torch.float16, device=DEVICE)
    triton.add_lora_(output, x, a, b, (4,), segments)
    assert torch.isfinite(output).all()
    assert (output.double() - 1.024e6 * 8 * float(b[0, 0, 0])).abs().max() < 2


def test_an_adapter_full_of_nan_does_not_reach_other_rows():
    segments = Segments.of_lengths([0, 1, BASE], [20, 20, 20], DEVICE)
    for way in WAYS.values():
        x, output = random((60, 30), torch.float32, 1), random((60, 30), torch.float32, 2)
        a, b = random((3, 1, 16, 30), torch.float32, 3), random((3, 30, 16), torch.float32, 4)
        a[1:], b[1:] = float("nan"), float("nan")
        before = output.clone()
        way.add_lora_(output, x, a, b, (30,), segments)
        assert torch.isfinite(output[:20]).all()
        assert torch.isnan(output[20:40]).all()
        assert torch.equal(output[40:], before[40:])


def test_an_empty_batch_is_left_alone():
    for way in WAYS.values():
        output = random((7, 9), torch.float32, 1)
        before = output.clone()
        a, b = random((2, 1, 8, 5), torch.float32, 2), random((2, 9, 8), torch.float32, 3)
        way.add_lora_(
            output, torch.ones(7, 5, device=DEVICE), a, b, (9,), Segments.of_lengths([BASE, BASE], [4, 3], DEVICE)
        )
        assert torch.equal(output, before)


def test_what_does_not_fit_is_said():
    segments = Segments.of_lengths([0], [4])
    x, output = torch.zeros(4, 6), torch.zeros(4, 8)
    a, b = torch.zeros(2, 1, 8, 6), torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match=r"b is torch.float32 \(2, 8, 8\).*expected output \[4, 9\]"):
        add_lora_(torch.zeros(4, 9), x, a, b, (9,), segments)
    with pytest.raises(ValueError, match=r"x is torch\.float16"):
        add_lora_(output, x.half(), a, b, (8,), segments)
    with pytest.raises(ValueError, match=r"hidden is torch.float32 \(3, 6\)"):
        add_direft_(torch.zeros(3, 6), a[:, 0], torch.zeros(2, 6, 8), torch.zeros(2, 8), segments)
    with pytest.raises(ValueError, match="for inference"):
        add_lora_(output, x.requires_grad_(), a, b, (8,), segments)
    with pytest.raises(ValueError, match="takes up to 3"):
        triton.add_lora_(output, x, torch.zeros(2, 4, 8, 6), b, (2, 2, 2, 2), segments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_graph_follows_the_segments(dtype):
    """Replays one CUDA graph for other adapters, lengths and slots than it was captured with."""
    buffer = Segments.buffer(512, 64, 16, "cuda")
    x, output = random((512, 4096), dtype, 1), random((512, 6144), dtype, 2)
    a = (random((8, 3, 16, 4096), dtype, 3) / 64).to(dtype)
    b = (random((8, 6144, 16), dtype, 4) / 4).to(dtype)
    widths, before = (4096, 1024, 1024), output.clone()
    triton.add_lora_(output, x, a, b, widths, buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton.add_lora_(output, x, a, b, widths, buffer)
    for slots, lengths in (([0, 1], [256, 256]), ([7, BASE, 3], [100, 300, 17]), ([BASE], [512])):
        segments = Segments.of_lengths(slots, lengths, "cuda", 16)
        segments.copy_into(buffer)
        output.copy_(before)
        graph.replay()
        slot_of_row = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        slot_of_row += [BASE] * (512 - len(slot_of_row))
        assert_close(output, exact_lora(before, x, a, b, widths, slot_of_row), scale=3)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """64k rows of 65,536 columns: the last rows lie 8 GiB into the output."""
    segments = Segments.of_lengths([BASE, 1], [65_500, 36], "cuda")
    x, output = (
        random((65_536, 64), torch.bfloat16, 1),
        torch.zeros(65_536, 65_536, dtype=torch.bfloat16, device="cuda"),
    )
    a, b = random((2, 1, 16, 64), torch.bfloat16, 2) / 8, random((2, 65_536, 16), torch.bfloat16, 3) / 4
    triton.add_lora_(output, x, a, b, (65_536,), segments)
    exact = (x[65_500:].double() @ a[1, 0].double().T) @ b[1].double().T
    assert_close(output[65_500:], exact, scale=3)
    assert not output[:65_500].any()


def test_the_op_of_this_device_is_the_one_that_is_documented():
    segments = Segments.of_lengths([1, 0], [10, 7], DEVICE)
    x, output = random((17, 6), torch.float32, 1), torch.zeros(17, 8, device=DEVICE)
    a, b = random((2, 1, 8, 6), torch.float32, 2), random((2, 8, 8), torch.float32, 3)
    expected = output.clone()
    reference.add_lora_(expected, x, a, b, (8,), segments)
    add_lora_(output, x, a, b, (8,), segments)
    assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.gpu
def test_more_tiles_than_a_second_dimension_of_a_grid_holds():
    count = 70_000
    rows = torch.arange(count, dtype=torch.int32)
    tiles = torch.stack([rows, torch.ones_like(rows), rows % 2], dim=1).to(DEVICE)
    segments = Segments(count, rows.to(DEVICE), tiles, 16, None)
    x, a, b = (random(shape, torch.float32, 1) for shape in ((count, 32), (2, 1, 8, 32), (2, 16, 8)))
    output = torch.zeros(count, 16, device=DEVICE)
    triton.add_lora_(output, x, a, b, (16,), segments)
    for slot in (0, 1):
        assert_close(output[slot::2], x[slot::2].double() @ a[slot, 0].double().T @ b[slot].double().T, scale=60)


@given(
    num_tiles=st.integers(1, 5000),
    tile_rows=st.sampled_from([16, 32, 64]),
    width=st.integers(1, 20000),
    width_out=st.integers(1, 60000),
    parts=st.integers(1, 3),
    rank=st.sampled_from([1, 8, 16, 32, 64, 128]),
    capability=st.sampled_from([(8, 0), (9, 0), (8, 9)]),
)
def test_every_launch_is_one_of_those_that_are_warmed_up(
    num_tiles, tile_rows, width, width_out, parts, rank, capability
):
    def launch(count):
        return launch_for(capability, count, tile_rows, width, parts * rank, rank, width_out, 2)

    assert launch(num_tiles) in {launch(count) for count in tile_counts(width_out)}


def test_a_launch_takes_the_compiled_form_that_triton_would():
    """A form made for aligned memory fails on memory that is not. And none is compiled after a warm-up."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernel_choice.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
