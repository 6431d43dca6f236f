"""What operators do with leases: list, hurry a retry, give one up with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.audit import AuditKind, AuditRecord
from broker.core.errors import InvalidRequest, UnknownObject
from broker.core.lease import ENDING, Cause, Lease, LeaseState, Urgency
from broker.service import moves
from inventory import ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.ids import LeaseId
    from broker.service.context import Context
    from inventory.store.writer import Transaction


class LeaseAdmin:
    """The ledger as operators handle it."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def page(
        self,
        *,
        after: str = "",
        limit: int = 100,
        state: LeaseState | None = None,
        stuck: bool | None = None,
    ) -> Sequence[Lease]:
        """Return a page of leases in id order."""
        return ledger.page(self._ctx.store.reader, after=after, limit=limit, state=state, stuck=stuck)

    def get(self, lease_id: LeaseId) -> Lease:
        """Return one lease, or raise `UnknownObject`."""
        lease = ledger.get(self._ctx.store.reader, lease_id)
        if lease is None:
            raise UnknownObject
        return lease

    async def retry(self, lease_id: LeaseId, *, actor: str) -> Lease:
        """Try to revoke an ending lease now instead of at its next due time."""

        def hurry(tx: Transaction) -> None:
            lease = self._ending(tx, lease_id)
            now_ms = self._ctx.clock.now_ms()
            if ledger.hurry(tx, lease, urgency=Urgency.COMPROMISE, at_ms=now_ms) is None:
                return
            tx.audit(
                AuditRecord(
                    kind=AuditKind.LEASE_RETRIED,
                    at_ms=now_ms,
                    actor=actor,
                    lease_id=lease.id,
                    task_id=lease.task_id or None,
                    identity=lease.identity or None,
                )
            )
            tx.after_commit(self._ctx.sweep_due.set)

        await self._ctx.store.writer.run(hurry)
        return self.get(lease_id)

    async def abandon(self, lease_id: LeaseId, *, reason: str, actor: str) -> Lease:
        """Stop trying to end a stuck lease. The credential may still work: the reason is kept."""

        def give_up(tx: Transaction) -> None:
            lease = self._ending(tx, lease_id)
            if not lease.stuck:
                raise InvalidRequest(
                    "Only a stuck lease can be abandoned; this one is still being revoked. "
                    "Use retry, or wait."
                )
            moves.move(
                self._ctx,
                tx,
                lease,
                LeaseState.ABANDONED,
                Cause.ABANDONED,
                actor=actor,
                text={"reason": reason},
                evidence={"basis": "abandoned by an operator, not proven dead"},
            )

        await self._ctx.store.writer.run(give_up)
        return self.get(lease_id)

    def _ending(self, tx: Transaction, lease_id: LeaseId) -> Lease:
        lease = ledger.get(tx, lease_id)
        if lease is None:
            raise UnknownObject
        if lease.state not in ENDING:
            raise InvalidRequest(f"This lease is {lease.state}; only one that is being ended can be retried.")
        return lease
