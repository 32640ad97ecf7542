"""The former name of `preft_core.format.adapter`, kept for code that imports it."""

from preft_core.format.adapter import *  # noqa: F403
from preft_core.format.adapter import __all__  # noqa: F401
