"""One patched shard for the tests: TGI's command line in float32, because 16 bit has ties between greedy tokens.

Run by TGI's Python. Negative controls: `PREFT_TEST_BREAK=rows` removes the position rule, `owner` shares the prefix
cache between adapters.
"""

import builtins
import functools
import os
import sys

import torch
from text_generation_server.models.flash_causal_lm import FlashCausalLM

from tgi_patch import launch
from tgi_patch.server import layers
from tgi_patch.server import shard as shard_module
from tgi_patch.server.routing import PrefillRows


def in_float32(original):
    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **(kwargs | {"dtype": torch.float32}))

    return init


def all_rows(tickets, cache_lengths, input_lengths, prompt_lengths):
    found, row = [], 0
    for ticket, length in zip(tickets, input_lengths, strict=True):
        if ticket is not None:
            found.append(PrefillRows(ticket.key, row, row + length))
        row += length
    return found


def keep_tickets(target, name, value):
    if value is not None:
        builtins.setattr(target, name, value)


FlashCausalLM.__init__ = in_float32(FlashCausalLM.__init__)
broken = os.environ.pop("PREFT_TEST_BREAK", None)
if broken == "rows":
    shard_module.prefill_rows = all_rows
    layers.setattr = keep_tickets
elif broken == "owner":
    shard_module.Shard.owner = lambda self, request, ticket: "anybody"
launch.server(sys.argv[1:])
