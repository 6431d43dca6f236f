"""Handing out status-list positions: durable, never repeated, unpredictable."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from broker.core.status_list import StatusIndexer
from inventory import meta

if TYPE_CHECKING:
    from broker.core.ports import KeyStore
    from inventory.store.store import Store

BLOCK: Final = 4096
"""Positions reserved per ledger write; a restart forgets what is left of a block, and that is all."""

STATUS_COUNTER: Final = "status_counter"


class StatusIndices:
    """Reserves counters in blocks and maps each to its position."""

    def __init__(self, store: Store, keys: KeyStore) -> None:
        self._store = store
        self._indexer = StatusIndexer(keys.derive("status-index"))
        self._next = 0
        self._beyond = 0
        self._refill = asyncio.Lock()

    async def take(self) -> int:
        """Return a status index no lease had before."""
        while self._next >= self._beyond:
            async with self._refill:
                if self._next >= self._beyond:
                    self._next = await self._store.writer.run(
                        lambda tx: meta.reserve_block(tx, STATUS_COUNTER, BLOCK)
                    )
                    self._beyond = self._next + BLOCK
        counter = self._next
        self._next += 1
        return self._indexer.index_of(counter)
