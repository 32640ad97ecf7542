"""One adapted model with its oracle per architecture and method, made once."""

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import VOCABULARY, make_base, make_preft

NEW_TOKENS = 8
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass
class Case:
    """base: untouched; adapted: the adapter on every token; model: the PreFT model under test."""

    base: PreTrainedModel
    adapted: PreTrainedModel
    model: PeftModel

    def oracle(self, ids: Tensor, mask: Tensor | None = None, num_new: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
        return two_phase_greedy(self.adapted, self.base, ids, num_new, mask)


@functools.cache
def case(architecture: str, method: str) -> Case:
    base = make_base(architecture)
    untouched = copy.deepcopy(base)
    model = make_preft(base, method)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Case(untouched, adapted_copy(untouched, method, weights, model.peft_config["default"].scaling), model)


def run_together(work: Callable[[int], None], count: int) -> None:
    """Runs work(0) ... work(count - 1) in threads, all at once, to their ends."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
        assert not thread.is_alive()


def prompt(num_rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Returns token ids (num_rows, length) without special tokens."""
    return torch.randint(3, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(seed))
