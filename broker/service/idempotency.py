"""Idempotency keys as routes present them (DESIGN 4, rule 8)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from inventory.idempotency import IdempotencyKey

if TYPE_CHECKING:
    from broker.core.caller import Caller


def presented(caller: Caller, route: str, key: str | None, body: bytes) -> IdempotencyKey | None:
    """Return the key as the ledger keeps it, bound to caller, route and body; None where none was sent."""
    if key is None:
        return None
    return IdempotencyKey(caller.spiffe_id, route, key, hashlib.sha256(body).hexdigest())
