"""Idempotency keys: unique per identity and route, kept 24 h with the request's hash (DESIGN 4, rule 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.core.errors import IdempotencyMismatch

if TYPE_CHECKING:
    from inventory.store.writer import Transaction

KEPT_MS: Final = 24 * 3600 * 1000
PURGE_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A key as a caller presented it; `request_hash` is SHA-256 of the body, hex."""

    identity: str
    route: str
    key: str
    request_hash: str


def seen_object(tx: Transaction, presented: IdempotencyKey, *, now_ms: int) -> str | None:
    """Return the id of the object the first request with this key made, None for a new key.

    Raises:
        IdempotencyMismatch: the key was used with another body.

    """
    row = tx.one(
        "SELECT request_hash, object_id FROM idempotency "
        "WHERE identity = ? AND route = ? AND key = ? AND created_ms > ?",
        (presented.identity, presented.route, presented.key, now_ms - KEPT_MS),
    )
    if row is None:
        return None
    request_hash, object_id = row
    if request_hash != presented.request_hash:
        raise IdempotencyMismatch(
            "This Idempotency-Key was used with another request body. Use a new key for a new request."
        )
    return str(object_id)


def remember(tx: Transaction, presented: IdempotencyKey, object_id: str, *, now_ms: int) -> None:
    """Bind the key to an object, or point it at the one that superseded the first."""
    tx.execute(
        "INSERT INTO idempotency (identity, route, key, request_hash, object_id, created_ms) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (identity, route, key) DO UPDATE SET "
        "request_hash = excluded.request_hash, object_id = excluded.object_id, "
        "created_ms = excluded.created_ms",
        (presented.identity, presented.route, presented.key, presented.request_hash, object_id, now_ms),
    )


def purge(tx: Transaction, *, now_ms: int) -> int:
    """Forget a page of keys older than 24 h; returns how many."""
    cursor = tx.execute(
        "DELETE FROM idempotency WHERE (identity, route, key) IN "
        "(SELECT identity, route, key FROM idempotency WHERE created_ms <= ? LIMIT ?)",
        (now_ms - KEPT_MS, PURGE_MAX),
    )
    return cursor.rowcount
