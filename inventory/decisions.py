"""Decisions with their full input, and the history of grants that later decisions read."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final, assert_never

import orjson

from broker.core.audit import AuditKind, AuditRecord
from broker.core.decision import Allow, Decision, Deny, NeedsApproval
from broker.core.facts import Grant
from inventory.store.sql import plain, positional_insert_sql
from inventory.store.tables import DecisionRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from broker.core.audit import JsonValue
    from broker.core.ids import DecisionId, TaskId
    from inventory.store.writer import Transaction

HISTORY_REFRESH_MS: Final = 60_000
"""A grant already in the history is written again at most once a minute (`_REMEMBER` says the same)."""

_INSERT: Final = positional_insert_sql(DecisionRow)
_REMEMBER: Final = (
    "INSERT INTO history (scope, resource, action, last_ms) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (scope, resource, action) DO UPDATE SET last_ms = excluded.last_ms "
    "WHERE excluded.last_ms > history.last_ms + 60000"
)


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
    asked = orjson.dumps(made.input, option=orjson.OPT_SORT_KEYS)
    tx.execute(
        _INSERT,
        plain(
            (
                made.id,
                made.at_ms,
                made.identity,
                made.task_id,
                made.question,
                outcome,
                reason,
                orjson.dumps(made.policy_ids).decode(),
                basis.policy_hash,
                asked.decode(),
            )
        ),
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
                "input_digest": sha256(asked).hexdigest(),
            },
            text=text or {},
        )
    )


def remember_grant(tx: Transaction, scopes: tuple[str, ...], grant: Grant, *, at_ms: int) -> None:
    """Add a grant to the history of each scope (task and identity)."""
    for scope in scopes:
        if tx.execute(_REMEMBER, (scope, grant.resource, grant.action, at_ms)).rowcount:
            tx.facts_changed()


def grants_of(connection: sqlite3.Connection | Transaction, scope: str) -> dict[Grant, int]:
    """Return what was granted in a scope (a task or an identity), with when it last was."""
    rows = connection.execute("SELECT resource, action, last_ms FROM history WHERE scope = ?", (scope,))
    return {Grant(resource, action): last_ms for resource, action, last_ms in rows}


def within(grants: Mapping[Grant, int], since_ms: int) -> frozenset[Grant]:
    """Return the grants since `since_ms`.

    The window is extended by the refresh interval, so that coalesced writes never hide a grant.
    """
    return frozenset(grant for grant, last_ms in grants.items() if last_ms >= since_ms - HISTORY_REFRESH_MS)
