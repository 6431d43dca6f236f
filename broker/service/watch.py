"""Waiting for proof: who wants to know when leases have reached their end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.ids import LeaseId

WAIT_SECONDS_MAX = 30


class LeaseWatch:
    """Tells waiters in this process of terminal states, from the commit that made them so."""

    def __init__(self) -> None:
        self._waiters: defaultdict[LeaseId, set[asyncio.Future[None]]] = defaultdict(set)

    def ended(self, lease_id: LeaseId) -> None:
        """Tell waiters that a lease is terminal."""
        for future in self._waiters.pop(lease_id, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, lease_ids: Iterable[LeaseId], *, seconds: float) -> None:
        """Return when all leases have ended or the time is up, whichever comes first.

        The caller reads the ledger afterwards either way; this only says when to look.
        """
        loop = asyncio.get_running_loop()
        pending = {lease_id: loop.create_future() for lease_id in lease_ids}
        if not pending:
            return
        for lease_id, future in pending.items():
            self._waiters[lease_id].add(future)
        try:
            await asyncio.wait(pending.values(), timeout=min(seconds, WAIT_SECONDS_MAX))
        finally:
            for lease_id, future in pending.items():
                future.cancel()
                self._forget(lease_id, future)

    def _forget(self, lease_id: LeaseId, future: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(lease_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                del self._waiters[lease_id]
