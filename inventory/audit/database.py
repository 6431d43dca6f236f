"""Reads the audit log out of a SQLite ledger, read-only, one snapshot, one row at a time."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from inventory.audit.entries import AuditSourceError, LogEntry, LogFault, TextEvidence
from inventory.audit.report import FindingKind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_VALUE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Far above anything the broker writes; a planted giant must not exhaust our memory."""

_INDEXED: Final = ("at_ms", "kind", "actor", "lease_id", "task_id", "identity", "decision_id")
_SELECT_RECORDS: Final = (
    "SELECT slot, seq, at_ms, kind, actor, lease_id, task_id, identity, decision_id, body, hash "
    "FROM audit ORDER BY slot, seq"
)
_SELECT_TEXTS: Final = "SELECT slot, seq, name, sealed FROM audit_text ORDER BY slot, seq, name"


def read_database(path: Path) -> Iterator[LogEntry | LogFault]:
    """Yield the log in order of slot and number.

    Raises:
        AuditSourceError: the file is missing, is no ledger, or is damaged.

    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.isolation_level = None
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES_MAX)
            # Tampered text need not be UTF-8: keep its bytes instead of failing on them.
            connection.text_factory = _lenient
            connection.execute("BEGIN")  # one snapshot for both tables, while the broker writes on
            yield from _merged(connection)
    except sqlite3.Error as error:
        raise AuditSourceError(
            f"cannot read the audit log in {path}: {error}. Is it the ledger's database file, may this "
            "user read it, and may a -shm file be made beside it?"
        ) from error


def _merged(connection: sqlite3.Connection) -> Iterator[LogEntry | LogFault]:
    texts = _Texts(connection)
    for row in connection.execute(_SELECT_RECORDS):
        slot, seq, body, hash_ = row[0], row[1], row[9], row[10]
        if not (isinstance(slot, int) and isinstance(seq, int)):
            yield LogFault(FindingKind.MALFORMED, None, None, "slot or number of a row is not an integer")
            continue
        yield from texts.strays_before(slot, seq)
        if not (isinstance(body, str | bytes) and isinstance(hash_, bytes)):
            yield LogFault(FindingKind.MALFORMED, slot, seq, "body or hash of the row is of the wrong type")
            texts.take(slot, seq)
            continue
        raw = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else body
        columns = dict(zip(_INDEXED, row[2:9], strict=True))
        yield LogEntry(slot, seq, raw, hash_, columns, texts.take(slot, seq))
    yield from texts.strays_before(None, None)


class _Texts:
    """The rows of ``audit_text``, taken alongside the records they belong to."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._rows = connection.execute(_SELECT_TEXTS)
        self._next: Any = self._rows.fetchone()

    def take(self, slot: int, seq: int) -> tuple[TextEvidence, ...]:
        """Return the texts of one record; it names a record's texts by their stored names."""
        taken: list[TextEvidence] = []
        while self._next is not None and self._next[:2] == (slot, seq):
            _, _, name, sealed = self._next
            taken.append(TextEvidence(str(name), sealed if isinstance(sealed, bytes) else b""))
            self._next = self._rows.fetchone()
        return tuple(taken)

    def strays_before(self, slot: int | None, seq: int | None) -> Iterator[LogFault]:
        """Yield a fault per text that belongs to no record before (slot, seq); None is the end."""
        while self._next is not None and (slot is None or seq is None or _precedes(self._next, slot, seq)):
            at_slot, at_seq = (value if isinstance(value, int) else None for value in self._next[:2])
            detail = "a text is stored for a record that is not there"
            yield LogFault(FindingKind.STRAY_TEXT, at_slot, at_seq, detail)
            self._next = self._rows.fetchone()


def _precedes(row: Any, slot: int, seq: int) -> bool:
    # SQLite orders NULL and numbers before text, so a value of another type ends up a stray here or
    # at the end, and never hides what comes after it.
    text_slot, text_seq = row[:2]
    if not isinstance(text_slot, int) or not isinstance(text_seq, int):
        return True
    return (text_slot, text_seq) < (slot, seq)


def _lenient(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
