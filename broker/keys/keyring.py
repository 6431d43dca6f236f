"""Everything the key file holds, as one immutable value, and its JSON form."""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from broker.core.secret import Secret
from broker.keys.token_keys import ALGORITHMS, Phase, TokenKey, algorithm_of, thumbprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.keys.token_keys import PrivateKey

_FORMAT: Final = "nhi-broker-keys/1"
_SYMMETRIC_BYTES: Final = 32
_ED25519_BYTES: Final = 32
_ID_BYTES: Final = 4
_AUDIT_ID_HEX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AuditKey:
    """A key that signs audit heads; `private` None once it is retired, the public half stays for ever."""

    id: str
    public: bytes
    private: Secret[bytes] | None

    @classmethod
    def new(cls) -> AuditKey:
        """Draw a fresh key, named after its public half."""
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        return cls(id=_audit_id(public), public=public, private=Secret(private.private_bytes_raw()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SymmetricKey:
    """A 256-bit key for digests or sealing. Never dropped: what it made must stay readable."""

    id: str
    key: Secret[bytes]

    @classmethod
    def new(cls) -> SymmetricKey:
        """Draw a fresh key with a random id of eight hex digits."""
        return cls(id=secrets.token_hex(_ID_BYTES), key=Secret(secrets.token_bytes(_SYMMETRIC_BYTES)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keyring:
    """All keys. Of `audit`, `digest` and `sealing` the last one is in use, the others are kept."""

    token: tuple[TokenKey, ...]
    audit: tuple[AuditKey, ...]
    digest: tuple[SymmetricKey, ...]
    sealing: tuple[SymmetricKey, ...]

    def to_json(self) -> bytes:
        """Return the key file's content: secret."""
        document = {
            "format": _FORMAT,
            "token": [_token_to_json(key) for key in self.token],
            "audit": [
                {"id": key.id, "public": _text(key.public)}
                | ({} if key.private is None else {"private": _text(key.private.reveal())})
                for key in self.audit
            ],
            "digest": [{"id": key.id, "key": _text(key.key.reveal())} for key in self.digest],
            "sealing": [{"id": key.id, "key": _text(key.key.reveal())} for key in self.sealing],
        }
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_json(cls, content: bytes) -> Keyring:
        """Read the key file's content.

        Raises:
            KeyError, TypeError, ValueError: it is damaged. Such an error may carry the content:
                it must go no further, not even as the context of another.

        """
        document = orjson.loads(content)
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError("not a key file of this version")
        keyring = cls(
            token=tuple(_token_from_json(entry) for entry in document["token"]),
            audit=tuple(_audit_from_json(entry) for entry in document["audit"]),
            digest=tuple(_symmetric_from_json(entry) for entry in document["digest"]),
            sealing=tuple(_symmetric_from_json(entry) for entry in document["sealing"]),
        )
        keyring._check()
        return keyring

    def _check(self) -> None:
        """Refuse a file that the store could not have written."""
        if not (self.token and self.audit and self.digest and self.sealing):
            raise ValueError("a kind of key is missing")
        if self.audit[-1].private is None:
            raise ValueError("no audit key can sign")
        ids = (
            [key.kid for key in self.token],
            [key.id for key in self.audit],
            [key.id for key in self.digest],
            [key.id for key in self.sealing],
        )
        if any(len(set(group)) != len(group) for group in ids):
            raise ValueError("two keys have one id")
        for algorithm in {key.algorithm for key in self.token}:
            phases = [key.phase for key in self.token if key.algorithm == algorithm]
            if phases.count(Phase.CURRENT) != 1 or phases.count(Phase.NEXT) > 1:
                raise ValueError("an algorithm has no single current key")


def _token_to_json(key: TokenKey) -> dict[str, object]:
    private = key.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return {
        "kid": key.kid,
        "algorithm": key.algorithm,
        "phase": key.phase,
        "published_ms": key.published_ms,
        "activates_ms": key.activates_ms,
        "retires_ms": key.retires_ms,
        "gone_ms": key.gone_ms,
        "private": _text(private),
    }


def _token_from_json(entry: Mapping[str, object]) -> TokenKey:
    private = load_der_private_key(_bytes(entry["private"]), password=None)
    algorithm = algorithm_of(private)
    if algorithm not in ALGORITHMS or entry["algorithm"] != algorithm:
        raise ValueError("a token key does not fit its algorithm")
    known = cast("PrivateKey", private)  # algorithm_of recognised it
    if entry["kid"] != thumbprint(known):
        raise ValueError("a token key does not fit its id")
    return TokenKey(
        kid=thumbprint(known),
        algorithm=algorithm,
        phase=Phase(str(entry["phase"])),
        private=known,
        published_ms=_ms(entry["published_ms"]),
        activates_ms=_ms(entry["activates_ms"]),
        retires_ms=_ms(entry["retires_ms"]),
        gone_ms=_ms(entry["gone_ms"]),
    )


def _audit_from_json(entry: Mapping[str, object]) -> AuditKey:
    public = _bytes(entry["public"], _ED25519_BYTES)
    if entry["id"] != _audit_id(public):
        raise ValueError("an audit key does not fit its id")
    if "private" not in entry:
        return AuditKey(id=_audit_id(public), public=public, private=None)
    private = _bytes(entry["private"], _ED25519_BYTES)
    if Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() != public:
        raise ValueError("an audit key does not fit its public half")
    return AuditKey(id=_audit_id(public), public=public, private=Secret(private))


def _symmetric_from_json(entry: Mapping[str, object]) -> SymmetricKey:
    name = entry["id"]
    if not isinstance(name, str) or len(bytes.fromhex(name)) != _ID_BYTES:
        raise ValueError("a key id is not eight hex digits")
    return SymmetricKey(id=name, key=Secret(_bytes(entry["key"], _SYMMETRIC_BYTES)))


def _audit_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:_AUDIT_ID_HEX]


def _ms(value: object) -> int:
    if type(value) is not int:
        raise ValueError("a time is not a whole number")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(value: object, size: int | None = None) -> bytes:
    if not isinstance(value, str):
        raise TypeError("a key is not text")
    data = base64.b64decode(value, validate=True)
    if size is not None and len(data) != size:
        raise ValueError("a key has the wrong length")
    return data
