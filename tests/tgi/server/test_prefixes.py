"""The prefix cache by itself, over blocks whose content says whose KV it is: no request ever reads another's."""

import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgi_patch.server.prefixes import Found, PrefixCache, blocks_per_unit, num_blocks

OWNERS = ("base", "preft:a#1", "preft:a#2")


def kv_of(owner, tokens, position):
    """What a model would leave at a position: a number of the owner and of all tokens up to it."""
    return float(hash((owner, tuple(tokens[: position + 1]))) % 1_000_003)


class Tgi:
    """TGI's blocks: one layer, key (block, size, 1) and value (block, 1, size)."""

    def __init__(self, block_size, count=64):
        self.block_size = block_size
        self.key, self.value = torch.zeros(count, block_size, 1), torch.zeros(count, 1, block_size)
        self.layers = [SimpleNamespace(key=self.key, value=self.value)]

    def compute(self, owner, tokens, begin, blocks):
        for position in range(begin, len(tokens)):
            block, place = blocks[position // self.block_size], position % self.block_size
            self.key[block, place] = self.value[block, 0, place] = kv_of(owner, tokens, position)

    def check(self, owner, tokens, blocks):
        for position in range(len(tokens)):
            block, place = blocks[position // self.block_size], position % self.block_size
            assert self.key[block, place] == self.value[block, 0, place] == kv_of(owner, tokens, position)


def store(block_size, tokens):
    count = num_blocks(tokens, block_size)
    return PrefixCache([(torch.zeros(count, block_size, 1), torch.zeros(count, 1, block_size))], block_size)


@settings(max_examples=60, deadline=None)
@given(
    block_size=st.sampled_from([1, 4, 16, 64]),
    capacity=st.integers(1, 400),
    requests=st.lists(
        st.tuples(st.sampled_from(OWNERS), st.lists(st.integers(0, 1), max_size=3), st.integers(1, 90)), max_size=25
    ),
    dice=st.randoms(use_true_random=False),
)
def test_a_request_reads_its_own_adapters_kv(block_size, capacity, requests, dice):
    """Prompts that share beginnings of some units, of three owners, in a store that is mostly too small."""
    cache, tgi = store(block_size, capacity), Tgi(block_size, 512)
    for owner, branches, rest in requests:
        tokens = [token for branch in branches for token in [branch] * cache.unit] + [7] * rest
        needed = -(-len(tokens) // block_size)
        blocks = dice.sample(range(512), needed) if needed <= 512 else []
        if not blocks:
            continue
        tgi.key[blocks] = tgi.value[blocks] = -1.0
        found = cache.find(owner, tokens)
        assert found.num_tokens < len(tokens)
        assert found.num_tokens % cache.unit == 0
        cache.fill(found, tgi.layers, blocks)
        tgi.compute(owner, tokens, found.num_tokens, blocks)
        tgi.check(owner, tokens, blocks)
        cache.keep(owner, tokens, tgi.layers, blocks)
        assert cache.statistics()["prefix_units_used"] <= cache.capacity
        # what was just kept is there, up to the store's size
        again = cache.find(owner, tokens)
        assert again.num_tokens == min((len(tokens) - 1) // cache.unit, cache.capacity) * cache.unit


def test_the_end_of_a_prompt_makes_room_before_its_beginning():
    cache, tgi = store(16, 64), Tgi(16)
    first, second = [1] * 64, [2] * 16
    for tokens in (first, second):
        tgi.compute("base", tokens, 0, range(4))
        cache.keep("base", tokens, tgi.layers, range(4))
    assert cache.evictions == 1
    assert cache.find("base", [*first, 9]).num_tokens == 48
    assert cache.find("base", [*second, 9]).num_tokens == 16
    assert cache.find("preft:a#1", [*first, 9]) == Found()


@pytest.mark.parametrize(("block", "per_unit"), [(1, 16), (16, 1), (64, 1), (256, 1)])
def test_units_are_whole_blocks(block, per_unit):
    assert blocks_per_unit(block) == per_unit
    assert num_blocks(1, block) == per_unit
    assert num_blocks(1000, block) == 1000 // (block * per_unit) * per_unit


def test_eight_bit_kv_is_copied_as_bytes():
    keys = torch.arange(32, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 16)
    cache = PrefixCache([(torch.zeros_like(keys), torch.zeros_like(keys))], 16)
    source = [SimpleNamespace(key=keys, value=keys)]
    cache.keep("base", list(range(32)), source, [1, 0])
    target = [SimpleNamespace(key=torch.zeros_like(keys), value=torch.zeros_like(keys))]
    cache.fill(cache.find("base", list(range(33))), target, [0, 1])
    assert torch.equal(target[0].key.view(torch.uint8), keys.view(torch.uint8).flip(0))


def test_keys_take_any_token_id():
    cache = store(16, 64)
    assert cache.find("base", [2**31] * 40) == Found()
    with pytest.raises(struct.error):
        cache.find("base", [2**64] * 40)


def test_a_copy_that_fails_leaves_nothing_to_be_found():
    cache, tgi = store(16, 256), Tgi(16)
    tokens = list(range(cache.unit + 1))
    blocks = list(range(-(-len(tokens) // 16)))
    with pytest.raises(IndexError):
        cache.keep("base", tokens, tgi.layers, [10_000] * len(blocks))
    assert cache.find("base", tokens) == Found()
    tgi.compute("base", tokens, 0, blocks)
    for _ in range(2 * cache.capacity):
        cache.keep("base", tokens, tgi.layers, blocks)
        tokens = [token + 1 for token in tokens]
    assert cache.statistics()["prefix_units_used"] == cache.capacity
