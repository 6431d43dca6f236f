"""SCRAM-SHA-256 verifiers, computed on our side (RFC 5802 §3, RFC 7677).

The server stores what it is given and never sees the password: not in the statement, not in
its log, not in ``pg_stat_activity``.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Final

from broker.core.secret import Secret

ITERATIONS: Final = 4096
"""RFC 7677 §4's minimum. Some clients refuse fewer, and a random password needs no more."""

_SALT_BYTES: Final = 16
_PASSWORD_BYTES: Final = 32


def new_password() -> str:
    """Draw a password of 256 random bits, ASCII only: SASLprep leaves it as it is (RFC 5802 §2.2)."""
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def scram_verifier(password: Secret[str]) -> str:
    """Return the verifier PostgreSQL stores for `password`, with a fresh salt.

    Takes about a millisecond of CPU with the interpreter's lock released: call it in a thread.

    Raises:
        ValueError: the password is not printable ASCII, so SASLprep might change it.

    """
    clear = password.reveal()
    if not clear or not clear.isascii() or not clear.isprintable():
        raise ValueError("a verifier is computed only for a password of printable ASCII characters")
    salt = secrets.token_bytes(_SALT_BYTES)
    salted = hashlib.pbkdf2_hmac("sha256", clear.encode("ascii"), salt, ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${ITERATIONS}:{_b64(salt)}${_b64(stored_key)}:{_b64(server_key)}"


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A password and the verifier that belongs to it."""

    password: Secret[str]
    verifier: str


def prepare_password() -> Prepared:
    """Draw a password and compute its verifier."""
    password = Secret(new_password())
    return Prepared(password, scram_verifier(password))


class PasswordStock:
    """A few passwords made ahead, so that a mint does not wait for key stretching.

    They belong to no role until a mint takes one; each is handed out once.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ready: deque[Prepared] = deque()
        self._refill: asyncio.Task[None] | None = None

    async def take(self) -> Prepared:
        """Return a password that nobody else gets."""
        prepared = self._ready.popleft() if self._ready else await asyncio.to_thread(prepare_password)
        if self._refill is None or self._refill.done():
            self._refill = asyncio.create_task(self._fill())
        return prepared

    async def close(self) -> None:
        """Stop refilling and forget what is in stock."""
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        self._ready.clear()

    async def _fill(self) -> None:
        while len(self._ready) < self._size:
            self._ready.append(await asyncio.to_thread(prepare_password))
