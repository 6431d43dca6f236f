"""Opening the embedded ledger: one file, one deployment, one process at a time."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from broker.core.ids import InstanceTag
from inventory.store.connections import (
    LedgerSchemaError,
    open_for_reading,
    open_for_writing,
    schema_revision,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = [
    "SCHEMA_REVISION",
    "LedgerInUseError",
    "LedgerSchemaError",
    "claim",
    "is_untouched",
    "open_for_reading",
    "open_for_writing",
    "prepare",
    "schema_revision",
]

SCHEMA_REVISION: Final = "0001"
"""Alembic's head; start-up compares it without importing Alembic."""

_FILE_MODE: Final = 0o600


class LedgerInUseError(RuntimeError):
    """Another process has claimed the ledger."""


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
