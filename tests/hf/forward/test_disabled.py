"""Disabled adapters stay off where rows name them, those of a pool included, as in PEFT's LoRA."""

import contextlib
import copy

import pytest
import torch
from peft import PeftModel

from preft_hf import PreftPool
from tests.hf.cases import GREEDY
from tests.hf.many_adapters import BASE, NAMES, prompts, saved_adapters


@contextlib.contextmanager
def disabled(model, how: str):
    """Disables the adapters of a PeftModel in one of the ways that PEFT and transformers have."""
    if how == "context":
        with model.disable_adapter():
            yield
    elif how == "tuner":
        model.base_model.disable_adapter_layers()
        yield
        model.base_model.enable_adapter_layers()
    else:
        base = model.get_base_model()
        base._hf_peft_config_loaded = True
        base.disable_adapters()
        yield
        base.enable_adapters()


@pytest.mark.parametrize("how", ["context", "tuner", "transformers"])
@pytest.mark.parametrize("kind", ["held", "both"])
def test_disabled_wins_over_names(kind, how):
    c, ids = saved_adapters(), prompts()
    model = c.model(kind)
    base = model.get_base_model()
    off, on = c.oracle_rows([BASE] * len(NAMES), ids), c.oracle_rows(NAMES, ids)
    for expected, context in ((off, disabled(model, how)), (on, contextlib.nullcontext())):
        with context, torch.no_grad():
            tokens = base.generate(input_ids=ids, adapter_names=NAMES, **GREEDY).sequences[:, ids.shape[1] :]
            logits = base(input_ids=ids, adapter_names=NAMES).logits[:, -1]
        assert torch.equal(tokens, expected[0])
        assert (logits - expected[1][:, 0]).abs().max() < 1e-4


def test_a_pool_made_while_adapters_are_disabled_is_disabled():
    c, ids = saved_adapters(), prompts(2)
    model = PeftModel.from_pretrained(copy.deepcopy(c.base), c.paths["turn"], "turn").eval()
    base = model.get_base_model()
    with disabled(model, "tuner"):
        PreftPool.from_pretrained(base, {"wide": c.paths["wide"]}, num_slots=1)
        found = base.generate(input_ids=ids, adapter_names=["wide"] * 2, **GREEDY).sequences[:, ids.shape[1] :]
        assert torch.equal(found, c.oracle_rows([BASE] * 2, ids)[0])
    found = base.generate(input_ids=ids, adapter_names=["wide"] * 2, **GREEDY).sequences[:, ids.shape[1] :]
    assert torch.equal(found, c.oracle_rows(["wide"] * 2, ids)[0])


def test_prefixes_of_a_disabled_adapter_are_not_those_of_the_adapter():
    model = saved_adapters().model("held")
    routing = model.get_base_model()._preft_attachment.routing
    on = routing.adapter_key("wide")
    with disabled(model, "tuner"):
        assert routing.adapter_key("wide") != on
    assert routing.adapter_key("wide") == on
