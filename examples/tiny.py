"""A tiny random model with a tokenizer of words, made in place: what the examples run on with --smoke."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def load(name: str, smoke: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns the named model and its tokenizer, or the tiny ones."""
    if smoke:
        return tiny()
    from transformers import AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@contextmanager
def output_folder(asked: str | None, default: str, smoke: bool) -> Iterator[str]:
    """Yields the folder that was asked for; if none was, the default, or with --smoke a temporary one."""
    if asked is not None or not smoke:
        yield asked or default
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
