"""Means over seeds and over held-out rows, with their intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]

# for a two-sided 95 % interval: the normal's, for hundreds of rows, and Student's t by degrees of freedom, for seeds
Z_95 = 1.96
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float], signed: bool = False, digits: int = 3) -> str:
    """Returns `mean ± half width` of a 95 % interval by Student's t; only the mean for one value."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    if len(values) == 1:
        return mean
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def difference(runs: Sequence[Run], others: Sequence[Run], figure: str = "loss", rows: bool = False) -> str:
    """Returns the interval of a figure's difference to other runs, seed by seed; nothing for the same runs.

    Args:
        rows: for the loss, add the half width of an interval over held-out rows, where runs have their row_tokens
    """
    if runs == others:
        return ""
    reference = {run["seed"]: run[figure] for run in others}
    over_seeds = interval(
        [run[figure] - reference[run["seed"]] for run in runs if run["seed"] in reference], signed=True
    )
    if not rows or not over_seeds or "row_tokens" not in runs[0]:
        return over_seeds
    return f"{over_seeds}; rows ± {rows_half_width(_by_row(runs, others), runs[0]['row_tokens']):.3f}"


def each_row_alike(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Returns the mean of the rows' differences in loss to other runs, and half of a 95 % interval over rows.

    The loss of a run weighs tokens alike, so that long responses count most. Nothing for the same runs.
    """
    differences = [] if runs == others else _by_row(runs, others)
    if not differences:
        return ""
    half = rows_half_width(differences, [1] * len(differences))
    return f"{statistics.fmean(differences):+.3f} ± {half:.3f}"


def rows_half_width(differences: Sequence[float], row_tokens: Sequence[int]) -> float:
    """Returns half of a 95 % interval over rows of a mean in which each row weighs as much as it has tokens.

    A row is drawn with its number of tokens: the ratio estimator's variance to first order (Cochran, Sampling
    Techniques, chapter 6).
    """
    mean = statistics.fmean(differences, row_tokens)
    mean_tokens = statistics.fmean(row_tokens)
    shares = [tokens * (one - mean) / mean_tokens for one, tokens in zip(differences, row_tokens, strict=True)]
    return Z_95 * statistics.stdev(shares) / math.sqrt(len(shares))


def _by_row(runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Returns each held-out row's difference in loss, mean over the seeds that both have; none if they share none."""
    reference = {run["seed"]: run["row_losses"] for run in others}
    pairs = [(run["row_losses"], reference[run["seed"]]) for run in runs if run["seed"] in reference]
    differences = [[loss - other for loss, other in zip(*pair, strict=True)] for pair in pairs]
    return [statistics.fmean(of_seeds) for of_seeds in zip(*differences, strict=True)]
