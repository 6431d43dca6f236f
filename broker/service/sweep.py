"""The sweeper: ends what is due, revokes, verifies, and never gives up (DESIGN 4).

One loop per process. It claims due leases in bounded pages, per backend and most urgent
first. Every commit to REVOKE_PENDING wakes it; the tick is the backstop. All state is in
the ledger: a sweeper that dies loses nothing, another takes its claims over.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from broker.core.clock import MS_PER_SECOND
from broker.core.errors import BrokerError
from broker.core.ids import lease_of_backend_name
from broker.core.lease import ENDING, Cause, Lease, LeaseState
from broker.core.ports import Presence, Target
from broker.core.secret import Secret
from broker.core.task import TaskEndCause
from broker.service import moves
from broker.service.kill import finish_kills
from broker.service.limits import (
    BACKOFF_SECONDS_MAX,
    NATIVE_EXPIRY_SKEW_SECONDS,
    PLANNED_SECONDS_MAX,
    STUCK_AFTER_SECONDS,
    STUCK_RETRY_SECONDS,
)
from broker.service.tasks import end_task
from inventory import findings, ledger
from inventory import tasks as task_rows
from inventory.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from broker.core.ports import Verification
    from broker.service.backends import Backend
    from broker.service.context import Context
    from inventory.store.writer import Transaction

log = structlog.get_logger(__name__)

T = TypeVar("T")

ACTOR: Final = "sweeper"
PAGE: Final = 100
"""Leases moved per transaction: issue keeps its latency during a sweep (DESIGN 13)."""

JUMP_MS: Final = 1000
"""A clock that went back by more than this has jumped; by less it was disciplined."""

_BEGINNING: Final = frozenset({LeaseState.INTENT, LeaseState.PREPARED, LeaseState.ACTIVE})


class Sweeper:
    """Drives every lease from its due time to its end."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._working: set[asyncio.Task[None]] = set()
        self._busy: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_ms: int | None = None

    def start(self) -> None:
        """Begin to sweep on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="sweeper")

    async def close(self) -> None:
        """Stop claiming and let the work in hand finish."""
        self._stopping = True
        self._ctx.sweep_due.set()
        if self._task is not None:
            await self._task
        if self._working:
            await asyncio.wait(self._working)

    async def drain(self) -> None:
        """Sweep until nothing is due now: for tests, tools and shutdown."""
        while await self.sweep_once() or self._working:
            if self._working:
                await asyncio.wait(self._working, return_when=asyncio.FIRST_COMPLETED)

    async def _run(self) -> None:
        while not self._stopping:
            self._ctx.sweep_due.clear()
            try:
                did_something = await self.sweep_once()
            except BrokerError as error:
                # The ledger is down or full: nothing is lost, the next tick tries again.
                log.warning("sweep.postponed", code=error.code)
                did_something = False
            except Exception:
                # Whatever it was, a sweeper that stops revokes nothing any more (rule 7).
                log.exception("sweep.failed")
                did_something = False
            if not did_something:
                await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._ctx.limits.sweep_tick_seconds):
                await self._ctx.sweep_due.wait()
        except TimeoutError:
            return

    async def sweep_once(self) -> bool:
        """Start everything that is due and has room; say whether anything was."""
        if self._last_ms is None:
            await finish_kills(self._ctx)
        await self._follow_clock()
        did_something = await self._end_overdue_tasks()
        for backend in self._ctx.backends:
            if await self._sweep_backend(backend):
                did_something = True
        return did_something

    async def _sweep_backend(self, backend: Backend) -> bool:
        try:
            ended = await self._end_due_leases(backend)
            return await self._claim(backend) or ended
        except BrokerError:
            raise
        except Exception:
            # A row or an adapter that breaks this backend's sweep holds up no other backend.
            log.exception("sweep.backend_failed", backend=backend.name)
            return False

    async def _follow_clock(self) -> None:
        """Move what is planned back with a clock that jumped back, so that no retry waits for it.

        At the start there is nothing to compare with: what a dead process had claimed, and what
        lies further ahead than anything is planned, is due now.
        """
        now_ms = self._ctx.clock.now_ms()
        last_ms = self._last_ms
        if last_ms is None:
            latest_ms = now_ms + PLANNED_SECONDS_MAX * MS_PER_SECOND
            await self._ctx.store.writer.run(lambda tx: ledger.bring_forward(tx, latest_ms, now_ms))
        elif last_ms - now_ms > JUMP_MS:
            log.warning("sweep.clock_jumped_back", ms=last_ms - now_ms)
            await self._ctx.store.writer.run(lambda tx: ledger.pull_back(tx, last_ms - now_ms))
        self._last_ms = now_ms

    # --- what ends by time -----------------------------------------------------------------------

    async def _end_overdue_tasks(self) -> bool:
        now_ms = self._ctx.clock.now_ms()
        overdue = task_rows.overdue(self._ctx.store.reader, now_ms)
        for task in overdue:
            await self._ctx.store.writer.run(
                partial(end_task, self._ctx, task=task, cause=TaskEndCause.DEADLINE, actor=ACTOR)
            )
        return bool(overdue)

    async def _end_due_leases(self, backend: Backend) -> bool:
        """Move expired leases and mints past their deadline towards their end, a page at a time."""
        now_ms = self._ctx.clock.now_ms()
        if not ledger.has_due(self._ctx.store.reader, backend.name, _BEGINNING, now_ms=now_ms):
            return False

        def expire(tx: Transaction) -> None:
            for lease in ledger.due(tx, backend.name, _BEGINNING, now_ms=now_ms, limit=PAGE):
                cause = Cause.EXPIRY if lease.state is LeaseState.ACTIVE else Cause.MINT_DEADLINE
                moves.end(self._ctx, tx, lease, cause, actor=ACTOR)

        await self._ctx.store.writer.run(expire)
        return True

    # --- what must be revoked --------------------------------------------------------------------

    async def _claim(self, backend: Backend) -> bool:
        """Claim what this backend has room for and set to work on it."""
        room = self._ctx.limits.end_concurrency - self._busy.get(backend.name, 0)
        now_ms = self._ctx.clock.now_ms()
        if room <= 0 or not ledger.has_due(self._ctx.store.reader, backend.name, ENDING, now_ms=now_ms):
            return False
        if not backend.breaker.admits():
            return False
        if backend.breaker.is_open:
            room = 1  # a trial: one lease finds out whether the backend is back
        claimed = await self._ctx.store.writer.run(
            lambda tx: ledger.claim_due(
                tx,
                backend.name,
                ENDING,
                now_ms=now_ms,
                visibility_ms=self._ctx.limits.claim_visibility_seconds * MS_PER_SECOND,
                limit=room,
            )
        )
        for lease in claimed:
            self._start_work(backend, lease)
        return bool(claimed)

    def _start_work(self, backend: Backend, lease: Lease) -> None:
        self._busy[backend.name] = self._busy.get(backend.name, 0) + 1
        task = asyncio.get_running_loop().create_task(self._work(backend, lease))
        self._working.add(task)

        def done(finished: asyncio.Task[None]) -> None:
            self._working.discard(finished)
            self._busy[backend.name] -= 1
            self._ctx.sweep_due.set()
            if not finished.cancelled() and finished.exception() is not None:
                log.error("sweep.work_failed", lease_id=lease.id, exc_info=finished.exception())

        task.add_done_callback(done)

    async def _work(self, backend: Backend, lease: Lease) -> None:
        """Take one claimed lease as far as it goes now."""
        try:
            if self._may_end_by_expiry(backend, lease):
                await self._end_by_expiry(lease)
            elif backend.ends_only_by_expiry:
                await self._postpone(lease, until_ms=_native_end_ms(lease))
            else:
                await self._revoke_and_verify(backend, lease)
        except BrokerError as error:
            # The ledger refused a write: the claim runs out and somebody takes the lease over.
            log.warning("sweep.lease_postponed", lease_id=lease.id, code=error.code)

    async def _revoke_and_verify(self, backend: Backend, lease: Lease) -> None:
        try:
            target = self._target(backend, lease)
            # A verification that failed may have failed for want of a fence, which a backend
            # restored from its backup has lost: revoking is idempotent, and brings it back.
            if lease.state is LeaseState.REVOKE_PENDING or lease.attempts > 0:
                await self._call(backend, backend.adapter.revoke(target))
            if lease.state is LeaseState.REVOKE_PENDING:
                accepted = await self._accepted(backend, lease)
                if accepted is None or backend.needs_second_look(lease):
                    return
                lease = accepted
            if self._is_too_early(backend, lease):
                await self._postpone(lease, until_ms=backend.last_effect_ms(lease))
                return
            verification = await self._call(backend, backend.adapter.verify(target))
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001  any vendor's exception: the lease is retried, for ever
            await self._failed(lease, type(error).__name__)
            return
        await self._verified(lease, verification)

    async def _call(self, backend: Backend, call: Awaitable[T]) -> T:
        """Await one call of an adapter, no longer than the claim on its lease lasts."""
        with backend.observed():
            async with asyncio.timeout(self._ctx.limits.claim_visibility_seconds):
                return await call

    def _is_too_early(self, backend: Backend, lease: Lease) -> bool:
        """Whether absence would be no proof yet, because a mint may still be in flight (rule 5)."""
        return backend.needs_second_look(lease) and self._ctx.clock.now_ms() < backend.last_effect_ms(lease)

    async def _accepted(self, backend: Backend, lease: Lease) -> Lease | None:
        """Record that the backend accepted the revocation."""
        now_ms = self._ctx.clock.now_ms()
        due_ms = now_ms + self._ctx.limits.claim_visibility_seconds * MS_PER_SECOND
        if backend.needs_second_look(lease):
            # Counted from now as well: the clock may have jumped since the lease was recorded.
            in_flight_ms = now_ms + backend.capabilities.t_inflight_seconds * MS_PER_SECOND
            due_ms = max(in_flight_ms, backend.last_effect_ms(lease))
        return await self._move(lease, LeaseState.VERIFYING, lease.cause, next_action_ms=due_ms)

    async def _verified(self, lease: Lease, verification: Verification) -> None:
        match verification.presence:
            case Presence.ABSENT:
                evidence = {**verification.evidence, "verified_ms": self._ctx.clock.now_ms()}
                await self._move(lease, LeaseState.REVOKED, lease.cause, evidence=evidence)
            case Presence.PRESENT:
                await self._failed(lease, "still present after revocation", present=True)
            case Presence.UNKNOWN:
                await self._failed(lease, "verification saw neither presence nor absence")

    def _target(self, backend: Backend, lease: Lease) -> Target:
        granted = self._ctx.catalog.action(lease.resource, lease.action)
        recipe = backend.recipes[0] if granted is None and backend.recipes else {}
        kept = None
        if lease.sealed is not None:
            kept = Secret(self._ctx.keys.unseal(lease.sealed, lease.id.encode()))
        # An orphan of an ended lease has an id of its own; the backend knows the one in the name.
        named_after = lease_of_backend_name(self._ctx.store.instance, lease.backend_name)
        return Target(
            lease_id=named_after or lease.id,
            backend_name=lease.backend_name,
            recipe=recipe if granted is None else granted.recipe,
            handle=lease.handle,
            kept=kept,
        )

    # --- what failed -----------------------------------------------------------------------------

    async def _failed(self, lease: Lease, error: str, *, present: bool = False) -> None:
        """Schedule the next attempt; after ten minutes of failure the lease is stuck, and still tried.

        `present`: verification saw it, so it has to be revoked anew.
        """
        changes = {**self._retry_changes(lease), "last_error": error}
        becomes_stuck = bool(changes["stuck"]) and not lease.stuck

        def record(tx: Transaction) -> None:
            if present:
                target = LeaseState.REVOKE_PENDING
                kept = moves.move(self._ctx, tx, lease, target, lease.cause, actor=ACTOR, **changes)
            else:
                kept = ledger.postpone(tx, lease, **changes)
            if kept is None or not becomes_stuck:
                return
            now_ms = self._ctx.clock.now_ms()
            evidence = {"adapter": lease.adapter, "resource": lease.resource, "error": error}
            findings.open_finding(tx, Finding(moves.FINDING_STUCK, lease.id, evidence, now_ms), actor=ACTOR)
            tx.after_commit(lambda: self._ctx.telemetry.stuck(lease.adapter, 1))

        await self._ctx.store.writer.run(record)
        level = log.error if becomes_stuck else log.warning
        level("sweep.revocation_failed", lease_id=lease.id, attempts=changes["attempts"], error=error)

    def _retry_changes(self, lease: Lease) -> dict[str, Any]:
        """Full-jitter backoff for ten minutes, then every fifteen (rule 7)."""
        now_ms = self._ctx.clock.now_ms()
        first_failed_ms = now_ms if lease.first_failed_ms is None else lease.first_failed_ms
        attempts = lease.attempts + 1
        # Stuck is left by an end only: a clock that jumps back unsays no alert.
        stuck = lease.stuck or now_ms - first_failed_ms >= STUCK_AFTER_SECONDS * MS_PER_SECOND
        if stuck:
            delay_ms = STUCK_RETRY_SECONDS * MS_PER_SECOND
        else:
            ceiling = min(BACKOFF_SECONDS_MAX, 2 ** min(attempts - 1, 16))
            delay_ms = int(random.uniform(0.1, 1) * ceiling * MS_PER_SECOND)  # noqa: S311  jitter, not a secret
        return {
            "attempts": attempts,
            "first_failed_ms": first_failed_ms,
            "stuck": stuck,
            "next_action_ms": now_ms + delay_ms,
        }

    # --- what only time ends ---------------------------------------------------------------------

    def _may_end_by_expiry(self, backend: Backend, lease: Lease) -> bool:
        if self._ctx.clock.now_ms() < _native_end_ms(lease):
            return False
        if backend.ends_only_by_expiry:
            return True
        return lease.stuck and backend.capabilities.expiry_ends_sessions

    async def _end_by_expiry(self, lease: Lease) -> None:
        evidence = {"basis": "native expiry, not revoked", "not_after_ms": lease.not_after_ms}
        await self._move(lease, LeaseState.EXPIRED, Cause.NATIVE_EXPIRY, evidence=evidence)

    async def _postpone(self, lease: Lease, *, until_ms: int) -> None:
        await self._ctx.store.writer.run(lambda tx: ledger.postpone(tx, lease, next_action_ms=until_ms))

    async def _move(self, lease: Lease, target: LeaseState, cause: Cause, **changes: Any) -> Lease | None:
        return await self._ctx.store.writer.run(
            lambda tx: moves.move(self._ctx, tx, lease, target, cause, actor=ACTOR, **changes)
        )


def _native_end_ms(lease: Lease) -> int:
    return lease.not_after_ms + NATIVE_EXPIRY_SKEW_SECONDS * MS_PER_SECOND
