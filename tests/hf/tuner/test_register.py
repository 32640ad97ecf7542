"""The table of what preft_hf replaces in PEFT and transformers."""

import pytest
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers.integrations.peft import PeftAdapterMixin

from preft_hf.config import PreftType
from preft_hf.tuner.model import PreftModel
from preft_hf.tuner.register import PATCHES, _place, register, unregister


def found() -> dict[str, object]:
    places = {patch.target: _place(patch.target) for patch in PATCHES}
    return {target: vars(owner).get(name) for target, (owner, name) in places.items()}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_every_target_exists_and_is_replaced_once(patch):
    owner, name = _place(patch.target)
    replaced = vars(owner)[name]
    register()
    assert vars(owner)[name] is replaced
    assert patch.why.endswith(".")
    assert "." not in patch.why[:-1]


def test_unregister_restores_every_original():
    before = found()
    unregister()
    try:
        assert PreftType.PREFT not in PEFT_TYPE_TO_TUNER_MAPPING
        for target, original in found().items():
            assert original is not before[target]
        # inherited, so that PEFT's class has none of its own
        assert "push_to_hub" not in vars(PeftModel)
        unregister()
    finally:
        register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PreftType.PREFT] is PreftModel
    for function in (PeftModel.load_adapter, PeftAdapterMixin.load_adapter):
        assert "preft_hf" in function.__code__.co_filename
