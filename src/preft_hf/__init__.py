"""Prefill-only finetuning (PreFT) for Hugging Face: a PEFT type whose adapters act on prompt tokens only.

Importing this package registers the PEFT type PREFT.
"""

from preft_hf.config import PreftConfig
from preft_hf.model import PreftModel
from preft_hf.phase import preft_phase
from preft_hf.pool import PreftPool
from preft_hf.register import register
from preft_hf.training import PrefillMaskCollator, expand_turns

register()

__all__ = ["PrefillMaskCollator", "PreftConfig", "PreftModel", "PreftPool", "expand_turns", "preft_phase"]
