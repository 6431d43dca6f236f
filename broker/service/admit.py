"""Admission: first sight, lifecycle, last use. Every request of a caller passes here first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from broker.core.errors import IdentityRefused
from broker.core.facts import Lifecycle
from inventory import identities

if TYPE_CHECKING:
    from broker.core.caller import Caller
    from broker.core.facts import IdentityFacts
    from broker.service.context import Context
    from inventory.store.writer import Transaction

BARRED: Final = frozenset({Lifecycle.SUSPENDED, Lifecycle.RETIRED})
"""Where an identity gets nothing, and nothing of it is active."""

TOUCH_EVERY_MS: Final = 60_000
"""Last use is written at most once per identity and minute (DESIGN 8)."""

TOUCHED_MAX: Final = 100_000
"""Identities whose last write is remembered; forgetting one costs one write."""


class Admission:
    """Turns an authenticated caller into what the inventory knows of it, or refuses it."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._touched_ms: dict[str, int] = {}

    async def admit(self, caller: Caller) -> IdentityFacts:
        """Return the caller's facts.

        Raises:
            IdentityRefused: suspended, retired, or ownerless where an owner is required.

        """
        facts = self._ctx.known.identity(caller.spiffe_id)
        if facts is None or facts.lifecycle is Lifecycle.DISCOVERED:
            facts = await self._first_sight(caller)
        check_not_barred(facts, require_owner=self._ctx.limits.require_owner)
        await self._touch(caller)
        return facts

    async def _first_sight(self, caller: Caller) -> IdentityFacts:
        now_ms = self._ctx.clock.now_ms()
        registration = self._ctx.registrations.get(caller.spiffe_id)

        def record(tx: Transaction) -> IdentityFacts:
            identities.record_first_sight(tx, caller.spiffe_id, registration, at_ms=now_ms)
            facts = identities.facts(tx, caller.spiffe_id)
            if facts is None:
                raise RuntimeError("an identity recorded a moment ago is gone")
            return facts

        self._touched_ms[caller.spiffe_id] = now_ms
        return await self._ctx.store.writer.run(record)

    async def _touch(self, caller: Caller) -> None:
        now_ms = self._ctx.clock.now_ms()
        if now_ms - self._touched_ms.get(caller.spiffe_id, 0) < TOUCH_EVERY_MS:
            return
        if len(self._touched_ms) >= TOUCHED_MAX:
            self._touched_ms.clear()
        self._touched_ms[caller.spiffe_id] = now_ms
        await self._ctx.store.writer.run(lambda tx: identities.touch(tx, caller.spiffe_id, at_ms=now_ms))


def check_not_barred(facts: IdentityFacts, *, require_owner: bool) -> None:
    """Raise `IdentityRefused` where the inventory bars the identity."""
    if facts.lifecycle in BARRED:
        raise IdentityRefused(
            f"This identity is {facts.lifecycle} in the inventory and gets nothing. "
            "Ask its owner, or an operator, to resume it."
        )
    if require_owner and not facts.owner:
        raise IdentityRefused(
            "This identity has no owner in the inventory, and this broker issues nothing to an orphan. "
            "Ask an operator to run: nhi inventory set-owner."
        )
