"""The server processes of all ranks, asked together: what they agree on, and what they do not."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tgi_patch.gateway.errors import RETRY_AFTER_S, RequestRejected, rejection, shard_error
from tgi_patch.server.control import ask

Facts = dict[str, Any]


class Shards:
    """Asks every rank over its control socket. A rank that does not answer is {"ok": False, "kind": "silent", ...}.

    Args:
        control: directory of the sockets
        world_size: number of ranks
        ask: sends a request to one rank, as `control.ask`
    """

    def __init__(self, control: Path, world_size: int, ask: Callable[..., Facts] = ask):
        self._control = control
        self._world_size = world_size
        self._ask = ask
        self._stale: set[str] = set()

    async def ask_all(self, request: Facts, timeout_s: float = 10.0) -> list[Facts]:
        """Returns each rank's answer, in the order of the ranks. Never raises."""
        return await asyncio.gather(*(self._asked(rank, request, timeout_s) for rank in range(self._world_size)))

    async def adapters(self) -> tuple[dict[str, Facts], set[str]] | None:
        """Returns the adapters that all ranks hold alike, and the names under which they do not.

        None if a rank does not respond. Ranks with different weights under one name would generate the tokens of
        neither adapter; if only some have it, the others wait for them forever.
        """
        answers = await self.ask_all({"op": "list"})
        if not all(answer["ok"] for answer in answers):
            return None
        listed = [answer["adapters"] for answer in answers]
        names = set().union(*listed)
        alike = {name for name in names if len({_identity(held.get(name)) for held in listed}) == 1}
        return {name: facts for name, facts in listed[0].items() if name in alike}, names - alike

    async def faults(self) -> dict[str, str]:
        """Returns the adapters whose files some rank could not read again, and why."""
        answers = await self.ask_all({"op": "faults"})
        return {name: fault for answer in answers for name, fault in answer.get("faults", {}).items()}

    async def add(self, name: str, location: str) -> Facts:
        """Registers an adapter on all ranks, or on none. Returns what they report of it.

        Raises:
            RequestRejected: a rank did not take it, or they read different weights.
        """
        if name in self._stale and not await self.remove(name):
            raise rejection(503, f"adapter {name!r} is still on some shards: try again", RETRY_AFTER_S)
        refusal = await self._add(name, location)
        same, _ = (await self.adapters() if refusal is None else None) or ({}, set())
        if name in same:
            return same[name]
        await self.remove(name)
        if refusal is not None and refusal["kind"] != "taken":
            raise RequestRejected(shard_error(name, refusal))
        # the directory changed between two ranks' reads, or a rank had another adapter under this name
        raise rejection(503, f"adapter {name!r}: the shards read different weights: try again", RETRY_AFTER_S)

    async def compare(self, name: str, location: str) -> None:
        """Has all ranks compare a directory with the adapter of this name that they have.

        Raises:
            RequestRejected: its content has changed.
        """
        refusal = await self._add(name, location)
        if refusal is not None:
            raise RequestRejected(shard_error(name, refusal))

    async def remove(self, name: str) -> bool:
        """Unregisters an adapter on all ranks. Returns whether every one confirmed that it has none of this name."""
        self._stale.add(name)
        answers = await self.ask_all({"op": "remove", "name": name})
        done = all(answer["ok"] or answer["kind"] == "unknown" for answer in answers)
        if done:
            self._stale.discard(name)
        return done

    def mark_stale(self, name: str) -> None:
        """Records that a rank may have an adapter of this name that is not served."""
        self._stale.add(name)

    def is_stale(self, name: str) -> bool:
        """Returns whether a rank may have an adapter of this name that is not served."""
        return name in self._stale

    async def _add(self, name: str, location: str) -> Facts | None:
        answers = await self.ask_all({"op": "add", "name": name, "location": location}, timeout_s=300.0)
        return next((answer for answer in answers if not answer["ok"]), None)

    async def statistics(self) -> dict[str, float]:
        """Returns the counts of the first rank; empty while it is not up."""
        return (await self._asked(0, {"op": "statistics"}, 10.0)).get("statistics", {})

    async def _asked(self, rank: int, request: Facts, timeout_s: float) -> Facts:
        try:
            return await asyncio.to_thread(self._ask, self._control, rank, request, timeout_s)
        except (OSError, ValueError) as error:
            # ValueError: the connection ended before its line did
            return {"ok": False, "kind": "silent", "error": f"rank {rank} does not answer: {error}"}


def _identity(facts: Facts | None) -> Any:
    return None if facts is None else (facts.get("fingerprint"), facts.get("location"))
