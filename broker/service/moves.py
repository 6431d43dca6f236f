"""Moving leases: the ledger's guarded move, plus what must follow its commit.

Every service moves leases through here, so that no commit forgets to wake the sweeper,
tell the waiters or count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.clock import MS_PER_SECOND
from broker.core.lease import ENDING, NEVER_ACTIVE, TERMINAL, Cause, Lease, LeaseState, urgency_of
from inventory import findings, ledger, tasks
from inventory.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.core.audit import JsonValue
    from broker.service.context import Context
    from inventory.store.writer import Transaction

FINDING_OUTLIVES = "value-outlives-lease"
FINDING_STUCK = "lease-stuck"


def created(ctx: Context, tx: Transaction, lease: Lease, *, actor: str, **more: Any) -> None:
    """Insert a lease and count it once durable."""
    ledger.insert(tx, lease, actor=actor, **more)
    tx.after_commit(lambda: ctx.telemetry.live(lease.adapter, 1))
    if lease.state in ENDING:
        tx.after_commit(ctx.sweep_due.set)


def move(
    ctx: Context,
    tx: Transaction,
    lease: Lease,
    target: LeaseState,
    cause: Cause,
    *,
    actor: str,
    fields: Mapping[str, JsonValue] | None = None,
    text: Mapping[str, str] | None = None,
    **changes: Any,
) -> Lease | None:
    """Move a lease; None where somebody else moved it first."""
    now_ms = ctx.clock.now_ms()
    moved = ledger.move(
        tx, lease, target, cause, at_ms=now_ms, actor=actor, fields=fields, text=text, **changes
    )
    if moved is None:
        return None
    if target in TERMINAL:
        tx.after_commit(lambda: _report_end(ctx, lease, moved, now_ms))
        if lease.stuck:
            findings.close_finding(tx, FINDING_STUCK, lease.id, at_ms=now_ms, actor=actor)
    elif target is LeaseState.REVOKE_PENDING:
        tx.after_commit(ctx.sweep_due.set)
    ends = lease.ended_ms is None and moved.ended_ms is not None
    if ends and tasks.end_inline(tx, lease.task_id, at_ms=now_ms, actor=actor):
        tx.after_commit(lambda: ctx.known.forget_task(lease.task_id))
    return moved


def end(
    ctx: Context,
    tx: Transaction,
    lease: Lease,
    cause: Cause,
    *,
    actor: str,
    text: Mapping[str, str] | None = None,
) -> Lease | None:
    """Send a lease towards its end by the shortest legal way; None where nothing changed.

    A lease that is ending already is only brought forward in the queue.
    """
    now_ms = ctx.clock.now_ms()
    backend = ctx.backends.get(lease.adapter)
    if lease.state in ENDING:
        hurried = ledger.hurry(tx, lease, urgency=urgency_of(cause), at_ms=now_ms)
        tx.after_commit(ctx.sweep_due.set)
        return hurried
    if lease.state in TERMINAL:
        return None
    if lease.state not in NEVER_ACTIVE and backend is not None:
        if not backend.has_external_effect:
            evidence = {"basis": "ledger", "introspection": "inactive", "ended_ms": now_ms}
            return move(ctx, tx, lease, LeaseState.REVOKED, cause, actor=actor, text=text, evidence=evidence)
        if backend.outlives_the_lease:
            return _hand_out(ctx, tx, lease, cause, actor=actor, text=text)
    return move(
        ctx,
        tx,
        lease,
        LeaseState.REVOKE_PENDING,
        cause,
        actor=actor,
        text=text,
        next_action_ms=now_ms,
        attempts=0,
        first_failed_ms=None,
    )


def end_all(
    ctx: Context, tx: Transaction, leases: Iterable[Lease], cause: Cause, *, actor: str
) -> list[Lease]:
    """End several leases in one transaction and return those that changed."""
    changed = [end(ctx, tx, lease, cause, actor=actor) for lease in leases]
    return [lease for lease in changed if lease is not None]


def _hand_out(
    ctx: Context,
    tx: Transaction,
    lease: Lease,
    cause: Cause,
    *,
    actor: str,
    text: Mapping[str, str] | None,
) -> Lease | None:
    moved = move(ctx, tx, lease, LeaseState.HANDED_OUT, cause, actor=actor, text=text)
    if moved is not None:
        findings.open_finding(
            tx,
            Finding(FINDING_OUTLIVES, lease.id, {"resource": lease.resource}, ctx.clock.now_ms()),
            actor=actor,
        )
    return moved


def _report_end(ctx: Context, before: Lease, lease: Lease, now_ms: int) -> None:
    lag_ms = now_ms - (lease.ended_ms if lease.ended_ms is not None else now_ms)
    ctx.telemetry.live(lease.adapter, -1)
    if before.stuck:
        ctx.telemetry.stuck(lease.adapter, -1)
    ctx.telemetry.ended(lease.adapter, lease.state, lease.cause, lag_ms / MS_PER_SECOND)
    ctx.watch.ended(lease.id)
