"""The kill switch: scopes in which nothing is issued or active until an operator lifts them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from broker.core.audit import AuditKind, AuditRecord

if TYPE_CHECKING:
    import sqlite3

    from inventory.store.writer import Transaction


PAGE_MAX: Final = 1000
"""Rows per read of a list."""


class KillScope(StrEnum):
    """What a kill covers. A task's kill is its end and needs no row."""

    TASK = "task"
    IDENTITY = "identity"
    OWNER = "owner"
    RESOURCE = "resource"


@dataclass(frozen=True, slots=True)
class Kill:
    """One killed scope."""

    scope: KillScope
    value: str
    reason: str
    actor: str
    at_ms: int

    def covers(self, identity: str, owner: str, resource: str) -> bool:
        """Say whether an identity, its owner (empty for none) or a resource lies in the scope."""
        match self.scope:
            case KillScope.IDENTITY:
                return self.value == identity
            case KillScope.OWNER:
                return bool(owner) and self.value == owner
            case KillScope.RESOURCE:
                return self.value == resource
            case KillScope.TASK:
                return False


_FIND: Final = (
    "SELECT scope, value, reason, actor, at_ms FROM kills WHERE (scope = 'identity' AND value = ?) "
    "OR (scope = 'owner' AND value = ?) OR (scope = 'resource' AND value = ?) LIMIT 1"
)


def find(
    connection: sqlite3.Connection | Transaction, *, identity: str, owner: str, resource: str
) -> Kill | None:
    """Return a kill that covers this identity, its owner or the resource."""
    row = connection.execute(_FIND, (identity, owner or "\x00", resource)).fetchone()
    return None if row is None else Kill(KillScope(row[0]), *row[1:])


def every(connection: sqlite3.Connection | Transaction) -> list[Kill]:
    """Return all killed scopes, newest first; operators set and lift them one by one."""
    rows = connection.execute("SELECT scope, value, reason, actor, at_ms FROM kills ORDER BY at_ms DESC")
    return [Kill(KillScope(row[0]), *row[1:]) for row in rows]


def page(
    connection: sqlite3.Connection | Transaction, *, after: tuple[str, str] = ("", ""), limit: int = 100
) -> list[Kill]:
    """Return killed scopes in order of scope and value after a cursor."""
    rows = connection.execute(
        "SELECT scope, value, reason, actor, at_ms FROM kills WHERE (scope, value) > (?, ?) "
        "ORDER BY scope, value LIMIT ?",
        (*after, min(limit, PAGE_MAX)),
    )
    return [Kill(KillScope(row[0]), *row[1:]) for row in rows]


def mark(tx: Transaction, kill: Kill) -> None:
    """Kill a scope: from this commit nothing in it is issued or active."""
    tx.facts_changed()
    tx.execute(
        "INSERT INTO kills (scope, value, reason, actor, at_ms) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (scope, value) DO NOTHING",
        (kill.scope, kill.value, kill.reason, kill.actor, kill.at_ms),
    )
    _audit(tx, kill, "ordered")


def lift(tx: Transaction, scope: KillScope, value: str, *, reason: str, actor: str, at_ms: int) -> bool:
    """Lift a kill; False where there was none."""
    tx.facts_changed()
    cursor = tx.execute("DELETE FROM kills WHERE scope = ? AND value = ?", (scope, value))
    if cursor.rowcount != 1:
        return False
    _audit(tx, Kill(scope, value, reason, actor, at_ms), "lifted")
    return True


def _audit(tx: Transaction, kill: Kill, what: str) -> None:
    tx.audit(
        AuditRecord(
            kind=AuditKind.KILL,
            at_ms=kill.at_ms,
            actor=kill.actor,
            identity=kill.value if kill.scope is KillScope.IDENTITY else None,
            fields={"scope": kill.scope, "value": kill.value, "what": what},
            text={"reason": kill.reason},
        )
    )
