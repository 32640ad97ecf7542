"""A forward that a KeyboardInterrupt or SystemExit ends leaves no phase and no pinned adapter behind."""

import copy
import threading

import pytest
import torch

from preft_hf import PreftPool
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.many_adapters import saved_adapters
from tests.hf.zoo import make_base, make_preft

ERRORS = pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def interrupt(model, error) -> None:
    """Makes the second decoder layer raise the error, once."""

    def hook(module, args):
        handle.remove()
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(hook)


def one_slot():
    model = copy.deepcopy(saved_adapters().base)
    names = ("wide", "stable")
    return model, PreftPool.from_pretrained(model, {name: saved_adapters().paths[name] for name in names}, num_slots=1)


def in_a_thread(model, name: str) -> torch.Tensor:
    found = []
    ids = prompt(1)
    thread = threading.Thread(
        target=lambda: found.append(model.generate(input_ids=ids, adapter_names=[name], **GREEDY).sequences[:, 9:]),
        daemon=True,
    )
    thread.start()
    thread.join(60)
    assert found, "the thread waits for a slot that nobody uses"
    return found[0]


@ERRORS
@pytest.mark.parametrize("method", ["lora", "direft"])
def test_no_phase_is_left(method, error):
    model = make_preft(make_base(), method).get_base_model()
    for call in (lambda: model(input_ids=prompt()), lambda: model.generate(input_ids=prompt(), **GREEDY)):
        interrupt(model, error)
        with pytest.raises(error):
            call()
        with pytest.raises(RuntimeError, match="outside of its model's forward"):
            model.model(input_ids=prompt())
        found = model.generate(input_ids=prompt(), **GREEDY).sequences[:, 9:]
        assert torch.equal(found, case("llama", method).oracle(prompt())[0])


@ERRORS
def test_no_adapter_stays_pinned(error):
    model, pool = one_slot()
    interrupt(model, error)
    with pytest.raises(error):
        model(input_ids=prompt(), adapter_names=["wide"] * 2)
    assert pool.slots.resident() == {"wide": 0}
    assert torch.equal(in_a_thread(model, "stable"), saved_adapters().oracle_rows(["stable"], prompt(1))[0])
    pool.close()


@ERRORS
def test_a_traceback_that_is_kept_does_not_keep_the_slot(error):
    """As in a notebook, which keeps the last one: another thread finds that the call is gone."""
    model, pool = one_slot()
    for _ in range(2):
        interrupt(model, error)
        with pytest.raises(error) as kept:
            model(input_ids=prompt(), adapter_names=["wide"] * 2)
        assert torch.equal(in_a_thread(model, "stable"), saved_adapters().oracle_rows(["stable"], prompt(1))[0])
        logits = model(input_ids=prompt(), adapter_names=["wide"] * 2).logits
        assert (logits[:, -1] - saved_adapters().oracle_rows(["wide"] * 2, prompt())[1][:, 0]).abs().max() < 1e-4
    pool.close()
    del kept


def test_a_call_that_is_running_keeps_its_slot():
    """Another pre-hook's arguments take the place of ours, and another thread waits meanwhile."""
    model, pool = one_slot()
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, dict(kwargs)), with_kwargs=True)
    pins = []

    def hook(module, args):
        other = threading.Thread(target=lambda: found.append(in_a_thread(model, "stable")), daemon=True)
        other.start()
        other.join(1)
        pins.append(dict(pool.slots.resident()))
        waiting.append(other)

    found: list[torch.Tensor] = []
    waiting: list[threading.Thread] = []
    handle = model.model.layers[1].register_forward_pre_hook(hook)
    logits = model(input_ids=prompt(), adapter_names=["wide"] * 2).logits
    handle.remove()
    assert pins == [{"wide": 1}]
    assert (logits[:, -1] - saved_adapters().oracle_rows(["wide"] * 2, prompt())[1][:, 0]).abs().max() < 1e-4
    waiting[0].join(60)
    assert torch.equal(found[0], saved_adapters().oracle_rows(["stable"], prompt(1))[0])


def test_a_forward_inside_a_forward_is_refused():
    model = make_preft(make_base()).get_base_model()
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: model(input_ids=prompt()) and None)
    with pytest.raises(RuntimeError, match="called inside its own forward"):
        model(input_ids=prompt())
    handle.remove()
    assert torch.equal(
        model.generate(input_ids=prompt(), **GREEDY).sequences[:, 9:], case("llama", "lora").oracle(prompt())[0]
    )
