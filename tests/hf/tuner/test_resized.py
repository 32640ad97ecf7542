"""An adapter trained on resized embeddings: saving says that they are not in it, and what to save as well."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.hf.cases import prompt
from tests.hf.zoo import VOCABULARY, make_base, make_preft

IDS = torch.tensor([[5, VOCABULARY, 6, VOCABULARY + 1, 7]])


@pytest.fixture
def base(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, num_embeddings: int | None = None) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    if num_embeddings is not None:
        model.resize_token_embeddings(num_embeddings)
    return make_preft(model)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_resized_embeddings_are_named_and_the_way_that_is_told_works(base, tmp_path):
    model = adapted(base, VOCABULARY + 2)
    expected = logits(model)
    with pytest.warns(UserWarning, match=rf"has {VOCABULARY + 2} embeddings.*base has {VOCABULARY}.*unload\(\)"):
        model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "resized")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(logits(PeftModel.from_pretrained(saved, tmp_path / "adapter").eval()), expected)
    # what the warning is about: the new rows are drawn anew
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.resize_token_embeddings(VOCABULARY + 2)
    assert not torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter").eval()), expected)


@pytest.mark.parametrize("name", ["", "nobody/nowhere", "no such folder at all"])
def test_other_models_are_saved_without_a_word(name, base, tmp_path):
    whole, unknown = adapted(base), adapted(base, VOCABULARY + 2)
    unknown.peft_config["default"].base_model_name_or_path = name
    # warnings are errors
    whole.save_pretrained(tmp_path / "one")
    unknown.save_pretrained(tmp_path / "two")
    # who says so knows
    adapted(base, VOCABULARY + 2).save_pretrained(tmp_path / "three", save_embedding_layers=False)
    assert torch.equal(
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one"), prompt()),
        logits(whole, prompt()),
    )
