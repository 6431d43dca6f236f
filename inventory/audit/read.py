"""Reads the audit log page by page, while the broker writes on.

The log only grows, so pages below a fixed head are one consistent whole without a
transaction that stays open: a reader that stalls holds up no checkpoint.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from inventory.audit.canonical import parse_canonical
from inventory.audit.chain import AuditRow
from inventory.audit.export import export_lines
from inventory.audit.text import OpenedText, SealedText, TextUnreadableError, open_text

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from broker.core.ports import KeyStore
    from inventory.audit.export import ExportFilter
    from inventory.audit.heads import SignedHead
    from inventory.audit.public_keys import PublicKeys

PAGE: Final = 500

_COLUMNS: Final = ", ".join(AuditRow._fields)
_CONDITIONS: Final = {
    "lease_id": "lease_id = ?",
    "task_id": "task_id = ?",
    "identity": "identity = ?",
    "from_ms": "at_ms >= ?",
    "to_ms": "at_ms < ?",
}

log = logging.getLogger(__name__)


def export_up_to(
    connection: sqlite3.Connection,
    head: SignedHead,
    public: PublicKeys,
    *,
    only: ExportFilter,
    texts_with: KeyStore | None,
) -> Iterator[bytes]:
    """Yield the lines of an export of `head`'s slot up to it; `head` is part of it.

    Args:
        connection: used by whoever takes the next line, and by nobody else meanwhile.
        head: where the export ends.
        public: origin and public keys, for the header.
        only: what to export.
        texts_with: opens free texts; None leaves them out.

    """

    def reveal(row: AuditRow) -> dict[str, OpenedText]:
        return {} if texts_with is None else opened_texts(connection, row, texts_with)

    return export_lines(
        rows_up_to(connection, head, only),
        [head],
        public,
        only=only,
        reveal=None if texts_with is None else reveal,
    )


def rows_up_to(
    connection: sqlite3.Connection, head: SignedHead, only: ExportFilter, page: int = PAGE
) -> Iterator[AuditRow]:
    """Yield the records of `head`'s slot up to it that `only` lets through, in order."""
    chosen = only.as_json()
    where = "".join(f" AND {_CONDITIONS[name]}" for name in chosen)
    sql = (
        f"SELECT {_COLUMNS} FROM audit WHERE slot = ? AND seq > ? AND seq <= ?{where} "  # noqa: S608  constants of ours
        "ORDER BY seq LIMIT ?"
    )
    after = 0
    while True:
        rows = connection.execute(sql, (head.slot, after, head.seq, *chosen.values(), page)).fetchall()
        for row in rows:
            yield AuditRow(*row)
        if len(rows) < page:
            return
        after = AuditRow(*rows[-1]).seq


def opened_texts(connection: sqlite3.Connection, row: AuditRow, keys: KeyStore) -> dict[str, OpenedText]:
    """Return a record's free texts in clear; erased ones are absent, as are those that do not open."""
    stored = connection.execute(
        "SELECT slot, seq, name, salt, sealed FROM audit_text WHERE slot = ? AND seq = ?", (row.slot, row.seq)
    ).fetchall()
    if not stored:
        return {}
    committed = parse_canonical(row.body)["event"].get("text", {})
    opened: dict[str, OpenedText] = {}
    for each in stored:
        text = SealedText(*each)
        if text.name not in committed:
            continue  # no record promised it: verification of the database names it
        try:
            opened[text.name] = open_text(text, committed[text.name], keys)
        except TextUnreadableError:
            log.error("audit text of record %d in slot %d does not open", row.seq, row.slot)  # noqa: TRY400  no traceback: it would say no more
    return opened
