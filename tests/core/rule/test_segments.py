"""Segments against the rule itself: every adapted row in exactly one tile of its slot, no other row in any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preft_core.rule.tiles import tiles_on_device
from preft_core.rule.tokens import BASE, Segments, Span, choose_tile_rows

REQUESTS = st.lists(st.tuples(st.integers(BASE, 5), st.integers(0, 90)), max_size=12)


def slot_of_each_row(segments: Segments) -> list[int]:
    """Reads the tiles the way a kernel does."""
    found = [BASE] * segments.num_rows
    for first, count, slot in segments.tiles.tolist():
        assert 0 <= count <= segments.tile_rows
        for row in segments.rows[first : first + count].tolist():
            assert found[row] == BASE, "a row is in two tiles"
            found[row] = slot
    return found


@given(REQUESTS, st.sampled_from([None, 16, 32, 64]))
def test_every_row_is_in_the_tiles_of_its_slot(requests, tile_rows):
    slots, lengths = [slot for slot, _ in requests], [length for _, length in requests]
    segments = Segments.of_lengths(slots, lengths, tile_rows=tile_rows)
    expected = [slot for slot, length in requests for _ in range(length)]
    assert slot_of_each_row(segments) == expected
    by_group = {group.slot: group.rows for group in segments.groups}
    assert len(by_group) == len(segments.groups), "one slot in two groups"
    everything = torch.arange(segments.num_rows)
    for slot, rows in by_group.items():
        assert everything[rows].tolist() == [row for row, other in enumerate(expected) if other == slot]
    assert segments.runs is not None
    assert [slot for run in segments.runs for slot in [run.slot] * (run.end - run.begin)] == [
        slot for slot in expected if slot != BASE
    ]


@given(st.data())
def test_a_mask_gives_the_same_on_the_host_and_on_the_device(data):
    batch, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits).view(batch, length)
    slots = data.draw(st.lists(st.integers(BASE, 4), min_size=batch, max_size=batch))
    expected = [slots[i // length] if bit else BASE for i, bit in enumerate(bits)]
    assert slot_of_each_row(Segments.of_mask(mask, slots)) == expected
    # what runs on a GPU, where nothing may wait for the mask
    on_device = Segments(mask.numel(), *tiles_on_device(mask, slots, None), None)
    assert slot_of_each_row(on_device) == expected
    assert {group.slot for group in on_device.groups} == set(expected) - {BASE}


@given(REQUESTS)
def test_even_is_said_of_spans_of_one_length_only(requests):
    segments = Segments.of_lengths([slot for slot, _ in requests], [length for _, length in requests])
    if segments.even is None:
        return
    first, length, slots = segments.even
    rebuilt = [Span(int(slot), first + i * length, first + (i + 1) * length) for i, slot in enumerate(slots)]
    assert tuple(rebuilt) == segments.spans


def test_left_padding_is_left_out():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    segments = Segments.of_mask(mask, [7, BASE, 7])
    assert segments.spans == (Span(7, 2, 4), Span(7, 9, 12))
    assert [group.slot for group in segments.groups] == [7]


def test_a_buffer_takes_other_segments_at_the_same_address():
    buffer = Segments.buffer(100, 12, 16, "cpu")
    addresses = buffer.rows.data_ptr(), buffer.tiles.data_ptr()
    assert slot_of_each_row(buffer) == [BASE] * 100
    for lengths in ([40, 30, 30], [1, 2, 3], [100]):
        segments = Segments.of_lengths(list(range(len(lengths))), lengths, tile_rows=16)
        segments.copy_into(buffer)
        assert slot_of_each_row(buffer)[: segments.num_rows] == slot_of_each_row(segments)
    assert (buffer.rows.data_ptr(), buffer.tiles.data_ptr()) == addresses
    with pytest.raises(ValueError, match="do not fit a buffer of 12 tiles of 16"):
        Segments.of_lengths([0] * 5, [40] * 5, tile_rows=16).copy_into(buffer)
    with pytest.raises(ValueError, match="tiles of 32"):
        Segments.of_lengths([0], [40], tile_rows=32).copy_into(buffer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segments.of_spans([Span(0, 0, 5), Span(1, 4, 6)], 10), "overlap"),
        (lambda: Segments.of_spans([Span(0, 5, 11)], 10), "is outside the batch's 10 rows"),
        (lambda: Segments.of_spans([Span(-2, 0, 5)], 10), "slot below -1"),
        (lambda: Segments.of_lengths([0, 1], [3]), "2 slots and 1 lengths"),
        (lambda: Segments.of_lengths([0], [3], tile_rows=48), "tile_rows is 48"),
        (lambda: Segments.of_mask(torch.ones(2, 3), [0, 1]), "mask is torch.float32"),
        (lambda: Segments.of_mask(torch.ones(2, 3, dtype=torch.bool), [0]), "with 1 slots"),
        (lambda: tiles_on_device(torch.ones(1, 3, dtype=torch.bool), [-5], None), "slots contains -5"),
    ],
)
def test_bad_input_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tiles_are_as_large_as_slots_fill():
    assert [choose_tile_rows(*case) for case in ((0, 0), (10, 1), (64, 4), (64, 2), (64, 1), (8192, 512))] == [
        16,
        16,
        16,
        32,
        64,
        16,
    ]
