"""Connections to the embedded ledger: SQLite, WAL, ``synchronous=FULL``.

With commits grouped by the writer, FULL costs almost nothing and an acknowledged lease
survives a power cut.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Final

from broker.core.errors import LedgerUnavailable

if TYPE_CHECKING:
    from pathlib import Path

_BUSY_TIMEOUT_MS: Final = 5000
_WRITER_CACHE_KIB: Final = 16_384
_READER_CACHE_KIB: Final = 4_096


class LedgerSchemaError(RuntimeError):
    """The ledger's schema is not the one this version of the broker needs."""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the connection that only the writer uses.

    It crosses threads (statements on the loop, COMMIT in one worker thread), never
    concurrently; the writer sees to that.
    """
    connection = _connect(f"file:{path}?mode=rw")
    connection.execute(f"PRAGMA cache_size=-{_WRITER_CACHE_KIB}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA temp_store=MEMORY")
    return connection


class ReadingConnection(sqlite3.Connection):
    """A connection whose callers learn in our words that the ledger cannot be read."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Run one statement.

        Raises:
            LedgerUnavailable: the file is gone, damaged, locked for too long, or its disk fails.

        """
        try:
            return super().execute(sql, parameters)
        except sqlite3.DatabaseError as error:
            raise LedgerUnavailable(
                "The ledger cannot be read; nothing was issued. Retry later.", retry_after_seconds=5
            ) from error


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write: ``query_only``, and it sees committed rows only."""
    connection = _connect(f"file:{path}?mode=rw", ReadingConnection)
    connection.execute("PRAGMA query_only=ON")
    return connection


def _connect(uri: str, kind: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, factory=kind
        )
    except sqlite3.OperationalError as error:
        raise LedgerUnavailable("The ledger cannot be opened.") from error
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    connection.execute(f"PRAGMA cache_size=-{_READER_CACHE_KIB}")
    return connection


def schema_revision(path: Path) -> str | None:
    """Return the revision the file is at, None for an empty one."""
    connection = _connect(f"file:{path}?mode=rw")
    try:
        known = connection.execute(
            "SELECT 1 FROM sqlite_master WHERE type='table' AND name='alembic_version'"
        ).fetchone()
        if known is None:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])
    finally:
        connection.close()
