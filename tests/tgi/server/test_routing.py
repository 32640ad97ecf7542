"""Which rows of a forward get which adapter, on layers made like TGI's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from preft_core import ops
from tests.tgi.server.small_model import HIDDEN, ServedModel
from tgi_patch.server.known import Ticket
from tgi_patch.server.routing import PrefillRows, add_linear, edit_block, prefill_rows, routed, warm_route
from tgi_patch.server.shard import Shard
from tgi_patch.settings import Settings


@pytest.fixture
def served(tmp_path):
    return ServedModel(tmp_path)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 9), st.integers(1, 12)), max_size=6))
def test_position_decides_which_rows_are_adapted(requests):
    tickets = [Ticket(f"a{i}") if has else None for i, (has, _, _, _) in enumerate(requests)]
    lists = [[request[i] for request in requests] for i in (1, 2, 3)]
    found = prefill_rows(tickets, *lists)
    adapted = {(rows.key, row) for rows in found for row in range(rows.begin, rows.end)}
    expected, row = set(), 0
    for ticket, (_, cached, length, prompt) in zip(tickets, requests, strict=True):
        for i in range(length):
            if ticket is not None and cached + i < prompt:
                expected.add((ticket.key, row + i))
        row += length
    assert adapted == expected


def test_rows_get_their_adapters_also_when_there_are_more_than_slots(served):
    x = torch.randn(12, HIDDEN)
    spans = {"l0": (0, 3), "l1": (4, 6), "l2": (7, 12)}
    tickets = {name: served.registry.ticket(name) for name in spans}
    rows = [PrefillRows(tickets[name].key, *span) for name, span in spans.items()]
    target = served.targets[0]
    with routed(served.registry, rows, 12) as route:
        output = torch.zeros(12, target.whole.out_features)
        add_linear(route, target.whole.name, output, x)
    expected = torch.zeros_like(output)
    for name, (begin, end) in spans.items():
        modules, at = served.sources[name].load().modules(), 0
        for path, width in zip(target.whole.paths, target.whole.widths, strict=True):
            update = linear(linear(x[begin:end], modules[path]["preft_A"]), modules[path]["preft_B"]) * 2.0
            expected[begin:end, at : at + width] = update
            at += width
    assert torch.allclose(output, expected, atol=1e-4)
    assert served.registry.streamed == 2
    # nothing stays pinned
    assert not any(served.registry.pool.resident().values())


def test_the_stream_is_edited_where_it_is_two_tensors(served):
    hidden, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    ticket = served.registry.ticket("d")
    with routed(served.registry, [PrefillRows(ticket.key, 1, 4)], 6) as route:
        one = edit_block(route, "model.layers.1.preft", hidden + residual)
        h, r = edit_block(route, "model.layers.1.preft", (hidden.clone(), residual.clone()))
    leaves = served.sources["d"].load().modules()["model.layers.1.preft"]
    stream = (hidden + residual)[1:4]
    expected = stream + 2.0 * linear(linear(stream, leaves["preft_A"], leaves["preft_bias"]), leaves["preft_B"])
    assert torch.allclose(one[1:4], expected, atol=1e-4)
    assert torch.equal(h + r, one)
    for rows in (slice(0, 1), slice(4, 6)):
        assert torch.equal(h[rows], hidden[rows])
        assert torch.equal(r[rows], residual[rows])


class CountedOps(TorchDispatchMode):
    """Counts the ops that run in it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_edit_of_many_spans_takes_no_more_ops_than_of_two(served):
    """Also for rows of one adapter that lie between rows of the base model."""
    ticket, counts = served.registry.ticket("d"), []
    for num_spans in (2, 40):
        rows = [PrefillRows(ticket.key, 3 * i, 3 * i + 2) for i in range(num_spans)]
        hidden, residual = torch.randn(120, HIDDEN), torch.randn(120, HIDDEN)
        with routed(served.registry, rows, 120) as route:
            edit_block(route, "model.layers.0.preft", (hidden, residual))
            with CountedOps() as ops_of_a_layer:
                edit_block(route, "model.layers.1.preft", (hidden, residual))
        counts.append(ops_of_a_layer.count)
    assert counts[0] == counts[1]


def test_warming_changes_nothing(served):
    route = warm_route(served.registry, 7)
    for target in served.targets[:2]:
        output = torch.randn(7, target.whole.out_features)
        before = output.clone()
        add_linear(route, target.whole.name, output, torch.randn(7, target.whole.in_features))
        assert torch.equal(output, before)


def test_the_kernels_are_compiled_before_the_warm_up_for_every_kind_and_rank(served, monkeypatch, capsys):
    pool, given = served.registry.pool, []
    monkeypatch.setattr(ops, "warm_up", lambda weights: given.extend(weights) or 3)
    shard = Shard(Settings())
    shard.registry = served.registry
    with shard.warming(None):
        assert len(pool.buckets) > 1
        expected = [one for bucket in pool.buckets for one in pool.weights(bucket).values()]
        assert [one.a.data_ptr() for one in given] == [one.a.data_ptr() for one in expected]
    assert "compiled the kernels by 3 ops" in capsys.readouterr().err
    monkeypatch.undo()
    # nothing is compiled without a GPU, and there is nothing to say
    with shard.warming(None), Shard(Settings()).warming(None):
        assert capsys.readouterr().err == ""
