"""The study's intervals: over seeds, and over held-out rows as drawing the rows anew would spread the figures."""

import json
import random
import statistics

import pytest

from benchmarks.quality.intervals import difference, each_row_alike, interval, rows_half_width
from benchmarks.quality.report import MAIN, RESULTS, with_row_tokens
from benchmarks.quality.tasks import TASKS

LORA = [{"seed": 0, "loss": 2.0, "row_losses": [2.0, 2.0]}, {"seed": 1, "loss": 3.0, "row_losses": [3.0, 3.0]}]


def other(*row_losses: tuple[float, float], tokens: tuple[int, int] = (1, 3)) -> list[dict]:
    return [
        {
            "seed": seed,
            "loss": statistics.fmean(losses, tokens),
            "row_losses": list(losses),
            "row_tokens": list(tokens),
        }
        for seed, losses in enumerate(row_losses)
    ]


def test_student_s_interval_over_seeds():
    assert interval([]) == ""
    assert interval([1.0], signed=True) == "+1.000"
    # 12.71 * sqrt(2) / sqrt(2), since the two are 2 apart
    assert interval([1.0, 3.0], digits=2) == "2.00 ± 12.71"


def test_a_row_weighs_what_its_tokens_do_or_as_much_as_another():
    # rows 1 higher and 1 lower with each seed, the lower one three times as long
    runs = other((3.0, 1.0), (4.0, 2.0))
    assert difference(runs, LORA) == "-0.500 ± 0.000"
    assert difference(runs, LORA, rows=True).startswith("-0.500 ± 0.000; rows ± ")
    assert each_row_alike(runs, LORA) == "+0.000 ± 1.960"


def test_seeds_that_one_lacks_are_left_out_of_both():
    runs = other((3.0, 1.0), (4.0, 2.0), (90.0, 90.0))
    assert difference(runs, LORA, rows=True) == difference(runs[:2], LORA, rows=True)
    assert each_row_alike(runs, LORA) == each_row_alike(runs[:2], LORA)
    assert difference(runs[2:], LORA, rows=True) == each_row_alike(runs[2:], LORA) == ""


def test_a_method_is_not_compared_with_itself_nor_rows_without_their_tokens():
    assert difference(LORA, LORA, rows=True) == each_row_alike(LORA, LORA) == ""
    runs = [{name: run[name] for name in ("seed", "loss", "row_losses")} for run in other((3.0, 1.0), (4.0, 2.0))]
    assert difference(runs, LORA, rows=True) == "-0.500 ± 0.000"


@pytest.mark.parametrize("of_length", [0.0, 0.02])
def test_drawing_the_rows_anew_spreads_the_mean_as_the_interval_says(of_length):
    """Against the bootstrap, for rows of 1 to 300 tokens whose difference grows with their length, or not."""
    draw = random.Random(0)
    tokens = [min(300, 1 + int(draw.expovariate(1 / 40))) for _ in range(250)]
    differences = [draw.gauss(of_length * n, 1 / n**0.5) for n in tokens]
    means = []
    for _ in range(2000):
        rows = draw.choices(range(250), k=250)
        means.append(statistics.fmean([differences[i] for i in rows], [tokens[i] for i in rows]))
    assert rows_half_width(differences, tokens) == pytest.approx(1.96 * statistics.stdev(means), rel=0.08)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
@pytest.mark.parametrize("task", TASKS)
def test_the_committed_tokens_are_those_that_the_losses_weigh_rows_by(file, task):
    runs = json.loads(file.read_text())["runs"]
    if file.stem != MAIN and not any(run.get("task") == task for run in runs.values()):
        pytest.skip(f"{file.stem} has no run of this task")
    of_task = [run for run in with_row_tokens(runs, runs).values() if run.get("task") == task]
    judged = [run for run in of_task if "row_losses" in run]
    assert judged
    for run in judged:
        assert statistics.fmean(run["row_losses"], run["row_tokens"]) == pytest.approx(run["loss"], abs=1e-9)
