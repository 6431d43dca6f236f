"""What operators do with identities: list, give an owner, suspend, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.errors import InvalidRequest, UnknownObject
from broker.core.facts import Lifecycle
from broker.core.lease import Cause
from broker.service import moves
from broker.service.kill import PAGE, PAGES_MAX, end_tasks_of
from inventory import identities, ledger
from inventory.identities import Identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.lease import Lease
    from broker.service.context import Context
    from inventory.store.writer import Transaction

__all__ = ["Identity", "InventoryAdmin"]


class InventoryAdmin:
    """The inventory as operators handle it."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def page(self, *, after: str = "", limit: int = 100, query: str = "") -> Sequence[Identity]:
        """Return a page of identities; `query` is a prefix of SPIFFE ID, owner or team."""
        return identities.page(self._ctx.store.reader, after=after, limit=limit, query=query)

    def get(self, spiffe_id: str) -> Identity:
        """Return one identity, or raise `UnknownObject`."""
        known = identities.get(self._ctx.store.reader, spiffe_id)
        if known is None:
            raise UnknownObject
        return known

    def live_leases(self, spiffe_id: str) -> Sequence[Lease]:
        """Return a page of the identity's leases that have not ended."""
        return ledger.live_of_identity(self._ctx.store.reader, spiffe_id)

    async def set_owner(
        self, spiffe_id: str, *, owner: str, team: str | None, environment: str | None, actor: str
    ) -> Identity:
        """Give an identity an accountable owner."""
        now_ms = self._ctx.clock.now_ms()

        def change(tx: Transaction) -> None:
            known = identities.get(tx, spiffe_id)
            if known is None:
                raise UnknownObject
            identities.set_owner(
                tx, known, owner=owner, team=team, environment=environment, at_ms=now_ms, actor=actor
            )

        await self._ctx.store.writer.run(change)
        return self.get(spiffe_id)

    async def suspend(self, spiffe_id: str, *, reason: str, actor: str) -> Identity:
        """Suspend an identity: it gets nothing, and loses what it has."""
        await self._set_lifecycle(spiffe_id, Lifecycle.SUSPENDED, reason=reason, actor=actor)
        await end_tasks_of(self._ctx, spiffe_id, actor, reason)

        def end_page(tx: Transaction) -> int:
            page = ledger.live_of_identity(tx, spiffe_id, PAGE)
            moves.end_all(self._ctx, tx, page, Cause.SUSPENDED, actor=actor)
            return len(page)

        for _ in range(PAGES_MAX):
            if await self._ctx.store.writer.run(end_page) < PAGE:
                break
        return self.get(spiffe_id)

    async def resume(self, spiffe_id: str, *, reason: str, actor: str) -> Identity:
        """Let a suspended identity ask again; what it lost stays lost."""
        await self._set_lifecycle(spiffe_id, Lifecycle.ACTIVE, reason=reason, actor=actor)
        return self.get(spiffe_id)

    async def _set_lifecycle(self, spiffe_id: str, target: Lifecycle, *, reason: str, actor: str) -> None:
        now_ms = self._ctx.clock.now_ms()

        def change(tx: Transaction) -> None:
            known = identities.get(tx, spiffe_id)
            if known is None:
                raise UnknownObject
            if known.lifecycle is target:
                return
            if not identities.set_lifecycle(tx, known, target, at_ms=now_ms, actor=actor, reason=reason):
                raise InvalidRequest(
                    f"An identity that is {known.lifecycle} cannot become {target}; "
                    "only a suspended one is resumed, and a retired one stays retired."
                )

        await self._ctx.store.writer.run(change)
