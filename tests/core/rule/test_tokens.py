import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_core.rule.tokens import prefill_span

counts = st.integers(0, 60)


@given(first=counts, num=counts, prompt=counts, start=counts)
def test_a_row_is_adapted_iff_its_position_is_in_the_window(first, num, prompt, start):
    begin, end = prefill_span(first, num, prompt, start)
    assert 0 <= begin <= end <= num
    adapted = [start <= first + i < prompt for i in range(num)]
    assert [begin <= i < end for i in range(num)] == adapted


@given(prompt=st.integers(1, 40), cuts=st.lists(st.integers(1, 40), max_size=6), more=st.integers(0, 20))
def test_chunks_and_whole_agree(prompt, cuts, more):
    """However a request is cut into forwards, each of its tokens has one phase."""
    total = prompt + more
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    rows = []
    for first, last in itertools.pairwise(edges):
        begin, end = prefill_span(first, last - first, prompt)
        rows += [begin <= i < end for i in range(last - first)]
    assert rows == [True] * prompt + [False] * more


def test_negative_arguments_are_named():
    with pytest.raises(ValueError, match=r"first_position is -1, prompt_length is -3"):
        prefill_span(-1, 2, -3)
