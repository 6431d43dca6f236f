"""The embedded ledger, opened: one writer, and a reader that sees committed rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from inventory.audit.slots import ChosenSlot, choose_slot, last_head
from inventory.store import engine
from inventory.store.writer import Writer

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from broker.core.ids import InstanceTag
    from broker.core.ports import KeyStore
    from inventory.audit.heads import HeadCopy


class Store:
    """One open ledger.

    Attributes:
        instance: marks backend objects as this deployment's.
        writer: the only way to write.
        reader: point reads on the event loop; long ones get a connection of their own.
        slots_behind: audit chains that end before their copied head: a restore, or a cut tail.

    """

    def __init__(
        self,
        path: Path,
        instance: InstanceTag,
        writer: Writer,
        reader: sqlite3.Connection,
        slots_behind: tuple[int, ...] = (),
    ) -> None:
        self.slots_behind = slots_behind
        self.path = path
        self.instance = instance
        self.writer = writer
        self.reader = reader

    @classmethod
    def open(cls, path: Path, keys: KeyStore, copy: HeadCopy | None = None) -> Self:
        """Open a ledger, creating or migrating it first; starts the writer on the running loop.

        Args:
            path: the SQLite file.
            keys: seals and digests what the audit keeps.
            copy: the signed heads' second place; says which audit chain can be gone on with.

        Raises:
            LedgerUnavailable: the file cannot be opened.
            LedgerSchemaError: it was written by a newer version.
            NoSlotLeftError, HeadCopyError: see `choose_slot`.

        """
        instance = engine.prepare(path)
        connection = engine.open_for_writing(path)
        chosen = ChosenSlot(last_head(connection, 0), ()) if copy is None else choose_slot(connection, copy)
        writer = Writer(connection, chosen.head, keys)
        writer.start()
        return cls(path, instance, writer, engine.open_for_reading(path), chosen.behind)

    def open_reader(self) -> sqlite3.Connection:
        """Open another read-only connection, for work in a thread; the caller closes it."""
        return engine.open_for_reading(self.path)

    async def close(self) -> None:
        """Commit what is queued and close. Idempotent."""
        await self.writer.close()
        self.reader.close()
