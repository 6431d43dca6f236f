"""Findings: failed checks with evidence, open until mended (one open finding per check and subject)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import orjson

from broker.core.audit import AuditKind, AuditRecord

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from broker.core.audit import JsonValue
    from inventory.store.writer import Transaction


PAGE_MAX: Final = 1000
"""Rows per read of a list."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One failed check on one subject."""

    check_id: str
    subject: str
    evidence: Mapping[str, JsonValue]
    opened_ms: int

    @property
    def id(self) -> str:
        """Names this occurrence."""
        return f"{self.check_id}:{self.subject}:{self.opened_ms}"


def open_finding(tx: Transaction, finding: Finding, *, actor: str) -> bool:
    """Open a finding; False where the same one is open already."""
    cursor = tx.execute(
        "INSERT INTO findings (id, check_id, subject, evidence, opened_ms, closed_ms) "
        "VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT DO NOTHING",
        (
            finding.id,
            finding.check_id,
            finding.subject,
            orjson.dumps(finding.evidence).decode(),
            finding.opened_ms,
        ),
    )
    if cursor.rowcount != 1:
        return False
    _audit(tx, AuditKind.FINDING_OPENED, finding.check_id, finding.subject, finding.opened_ms, actor)
    return True


def close_finding(tx: Transaction, check_id: str, subject: str, *, at_ms: int, actor: str) -> bool:
    """Close an open finding; False where none was open."""
    cursor = tx.execute(
        "UPDATE findings SET closed_ms = ? WHERE check_id = ? AND subject = ? AND closed_ms IS NULL",
        (at_ms, check_id, subject),
    )
    if cursor.rowcount != 1:
        return False
    _audit(tx, AuditKind.FINDING_CLOSED, check_id, subject, at_ms, actor)
    return True


def open_findings(connection: sqlite3.Connection, limit: int = 1000) -> list[Finding]:
    """Return open findings, oldest first."""
    rows = connection.execute(
        "SELECT check_id, subject, evidence, opened_ms FROM findings "
        "WHERE closed_ms IS NULL ORDER BY opened_ms LIMIT ?",
        (limit,),
    )
    return [Finding(check, subject, orjson.loads(evidence), at) for check, subject, evidence, at in rows]


def open_page(
    connection: sqlite3.Connection, *, after: tuple[int, str] = (0, ""), limit: int = 100
) -> list[Finding]:
    """Return open findings after a cursor (time of opening and id), oldest first."""
    rows = connection.execute(
        "SELECT check_id, subject, evidence, opened_ms FROM findings "
        "WHERE closed_ms IS NULL AND (opened_ms, id) > (?, ?) ORDER BY opened_ms, id LIMIT ?",
        (*after, min(limit, PAGE_MAX)),
    )
    return [Finding(check, subject, orjson.loads(evidence), at) for check, subject, evidence, at in rows]


def _audit(tx: Transaction, kind: AuditKind, check_id: str, subject: str, at_ms: int, actor: str) -> None:
    tx.audit(AuditRecord(kind=kind, at_ms=at_ms, actor=actor, fields={"check": check_id, "subject": subject}))
