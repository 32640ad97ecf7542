"""Means over seeds, with their intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Student's t for a two-sided 95 % interval, by degrees of freedom
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


def difference(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], figure: str = "loss") -> str:
    """Returns the interval of a figure's difference to other runs, seed by seed; nothing for the same runs."""
    if runs == others:
        return ""
    reference = {run["seed"]: run[figure] for run in others}
    return interval([run[figure] - reference[run["seed"]] for run in runs if run["seed"] in reference], signed=True)
