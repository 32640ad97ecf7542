"""An adapter in a process that did not train it: the same tokens, and none without preft_hf."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.hf.cases import GREEDY, prompt
from tests.hf.zoo import METHODS, make_base, make_preft
from tests.interpreter import printed


@pytest.fixture
def of_each_method(tmp_path):
    """Folders of an adapter of each method by their models; a new process costs seconds, so that it reads them all."""
    make_base().save_pretrained(tmp_path / "base")
    models = {}
    for method in METHODS:
        model = make_preft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), method)
        model.save_pretrained(tmp_path / method)
        models[str(tmp_path / method)] = model
    return models


def test_a_process_that_did_not_train_gives_the_same_tokens(of_each_method):
    code = (
        "import sys, torch, preft_hf; from peft import AutoPeftModelForCausalLM\n"
        "ids = torch.tensor(eval(sys.argv[1]))\n"
        "options = {'max_new_tokens': 8, 'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}\n"
        "for folder in sys.argv[2:]:\n"
        "    model = AutoPeftModelForCausalLM.from_pretrained(folder)\n"
        "    print(model.generate(input_ids=ids, **options).tolist())"
    )
    lines = printed(code, str(prompt().tolist()), *of_each_method).splitlines()
    expected = [model.generate(input_ids=prompt(), **GREEDY).sequences for model in of_each_method.values()]
    assert [json.loads(line) for line in lines] == [sequences.tolist() for sequences in expected]


def test_without_our_import_nothing_is_served(of_each_method):
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        AutoPeftModelForCausalLM.from_pretrained(folder)\n"
        "        print('served')\n"
        "    except Exception as error:\n"
        "        print(repr(error))"
    )
    lines = printed(code, *of_each_method).splitlines()
    assert len(lines) == len(METHODS)
    assert all("PREFT" in line for line in lines), lines
