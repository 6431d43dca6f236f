"""The kill switch: one transaction stops a scope at once, its leases then move in pages (DESIGN 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from broker.core.errors import InvalidRequest, UnknownObject
from broker.core.ids import MalformedIdError, TaskId
from broker.core.lease import Cause
from broker.core.task import TaskEndCause
from broker.service import moves
from broker.service.tasks import end_task
from inventory import identities, kills, ledger
from inventory import tasks as task_rows
from inventory.kills import Kill, KillScope

if TYPE_CHECKING:
    from broker.core.lease import Lease
    from broker.service.context import Context
    from inventory.store.writer import Transaction

__all__ = ["KillOrder", "KillResult", "KillScope", "KillSwitch", "end_tasks_of"]

ACTOR: Final = "broker"
"""Who finishes what an operator ordered before a restart."""

PAGE: Final = 100
PAGES_MAX: Final = 100_000
"""Bound on one kill: ten million leases; a kill repeated goes on where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillOrder:
    """What an operator orders."""

    scope: KillScope
    value: str
    reason: str
    actor: str


@dataclass(frozen=True, slots=True)
class KillResult:
    """What a kill moved so far; the sweeper proves the rest."""

    scope: KillScope
    value: str
    tasks_ended: int
    leases_moved: int


class KillSwitch:
    """Kills by task, identity, owner and resource."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def kill(self, order: KillOrder) -> KillResult:
        """Stop a scope and send everything live in it towards its end.

        Raises:
            UnknownObject: there is no such task.
            InvalidRequest: there is no such resource or identity to kill.

        """
        match order.scope:
            case KillScope.TASK:
                return await self._kill_task(order)
            case KillScope.IDENTITY | KillScope.OWNER | KillScope.RESOURCE:
                return await self._kill_scope(order)

    async def lift(self, order: KillOrder) -> bool:
        """Lift a kill; False where there was none. What it ended stays ended."""
        now_ms = self._ctx.clock.now_ms()
        return await self._ctx.store.writer.run(
            lambda tx: kills.lift(
                tx, order.scope, order.value, reason=order.reason, actor=order.actor, at_ms=now_ms
            )
        )

    async def _kill_task(self, order: KillOrder) -> KillResult:
        try:
            task = task_rows.get(self._ctx.store.reader, TaskId.parse(order.value))
        except MalformedIdError as error:
            raise InvalidRequest("A task id looks like tsk_ and 16 characters.") from error
        if task is None:
            raise UnknownObject
        live = len(ledger.live_of_task(self._ctx.store.reader, task.id))
        ended = await self._ctx.store.writer.run(
            lambda tx: end_task(
                self._ctx, tx, task, TaskEndCause.KILL, actor=order.actor, reason=order.reason
            )
        )
        return KillResult(order.scope, order.value, 0 if ended is None else 1, live)

    async def _kill_scope(self, order: KillOrder) -> KillResult:
        self._check_exists(order)
        kill = Kill(order.scope, order.value, order.reason, order.actor, self._ctx.clock.now_ms())
        await self._ctx.store.writer.run(lambda tx: kills.mark(tx, kill))
        return await _end_scope(self._ctx, kill)

    def _check_exists(self, order: KillOrder) -> None:
        """Refuse a typing error: a kill of nothing would look like success in an incident."""
        match order.scope:
            case KillScope.RESOURCE:
                known = self._ctx.catalog.resource(order.value) is not None
            case KillScope.OWNER:
                known = bool(identities.of_owner(self._ctx.store.reader, order.value))
            case _:
                known = identities.get(self._ctx.store.reader, order.value) is not None
        if not known:
            raise InvalidRequest(
                f"There is no such {order.scope} in the inventory or catalog; nothing was killed. "
                "Check the spelling."
            )


async def finish_kills(ctx: Context) -> None:
    """Move what a kill or a suspension left behind because the broker stopped between its pages.

    The scope was closed by the kill's first commit; this ends what was issued before it.
    """
    for kill in kills.every(ctx.store.reader):
        await _end_scope(ctx, kill)
    for spiffe_id in identities.barred_but_live(ctx.store.reader):
        await end_tasks_of(ctx, spiffe_id, ACTOR, "suspended")
        live = partial(ledger.live_of_identity, spiffe_id=spiffe_id, limit=PAGE)
        await end_pages(ctx, live, Cause.SUSPENDED, actor=ACTOR)


async def _end_scope(ctx: Context, kill: Kill) -> KillResult:
    """End everything live in a scope that is marked as killed."""
    tasks_ended = leases_moved = 0
    for spiffe_id in _identities_in(ctx, kill):
        tasks, with_them = await end_tasks_of(ctx, spiffe_id, kill.actor, kill.reason)
        tasks_ended += tasks
        leases_moved += with_them
        live = partial(ledger.live_of_identity, spiffe_id=spiffe_id, limit=PAGE)
        leases_moved += await end_pages(ctx, live, Cause.KILL, actor=kill.actor)
    if kill.scope is KillScope.RESOURCE:
        live = partial(ledger.live_of_resource, resource=kill.value, limit=PAGE)
        leases_moved = await end_pages(ctx, live, Cause.KILL, actor=kill.actor)
    return KillResult(kill.scope, kill.value, tasks_ended, leases_moved)


def _identities_in(ctx: Context, kill: Kill) -> list[str]:
    """Return whom a kill covers; read after it was marked, so that nobody slips in between."""
    match kill.scope:
        case KillScope.IDENTITY:
            return [kill.value]
        case KillScope.OWNER:
            return identities.of_owner(ctx.store.reader, kill.value)
        case KillScope.RESOURCE | KillScope.TASK:
            return []


async def end_pages(ctx: Context, live: LivePage, cause: Cause, *, actor: str) -> int:
    """End leases page by page, so that nobody else's request waits behind them; returns how many."""

    def end_page(tx: Transaction) -> int:
        page = live(tx)
        moves.end_all(ctx, tx, page, cause, actor=actor)
        return len(page)

    moved = 0
    for _ in range(PAGES_MAX):
        in_page = await ctx.store.writer.run(end_page)
        moved += in_page
        if in_page < PAGE:
            break
    return moved


async def end_tasks_of(ctx: Context, spiffe_id: str, actor: str, reason: str) -> tuple[int, int]:
    """End an identity's open tasks, each in its own transaction; returns how many, and their live leases."""
    ended = moved = 0
    for _ in range(PAGES_MAX):
        page = task_rows.open_of_identity(ctx.store.reader, spiffe_id)
        for task in page:
            live = len(ledger.live_of_task(ctx.store.reader, task.id))
            done = await ctx.store.writer.run(
                partial(end_task, ctx, task=task, cause=TaskEndCause.KILL, actor=actor, reason=reason)
            )
            if done is not None:
                ended, moved = ended + 1, moved + live
        if not page:
            break
    return ended, moved


if TYPE_CHECKING:
    from collections.abc import Callable

    LivePage = Callable[[Transaction], list[Lease]]
