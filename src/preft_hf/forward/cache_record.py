"""What a KV cache remembers of its request: whose prompt it holds, and what the model generated into it last.

A record is an attribute of the cache, so it is copied and dropped with it. `reset`, `crop` and eviction show in the
cache's length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from preft_hf.forward.caches import cached_length

ATTRIBUTE = "_preft_record"

Owners = tuple[bytes | None, ...]
"""The key of the adapter of each row's prompt, None for the base model."""


@dataclass(frozen=True)
class CacheRecord:
    """What is known of a cache beyond its tensors.

    Attributes:
        owners: whose keys and values the prompt's are
        length: the cache's own length when the record was made, 0 if it does not count
        num_seen: tokens that the request has had, those evicted from the cache included; None after a custom loop
        answer: int64, (rows, tokens), the tokens that generate has returned last, if they are known. It has not fed
            the last one of them to the model, so that one is not in the cache
        begin: position of the answer's first token
    """

    owners: Owners
    length: int
    num_seen: int | None = None
    answer: Tensor | None = None
    begin: int = 0

    def position(self, held: int, num_ids: int, num_masked: int | None) -> int:
        """Returns the position of the first token that continues the cache.

        Args:
            held: the cache's length now
            num_ids: token ids given, of which the new ones are the last
            num_masked: columns of the attention mask if only the new ids were given, else None
        Raises:
            ValueError: the cache holds fewer tokens than the request has had, so transformers, which goes by the
                cache's length, would feed some of the ids twice.
        """
        if num_masked is not None:
            masked = num_masked - num_ids
            if self.num_seen is not None and (self.length == held or masked == self.num_seen):
                return self.num_seen
            return max(masked, held)
        if self.num_seen in (None, self.length):
            return held
        raise ValueError(
            f"the cache holds {held} tokens of a request that has had {self.num_seen}, and generate was given ids for "
            "all of them: transformers would feed some twice; give only the new ids, with an attention_mask over the "
            "whole request, or leave the cache out"
        )

    def starts(self, first: int, new_ids: Tensor | None, num_rows: int) -> list[int]:
        """Returns for each row the position after the answer's tokens that are fed now; 0 if none of them is.

        Args:
            first: position of the first token that is fed
            new_ids: int64, (rows, tokens), the tokens from there on; None if only their embeddings are known
        """
        answer = self.answer
        if answer is None or not self.begin <= first < self.begin + answer.shape[1]:
            return [0] * num_rows
        answer = answer[:, first - self.begin :]
        if new_ids is None:
            return [first + answer.shape[1]] * num_rows
        width = min(answer.shape[1], new_ids.shape[1])
        answer, new_ids = answer[:, :width].to(new_ids.device), new_ids[:, :width]
        # rows that were selected or repeated since may be any of the answer's
        same = new_ids[:, None] == (answer[:, None] if len(answer) == num_rows else answer[None])
        counts = same.cumprod(-1).sum(-1).amax(-1).tolist()
        return [first + count if count else 0 for count in counts]


def record_of(cache: Any) -> CacheRecord | None:
    """Returns the record of a cache, None if it has none or was emptied since."""
    record = getattr(cache, ATTRIBUTE, None)
    if record is None or (record.length > 0 and cached_length(cache) == 0):
        return None
    return record


def record_owners(cache: Any, owners: Owners) -> None:
    """Records, after a forward of prompt tokens, whose they are. What was generated before is no longer the last."""
    record = record_of(cache)
    if record is not None:
        before = _matched(record.owners, len(owners))
        owners = tuple(new if old is None else old for old, new in zip(before, owners, strict=True))
    _put(cache, CacheRecord(owners, cached_length(cache) or 0))


def record_generated(cache: Any, output: Any, first_id: int, prompt_length: int, num_seen: int) -> None:
    """Records what a generation has left in a cache.

    Args:
        output: what generate returns: token ids, or an output that has them as `sequences`
        first_id: position of the first of these ids
        num_seen: tokens that the request has had, rejected candidates included
    """
    record, length = record_of(cache), cached_length(cache) or 0
    ids = output.get("sequences") if isinstance(output, Mapping) else output
    # the last token was not fed; rejected candidates were, and have been cropped
    num_fed = first_id + ids.shape[1] - 1 if isinstance(ids, Tensor) else None
    owners = (None,) if record is None else record.owners
    if num_fed in (num_seen, length):
        assert isinstance(ids, Tensor)
        answer = ids[:, prompt_length - first_id :].clone()
        _put(cache, CacheRecord(owners, length, num_fed, answer, prompt_length))
    else:
        _put(cache, CacheRecord(owners, length, num_seen))


def check_owners(cache: Any, owners: Owners | None) -> None:
    """Raises a ValueError if a cache holds the prompt of another adapter than that of a request that continues it.

    Args:
        owners: of the rows of the request; None if all are the base model's
    """
    record = record_of(cache)
    if record is None or set(record.owners) == {None}:
        return
    owners = (None,) * len(record.owners) if owners is None else owners
    before = _matched(record.owners, len(owners))
    if len(before) != len(owners):
        raise ValueError(
            f"the cache holds {len(before)} rows of several adapters and this batch has {len(owners)} rows, so "
            "nothing tells which rows belong together: use one cache per adapter, or generate without past_key_values"
        )
    faults = [i for i, (old, new) in enumerate(zip(before, owners, strict=True)) if old not in (None, new)]
    if faults:
        raise ValueError(
            f"rows {faults[:8]} of the cache hold keys and values of a prompt that another adapter has read, or this "
            "one before its weights changed: a cache belongs to one adapter; leave past_key_values out to read the "
            "whole conversation with this adapter"
        )


def _matched(owners: Owners, num_rows: int) -> Owners:
    """Returns the owner of each row of a batch where rows can be matched, else the owners as they are."""
    if len(set(owners)) == 1:
        return owners[:1] * num_rows
    copies, rest = divmod(num_rows, len(owners))
    return owners if rest else tuple(owner for owner in owners for _ in range(copies))


def _put(cache: Any, record: CacheRecord) -> None:
    try:
        setattr(cache, ATTRIBUTE, record)
    except AttributeError:
        # a list, as RWKV's
        return
