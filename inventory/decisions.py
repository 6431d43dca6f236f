"""Decisions with their full input, and the history of grants that later decisions read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

import orjson

from broker.core.audit import AuditKind, AuditRecord
from broker.core.decision import Allow, Decision, Deny, NeedsApproval
from broker.core.facts import Grant, History
from inventory.audit.canonical import canonical_bytes
from inventory.store.sql import insert_sql
from inventory.store.tables import DecisionRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from broker.core.audit import JsonValue
    from broker.core.ids import DecisionId, TaskId
    from inventory.store.writer import Transaction

HISTORY_REFRESH_MS: Final = 60_000
"""A grant already in the history is written again at most once a minute (`_REMEMBER` says the same)."""

_INSERT: Final = insert_sql(DecisionRow)
_REMEMBER: Final = (
    "INSERT INTO history (scope, resource, action, last_ms) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (scope, resource, action) DO UPDATE SET last_ms = excluded.last_ms "
    "WHERE excluded.last_ms > history.last_ms + 60000"
)
_RECALL: Final = "SELECT resource, action FROM history WHERE scope = ? AND last_ms >= ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    """One decision as it is kept: replayable against another policy set.

    `policy_ids` are all determining policies, those included that the caller is not told of;
    `failed_policy_ids` those that could not be evaluated, which makes any decision a Deny.
    """

    id: DecisionId
    at_ms: int
    identity: str
    task_id: TaskId | None
    question: str
    decision: Decision
    policy_ids: tuple[str, ...]
    failed_policy_ids: tuple[str, ...]
    input: Mapping[str, JsonValue]


def _outcome(decision: Decision) -> tuple[str, str]:
    match decision:
        case Allow():
            return "allow", ""
        case Deny():
            return "deny", decision.reason
        case NeedsApproval():
            return "needs_approval", decision.reason
        case _:
            assert_never(decision)


def record(tx: Transaction, made: DecisionRecord, *, text: Mapping[str, str] | None = None) -> None:
    """Keep a decision and audit it."""
    outcome, reason = _outcome(made.decision)
    basis = made.decision.basis
    tx.execute(
        _INSERT,
        {
            "id": made.id,
            "at_ms": made.at_ms,
            "identity": made.identity,
            "task_id": made.task_id,
            "question": made.question,
            "outcome": outcome,
            "reason": reason,
            "policy_ids": orjson.dumps(made.policy_ids).decode(),
            "policy_hash": basis.policy_hash,
            "input": canonical_bytes(made.input).decode(),
        },
    )
    tx.audit(
        AuditRecord(
            kind=AuditKind.DECISION,
            at_ms=made.at_ms,
            actor=made.identity,
            identity=made.identity,
            task_id=made.task_id,
            decision_id=made.id,
            fields={
                "question": made.question,
                "outcome": outcome,
                "policy_ids": made.policy_ids,
                "failed_policy_ids": made.failed_policy_ids,
                "policy_hash": basis.policy_hash,
            },
            text=text or {},
        )
    )


def remember_grant(tx: Transaction, scopes: tuple[str, ...], grant: Grant, *, at_ms: int) -> None:
    """Add a grant to the history of each scope (task and identity)."""
    for scope in scopes:
        tx.execute(_REMEMBER, (scope, grant.resource, grant.action, at_ms))


def history(
    connection: sqlite3.Connection | Transaction, *, task: str | None, identity: str, since_ms: int
) -> History:
    """Return what was granted in the task at any time and to the identity since `since_ms`.

    The window is extended by the refresh interval, so that coalesced writes never hide a grant.
    """
    of_task: frozenset[Grant] = frozenset()
    if task is not None:
        of_task = frozenset(Grant(*row) for row in connection.execute(_RECALL, (task, 0)))
    of_identity = connection.execute(_RECALL, (identity, since_ms - HISTORY_REFRESH_MS))
    return History(task=of_task, identity=frozenset(Grant(*row) for row in of_identity))
