"""What TRL users import: the check of a trainer before training, and LoRA+. They live in preft_hf.training."""

from preft_hf.training.optimizers import create_loraplus_optimizer
from preft_hf.training.trl import check_trainer

__all__ = ["check_trainer", "create_loraplus_optimizer"]
