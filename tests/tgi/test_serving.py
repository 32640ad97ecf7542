"""The patched TGI 3.3.7 server against the two-phase loop, token for token, over its own gRPC."""

import pytest

from .world import make_world, request, serving, some_ids

pytestmark = pytest.mark.tgi
ADAPTERS = ["wide", "few", "stable", "edit", "turn"]
WORLDS = {}


def world_of(architecture):
    if architecture not in WORLDS:
        WORLDS[architecture] = make_world(architecture)
    return WORLDS[architecture]


def check(server, world, cases):
    """cases: (adapter, ids, new, other fields of a request)."""
    found = server.run([request(ids, name, new, **others) for name, ids, new, others in cases])
    for (name, ids, new, others), tokens in zip(cases, found, strict=True):
        expected = world.expected(name, ids, new)
        if "drop" in others:
            expected = expected[: len(tokens)]
        assert tokens == expected, (name, len(ids), others)


@pytest.mark.parametrize("attention", ["paged", "flashdecoding-ipex"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2"])
def test_every_way_a_batch_is_made(architecture, attention):
    world = world_of(architecture)
    # the adapters do change what is said
    ids = some_ids(11, 1)
    said = [tuple(world.expected(name, ids, 6)) for name in [None, *ADAPTERS]]
    assert len(set(said)) >= 5
    with serving(world, attention, prefill_tokens=24) as server:
        for name in [None, *ADAPTERS]:
            check(server, world, [(name, ids, 6, {})])
        # one batch of every adapter and base rows, then others join it, and some leave in the middle
        names = ["turn", None, "wide", "edit", "few", "wide", None, "stable"]
        cases = [(name, some_ids(5 + 3 * i, i), 7, {}) for i, name in enumerate(names)]
        cases += [("few", some_ids(9, 40), 5, {"arrive": 2}), ("edit", some_ids(17, 41), 6, {"arrive": 3})]
        cases += [("wide", some_ids(6, 42), 20, {"drop": 5}), (None, some_ids(6, 42), 20, {"drop": 6})]
        check(server, world, cases)
        assert server.chunks == (attention != "paged")
        if server.chunks:
            # a long prompt in chunks while others decode, with a request that begins as a chunk
            cases = [("wide", some_ids(6, 50), 12, {}), ("edit", some_ids(5, 51), 12, {})]
            cases += [("few", some_ids(70, 52), 5, {"arrive": 2, "chunk": 9})]
            cases += [("turn", some_ids(40, 53), 5, {"arrive": 3, "chunk": 3}), (None, some_ids(33, 54), 5, {"chunk": 8})]
            check(server, world, cases)
