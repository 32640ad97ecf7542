"""PreftPool: hundreds of adapters in a few slots, and the model as it was when the pool is gone."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preft_core import ops
from preft_core.format.adapter import AdapterConfig, AdapterError, load_adapter, save_adapter
from preft_core.pool.layout import Bucket
from preft_hf import PreftConfig, PreftPool
from tests.hf.cases import GREEDY, prompt, run_together
from tests.hf.forward.test_adapter_names import check
from tests.hf.many_adapters import BASE, NAMES, crowd, prompts
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import make_base, make_preft

NUM_ADAPTERS, NUM_SLOTS = 512, 64


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """512 saved adapters, LoRA-P on two kinds of layers, r = 2, each with weights of its own."""
    root = tmp_path_factory.mktemp("many")
    model = make_preft(make_base(), r=2, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(root / "first")
    first = load_adapter(root / "first")
    generator = torch.Generator().manual_seed(0)
    for i in range(NUM_ADAPTERS):
        tensors = {name: torch.randn(t.shape, generator=generator) * 0.5 for name, t in first.tensors.items()}
        save_adapter(root / f"a{i}", first.config, tensors)
    return {f"a{i}": root / f"a{i}" for i in range(NUM_ADAPTERS)}


def test_512_adapters_in_64_slots(many):
    base = make_base()
    model = copy.deepcopy(base)
    num_modules = len(list(model.modules()))
    pool = PreftPool.from_pretrained(model, many, num_slots=NUM_SLOTS, max_host_bytes=1 << 20)
    assert len(pool.names()) == NUM_ADAPTERS
    assert pool.counters().loads == 0
    # one adapter layer per site, whatever the number of adapters: itself and the three containers in it
    assert len(list(model.modules())) == num_modules + len(pool.slots.sites) * 4
    num_bytes = pool.slots.num_bytes
    chooser = random.Random(1)
    walk = [chooser.sample(sorted(many), 24) for _ in range(20)] + [
        [f"a{i}" for i in range(k, k + 24)] for k in (0, 7)
    ]
    for step, names in enumerate(walk):
        ids = prompt(len(names), 5, seed=step)
        with torch.no_grad():
            found = model(input_ids=ids, adapter_names=names).logits
        for row in chooser.sample(range(len(names)), 3):
            saved = load_adapter(many[names[row]])
            adapted = adapted_copy(base, "lora", saved.tensors, saved.config.scaling)
            with torch.no_grad():
                assert (found[row] - adapted(input_ids=ids[row : row + 1]).logits[0]).abs().max() <= 1e-4
        assert len(pool.slots.resident()) <= NUM_SLOTS
        assert pool.slots.num_bytes == num_bytes
        assert pool.slots.host_bytes <= 1 << 20
    counters = pool.counters()
    assert counters.evictions > 0
    assert counters.hits + counters.loads == 24 * len(walk)


def test_a_model_that_is_moved_away_from_its_pool():
    """The slots stay where they were made, and their addresses with them."""
    model = crowd().model("pooled").to("meta")
    for name in ("wide", "edit"):
        with pytest.raises(
            RuntimeError, match=r"slots .* are on cpu and the model is on meta now: move the model first"
        ):
            model(input_ids=prompt(1).to("meta"), adapter_names=[name])


def test_the_repr_of_a_pool_and_calls_after_close(many):
    pool = PreftPool.from_pretrained(make_base(), many, num_slots=2)
    pool.preload(["a1"])
    text = repr(pool)
    assert text.startswith(f"PreftPool({len(many)} adapters: a")
    assert f"1 in 2 of linear rank 8 slots of {pool.slots.num_bytes / 2**20:.1f} MiB on cpu" in text
    pool.close()
    pool.close()
    assert repr(pool) == "PreftPool(closed)"
    calls = {
        "add": lambda: pool.add("new", many["a1"]),
        "remove": lambda: pool.remove("a1"),
        "preload": lambda: pool.preload(["a1"]),
        "warm_up": pool.warm_up,
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"PreftPool.{name}: the pool is closed; make another"):
            call()


def test_a_warm_up_is_for_all_that_the_pool_holds(monkeypatch):
    pool, given = PreftPool.from_pretrained(make_base(), crowd().paths, num_slots=2), []
    assert pool.warm_up() == 0, "nothing is compiled on a CPU"
    monkeypatch.setattr(ops, "warm_up", lambda weights: given.extend(weights) or len(given))
    assert pool.warm_up() == sum(len(pool.slots.weights(bucket)) for bucket in pool.slots.buckets) > 0
    assert {one.bias is None for one in given} == {True, False}


def test_more_names_in_a_batch_than_slots(many):
    model = make_base()
    PreftPool.from_pretrained(model, many, num_slots=2)
    with pytest.raises(ValueError, match=r"3 adapters of linear rank 8 at once, and the pool has 2 slots"):
        model.generate(input_ids=prompt(3), adapter_names=["a1", "a2", "a3"], **GREEDY)
    assert model.generate(input_ids=prompt(3), adapter_names=["a1", "a2", "a1"], max_new_tokens=1).shape == (3, 10)


def test_threads_that_generate_on_one_pool(many):
    """More threads than slots for them: each waits for its slots, and each gets its own adapter's answer."""
    base = make_base()
    model = copy.deepcopy(base)
    PreftPool.from_pretrained(model, many, num_slots=3, max_host_bytes=0)
    faults: list[object] = []

    def work(number: int) -> None:
        chooser = random.Random(number)
        try:
            for step in range(6):
                names, ids = chooser.sample(sorted(many), 2), prompt(2, 6, seed=100 * number + step)
                found = model.generate(input_ids=ids, adapter_names=names, **GREEDY)
                for row, name in enumerate(names):
                    saved = load_adapter(many[name])
                    adapted = adapted_copy(base, "lora", saved.tensors, saved.config.scaling)
                    tokens, _ = two_phase_greedy(adapted, base, ids[row : row + 1], 8)
                    if not torch.equal(found.sequences[row : row + 1, 6:], tokens):
                        faults.append((number, step, name))
        except BaseException as error:
            faults.append(error)

    run_together(work, 4)
    assert faults == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    c, ids = crowd(), prompts()
    model = copy.deepcopy(c.base).to(dtype)
    PreftPool.from_pretrained(model, c.paths)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=NAMES).logits.float()
        exact = torch.cat([c.adapted[name](input_ids=ids[i : i + 1]).logits for i, name in enumerate(NAMES)])
        rounded = c.model("held").to(dtype)(input_ids=ids, adapter_names=NAMES).logits.float()
    # no farther from float32 than a model whose layers hold the adapters, but for a factor
    assert (found - exact).abs().mean() <= 2 * (rounded - exact).abs().mean()


def test_autocast():
    c, ids = crowd(), prompts()
    model = c.model("pooled")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=ids, adapter_names=NAMES).logits.float()
        other = c.model("held")(input_ids=ids, adapter_names=NAMES).logits.float()
    with torch.no_grad():
        exact = torch.cat([c.adapted[name](input_ids=ids[i : i + 1]).logits for i, name in enumerate(NAMES)])
    assert (found - exact).abs().mean() <= 2 * (other - exact).abs().mean()


def test_close_gives_the_model_back():
    c, ids = crowd(), prompts(2)
    model = copy.deepcopy(c.base)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with PreftPool.from_pretrained(model, c.paths) as pool:
        model.generate(input_ids=ids, adapter_names=["wide", "edit"], **GREEDY)
        assert [(name, type(module)) for name, module in model.named_modules()] != before
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert "generate" not in model.__dict__
    assert not any(key.startswith("_preft") for key in model.__dict__)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    pool.close()
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(input_ids=ids, adapter_names=["wide", "edit"])
    # and it can have another pool
    PreftPool.from_pretrained(model, {"wide": c.paths["wide"]})
    check(model.generate(input_ids=ids, adapter_names=["wide"] * 2, **GREEDY), *c.oracle("wide", ids), ids.shape[1])


def test_close_leaves_the_adapters_that_the_layers_hold():
    c, ids = crowd(), prompts(2)
    model = c.model("both")
    pool = pool_object(model)
    pool.close()
    for name in ("few", "stable"):
        model.set_adapter(name)
        check(model.generate(input_ids=ids, **GREEDY), *c.oracle(name, ids), ids.shape[1])
    with pytest.raises(ValueError, match="adapter 'wide' is not known; known are few, stable,"):
        model.generate(input_ids=ids, adapter_names=["wide", "few"])


def pool_object(model) -> PreftPool:
    """Returns a handle on the pool that crowd().model made."""
    pool = object.__new__(PreftPool)
    pool.model = model.get_base_model()
    pool.slots = pool.model._preft_attachment.routing.pool
    return pool


def test_close_while_a_forward_uses_it():
    c = crowd()
    model = copy.deepcopy(c.base)
    pool = PreftPool.from_pretrained(model, c.paths)
    seen = []

    def close(module, args, output):
        with pytest.raises(RuntimeError, match="wait for it to finish"):
            pool.close()
        seen.append(True)

    model.model.norm.register_forward_hook(close)
    model.generate(input_ids=prompt(1), adapter_names=["wide"], max_new_tokens=1)
    assert seen


def test_add_and_remove():
    c, ids = crowd(), prompts(2)
    model = copy.deepcopy(c.base)
    pool = PreftPool.from_pretrained(model, {"wide": c.paths["wide"]}, reserve=[PreftConfig(method="direft", r=3)])
    pool.add("edit", c.paths["edit"])
    pool.preload(["edit"])
    assert pool.counters().loads == 1
    names = ["edit", "wide"]
    check(model.generate(input_ids=ids, adapter_names=names, **GREEDY), *c.oracle_rows(names, ids), ids.shape[1])
    pool.remove("wide")
    with pytest.raises(ValueError, match="adapter 'wide' is not known; known are edit,"):
        model.generate(input_ids=ids, adapter_names=names)
    pool.add("wide", c.paths["stable"])
    output = model.generate(input_ids=ids, adapter_names=names, **GREEDY)
    check(output, *c.oracle_rows(["edit", "stable"], ids), ids.shape[1])
    with pytest.raises(ValueError, match="needs a slot of linear rank 16 and the pool has"):
        pool.add("few", c.paths["few"])
    with pytest.raises(ValueError, match="adapter name 'wide' is taken"):
        pool.add("wide", c.paths["wide"])
    with pytest.raises(ValueError, match="adapter name '' cannot be used"):
        pool.add("", c.paths["wide"])
    with pytest.raises(ValueError, match="adapter 'nobody' is not known"):
        pool.remove("nobody")


def test_an_adapter_on_layers_that_the_pool_has_no_room_for():
    c = crowd()
    pool = PreftPool(copy.deepcopy(c.base), [PreftConfig(r=4, target_modules=["q_proj"])])
    with pytest.raises(ValueError, match=r"changes \d+ layers that the pool has no slots for, such as .*reserve"):
        pool.add("wide", c.paths["wide"])


def test_names_of_pool_and_layers_stay_apart():
    c = crowd()
    model = make_preft(copy.deepcopy(c.base), adapter_name="wide")
    with pytest.raises(ValueError, match="the model's layers have an adapter of this name"):
        PreftPool.from_pretrained(model, {"wide": c.paths["wide"]})
    # the refused pool left nothing behind
    assert model.get_base_model()._preft_attachment.routing.pool is None
    PreftPool.from_pretrained(model, {"other": c.paths["wide"]})
    with pytest.raises(ValueError, match="'other' is one of the model's PreftPool"):
        model.add_adapter("other", PreftConfig())
    with pytest.raises(ValueError, match=r"close\(\) the pool first"):
        model.unload()
    with pytest.raises(ValueError, match="has a PreftPool already"):
        PreftPool.from_pretrained(model, {"more": c.paths["few"]})


def test_slots_by_bucket():
    c = crowd()
    sizes = {Bucket("linear", 8): 2, Bucket("linear", 16): 1, Bucket("block", 8): 1, Bucket("block", 16): 3}
    pool = PreftPool.from_pretrained(copy.deepcopy(c.base), c.paths, num_slots=sizes)
    assert pool.slots.buckets == sizes
    missing = {Bucket("linear", 8): 2}
    with pytest.raises(ValueError, match="adapter 'few' needs a slot of linear rank 16"):
        PreftPool.from_pretrained(copy.deepcopy(c.base), {"few": c.paths["few"]}, num_slots=missing)
    with pytest.raises(ValueError, match="num_slots of linear rank 8 is 0"):
        PreftPool.from_pretrained(copy.deepcopy(c.base), {"wide": c.paths["wide"]}, num_slots=0)


def test_what_is_no_adapter(tmp_path):
    c, model = crowd(), make_base()
    for location in (tmp_path / "none", "none", "a/b/c"):
        with pytest.raises(AdapterError, match=r"adapter 'x': '.*' is neither a directory nor a Hub id"):
            PreftPool.from_pretrained(model, {"x": location})
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"adapter 'x': .*adapter_config.json cannot be read"):
        PreftPool.from_pretrained(model, {"x": tmp_path / "empty"})
    with pytest.raises(ValueError, match="no adapter and no config"):
        PreftPool.from_pretrained(model, {})
    other = make_base(hidden_size=16)
    pool = PreftPool.from_pretrained(other, {"x": c.paths["wide"]})
    with pytest.raises(AdapterError, match=r"adapter 'x' of .*has shape \[4, 32\] and the model expects \[4, 16\]"):
        other.generate(input_ids=prompt(1), adapter_names=["x"], **GREEDY)
    assert not pool.slots.resident()


def test_weights_that_are_not_what_the_config_says(tmp_path):
    c = crowd()
    saved = load_adapter(c.paths["wide"])
    fewer = dict(list(saved.tensors.items())[2:])
    save_adapter(tmp_path / "fewer", saved.config, fewer)
    model = make_base()
    PreftPool.from_pretrained(model, {"x": tmp_path / "fewer"})
    with pytest.raises(AdapterError, match=r"adapter 'x' of .*missing"):
        model.generate(input_ids=prompt(1), adapter_names=["x"], **GREEDY)
    assert model.generate(input_ids=prompt(1), max_new_tokens=1).shape == (1, 10)


def test_an_adapter_that_changes_on_disk(tmp_path):
    c = crowd()
    saved = load_adapter(c.paths["wide"])
    save_adapter(tmp_path / "x", saved.config, saved.tensors)
    model = make_base()
    pool = PreftPool.from_pretrained(model, {"x": tmp_path / "x"})
    save_adapter(tmp_path / "x", saved.config, {name: t * 2 for name, t in saved.tensors.items()})
    with pytest.raises(ValueError, match="adapter 'x' has changed since it was added"):
        model.generate(input_ids=prompt(1), adapter_names=["x"], **GREEDY)
    pool.remove("x")
    pool.add("x", tmp_path / "x")
    assert model.generate(input_ids=prompt(1), adapter_names=["x"], max_new_tokens=1).shape == (1, 10)


def test_nan_weights(tmp_path):
    c = crowd()
    directory = tmp_path / "x"
    saved = load_adapter(c.paths["wide"])
    save_adapter(directory, saved.config, saved.tensors)
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fingerprint": None}))
    model = make_base()
    PreftPool.from_pretrained(model, {"x": directory})
    with pytest.raises(AdapterError, match="NaN or infinite"):
        model.generate(input_ids=prompt(1), adapter_names=["x"], **GREEDY)


def test_a_model_that_is_no_decoder():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(ValueError, match="encoder-decoder"):
        PreftPool(AutoModelForSeq2SeqLM.from_config(config), [PreftConfig()])


def test_a_rank_beyond_the_slots():
    with pytest.raises(AdapterError, match="r is 200: slots have ranks up to 128"):
        PreftPool(make_base(), [PreftConfig(r=200)])


def test_configs_resolve_as_their_own_adapters_do(tmp_path):
    """A saved all-linear adapter and the config it was made from choose the same layers."""
    model = make_preft(make_base(), r=4, exclude_modules=["o_proj"])
    model.save_pretrained(tmp_path)
    paths = set(load_adapter(tmp_path).modules())
    for config in (PreftConfig(r=4, exclude_modules=["o_proj"]), load_adapter(tmp_path).config):
        assert isinstance(config, (PreftConfig, AdapterConfig))
        assert {site.name for site in PreftPool(make_base(), [config]).slots.sites} == paths


def test_from_the_cache_of_the_hub(tmp_path):
    """The Hub's cache as huggingface_hub lays it out, with the network off: a branch is pinned to its commit."""
    c, ids = crowd(), prompts(2)
    commits = ["1" * 40, "2" * 40]
    repository = tmp_path / "models--org--tone"
    for commit, name in zip(commits, ("wide", "edit"), strict=True):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in Path(c.paths[name]).iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    model = copy.deepcopy(c.base)
    pool = PreftPool.from_pretrained(
        model, {"now": "org/tone", "then": f"org/tone@{commits[1]}"}, cache_dir=tmp_path, local_files_only=True
    )
    # main moves on after the pool was made: the commit that was found counts
    (repository / "refs" / "main").write_text(commits[1])
    output = model.generate(input_ids=ids, adapter_names=["now", "then"], **GREEDY)
    check(output, *c.oracle_rows(["wide", "edit"], ids), ids.shape[1])
    pool.add("later", "org/tone")
    output = model.generate(input_ids=ids, adapter_names=["later", BASE], **GREEDY)
    check(output, *c.oracle_rows(["edit", BASE], ids), ids.shape[1])
    with pytest.raises(AdapterError, match=r"org/nowhere@main: adapter_config\.json is not in the cache"):
        pool.add("lost", "org/nowhere")
