"""Token Status Lists: revocation that a verifier can check offline (draft-ietf-oauth-status-list-20).

A token names a list and a position in it (§6); the list is a compressed array of small
numbers (§4), published inside a signed token (§5). One status index names both: the list
is ``index // SIZE``, the position ``index % SIZE``. `StatusIndexer` turns the ledger's
counter into an index that gives away neither the order nor the number of tokens issued.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

SIZE: Final = 1 << 20
"""Tokens per list: large enough to hide one in a crowd, 2 KiB compressed at 0.1 % revoked."""

VALID: Final = 0
INVALID: Final = 1
SUSPENDED: Final = 2

_WIDTHS: Final = (1, 2, 4, 8)
_BYTE_BITS: Final = 8

_HALF_BITS: Final = 10
_HALF: Final = 1 << _HALF_BITS
_ROUNDS: Final = 10
_KEY_BYTES_MIN: Final = 16
_TABLES_KEPT: Final = 4


class StatusListError(ValueError):
    """A list or a position that the draft does not allow."""


def locate(index: int) -> tuple[int, int]:
    """Return (list number, position in that list) of a status index."""
    if index < 0:
        raise StatusListError("a status index is not negative")
    return divmod(index, SIZE)


class StatusIndexer:
    """Maps a counter that never repeats to a status index that cannot be guessed (draft §13.2).

    Within each list of `SIZE` the order is shuffled by a Feistel network over 20 bits, its
    round functions being tables expanded from the key. A Feistel network is a bijection
    whatever its round functions are, so no two counters share an index; the same key gives
    the same order after a restart.

    Args:
        key: at least 16 secret bytes that never change, as `KeyStore.derive` returns.

    """

    __slots__ = ("_key", "_tables")

    def __init__(self, key: bytes) -> None:
        if len(key) < _KEY_BYTES_MIN:
            raise ValueError("a status indexer needs a key of at least 16 bytes")
        self._key = hashlib.sha256(key).digest()
        self._tables: dict[int, tuple[tuple[int, ...], ...]] = {}

    def index_of(self, counter: int) -> int:
        """Return the status index of the `counter`-th token."""
        number, place = locate(counter)
        left, right = place >> _HALF_BITS, place & (_HALF - 1)
        for table in self._tables.get(number) or self._tables_of(number):
            left, right = right, left ^ table[right]
        return number * SIZE + (left << _HALF_BITS | right)

    def _tables_of(self, number: int) -> tuple[tuple[int, ...], ...]:
        """Expand one table per round; each list has its own, so that lists tell nothing of each other."""
        stream = hashlib.shake_256(self._key + number.to_bytes(16, "big")).digest(_ROUNDS * _HALF * 2)
        words = [int.from_bytes(stream[at : at + 2], "big") & (_HALF - 1) for at in range(0, len(stream), 2)]
        tables = tuple(tuple(words[at : at + _HALF]) for at in range(0, len(words), _HALF))
        if len(self._tables) >= _TABLES_KEPT:
            self._tables.clear()
        self._tables[number] = tables
        return tables


def encode(invalid: Iterable[int], *, bits: int = 1, size: int = SIZE) -> str:
    """Return the ``lst`` member: every status VALID but those at the `invalid` positions.

    Least significant bits first (§4.1), DEFLATE in the zlib format at the highest level,
    base64url without padding (§4.2).

    Raises:
        StatusListError: `bits` is none of 1, 2, 4, 8, or a position lies outside the list.

    """
    packed = bytearray(_bytes_of(size, bits))
    per_byte = _BYTE_BITS // bits
    for position in invalid:
        if not 0 <= position < size:
            raise StatusListError("a position lies outside the status list")
        packed[position // per_byte] |= INVALID << (position % per_byte * bits)
    return base64.urlsafe_b64encode(zlib.compress(packed, zlib.Z_BEST_COMPRESSION)).rstrip(b"=").decode()


def decode(lst: str, *, size_bytes_max: int = SIZE) -> bytes:
    """Return the packed statuses of a ``lst`` member.

    Args:
        lst: the member as received; it may be hostile.
        size_bytes_max: bound on the inflated size, so that a small list cannot fill the memory.

    Raises:
        StatusListError: it is not base64url, not zlib, or inflates past the bound.

    """
    try:
        compressed = base64.b64decode(lst + "=" * (-len(lst) % 4), altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        packed = inflate.decompress(compressed, size_bytes_max + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise StatusListError("the status list is not base64url of a zlib stream") from error
    if len(packed) > size_bytes_max:
        raise StatusListError("the status list is larger than expected")
    if not inflate.eof or inflate.unused_data:
        raise StatusListError("the status list is cut short or followed by something else")
    return packed


def status_of(packed: bytes, position: int, *, bits: int = 1) -> int:
    """Return the status at a position of a decoded list (§8.3).

    Raises:
        StatusListError: the position lies outside the list, which §8.3 wants refused.

    """
    _check_width(bits)
    per_byte = _BYTE_BITS // bits
    if not 0 <= position < len(packed) * per_byte:
        raise StatusListError("a position lies outside the status list")
    return packed[position // per_byte] >> (position % per_byte * bits) & ((1 << bits) - 1)


def status_list_claims(
    *, uri: str, issued_ms: int, ttl_seconds: int, expires_ms: int, lst: str, bits: int = 1
) -> dict[str, object]:
    """Return the claims of a Status List Token (§5.1); sign them with ``typ: statuslist+jwt``.

    Args:
        uri: where the list is served, exactly as tokens name it.
        issued_ms: when it was made.
        ttl_seconds: how long a verifier may keep it before asking again: the bound on staleness.
        expires_ms: from when no verifier may use it any more.
        lst: what `encode` returned.
        bits: the width it was encoded with.

    """
    _check_width(bits)
    return {
        "sub": uri,
        "iat": issued_ms // 1000,
        "exp": expires_ms // 1000,
        "ttl": ttl_seconds,
        "status_list": {"bits": bits, "lst": lst},
    }


def _check_width(bits: int) -> None:
    if bits not in _WIDTHS:
        raise StatusListError("a status takes 1, 2, 4 or 8 bits")


def _bytes_of(size: int, bits: int) -> int:
    _check_width(bits)
    return -(-size * bits // _BYTE_BITS)
