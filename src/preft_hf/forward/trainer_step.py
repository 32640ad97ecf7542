"""Whether a trainer's step runs: the rows of a forward in it are training rows, no prompts."""

import sys

import torch

STEPS = frozenset({"compute_loss", "prediction_step", "training_step"})


@torch.compiler.assume_constant_result
def trainer_of_step() -> str | None:
    """Returns the class of the transformers Trainer whose step runs in this thread; None outside of one.

    A Trainer has no argument, attribute or event that says so to a model, hence the look at the callers. Callbacks and
    metrics run outside of the steps. torch.compile takes the answer of the time when it traces.
    """
    trainers = sys.modules.get("transformers.trainer")
    if trainers is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in STEPS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, trainers.Trainer):
                return type(owner).__name__
        frame = frame.f_back
    return None
