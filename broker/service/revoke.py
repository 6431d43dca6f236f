"""A caller's own leases: look at one, give one back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.errors import UnknownObject
from broker.core.lease import TERMINAL, Cause
from broker.service import moves
from inventory import ledger

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.ids import LeaseId
    from broker.core.lease import Lease
    from broker.service.context import Context
    from inventory.store.writer import Transaction


class Revoke:
    """Serves a caller's reads and releases of its leases."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def get(self, caller: Caller, lease_id: LeaseId) -> Lease:
        """Return the caller's own lease; `UnknownObject` for any other (DESIGN 6)."""
        lease = ledger.get(self._ctx.store.reader, lease_id)
        if lease is None or lease.identity != caller.spiffe_id:
            raise UnknownObject
        return lease

    async def release(
        self, caller: Caller, lease_id: LeaseId, *, reason: str = "", wait_seconds: float = 0
    ) -> Lease:
        """End the caller's own lease; harmless when repeated. Waits for proof up to `wait_seconds`."""
        self.get(caller, lease_id)
        text = {"reason": reason} if reason else None

        def end(tx: Transaction) -> None:
            lease = ledger.get(tx, lease_id)
            if lease is not None and lease.ended_ms is None:
                moves.end(self._ctx, tx, lease, Cause.RELEASED, actor=caller.spiffe_id, text=text)

        await self._ctx.store.writer.run(end)
        lease = self.get(caller, lease_id)
        if lease.state not in TERMINAL and wait_seconds > 0:
            await self._ctx.watch.wait([lease_id], seconds=wait_seconds)
            lease = self.get(caller, lease_id)
        return lease
