"""Durable counters and job claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from inventory.store.writer import Transaction


def reserve_block(tx: Transaction, counter: str, size: int) -> int:
    """Reserve `size` numbers of a counter and return the first. None is ever handed out twice."""
    first = reserved(tx, counter)
    tx.execute(
        "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (counter, str(first + size)),
    )
    return first


def reserved(connection: sqlite3.Connection | Transaction, counter: str) -> int:
    """Return how many numbers of a counter were ever reserved."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (counter,)).fetchone()
    return 0 if row is None else int(row[0])


def is_due(connection: sqlite3.Connection, name: str, *, now_ms: int, every_ms: int) -> bool:
    """Say whether `claim_job` may succeed, without opening a write transaction."""
    row = connection.execute("SELECT due_ms FROM jobs WHERE name = ?", (name,)).fetchone()
    return row is None or not now_ms < row[0] <= now_ms + every_ms


def claim_job(tx: Transaction, name: str, *, now_ms: int, every_ms: int) -> bool:
    """Claim a periodic job's next run; False where another process has it already.

    A run due later than one period from now was planned before the clock jumped back, and is due.
    """
    tx.execute("INSERT INTO jobs (name, due_ms) VALUES (?, 0) ON CONFLICT (name) DO NOTHING", (name,))
    cursor = tx.execute(
        "UPDATE jobs SET due_ms = :next WHERE name = :name AND (due_ms <= :now OR due_ms > :next)",
        {"next": now_ms + every_ms, "name": name, "now": now_ms},
    )
    return cursor.rowcount == 1
