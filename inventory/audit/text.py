"""Free text behind a commitment, so that retention can erase it and the chain still holds (DESIGN 9).

Each text gets a record secret of its own. From it derive the salt of the commitment and
the key that seals the text. The record's body holds two digests only::

    digest  SHA-256(salt || UTF-8 text)   whoever is shown text and salt can check it
    sealed  SHA-256(sealed text)          whoever holds no key can check the stored ciphertext

The secret is stored beside the ciphertext, itself sealed by the `KeyStore`, and nowhere
else. Deleting that row destroys key and salt together: what stays in the body cannot be
opened, and cannot be guessed at either, however short the text was.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from inventory.audit.canonical import NotCanonicalError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.ports import KeyStore

TEXT_BYTES_MAX: Final = 16 * 1024
"""Longest single text, in bytes of UTF-8."""

SALT_BYTES: Final = 32
_SECRET_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_CONTEXT: Final = b"nhi-broker/audit-text/v1\x00"


class SealedText(NamedTuple):
    """One row of ``audit_text``. A tuple, in column order, so that it is the statement's parameters.

    Attributes:
        salt: the record secret, sealed by the `KeyStore`; it may be sealed again under a newer
            key without touching anything the chain covers.
        sealed: nonce and AES-256-GCM ciphertext of the text.

    """

    slot: int
    seq: int
    name: str
    salt: bytes
    sealed: bytes


class OpenedText(NamedTuple):
    """A text shown to a reader, with the salt that proves it is the one recorded."""

    text: str
    salt: bytes


class TextUnreadableError(ValueError):
    """The text cannot be opened: row changed, or sealed under a key this store does not have."""


def text_digest(salt: bytes, text: str) -> str:
    """Return the commitment that a record's body holds, in hex."""
    return hashlib.sha256(salt + text.encode("utf-8")).hexdigest()


def seal_text(name: str, text: str, keys: KeyStore) -> tuple[dict[str, str], bytes, bytes]:
    """Return (what the body holds, sealed record secret, sealed text).

    Raises:
        NotCanonicalError: the text is too long or holds a lone surrogate.

    """
    try:
        plain = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotCanonicalError("a text holds a lone surrogate") from error
    if len(plain) > TEXT_BYTES_MAX:
        raise NotCanonicalError(f"a text is longer than {TEXT_BYTES_MAX} bytes")
    secret = secrets.token_bytes(_SECRET_BYTES)
    digest = hashlib.sha256(_salt(secret) + plain).hexdigest()
    context = _context(name, digest)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = nonce + AESGCM(_key(secret)).encrypt(nonce, plain, context)
    body = {"digest": digest, "sealed": sealed_digest(sealed)}
    return body, keys.seal(secret, context), sealed


def sealed_digest(sealed: bytes) -> str:
    """Return the digest of a stored ciphertext as a record's body holds it, in hex."""
    return hashlib.sha256(sealed).hexdigest()


def open_text(row: SealedText, committed: Mapping[str, str], keys: KeyStore) -> OpenedText:
    """Open a stored text and check it against what the record's body committed to.

    Args:
        row: the stored row.
        committed: the body's entry for this text, with ``digest`` and ``sealed``.
        keys: the store whose `KeyStore.seal` sealed the record secret.

    Raises:
        TextUnreadableError: the row was changed or belongs to another record or key store.

    """
    context = _context(row.name, committed["digest"])
    try:
        secret = keys.unseal(row.salt, context)
        nonce, ciphertext = row.sealed[:_NONCE_BYTES], row.sealed[_NONCE_BYTES:]
        text = AESGCM(_key(secret)).decrypt(nonce, ciphertext, context).decode("utf-8")
    except (ValueError, InvalidTag) as error:
        raise TextUnreadableError("the text cannot be opened with these keys, or was changed") from error
    salt = _salt(secret)
    if text_digest(salt, text) != committed["digest"]:
        raise TextUnreadableError("the text is not the one that was recorded")
    return OpenedText(text, salt)


def _context(name: str, digest: str) -> bytes:
    # The digest is unique to this text of this record, so a row moved elsewhere does not open.
    return _CONTEXT + name.encode("ascii") + b"\x00" + digest.encode("ascii")


def _salt(secret: bytes) -> bytes:
    return hmac.digest(secret, _CONTEXT + b"salt", "sha256")


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, _CONTEXT + b"key", "sha256")
