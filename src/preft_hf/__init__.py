"""Prefill-only finetuning (PreFT) for Hugging Face: a PEFT type whose adapters act on prompt tokens only.

Importing this package registers the PEFT type PREFT.
"""

from importlib.metadata import version

from preft_hf.config import PreftConfig
from preft_hf.layers.phase import preft_phase, preft_scoring
from preft_hf.pool import PreftPool
from preft_hf.training.collator import PrefillMaskCollator
from preft_hf.training.turns import expand_turns
from preft_hf.tuner.model import PreftModel
from preft_hf.tuner.register import register

register()

__version__ = version("preft-hf")

__all__ = [
    "PrefillMaskCollator",
    "PreftConfig",
    "PreftModel",
    "PreftPool",
    "__version__",
    "expand_turns",
    "preft_phase",
    "preft_scoring",
]
