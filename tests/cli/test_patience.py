"""A run that was stopped and resumed counts its evaluations on, and ends where it would have ended by itself."""

import signal
from typing import Any

import pytest
import torch
from rich.console import Console

from preft_hf.training.sft import TrainingPlan, TrainingResult, train
from tests.hf.training.test_trainers import samples
from tests.hf.zoo import make_base, make_preft

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:.*pin_memory.*")]
NUM_STEPS, EVAL_EVERY, PATIENCE = 20, 2, 3


class Losses:
    """The model's own in training; in evaluation the lowest comes first, so that patience counts from there."""

    def __init__(self, stop_in_step: int | None, num_evaluations: int = 0):
        self.stop_in_step, self.num_steps, self.num_evaluations = stop_in_step, 0, num_evaluations

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not model.training:
            self.num_evaluations += 1
            return torch.tensor(float(self.num_evaluations))
        self.num_steps += 1
        if self.num_steps == self.stop_in_step:
            signal.raise_signal(signal.SIGINT)
        return model(**batch).loss


def run(path, losses: Losses, patience: int = PATIENCE, resume: bool = False) -> TrainingResult:
    plan = TrainingPlan(path, NUM_STEPS, eval_every=EVAL_EVERY, patience=patience)
    path.mkdir(exist_ok=True)
    return train(
        make_preft(make_base()), samples(), samples(4), plan, 0, Console(quiet=True), resume=resume, loss_of=losses
    )


@pytest.mark.parametrize("stop_in_step", [None, 1, 3, 4, 5, 7])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(stop_in_step, tmp_path):
    losses = Losses(stop_in_step)
    result = run(tmp_path / "run", losses)
    assert result.interrupted == (stop_in_step is not None)
    if stop_in_step is not None:
        assert result.num_steps == stop_in_step
        result = run(tmp_path / "run", Losses(None, losses.num_evaluations), resume=True)
    # the first evaluation is the best, and three after it are worse
    assert result.num_steps == (1 + PATIENCE) * EVAL_EVERY
    assert result.eval_losses == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]
    assert [step for step, _ in result.losses] == list(range(1, 9))


@pytest.mark.parametrize(
    ("before", "after", "num_steps"),
    [
        (3, 5, (1 + 5) * EVAL_EVERY),
        (5, 3, (1 + 3) * EVAL_EVERY),
        # without patience nothing was counted and no loss kept: two evaluations go by
        (0, 3, (2 + 1 + 3) * EVAL_EVERY),
    ],
)
def test_the_patience_is_that_of_the_command(before, after, num_steps, tmp_path):
    losses = Losses(5)
    run(tmp_path / "run", losses, patience=before)
    result = run(tmp_path / "run", Losses(None, losses.num_evaluations), patience=after, resume=True)
    assert result.num_steps == num_steps
