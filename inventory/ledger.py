"""The lease ledger: guarded moves and nothing else.

Every move is one UPDATE guarded by state and claim epoch, with its audit row in the same
transaction (DESIGN 4, rule 2). A function that returns None moved nothing: somebody else
did, and the caller must act on that, never ignore it.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import orjson

from broker.core.audit import AuditKind, AuditRecord
from broker.core.ids import LeaseId, TaskId
from broker.core.lease import (
    ENDING,
    MAYBE_ALIVE,
    NEVER_ACTIVE,
    TERMINAL,
    Cause,
    Lease,
    LeaseState,
    Urgency,
    check_move,
    urgency_of,
)
from inventory.store.sql import column_names, plain, positional_insert_sql, select_sql
from inventory.store.tables import LeaseRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

    from broker.core.audit import JsonValue
    from inventory.store.writer import Transaction

CLAIM_MAX: Final = 200
"""Rows per claim: keeps a sweep from holding up issue (DESIGN 13)."""

PAGE_MAX: Final = 1000
"""Rows per read of a list."""

_NAMES: Final = column_names(LeaseRow)
_INSERT: Final = positional_insert_sql(LeaseRow)
_IN_COLUMN_ORDER: Final = attrgetter(*_NAMES)
_EVIDENCE: Final = _NAMES.index("evidence")
_SELECT: Final = select_sql(LeaseRow)
_SELECT_BY_ID: Final = select_sql(LeaseRow, "WHERE id = ?")


def _states(states: Iterable[LeaseState]) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


@cache
def _due_sql(states: frozenset[LeaseState]) -> str:
    return select_sql(
        LeaseRow,
        "WHERE adapter = ? AND urgency = ? AND next_action_ms <= ? "
        f"AND state IN ({_states(states)}) ORDER BY next_action_ms LIMIT ?",
    )


_LIVE_OF_TASK: Final = select_sql(
    LeaseRow, f"WHERE task_id = ? AND state IN ({_states(MAYBE_ALIVE - {LeaseState.VERIFYING})})"
)
_NOT_ENDED: Final = select_sql(LeaseRow, "WHERE ended_ms IS NULL AND identity = ? LIMIT ?")
_NOT_ENDED_OF_RESOURCE: Final = select_sql(LeaseRow, "WHERE ended_ms IS NULL AND resource = ? LIMIT ?")


# --- reading -----------------------------------------------------------------------------------


def from_row(row: tuple[Any, ...]) -> Lease:
    """Build a lease from a row in table order."""
    values = dict(zip(_NAMES, row, strict=True))
    values["id"] = LeaseId(values["id"])
    values["task_id"] = TaskId(values["task_id"])
    values["state"] = LeaseState(values["state"])
    values["cause"] = Cause(values["cause"])
    values["urgency"] = Urgency(values["urgency"])
    values["stuck"] = bool(values["stuck"])
    if values["evidence"] is not None:
        values["evidence"] = orjson.loads(values["evidence"])
    return Lease(**values)


def get(connection: sqlite3.Connection | Transaction, lease_id: LeaseId) -> Lease | None:
    """Return one lease."""
    row = connection.execute(_SELECT_BY_ID, (lease_id,)).fetchone()
    return None if row is None else from_row(row)


def of_task(connection: sqlite3.Connection | Transaction, task_id: TaskId) -> list[Lease]:
    """Return every lease of a task, oldest first; a task's budget bounds them."""
    rows = connection.execute(f"{_SELECT} WHERE task_id = ? ORDER BY created_ms, id", (task_id,))
    return [from_row(row) for row in rows]


def live_of_task(connection: sqlite3.Connection | Transaction, task_id: TaskId) -> list[Lease]:
    """Return the task's leases that its end must move or hurry."""
    return [from_row(row) for row in connection.execute(_LIVE_OF_TASK, (task_id,))]


def live_of_identity(
    connection: sqlite3.Connection | Transaction, spiffe_id: str, limit: int = CLAIM_MAX
) -> list[Lease]:
    """Return a page of the identity's leases that no end has reached."""
    return [from_row(row) for row in connection.execute(_NOT_ENDED, (spiffe_id, limit))]


def live_of_resource(
    connection: sqlite3.Connection | Transaction, resource: str, limit: int = CLAIM_MAX
) -> list[Lease]:
    """Return a page of the resource's leases that no end has reached."""
    return [from_row(row) for row in connection.execute(_NOT_ENDED_OF_RESOURCE, (resource, limit))]


def page(
    connection: sqlite3.Connection,
    *,
    after: str = "",
    limit: int = 100,
    state: LeaseState | None = None,
    stuck: bool | None = None,
) -> list[Lease]:
    """Return leases in id order after a cursor, for lists that people page through."""
    where, parameters = ["id > ?"], [after]
    if state is not None:
        where.append("state = ?")
        parameters.append(state)
    if stuck is not None:
        where.append("stuck" if stuck else "NOT stuck")
    rows = connection.execute(
        f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY id LIMIT ?",
        (*parameters, min(limit, PAGE_MAX)),
    )
    return [from_row(row) for row in rows]


def count_by_state(connection: sqlite3.Connection) -> dict[tuple[str, LeaseState, bool], int]:
    """Count leases by (adapter, state, stuck): once at start, so that counters go on from there."""
    rows = connection.execute(
        f"SELECT adapter, state, stuck, count(*) FROM leases WHERE state NOT IN ({_states(TERMINAL)}) "  # noqa: S608  constants of ours
        "GROUP BY adapter, state, stuck"
    )
    return {(adapter, LeaseState(state), bool(stuck)): count for adapter, state, stuck, count in rows}


def live_counts(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Count leases that have not reached their end, and the stuck ones among them, per backend.

    Reads the partial indices of such rows only, so that history costs nothing.
    """
    live = connection.execute(
        "SELECT adapter, count(*) FROM leases WHERE next_action_ms IS NOT NULL GROUP BY adapter"
    )
    counts = {adapter: (count, 0) for adapter, count in live}
    stuck = connection.execute("SELECT adapter, count(*) FROM leases WHERE stuck GROUP BY adapter")
    for adapter, count in stuck:
        counts[adapter] = (counts.get(adapter, (count, 0))[0], count)
    return counts


def active_page(
    connection: sqlite3.Connection, adapter: str, *, activated_before_ms: int, after: str, limit: int
) -> list[Lease]:
    """Return a page of ACTIVE leases of one backend, for the reverse scan."""
    rows = connection.execute(
        f"{_SELECT} WHERE adapter = ? AND state = 'active' AND activated_ms < ? AND id > ? "
        "ORDER BY id LIMIT ?",
        (adapter, activated_before_ms, after, limit),
    )
    return [from_row(row) for row in rows]


def of_backend_object(
    connection: sqlite3.Connection | Transaction, adapter: str, name: str, lease_id: LeaseId
) -> list[Lease]:
    """Return the rows that account for a backend object: the lease it is named after, and its orphans."""
    rows = connection.execute(
        f"{_SELECT} WHERE id = ? UNION ALL {_SELECT} WHERE task_id = '' AND adapter = ? AND backend_name = ?"
        " AND id <> ?",
        (lease_id, adapter, name, lease_id),
    )
    return [from_row(row) for row in rows]


def revoked_status_indices(
    connection: sqlite3.Connection, first: int, beyond: int, expires_after_ms: int
) -> list[int]:
    """Return status indices in [first, beyond) of leases that are not ACTIVE and expire after a time."""
    rows = connection.execute(
        "SELECT status_index FROM leases WHERE status_index >= ? AND status_index < ? "
        "AND state <> 'active' AND expires_ms > ?",
        (first, beyond, expires_after_ms),
    )
    return [index for (index,) in rows]


# --- writing -----------------------------------------------------------------------------------


def insert(
    tx: Transaction,
    lease: Lease,
    *,
    actor: str,
    fields: Mapping[str, JsonValue] | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Create a lease in the state it carries, with its audit record.

    Raises:
        IllegalMoveError: the table does not let a lease begin there.

    """
    check_move(None, lease.state)
    tx.execute(_INSERT, _to_row(lease))
    _audit_move(tx, lease, None, actor=actor, at_ms=lease.created_ms, fields=fields, text=text)


def move(
    tx: Transaction,
    lease: Lease,
    target: LeaseState,
    cause: Cause,
    *,
    at_ms: int,
    actor: str,
    fields: Mapping[str, JsonValue] | None = None,
    text: Mapping[str, str] | None = None,
    **changes: Any,
) -> Lease | None:
    """Move a lease, if it still stands where `lease` says, at the epoch `lease` says.

    `changes` sets further columns of the row. Entering an end or REVOKE_PENDING sets
    `ended_ms` once; entering a terminal state clears the flag and the due time.

    Returns:
        The lease as it now stands, or None where the guarded UPDATE changed no row.

    Raises:
        IllegalMoveError: the table does not contain the move.

    """
    check_move(lease.state, target)
    values: dict[str, Any] = {"state": target, "cause": cause, **changes}
    if target in TERMINAL:
        values |= {"next_action_ms": None, "stuck": False, "sealed": None}
    if target is not LeaseState.ACTIVE and target not in NEVER_ACTIVE and lease.ended_ms is None:
        values["ended_ms"] = at_ms
    if target is LeaseState.REVOKE_PENDING and lease.state is not LeaseState.VERIFYING:
        values.setdefault("urgency", urgency_of(cause))
    moved = _guarded_update(tx, lease, values)
    if moved is not None:
        _audit_move(tx, moved, lease.state, actor=actor, at_ms=at_ms, fields=fields, text=text)
    return moved


def hurry(tx: Transaction, lease: Lease, *, urgency: Urgency, at_ms: int) -> Lease | None:
    """Bring the next attempt on an ending lease forward. Not a move: nothing is audited."""
    return _guarded_update(tx, lease, {"urgency": min(urgency, lease.urgency), "next_action_ms": at_ms})


def postpone(tx: Transaction, lease: Lease, **changes: Any) -> Lease | None:
    """Record a failed attempt and when to try again. Not a move: the state stays."""
    return _guarded_update(tx, lease, changes)


def pull_back(tx: Transaction, by_ms: int) -> None:
    """Move the next attempt on every ending lease as far back as the clock jumped. Nothing is audited."""
    tx.execute(
        "UPDATE leases SET next_action_ms = next_action_ms - ? "  # noqa: S608  constants of ours
        f"WHERE next_action_ms IS NOT NULL AND state IN ({_states(ENDING)})",
        (by_ms,),
    )


def bring_forward(tx: Transaction, latest_ms: int, now_ms: int) -> None:
    """Make due at start what no living process has in hand. Nothing is audited.

    The embedded ledger has one process, so a claim found at its start is a dead one's: no
    revocation waits for it to run out. Verifications keep their time, which may be the second
    look's, but for those planned beyond `latest_ms` by a clock that has jumped back since.
    """
    tx.execute(
        "UPDATE leases SET next_action_ms = :now WHERE next_action_ms > :now AND "
        "(state = 'revoke_pending' OR (state = 'verifying' AND next_action_ms > :latest))",
        {"now": now_ms, "latest": latest_ms},
    )


def has_due(
    connection: sqlite3.Connection, adapter: str, states: frozenset[LeaseState], *, now_ms: int
) -> bool:
    """Say whether a backend has anything due, without opening a write transaction."""
    return any(
        connection.execute(_due_sql(states), (adapter, urgency, now_ms, 1)).fetchone() is not None
        for urgency in Urgency
    )


def due(
    tx: Transaction, adapter: str, states: frozenset[LeaseState], *, now_ms: int, limit: int
) -> list[Lease]:
    """Return due leases of one backend in some states, most urgent first."""
    found: list[Lease] = []
    for urgency in Urgency:
        room = min(limit, CLAIM_MAX) - len(found)
        if room > 0:
            rows = tx.execute(_due_sql(states), (adapter, urgency, now_ms, room)).fetchall()
            found += [from_row(row) for row in rows]
    return found


def claim_due(
    tx: Transaction,
    adapter: str,
    states: frozenset[LeaseState],
    *,
    now_ms: int,
    visibility_ms: int,
    limit: int,
) -> list[Lease]:
    """Claim due leases of one backend, most urgent first.

    A claim raises the epoch and moves the due time to `now_ms + visibility_ms`: if the
    claimer dies, somebody else takes over then, and the claimer's late moves change nothing.
    """
    claimed = [
        _guarded_update(tx, lease, {"epoch": lease.epoch + 1, "next_action_ms": now_ms + visibility_ms})
        for lease in due(tx, adapter, states, now_ms=now_ms, limit=limit)
    ]
    return [lease for lease in claimed if lease is not None]


def _guarded_update(tx: Transaction, lease: Lease, values: dict[str, Any]) -> Lease | None:
    columns = ", ".join(f"{name} = :{name}" for name in values)
    cursor = tx.execute(
        f"UPDATE leases SET {columns} WHERE id = :__id AND state = :__state AND epoch = :__epoch",  # noqa: S608  names of ours
        {**_encoded(values), "__id": lease.id, "__state": lease.state, "__epoch": lease.epoch},
    )
    if cursor.rowcount != 1:
        return None
    return dataclasses.replace(lease, **values)


def _to_row(lease: Lease) -> list[Any]:
    row = plain(_IN_COLUMN_ORDER(lease))
    if lease.evidence is not None:
        row[_EVIDENCE] = orjson.dumps(lease.evidence).decode()
    return row


def _encoded(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("evidence") is not None:
        values = {**values, "evidence": orjson.dumps(values["evidence"]).decode()}
    return values


def _audit_move(
    tx: Transaction,
    lease: Lease,
    source: LeaseState | None,
    *,
    actor: str,
    at_ms: int,
    fields: Mapping[str, JsonValue] | None,
    text: Mapping[str, str] | None,
) -> None:
    facts: dict[str, JsonValue] = {
        "from": source,
        "to": lease.state,
        "cause": lease.cause,
        "epoch": lease.epoch,
        "adapter": lease.adapter,
        "resource": lease.resource,
        "action": lease.action,
        "expires_ms": lease.expires_ms,
    }
    if lease.evidence is not None:
        facts["evidence"] = dict(lease.evidence)
    if fields:
        facts.update(fields)
    tx.audit(
        AuditRecord(
            kind=AuditKind.LEASE_MOVED,
            at_ms=at_ms,
            actor=actor,
            lease_id=lease.id,
            task_id=lease.task_id or None,
            identity=lease.identity or None,
            decision_id=lease.decision_id,
            fields=facts,
            text=text or {},
        )
    )
