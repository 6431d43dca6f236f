"""Choosing the chain that a restarted writer goes on with.

A ledger that is behind its own signed heads was restored from an older backup, or its tail
was cut. Going on in that slot would give two records one number and make every later
verification report a forgery, rightly. So a new chain begins beside it, and the old one
stays as the evidence it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from inventory.audit.chain import ChainHead

if TYPE_CHECKING:
    import sqlite3

    from inventory.audit.heads import HeadCopy

SLOTS_MAX: Final = 1000


class NoSlotLeftError(RuntimeError):
    """Every slot is behind its copied head."""


@dataclass(frozen=True, slots=True)
class ChosenSlot:
    """Where the writer goes on.

    Attributes:
        head: the last record of the chosen slot, or its beginning.
        behind: slots whose copied head the ledger does not reach: a restore, or a cut tail.

    """

    head: ChainHead
    behind: tuple[int, ...]


def choose_slot(connection: sqlite3.Connection, copy: HeadCopy) -> ChosenSlot:
    """Return the first slot whose records reach what was signed and copied of it.

    Raises:
        NoSlotLeftError: there is none among the first `SLOTS_MAX`.
        HeadCopyError: the copied heads cannot be read.

    """
    behind: list[int] = []
    for slot in range(SLOTS_MAX):
        signed = copy.latest(slot)
        if signed is None or _hash_at(connection, slot, signed.seq) == signed.hash:
            return ChosenSlot(last_head(connection, slot), tuple(behind))
        behind.append(slot)
    raise NoSlotLeftError(f"all of the first {SLOTS_MAX} audit chains are behind their copied heads")


def last_head(connection: sqlite3.Connection, slot: int) -> ChainHead:
    """Return where a slot's chain stands in the ledger."""
    row = connection.execute(
        "SELECT seq, hash FROM audit WHERE slot = ? ORDER BY seq DESC LIMIT 1", (slot,)
    ).fetchone()
    return ChainHead(slot) if row is None else ChainHead(slot, row[0], row[1])


def _hash_at(connection: sqlite3.Connection, slot: int, seq: int) -> bytes | None:
    row = connection.execute("SELECT hash FROM audit WHERE slot = ? AND seq = ?", (slot, seq)).fetchone()
    return None if row is None else bytes(row[0])
