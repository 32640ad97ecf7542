"""torch.compile of a part of a model or with graph breaks, also in two threads: the phase is each thread's own."""

import contextlib
import threading

import pytest
import torch
from torch import nn

from preft_hf import preft_phase
from preft_hf.layers.linear import PreftLinear
from tests.hf.cases import GREEDY, case, prompt
from tests.hf.zoo import make_base, make_preft

DEADLINE_S = 60
TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def logits_of(model: nn.Module, is_prefill: bool) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt(), prefill_mask=is_prefill).logits


def expected_of(method: str) -> dict[bool, torch.Tensor]:
    c = case("llama", method)
    with torch.no_grad():
        found = {True: c.adapted(input_ids=prompt()).logits, False: c.base(input_ids=prompt()).logits}
    assert not torch.allclose(found[True], found[False], atol=0.1)
    return found


@pytest.mark.parametrize("fullgraph", [True, False])
def test_one_compiled_layer_in_two_threads(fullgraph):
    model, expected = make_preft(make_base()), expected_of("lora")[True]
    layer = model.get_base_model().model.layers[0]
    layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager", fullgraph=fullgraph)
    inside, go_on = threading.Event(), threading.Event()
    decoded: list[torch.Tensor] = []

    def decode_slowly() -> None:
        def wait(module, args):
            if threading.current_thread() is other:
                inside.set()
                go_on.wait(DEADLINE_S)

        handle = layer.register_forward_pre_hook(wait)
        with torch.no_grad(), preft_phase("decode"):
            decoded.append(model(input_ids=prompt()).logits)
        handle.remove()

    def check() -> None:
        with torch.no_grad():
            assert torch.allclose(model(input_ids=prompt()).logits, expected, atol=1e-5)

    check()
    other = threading.Thread(target=decode_slowly)
    other.start()
    assert inside.wait(DEADLINE_S)
    try:
        check()
    finally:
        go_on.set()
        other.join()
    check()
    assert torch.allclose(decoded[0], expected_of("lora")[False], atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_compiled_model_with_a_graph_break_in_two_threads(method):
    """A decode forward stops at the break, a prefill forward begins, and one or the other goes on first."""
    model, expected = make_preft(make_base(), method), expected_of(method)
    mlp = model.get_base_model().model.layers[0].mlp
    inside, go_on = threading.Event(), threading.Event()
    found: dict[bool, torch.Tensor] = {}
    other, other_first = None, False

    @torch.compiler.disable
    def stop() -> None:
        if threading.current_thread() is other:
            inside.set()
            go_on.wait(DEADLINE_S)
        elif other is not None and other_first:
            go_on.set()
            other.join()

    def forward(x: torch.Tensor) -> torch.Tensor:
        stop()
        return type(mlp).forward(mlp, x)

    def run(is_prefill: bool) -> None:
        found[is_prefill] = logits_of(compiled, is_prefill)

    mlp.forward = forward
    compiled = torch.compile(model, backend="eager")
    for is_prefill in (False, True):
        assert torch.allclose(logits_of(compiled, is_prefill), expected[is_prefill], atol=1e-5)
    for other_first in (False, True):
        inside.clear()
        go_on.clear()
        found.clear()
        other = threading.Thread(target=run, args=(False,))
        other.start()
        assert inside.wait(DEADLINE_S)
        try:
            run(True)
        finally:
            go_on.set()
            other.join()
        for is_prefill in (False, True):
            assert torch.allclose(found[is_prefill], expected[is_prefill], atol=1e-5), (other_first, is_prefill)


def test_declared_phases_of_a_compiled_model():
    """A context variable, which Dynamo cannot trace: code that reads it has to stay out of the graph."""
    model, expected = make_preft(make_base()), expected_of("lora")
    compiled = torch.compile(model, backend="eager")
    for phase in ("decode", "prefill", None, "decode", None, "prefill", "decode"):
        with torch.no_grad(), contextlib.nullcontext() if phase is None else preft_phase(phase):
            found = compiled(input_ids=prompt()).logits
        assert torch.allclose(found, expected[phase != "decode"], atol=1e-5), phase


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_generate_of_a_model_whose_forward_is_compiled(method):
    """`model.forward = torch.compile(model.forward, fullgraph=True)`, as transformers' guides have it."""
    model, c = make_preft(make_base(), method), case("llama", method)
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, backend="eager", fullgraph=True)
    for seed in (0, 1):
        ids = prompt(seed=seed)
        output = model.generate(input_ids=ids, cache_implementation="static", disable_compile=True, **GREEDY)
        tokens, logits = c.oracle(ids)
        assert torch.equal(output.sequences[:, ids.shape[1] :], tokens)
        assert (torch.stack(output.logits, 1) - logits).abs().max() <= TOLERANCE


def test_layers_that_are_not_compiled_in_a_model_that_is():
    """As after too many recompilations, when torch gives a function up."""
    model, expected = make_preft(make_base()), expected_of("lora")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PreftLinear, "forward", torch.compiler.disable(PreftLinear.forward))
        compiled = torch.compile(model, backend="eager")
        for is_prefill in (True, False, True):
            assert torch.allclose(logits_of(compiled, is_prefill), expected[is_prefill], atol=1e-5)
