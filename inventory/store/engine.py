"""Opening the embedded ledger: SQLite, WAL, ``synchronous=FULL``, one file, one deployment.

With commits grouped by the writer, FULL costs almost nothing and an acknowledged lease
survives a power cut.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING, Final

from broker.core.errors import LedgerUnavailable
from broker.core.ids import InstanceTag

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCHEMA_REVISION: Final = "0001"
"""Alembic's head; start-up compares it without importing Alembic."""

_BUSY_TIMEOUT_MS: Final = 5000
_CACHE_KIB: Final = 16_384
_FILE_MODE: Final = 0o600


class LedgerSchemaError(RuntimeError):
    """The ledger's schema is not the one this version of the broker needs."""


class LedgerInUseError(RuntimeError):
    """Another process has claimed the ledger."""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the connection that only the writer uses.

    It crosses threads (statements on the loop, COMMIT in one worker thread), never
    concurrently; the writer sees to that.
    """
    connection = _connect(f"file:{path}?mode=rw")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write: ``query_only``, and it sees committed rows only."""
    connection = _connect(f"file:{path}?mode=rw")
    connection.execute("PRAGMA query_only=ON")
    return connection


def _connect(uri: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise LedgerUnavailable("The ledger cannot be opened.") from error
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    return connection


def prepare(path: Path) -> InstanceTag:
    """Create or migrate the ledger file and return its instance tag.

    Raises:
        LedgerSchemaError: the file belongs to a newer broker.

    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _FILE_MODE))
    if schema_revision(path) != SCHEMA_REVISION:
        # Alembic costs ten megabytes and half a second: only when there is something to do.
        from inventory.migrations.run import upgrade  # noqa: PLC0415

        upgrade(path)
    return _instance_tag(path)


def claim(path: Path) -> Callable[[], None]:
    """Take the ledger for this process; the returned function gives it back.

    What is remembered of the ledger (`FactsVersion`) is true only while this process alone
    writes to it. The kernel gives the claim back when the process ends, however that happens.

    Raises:
        LedgerInUseError: another broker has it.

    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(
        path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, _FILE_MODE
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LedgerInUseError(
            "Another broker is running on this ledger. An SQLite ledger serves one process: stop the other."
        ) from None
    return lambda: os.close(descriptor)


def is_untouched(path: Path) -> bool:
    """Say whether nothing was ever recorded in a ledger: only then may new keys be made for it."""
    if not path.exists() or schema_revision(path) is None:
        return True
    connection = open_for_reading(path)
    try:
        return connection.execute("SELECT 1 FROM audit LIMIT 1").fetchone() is None
    finally:
        connection.close()


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


def _instance_tag(path: Path) -> InstanceTag:
    connection = open_for_writing(path)
    try:
        connection.execute(
            "INSERT INTO meta (key, value) VALUES ('instance', ?) ON CONFLICT (key) DO NOTHING",
            (InstanceTag.new(),),
        )
        (value,) = connection.execute("SELECT value FROM meta WHERE key = 'instance'").fetchone()
        return InstanceTag.parse(value)
    finally:
        connection.close()
