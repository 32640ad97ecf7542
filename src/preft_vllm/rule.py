"""The position rule on vLLM's batches: which rows of a step are prefill, and of which adapter. Needs numpy only."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Bools = Sequence[bool] | NDArray[np.bool_]


def prefill_rows(num_scheduled: Ints, num_computed: Ints, num_prompt: Ints) -> NDArray[np.int64]:
    """Returns how many rows of each request are prefill in this step. They come first.

        rows[i] = clip(num_prompt[i] - num_computed[i], 0, num_scheduled[i])

    This covers chunked prefill, recomputation after a preemption, and rows that verify speculated tokens.

    Args:
        num_scheduled, num_computed, num_prompt: tokens per request, (requests,)
    Source: arXiv 2605.14217, section 3; `preft_core.rule.tokens.prefill_span` is the same for one request.
    """
    return np.clip(num_prompt.astype(np.int64) - num_computed, 0, num_scheduled)


def token_ids(ids: Ints, prefill_only: Bools, num_scheduled: Ints, prefill: Ints) -> NDArray[np.int64]:
    """Returns the adapter id of each row of a step, 0 for none: (sum of num_scheduled,).

    Args:
        ids: of each request's adapter, 0 for none
        prefill_only: False for all-token LoRA, which acts on every row
        prefill: as returned by `prefill_rows`
    """
    adapted = np.where(np.asarray(prefill_only, bool), prefill, num_scheduled).astype(np.int64)
    pairs = np.stack([ids.astype(np.int64), np.zeros_like(ids, dtype=np.int64)], axis=1).ravel()
    counts = np.stack([adapted, num_scheduled - adapted], axis=1).ravel()
    return np.repeat(pairs, counts)


def sampled_ids(
    ids: Ints, prefill_only: Bools, num_scheduled: Ints, prefill: Ints, num_sampled: Ints
) -> NDArray[np.int64]:
    """Returns the adapter id of each sampled row, the last rows of each request: (sum of num_sampled,).

    A sampled row has the id that it has as a token: the last prompt token is prefill, speculated tokens are not.
    """
    first = num_scheduled.astype(np.int64) - num_sampled
    return token_ids(ids, prefill_only, num_sampled, np.clip(prefill - first, 0, num_sampled))
