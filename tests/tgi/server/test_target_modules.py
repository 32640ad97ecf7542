"""Places of a TGI model, shards of adapters, the registry and the routes, on layers made like TGI's, without TGI."""

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from preft_core import ops
from preft_core.format.adapter import AdapterError, save_adapter
from preft_core.format.config import AdapterConfig
from preft_core.hub.source import find_adapter
from tgi_patch.server import engine, known
from tgi_patch.server.engine import Served
from tgi_patch.server.known import Ticket
from tgi_patch.server.layers import lora_faults
from tgi_patch.server.registry import AdapterTaken, Registry, UnknownAdapter
from tgi_patch.server.routing import PrefillRows, add_linear, edit_block, prefill_rows, routed, warm_route
from tgi_patch.server.target_modules import UnsupportedModel, find_places, fix_layer_names, modules_of, shard_adapter
from tgi_patch.settings import Settings

HIDDEN, HEADS, KV_HEADS, INNER = 32, 4, 2, 48
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=INNER
)
HEAD = HIDDEN // HEADS


def base(width_in, width_out):
    return SimpleNamespace(linear=SimpleNamespace(weight=torch.zeros(width_out, width_in)))


class TensorParallelMultiAdapterLinear(nn.Module):
    def __init__(self, width_out, names, sizes):
        super().__init__()
        self.layer_names, self.sizes = names, sizes
        self.base_layer = base(HIDDEN, width_out)


class TensorParallelAdapterRowLinear(nn.Module):
    def __init__(self, width_in, name):
        super().__init__()
        self.layer_name = name
        self.base_layer = base(width_in, HIDDEN)


class FlashLlamaLayer(nn.Module):
    def __init__(self, shards=1, packed=False, prefix=""):
        super().__init__()
        attention, mlp = nn.Module(), nn.Module()
        widths = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        names = ["qkv_proj"] if packed else [prefix + name for name in ("q_proj", "k_proj", "v_proj")]
        sizes = None if packed else widths
        attention.query_key_value = TensorParallelMultiAdapterLinear(sum(widths) // shards, names, sizes)
        attention.o_proj = TensorParallelAdapterRowLinear(HIDDEN // shards, prefix + "o_proj")
        gate_up = None if packed else [prefix + "gate_proj", prefix + "up_proj"]
        mlp.gate_up_proj = TensorParallelMultiAdapterLinear(2 * INNER // shards, gate_up, gate_up and [INNER, INNER])
        mlp.down_proj = TensorParallelAdapterRowLinear(INNER // shards, prefix + "down_proj")
        self.self_attn, self.mlp = attention, mlp


class Other(nn.Module):
    pass


def model_of(layer=FlashLlamaLayer, **others):
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer(**others), layer(**others)])
    return model


def adapter_in(directory, places, method="lora", r=4, seed=0, **fields):
    """Saves a random adapter that acts at all places of its kind."""
    torch.manual_seed(seed)
    tensors = {}
    for place in places:
        if (place.whole.kind == "linear") != (method == "lora"):
            continue
        for path, width in zip(place.whole.paths, place.whole.widths, strict=True):
            name = f"base_model.model.{path}"
            tensors[f"{name}.preft_A"] = torch.randn(r, place.whole.in_features)
            tensors[f"{name}.preft_B"] = torch.randn(width, r)
            if method != "lora":
                tensors[f"{name}.preft_bias"] = torch.randn(r)
    targets = tuple(sorted({name.rsplit(".", 2)[1] for name in tensors})) if method == "lora" else None
    config = AdapterConfig(method=method, r=r, lora_alpha=2.0 * r, target_modules=targets, **fields)
    save_adapter(directory, config, tensors)
    return find_adapter(directory)


@pytest.mark.parametrize("packed", [False, True])
def test_shards_together_compute_what_one_would(tmp_path, packed):
    whole_model = find_places(model_of(packed=packed), CONFIG)
    source = adapter_in(tmp_path / "a", whole_model)
    adapter = source.load()
    x, inner = torch.randn(5, HIDDEN), torch.randn(5, INNER)
    for index, place in enumerate(whole_model):
        if place.whole.kind == "block":
            continue
        parts = [find_places(model_of(packed=packed, shards=2), CONFIG, rank, 2) for rank in range(2)]
        for path, width in zip(place.whole.paths, place.whole.widths, strict=True):
            leaves = adapter.modules()[path]
            found = [shard_adapter(adapter, part).modules()[path] for part in parts]
            row = place.whole.name.endswith(("o_proj", "down_proj"))
            given_x = inner if "down" in path else x
            expected = linear(linear(given_x, leaves["preft_A"]), leaves["preft_B"])
            if row:
                halves = [part[index].columns for part in parts]
                total = sum(
                    linear(linear(given_x[:, cut], f["preft_A"]), f["preft_B"])
                    for cut, f in zip(halves, found, strict=True)
                )
                assert torch.allclose(total, expected, atol=1e-4)
                continue
            rebuilt = torch.zeros(5, width)
            for part, f in zip(parts, found, strict=True):
                rebuilt[:, part[index].rows[path]] = linear(linear(given_x, f["preft_A"]), f["preft_B"])
            assert torch.allclose(rebuilt, expected, atol=1e-5)
            if path.endswith("qkv_proj"):
                # a shard's half of q, of k and of v, as TGI lays its packed weight out
                assert parts[1][index].rows[path].tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]


def test_names_are_those_of_transformers_whatever_tgi_calls_them():
    for prefix in ("", "model.layers.0.self_attn."):
        model = model_of(prefix=prefix)
        paths = [path for place in find_places(model, CONFIG) for path in place.whole.paths]
        assert paths[:4] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
        assert fix_layer_names(model) == (8 if prefix else 0)
        assert model.model.layers[0].self_attn.query_key_value.layer_names == ["q_proj", "k_proj", "v_proj"]
        assert model.model.layers[0].mlp.down_proj.layer_name == "down_proj"


def test_models_without_places_are_refused():
    with pytest.raises(UnsupportedModel, match="without layers that adapters can act at"):
        find_places(model_of(Other), CONFIG)
    with pytest.raises(UnsupportedModel, match="without layers"):
        find_places(nn.Module(), CONFIG)
    wrong = SimpleNamespace(**(vars(CONFIG) | {"intermediate_size": 50}))
    with pytest.raises(UnsupportedModel, match=r"has weights \[32, 48\]"):
        find_places(model_of(), wrong)


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


@pytest.fixture
def world(tmp_path):
    model = model_of()
    places = find_places(model, CONFIG)
    for module, site in modules_of(places):
        module.site = site
    sources = {f"l{i}": adapter_in(tmp_path / f"l{i}", places, seed=i) for i in range(3)}
    sources["d"] = adapter_in(tmp_path / "d", places, "direft", seed=9)
    registry = Registry(places, Settings(adapters={"x": "y"}, slots=1), "base", sources)
    return SimpleNamespace(places=places, registry=registry, sources=sources, root=tmp_path)


def test_rows_get_their_adapters_also_when_there_are_more_than_slots(world):
    x = torch.randn(12, HIDDEN)
    spans = {"l0": (0, 3), "l1": (4, 6), "l2": (7, 12)}
    tickets = {name: world.registry.ticket(name) for name in spans}
    rows = [PrefillRows(tickets[name].key, *span) for name, span in spans.items()]
    place = world.places[0]
    with routed(world.registry, rows, 12) as route:
        output = torch.zeros(12, place.whole.out_features)
        add_linear(route, place.whole.name, output, x)
    expected = torch.zeros_like(output)
    for name, (begin, end) in spans.items():
        modules, at = world.sources[name].load().modules(), 0
        for path, width in zip(place.whole.paths, place.whole.widths, strict=True):
            update = linear(linear(x[begin:end], modules[path]["preft_A"]), modules[path]["preft_B"]) * 2.0
            expected[begin:end, at : at + width] = update
            at += width
    assert torch.allclose(output, expected, atol=1e-4)
    assert world.registry.streamed == 2
    # nothing stays pinned
    assert not any(world.registry.pool.resident().values())


def test_the_stream_is_edited_where_it_is_two_tensors(world):
    hidden, residual = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    ticket = world.registry.ticket("d")
    with routed(world.registry, [PrefillRows(ticket.key, 1, 4)], 6) as route:
        one = edit_block(route, "model.layers.1.preft", hidden + residual)
        h, r = edit_block(route, "model.layers.1.preft", (hidden.clone(), residual.clone()))
    leaves = world.sources["d"].load().modules()["model.layers.1.preft"]
    stream = (hidden + residual)[1:4]
    expected = stream + 2.0 * linear(linear(stream, leaves["preft_A"], leaves["preft_bias"]), leaves["preft_B"])
    assert torch.allclose(one[1:4], expected, atol=1e-4)
    assert torch.equal(h + r, one)
    for rows in (slice(0, 1), slice(4, 6)):
        assert torch.equal(h[rows], hidden[rows])
        assert torch.equal(r[rows], residual[rows])


def test_warming_changes_nothing(world):
    route = warm_route(world.registry, 7)
    for place in world.places[:2]:
        output = torch.randn(7, place.whole.out_features)
        before = output.clone()
        add_linear(route, place.whole.name, output, torch.randn(7, place.whole.in_features))
        assert torch.equal(output, before)


def test_the_kernels_are_compiled_before_the_warm_up_for_every_kind_and_rank(world, monkeypatch, capsys):
    pool, given = world.registry.pool, []
    monkeypatch.setattr(ops, "warm_up", lambda weights: given.extend(weights) or 3)
    with Served(Settings(), "model", world.registry).warming():
        assert len(pool.buckets) > 1
        expected = [one for bucket in pool.buckets for one in pool.weights(bucket).values()]
        assert [one.a.data_ptr() for one in given] == [one.a.data_ptr() for one in expected]
    assert "compiled the kernels by 3 ops" in capsys.readouterr().err
    monkeypatch.undo()
    # nothing is compiled without a GPU, and there is nothing to say
    with Served(Settings(), "model", world.registry).warming(), Served(Settings(), "model", None).warming():
        assert capsys.readouterr().err == ""


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(known, "GRACE_S", 0.0)
    monkeypatch.setattr(known, "GRACE_REQUESTS", 0)


def test_a_removed_adapter_stays_for_requests_that_have_a_ticket(world, no_grace):
    ticket = world.registry.ticket("l0")
    world.registry.remove("l0")
    # another adapter of the same name does not touch it
    world.registry.add("l0", str(world.root / "l1"))
    again = world.registry.ticket("l0")
    assert again.key != ticket.key
    with routed(world.registry, [PrefillRows(ticket.key, 0, 2)], 2) as route:
        assert route.groups
    del ticket
    gc.collect()
    world.registry.ticket("l1")
    assert len(world.registry.pool.names()) == 4
    world.registry.remove("l2")
    with pytest.raises(UnknownAdapter, match="known are d, l0, l1"):
        world.registry.ticket("l2")


def test_a_removed_adapter_stays_for_requests_that_the_router_has_queued(world, monkeypatch):
    """An error in a Prefill fails all requests of the batch, so an id is known until no request can name it."""
    served, registry = Served(Settings(), "base", world.registry), world.registry
    now = [100.0]
    monkeypatch.setattr(engine, "_own_adapters", set)
    monkeypatch.setattr(known.time, "monotonic", lambda: now[0])

    def asked(name):
        return served.ticket(SimpleNamespace(adapter_id=name, cache_len=0))

    kept = asked("l0").key
    registry.remove("l0")
    assert "l0" not in registry.adapters()
    with pytest.raises(UnknownAdapter):
        registry.remove("l0")
    assert asked("l0").key == kept
    # an idle server's clock alone does not end it, nor do requests alone
    now[0] += 2 * known.GRACE_S
    assert asked("l0").key == kept
    registry.add("l0", str(world.root / "l1"))
    assert asked("l0").key != kept
    registry.remove("l0")
    for _ in range(known.GRACE_REQUESTS):
        asked("")
    assert kept not in {registry.ticket("l1").key, *registry.pool.names()}
    assert asked("l0").key in registry.pool.names()
    now[0] += 2 * known.GRACE_S
    with pytest.raises(UnknownAdapter, match="known are d, l1, l2"):
        asked("l0")
    assert len(registry.pool.names()) == 3


def test_removed_adapters_do_not_pile_up_where_no_request_comes(world, monkeypatch):
    monkeypatch.setattr(known, "GRACE_S", 0.0)
    registry = Registry(world.places, Settings(adapters={"x": "y"}, max_adapters=3), "b", {"l0": world.sources["l0"]})
    for _ in range(8):
        registry.add("again", str(world.root / "l1"))
        registry.remove("again")
    assert len(registry.pool.names()) == 1 + 3


def test_a_place_given_again_is_the_same_only_with_the_same_content(world):
    registry, root = world.registry, world.root
    # a directory may have an @ in its name
    adapter_in(root / "acme@v2", world.places, seed=5)
    adapter_in(root / "acme", world.places, seed=6)
    registry.add("x", str(root / "acme@v2"))
    with pytest.raises(AdapterTaken, match="stands for"):
        registry.add("x", str(root / "acme"))
    registry.add("x", str(root / "acme@v2"))
    adapter_in(root / "acme@v2", world.places, seed=7)
    with pytest.raises(AdapterTaken, match="other content than when it was added: remove it first"):
        registry.add("x", str(root / "acme@v2"))
    before = registry.adapters()["x"]["fingerprint"]
    registry.remove("x")
    registry.add("x", str(root / "acme@v2"))
    assert registry.adapters()["x"]["fingerprint"] not in (before, None)


def test_files_that_cannot_be_read_again_are_a_fault_that_is_told(world):
    settings = Settings(adapters={"x": "y"}, slots=1, host_bytes=0)
    registry = Registry(world.places, settings, "b", {name: world.sources[name] for name in ("l0", "l1")})
    assert registry.faults() == {}
    (world.root / "l0" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        registry.ticket("l0")
    assert list(registry.faults()) == ["l0"]
    registry.ticket("l1")


def test_what_does_not_fit_is_refused_and_leaves_nothing(world):
    registry, root = world.registry, world.root
    registry.add("l1", str(root / "l1"))
    with pytest.raises(AdapterTaken, match="stands for"):
        registry.add("l1", str(root / "l2"))
    adapter_in(root / "wide", world.places, r=20)
    with pytest.raises(AdapterError, match=r"slots for linear rank 32.*PREFT_RESERVE"):
        registry.add("wide", str(root / "wide"))
    adapter_in(root / "other", world.places, base_model_name_or_path="org/other")
    with pytest.raises(AdapterError, match=r"trained on 'org/other'.*PREFT_BASE_MODEL"):
        registry.add("other", str(root / "other"))
    bigger = SimpleNamespace(**(vars(CONFIG) | {"hidden_size": 64, "intermediate_size": 48}))
    with pytest.raises(UnsupportedModel):
        find_places(model_of(), bigger)
    source = adapter_in(root / "nan", world.places)
    file = root / "nan" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    with pytest.raises(AdapterError):
        registry.add("nan", source.location)
    small = Registry(
        world.places, Settings(adapters={"x": "y"}, max_bytes=100, reserve=tuple(registry.pool.buckets)), "b", {}
    )
    with pytest.raises(AdapterError, match="PREFT_MAX_ADAPTER_BYTES is 100"):
        small.add("l0", str(root / "l0"))
    assert sorted(registry.adapters()) == ["d", "l0", "l1", "l2"]
    assert len(registry.pool.names()) == 4
    with pytest.raises(AdapterError, match=r"'a'.*'b'"):
        Registry(
            world.places,
            Settings(adapters={"x": "y"}, max_bytes=100),
            "b",
            {"a": world.sources["l0"], "b": world.sources["l1"]},
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("layers_to_transform", [1]),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("peft_type", "IA3"),
    ],
)
def test_options_that_tgi_drops(field, value):
    fine = {"peft_type": "LORA", "r": 8, "bias": "none", "target_modules": ["q_proj", "v_proj"], "use_dora": False}
    assert lora_faults(fine) == []
    (fault,) = lora_faults(fine | {field: value})
    assert field in fault
