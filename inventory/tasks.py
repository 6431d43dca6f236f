"""Tasks in the ledger. The row of an open task is the lock that issue and end share (DESIGN 4, rule 3)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import orjson

from broker.core.audit import AuditKind, AuditRecord
from broker.core.errors import BudgetExhausted, TaskClosed
from broker.core.ids import TaskId
from broker.core.spiffe_id import SpiffeId
from broker.core.task import Task, TaskEndCause, TaskState
from inventory.store.sql import column_names, insert_sql, select_sql
from inventory.store.tables import TaskRow

if TYPE_CHECKING:
    import sqlite3

    from inventory.store.writer import Transaction

DUE_MAX: Final = 100
"""Tasks ended per sweep at their deadline."""

_NAMES: Final = column_names(TaskRow)
_INSERT: Final = insert_sql(TaskRow)
_SELECT_BY_ID: Final = select_sql(TaskRow, "WHERE id = ?")
_OVERDUE: Final = select_sql(
    TaskRow, "WHERE state = 'open' AND deadline_ms <= ? ORDER BY deadline_ms LIMIT ?"
)
_OPEN_OF_IDENTITY: Final = select_sql(TaskRow, "WHERE state = 'open' AND identity = ? LIMIT ?")


def from_row(row: tuple[Any, ...]) -> Task:
    """Build a task from a row in table order."""
    values = dict(zip(_NAMES, row, strict=True))
    values["id"] = TaskId(values["id"])
    values["identity"] = SpiffeId(values["identity"])
    values["resources"] = tuple(orjson.loads(values["resources"]))
    values["actions"] = tuple(orjson.loads(values["actions"]))
    values["inline"] = bool(values["inline"])
    values["state"] = TaskState(values["state"])
    if values["end_cause"] is not None:
        values["end_cause"] = TaskEndCause(values["end_cause"])
    return Task(**values)


def get(connection: sqlite3.Connection | Transaction, task_id: TaskId) -> Task | None:
    """Return one task."""
    row = connection.execute(_SELECT_BY_ID, (task_id,)).fetchone()
    return None if row is None else from_row(row)


def overdue(connection: sqlite3.Connection | Transaction, now_ms: int) -> list[Task]:
    """Return a page of open tasks whose deadline has passed."""
    return [from_row(row) for row in connection.execute(_OVERDUE, (now_ms, DUE_MAX))]


def open_of_identity(
    connection: sqlite3.Connection | Transaction, spiffe_id: str, limit: int = DUE_MAX
) -> list[Task]:
    """Return a page of the identity's open tasks."""
    return [from_row(row) for row in connection.execute(_OPEN_OF_IDENTITY, (spiffe_id, limit))]


def count_open(connection: sqlite3.Connection | Transaction, spiffe_id: str) -> int:
    """Count the identity's open tasks."""
    row = connection.execute(
        "SELECT count(*) FROM tasks WHERE state = 'open' AND identity = ?", (spiffe_id,)
    ).fetchone()
    return int(row[0])


def insert(tx: Transaction, task: Task, *, actor: str, decision_id: str) -> None:
    """Record a task being opened."""
    values = {name: getattr(task, name) for name in _NAMES}
    values["resources"] = orjson.dumps(task.resources).decode()
    values["actions"] = orjson.dumps(task.actions).decode()
    tx.execute(_INSERT, values)
    tx.audit(
        AuditRecord(
            kind=AuditKind.TASK_OPENED,
            at_ms=task.opened_ms,
            actor=actor,
            task_id=task.id,
            identity=task.identity,
            decision_id=decision_id,
            fields={
                "purpose": task.purpose,
                "resources": task.resources,
                "actions": task.actions,
                "classification_max": task.classification_max,
                "budget_leases": task.budget_leases,
                "deadline_ms": task.deadline_ms,
                "inline": task.inline,
            },
            text={"description": task.description} if task.description else {},
        )
    )


def take_from_budget(tx: Transaction, task_id: TaskId, now_ms: int) -> None:
    """Lock the open task's row and count one more lease against its budget.

    The UPDATE is the lock: an end that commits first makes it find no open row, and an
    end that comes after sees the lease this transaction inserts.

    Raises:
        TaskClosed: the task ended, or its deadline has passed.
        BudgetExhausted: the budget is used up.

    """
    cursor = tx.execute(
        "UPDATE tasks SET leases_issued = leases_issued + 1 "
        "WHERE id = ? AND state = 'open' AND deadline_ms > ? AND leases_issued < budget_leases",
        (task_id, now_ms),
    )
    if cursor.rowcount == 1:
        return
    task = get(tx, task_id)
    if task is not None and task.state is TaskState.OPEN and task.deadline_ms > now_ms:
        raise BudgetExhausted(
            f"The task's budget of {task.budget_leases} leases is used up. Open another task.",
            task_id=task_id,
        )
    raise TaskClosed(
        "The task has ended; nothing more is issued under it. Open another task.", task_id=task_id
    )


def end(
    tx: Transaction, task: Task, cause: TaskEndCause, *, at_ms: int, actor: str, reason: str
) -> Task | None:
    """Close an open task; None where it was closed already."""
    cursor = tx.execute(
        "UPDATE tasks SET state = 'ended', ended_ms = ?, end_cause = ? WHERE id = ? AND state = 'open'",
        (at_ms, cause, task.id),
    )
    if cursor.rowcount != 1:
        return None
    tx.audit(
        AuditRecord(
            kind=AuditKind.TASK_ENDED,
            at_ms=at_ms,
            actor=actor,
            task_id=task.id,
            identity=task.identity,
            fields={"cause": cause},
            text={"reason": reason} if reason else {},
        )
    )
    return dataclasses.replace(task, state=TaskState.ENDED, ended_ms=at_ms, end_cause=cause)


def end_inline(tx: Transaction, task_id: TaskId, *, at_ms: int, actor: str) -> bool:
    """Close the inline task whose only lease has ended; False where it is another kind, or closed."""
    row = tx.one("SELECT 1 FROM tasks WHERE id = ? AND inline AND state = 'open'", (task_id,))
    task = None if row is None else get(tx, task_id)
    if task is None:
        return False
    return end(tx, task, TaskEndCause.INLINE, at_ms=at_ms, actor=actor, reason="") is not None
