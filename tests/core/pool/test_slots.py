"""The slot pool: any history of requests reads the right weights within the slots there are, or gets a clear error."""

import threading
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from preft_core.format.adapter import Adapter, AdapterConfig, AdapterError
from preft_core.ops.reference import direft_update, lora_update, loreft_update
from preft_core.pool.layout import Bucket, Layout, Site, bucket_of
from preft_core.pool.slots import BASE_NAME, SlotPool

SITES = (
    Site("attention", "linear", ("layers.0.q", "layers.0.v"), 12, (8, 4)),
    Site("down", "linear", ("layers.0.down",), 20, (12,)),
    Site("layers.0", "block", ("layers.0.preft",), 12, (12,)),
)
SHAPES = {"layers.0.q": (12, 8), "layers.0.v": (12, 4), "layers.0.down": (20, 12), "layers.0.preft": (12, 12)}
LINEAR_8, LINEAR_16, BLOCK_8 = Bucket("linear", 8), Bucket("linear", 16), Bucket("block", 8)


def make_adapter(seed: int, method: str = "lora", rank: int = 8, paths=None, dtype=torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    config = AdapterConfig(method=method, r=rank, lora_alpha=None if method == "loreft" else 3.0 * rank)
    tensors = {}
    for path in paths or [p for p in SHAPES if p.endswith("preft") == (method != "lora")]:
        width, out = SHAPES[path]
        shapes = {"preft_A": (rank, width), "preft_B": (out, rank), "preft_R": (rank, width), "preft_bias": (rank,)}
        leaves = {"lora": ("preft_A", "preft_B"), "direft": ("preft_A", "preft_B", "preft_bias")}
        for leaf in leaves.get(method, ("preft_A", "preft_R", "preft_bias")):
            name = f"base_model.model.{path}.{leaf}"
            tensors[name] = torch.randn(shapes[leaf], generator=generator, dtype=torch.float32).to(dtype)
    return Adapter(config, tensors, f"sha256:{seed:064x}")


def make_pool(num_slots=None, **options) -> SlotPool:
    return SlotPool(SITES, num_slots or {LINEAR_8: 2, LINEAR_16: 1, BLOCK_8: 1}, **options)


def row_in(pool: SlotPool, slot) -> torch.Tensor:
    """Reads back what the views of a slot hold, in the order of the layout."""
    parts = []
    for weights in pool.weights(slot.bucket).values():
        parts += [weights.a[slot.index].flatten(), weights.b[slot.index].flatten()]
        parts += [] if weights.bias is None else [weights.bias[slot.index]]
    return torch.cat(parts)


def expected_row(adapter: Adapter) -> torch.Tensor:
    layout = Layout(SITES, bucket_of(adapter.config))
    memory = layout.pack(adapter, torch.float32).unsqueeze(0)
    pool_like = layout.views(memory)
    parts = []
    for weights in pool_like.values():
        parts += [weights.a[0].flatten(), weights.b[0].flatten()]
        parts += [] if weights.bias is None else [weights.bias[0]]
    return torch.cat(parts)


@pytest.mark.parametrize(("method", "rank"), [("lora", 5), ("lora", 8), ("direft", 3), ("loreft", 8)])
def test_a_slot_computes_what_the_adapter_computes(method, rank):
    """Filled up to the bucket's rank with zeros, scaling folded in, LoReFT turned into DiReFT."""
    adapter = make_adapter(7, method, rank)
    pool = make_pool()
    pool.add("one", adapter.config, lambda: adapter)
    with pool.acquire(["one"]) as lease:
        slot = lease.slots["one"]
        for site in SITES:
            if site.kind != slot.bucket.kind:
                continue
            weights, begin = pool.weights(slot.bucket)[site.name], 0
            for part, (path, width) in enumerate(zip(site.paths, site.widths, strict=True)):
                leaves = adapter.modules()[path]
                x = torch.randn(5, site.in_features)
                low = x @ weights.a[slot.index, part].T
                low = low if weights.bias is None else low + weights.bias[slot.index]
                found = low @ weights.b[slot.index, begin : begin + width].T
                begin += width
                if method == "lora":
                    expected = lora_update(x, leaves["preft_A"], leaves["preft_B"], adapter.config.scaling)
                elif method == "direft":
                    a, b, bias = (leaves[f"preft_{leaf}"] for leaf in ("A", "B", "bias"))
                    expected = direft_update(x, a, b, bias, adapter.config.scaling)
                else:
                    expected = loreft_update(x, *(leaves[f"preft_{leaf}"] for leaf in ("A", "R", "bias")))
                assert torch.allclose(found, expected, atol=1e-4)


def test_what_an_adapter_lacks_is_zero_whatever_was_there_before():
    pool = make_pool({LINEAR_8: 1})
    whole, part = make_adapter(1), make_adapter(2, paths=["layers.0.v"])
    pool.add("whole", whole.config, lambda: whole)
    pool.add("part", part.config, lambda: part)
    pool.acquire(["whole"]).release()
    with pool.acquire(["part"]) as lease:
        weights, index = pool.weights(LINEAR_8), lease.slots["part"].index
        assert not weights["down"].a[index].any()
        assert not weights["attention"].a[index, 0].any()
        assert not weights["attention"].b[index, :8].any()
        assert weights["attention"].b[index, 8:].any()


class History(RuleBasedStateMachine):
    """Random histories of one thread against a model: names -> adapters, and the leases that are held."""

    @initialize(slots=st.integers(1, 4), host_rows=st.sampled_from([0, 1, 3]))
    def make(self, slots, host_rows):
        row_bytes = Layout(SITES, LINEAR_8).num_elements * 4
        self.max_host_bytes = host_rows * row_bytes
        self.pool = make_pool({LINEAR_8: slots, BLOCK_8: 1}, max_host_bytes=self.max_host_bytes)
        self.num_slots = {LINEAR_8: slots, BLOCK_8: 1}
        self.num_bytes = self.pool.num_bytes
        self.known: dict[str, Adapter] = {}
        self.broken: set[str] = set()
        self.leases: list[tuple[object, dict[str, Adapter]]] = []
        self.seed = 0

    def source_of(self, name, adapter):
        def source():
            if name in self.broken:
                raise AdapterError("the file is broken")
            return adapter

        return source

    @rule(name=st.sampled_from("abcdefgh"), block=st.booleans())
    def add(self, name, block):
        self.seed += 1
        adapter = make_adapter(self.seed, "direft" if block else "lora")
        if name in self.known:
            with pytest.raises(ValueError, match="is taken"):
                self.pool.add(name, adapter.config, self.source_of(name, adapter))
        else:
            self.broken.discard(name)
            self.pool.add(name, adapter.config, self.source_of(name, adapter))
            self.known[name] = adapter

    @rule(name=st.sampled_from("abcdefgh"))
    def remove(self, name):
        if name in self.known:
            self.pool.remove(name)
            del self.known[name]
        else:
            with pytest.raises(ValueError, match="is not known"):
                self.pool.remove(name)

    @rule(name=st.sampled_from("abcdefgh"))
    def break_file(self, name):
        self.broken.add(name)

    @rule(name=st.sampled_from("abcdefgh"))
    def mend_file(self, name):
        self.broken.discard(name)

    @rule(names=st.lists(st.sampled_from([*"abcdefgh", BASE_NAME]), max_size=5))
    def acquire(self, names):
        wanted = set(names) - {BASE_NAME}
        pinned = {(name, id(adapter)) for _, held in self.leases for name, adapter in held.items()}
        try:
            lease = self.pool.acquire(names, timeout_s=0)
        except TimeoutError:
            # only if the pinned ones and the wanted ones do not fit together
            assert wanted <= self.known.keys()
            both = pinned | {(name, id(self.known[name])) for name in wanted}
            adapters = {id(a): a for _, held in self.leases for a in held.values()} | {
                id(a): a for a in self.known.values()
            }
            counts = dict.fromkeys(self.num_slots, 0)
            for _, key in both:
                counts[bucket_of(adapters[key].config)] += 1
            assert any(counts[bucket] > count for bucket, count in self.num_slots.items())
        except AdapterError:
            assert wanted & self.broken
        except ValueError as error:
            too_many = any(
                sum(bucket_of(self.known[n].config) == bucket for n in wanted if n in self.known) > count
                for bucket, count in self.num_slots.items()
            )
            assert wanted - self.known.keys() or too_many, error  # noqa: PT017
        else:
            assert lease.slots.keys() == wanted
            self.leases.append((lease, {name: self.known[name] for name in wanted}))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        lease.release()

    @invariant()
    def every_lease_reads_its_own_weights(self):
        for lease, held in getattr(self, "leases", []):
            for name, adapter in held.items():
                slot = lease.slots[name]
                assert slot.fingerprint == adapter.fingerprint
                assert torch.equal(row_in(self.pool, slot), expected_row(adapter))

    @invariant()
    def memory_stays_within_what_was_said(self):
        if hasattr(self, "pool"):
            assert self.pool.num_bytes == self.num_bytes
            assert self.pool.host_bytes <= self.max_host_bytes
            assert set(self.pool.resident()) <= self.known.keys()
            counters = self.pool.counters()
            assert counters.loads >= counters.evictions

    def teardown(self):
        for lease, _ in getattr(self, "leases", []):
            lease.release()
        if hasattr(self, "pool"):
            assert not any(self.pool.resident().values()), "a pin is left"


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_share_a_pool():
    """Eight threads, twenty adapters, four slots: whoever holds a lease reads its own weights all the while."""
    adapters = {f"a{i}": make_adapter(i) for i in range(20)}
    pool = make_pool({LINEAR_8: 4}, max_host_bytes=40_000)
    for name, adapter in adapters.items():
        pool.add(name, adapter.config, lambda adapter=adapter: adapter)
    expected = {name: expected_row(adapter) for name, adapter in adapters.items()}
    faults: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            names = {f"a{i}" for i in torch.randint(0, 20, (1 + seed % 4,), generator=generator).tolist()}
            with pool.acquire(names, timeout_s=60) as lease:
                for name in names:
                    if not torch.equal(row_in(pool, lease.slots[name]), expected[name]):
                        faults.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert faults == []
    counters = pool.counters()
    assert counters.hits + counters.loads >= 8 * 40
    assert counters.evictions > 20


def filled_pool(num_slots, num_adapters):
    pool = make_pool({LINEAR_8: num_slots})
    for i in range(num_adapters):
        adapter = make_adapter(i)
        pool.add(f"a{i}", adapter.config, lambda adapter=adapter: adapter)
    return pool


def test_a_request_waits_for_a_slot_and_is_served_in_its_turn():
    pool = filled_pool(num_slots=2, num_adapters=4)
    held = pool.acquire(["a0"])
    order: list[str] = []

    def ask(label: str, names: list[str]) -> None:
        with pool.acquire(names, timeout_s=30):
            order.append(label)

    large = threading.Thread(target=ask, args=("large", ["a1", "a2"]))
    large.start()
    while not pool.counters().waits:
        time.sleep(0.001)
    small = threading.Thread(target=ask, args=("small", ["a3"]))
    small.start()
    while pool.counters().waits < 2:
        time.sleep(0.001)
    assert order == [], "one slot is free, but the large request came first"
    held.release()
    large.join(30)
    small.join(30)
    assert order == ["large", "small"]


def test_a_waiting_request_may_release_what_nobody_holds_any_more():
    pool = filled_pool(num_slots=1, num_adapters=2)
    forgotten = pool.acquire(["a0"])
    with pool.acquire(["a1"], timeout_s=30, idle=forgotten.release) as lease:
        assert list(lease.slots) == ["a1"]
    with pool.acquire(["a1"], idle=lambda: pytest.fail("nothing to wait for")):
        pass


def test_one_load_serves_all_who_wait_for_it():
    loads, gate = [], threading.Event()
    adapter = make_adapter(1)

    def slow():
        loads.append(1)
        gate.wait(30)
        return adapter

    pool = make_pool({LINEAR_8: 2})
    pool.add("one", adapter.config, slow)
    threads = [threading.Thread(target=lambda: pool.acquire(["one"]).release()) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert len(loads) == 1
    assert pool.resident() == {"one": 0}


def test_two_reads_of_one_adapter_at_once_count_its_copy_once():
    adapter, both = make_adapter(1), threading.Barrier(2)

    def source():
        both.wait(30)
        return adapter

    pool = make_pool({LINEAR_8: 1})
    pool.add("one", adapter.config, source)
    reader = threading.Thread(target=pool.packed, args=("one",))
    reader.start()
    pool.acquire(["one"]).release()
    reader.join(30)
    assert pool.host_bytes == pool.packed("one").nbytes
    pool.remove("one")
    assert pool.host_bytes == 0


class Slow:
    """An adapter whose fingerprint another thread reads at the same time, if it can."""

    def __init__(self, adapter: Adapter, both: threading.Barrier):
        self.config, self.modules, self._mark, self._both = adapter.config, adapter.modules, adapter.fingerprint, both

    @property
    def fingerprint(self) -> str:
        with suppress(threading.BrokenBarrierError):
            self._both.wait(0.2)
        return self._mark


def test_two_reads_of_one_adapter_at_once_have_one_content():
    begun, both, answers = threading.Barrier(2), threading.Barrier(2), [make_adapter(1), make_adapter(2)]
    pool, found = make_pool({LINEAR_8: 1}), []

    def source() -> Slow:
        begun.wait(30)
        return Slow(answers.pop(), both)

    pool.add("one", answers[0].config, source)

    def read() -> None:
        with suppress(ValueError):
            found.append(pool.packed("one"))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 1, "the other one is an error: its fingerprint is not the first one's"


def test_a_failed_load_leaves_nothing_pinned_and_may_be_tried_again():
    good, bad = make_adapter(1), make_adapter(2)
    answers: list[object] = [AdapterError("broken"), OSError("no such file"), KeyboardInterrupt(), bad]

    def source():
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    pool = make_pool({LINEAR_8: 2})
    pool.add("good", good.config, lambda: good)
    pool.add("bad", bad.config, source)
    for kind in (AdapterError, OSError, KeyboardInterrupt):
        with pytest.raises(kind):
            pool.acquire(["good", "bad"])
        assert not any(pool.resident().values())
        with pool.acquire(["good"], timeout_s=0) as lease:
            assert torch.equal(row_in(pool, lease.slots["good"]), expected_row(good))
    with pool.acquire(["good", "bad"], timeout_s=0) as lease:
        assert torch.equal(row_in(pool, lease.slots["bad"]), expected_row(bad))


def test_an_adapter_that_is_removed_in_use_stays_for_those_who_use_it():
    old, new = make_adapter(1), make_adapter(2)
    pool = make_pool({LINEAR_8: 1})
    pool.add("a", old.config, lambda: old)
    lease = pool.acquire(["a"])
    pool.remove("a")
    pool.add("a", new.config, lambda: new)
    assert torch.equal(row_in(pool, lease.slots["a"]), expected_row(old))
    with pytest.raises(TimeoutError):
        pool.acquire(["a"], timeout_s=0)
    lease.release()
    with pool.acquire(["a"], timeout_s=0) as again:
        assert torch.equal(row_in(pool, again.slots["a"]), expected_row(new))


def test_the_least_recently_used_goes_first_and_the_host_keeps_a_copy():
    reads: list[str] = []

    def make(name: str, seed: int):
        adapter = make_adapter(seed)

        def source():
            reads.append(name)
            return adapter

        pool.add(name, adapter.config, source)

    pool = make_pool({LINEAR_8: 2})
    for i, name in enumerate("abc"):
        make(name, i)
    for name in "abac":
        pool.acquire([name]).release()
    assert sorted(pool.resident()) == ["a", "c"]
    pool.acquire(["b"]).release()
    assert reads == ["a", "b", "c"]
    counters = pool.counters()
    assert (counters.hits, counters.loads, counters.host_hits, counters.evictions) == (1, 4, 1, 2)
    assert counters.bytes_loaded == 4 * Layout(SITES, LINEAR_8).num_elements * 4


def test_what_a_pool_refuses():
    pool = make_pool({LINEAR_8: 1})
    a, b, large = make_adapter(1), make_adapter(2), make_adapter(3, rank=16)
    pool.add("a", a.config, lambda: a)
    pool.add("b", b.config, lambda: b)
    with pytest.raises(ValueError, match="2 adapters of linear rank 8 at once, and the pool has 1 slots"):
        pool.acquire(["a", "b"])
    with pytest.raises(ValueError, match="'zz' is not known; known are a, b, and '__base__'"):
        pool.acquire(["a", "zz"])
    with pytest.raises(ValueError, match="needs a slot of linear rank 16 and the pool has 1 of linear rank 8"):
        pool.add("large", large.config, lambda: large)
    with pytest.raises(ValueError, match="'__base__' is taken"):
        pool.add("__base__", a.config, lambda: a)
    with pytest.raises(AdapterError, match="r is 129: slots have ranks up to 128"):
        pool.add("huge", AdapterConfig("lora", 129, 1.0), lambda: a)
    pool.remove("a")
    pool.add("a", a.config, lambda: large)
    with pytest.raises(ValueError, match="has changed since it was added"):
        pool.acquire(["a"])
    with pytest.raises(ValueError, match=r"num_slots of linear rank 8 is 0.*max_host_bytes is -1"):
        make_pool({LINEAR_8: 0}, max_host_bytes=-1)
    with pytest.raises(ValueError, match="no site is a block"):
        SlotPool(SITES[:2], {BLOCK_8: 1})


def test_weights_that_do_not_fit_the_sites_are_all_named():
    adapter = make_adapter(1)
    adapter.tensors["base_model.model.layers.9.q.preft_A"] = torch.zeros(8, 12)
    adapter.tensors["base_model.model.layers.0.down.preft_A"] = torch.zeros(8, 21)
    pool = make_pool()
    pool.add("a", adapter.config, lambda: adapter)
    with pytest.raises(
        AdapterError, match=r"down.preft_A has shape \[8, 21\].*expects \[8, 20\].*layers.9.q is not a site"
    ):
        pool.acquire(["a"])
    large = make_adapter(1)
    large.tensors["base_model.model.layers.0.down.preft_B"].fill_(1e5)
    half = make_pool(dtype=torch.float16)
    half.add("a", large.config, lambda: large)
    with pytest.raises(AdapterError, match=r"not finite in torch\.float16"):
        half.acquire(["a"])
    with suppress(AdapterError):
        half.acquire(["a"])
    assert half.resident() == {}
