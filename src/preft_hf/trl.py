"""What TRL users import: the check of a trainer before training. It lives in preft_hf.training.trl."""

from preft_hf.training.trl import check_trainer

__all__ = ["check_trainer"]
