"""The embedded ledger, opened: one writer, and a reader that sees committed rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from inventory.audit.chain import ChainHead
from inventory.store import engine
from inventory.store.writer import Writer

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from broker.core.ids import InstanceTag
    from broker.core.ports import KeyStore

EMBEDDED_SLOT = 0
"""SQLite has one writer, so one audit chain; the PostgreSQL store gives each process its own."""


class Store:
    """One open ledger.

    Attributes:
        instance: marks backend objects as this deployment's.
        writer: the only way to write.
        reader: point reads on the event loop; long ones get a connection of their own.

    """

    def __init__(self, path: Path, instance: InstanceTag, writer: Writer, reader: sqlite3.Connection) -> None:
        self.path = path
        self.instance = instance
        self.writer = writer
        self.reader = reader

    @classmethod
    def open(cls, path: Path, keys: KeyStore) -> Self:
        """Open a ledger, creating or migrating it first; starts the writer on the running loop.

        Raises:
            LedgerUnavailable: the file cannot be opened.
            LedgerSchemaError: it was written by a newer version.

        """
        instance = engine.prepare(path)
        connection = engine.open_for_writing(path)
        writer = Writer(connection, last_head(connection, EMBEDDED_SLOT), keys)
        writer.start()
        return cls(path, instance, writer, engine.open_for_reading(path))

    def open_reader(self) -> sqlite3.Connection:
        """Open another read-only connection, for work in a thread; the caller closes it."""
        return engine.open_for_reading(self.path)

    async def close(self) -> None:
        """Commit what is queued and close. Idempotent."""
        await self.writer.close()
        self.reader.close()


def last_head(connection: sqlite3.Connection, slot: int) -> ChainHead:
    """Return where a slot's chain stands, so that a restart goes on from there."""
    row = connection.execute(
        "SELECT seq, hash FROM audit WHERE slot = ? ORDER BY seq DESC LIMIT 1", (slot,)
    ).fetchone()
    return ChainHead(slot) if row is None else ChainHead(slot, row[0], row[1])
