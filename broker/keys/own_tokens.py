"""Reading our own access tokens back: what introspection starts from.

A signature says that we made it and when it ends; whether it is dead before that only the
ledger knows. So what is returned here is claims, not permission.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from broker.core.ids import LeaseId, TaskId
from broker.core.spiffe_id import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.core.ports import KeyStore, VerificationKey

    Verifier: TypeAlias = Callable[[bytes, bytes], None]

TYPE: Final = "at+jwt"
"""RFC 9068 §2.1; the only type read here, so that no other token of ours passes for access."""

TOKEN_CHARACTERS_MAX: Final = 8192
_PARTS: Final = 3
_P256_BYTES: Final = 32
_HEADER_MEMBERS: Final = frozenset({"alg", "kid", "typ"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClaims:
    """What a genuine, unexpired token of ours says.

    Attributes:
        lease_id: the ``jti``.
        subject: SPIFFE ID it was minted for; ``client_id`` is the same.
        audience: the one resource server it is for.
        issued_ms, expires_ms: whole seconds in milliseconds, as the token has them.

    """

    lease_id: LeaseId
    task_id: TaskId
    subject: SpiffeId
    audience: str
    scope: str
    issuer: str
    issued_ms: int
    expires_ms: int


class TokenReader:
    """Verifies our own access tokens.

    Args:
        keys: where the public keys come from; a key it no longer shows verifies nothing.
        issuer: the exact ``iss`` of our tokens.

    """

    def __init__(self, keys: KeyStore, issuer: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._seen: tuple[VerificationKey, ...] | None = None
        self._verifiers: dict[str, tuple[str, Verifier]] = {}
        self._headers: dict[str, Verifier] = {}

    def read(self, jws: str, now_ms: int) -> TokenClaims | None:
        """Return the claims, or None for anything but a genuine, unexpired access token of ours.

        Never raises on what it is given, whatever it is.
        """
        if len(jws) > TOKEN_CHARACTERS_MAX or not jws.isascii():
            return None
        parts = jws.split(".")
        if len(parts) != _PARTS:
            return None
        header, payload, signature = parts
        self._refresh()
        try:
            verify = self._headers.get(header) or self._verifier_for(header)
            verify(_decode(signature), f"{header}.{payload}".encode("ascii"))
            claims = _claims(orjson.loads(_decode(payload)))
        except (InvalidSignature, KeyError, TypeError, ValueError):
            return None
        self._headers[header] = verify  # only what a key of ours signed is remembered
        if claims.issuer != self._issuer or claims.expires_ms <= now_ms:
            return None
        return claims

    def _refresh(self) -> None:
        """Forget everything when a key was rotated or revoked: nothing remembered may outlive it."""
        keys = self._keys.token_keys()
        if keys is not self._seen:
            self._verifiers = {key.kid: (key.algorithm, _verifier(key)) for key in keys}
            self._headers = {}
            self._seen = keys

    def _verifier_for(self, part: str) -> Verifier:
        """Return what checks a signature made under this header.

        Raises:
            KeyError, TypeError, ValueError: no access token of ours has this header.

        """
        header = orjson.loads(_decode(part))
        if not isinstance(header, dict) or header.keys() != _HEADER_MEMBERS or header["typ"] != TYPE:
            raise ValueError("not the header of our access tokens")
        algorithm, verify = self._verifiers[header["kid"]]
        # RFC 8725 §3.1: the key decides the algorithm, the header may only agree.
        if header["alg"] != algorithm:
            raise ValueError("the key has another algorithm")
        return verify


def _claims(payload: dict[str, object]) -> TokenClaims:
    """Take the claims apart.

    Raises:
        KeyError, TypeError, ValueError: it is not what we put into access tokens.

    """
    subject = SpiffeId.parse(_text(payload["sub"]))
    if payload["client_id"] != subject:
        raise ValueError("client_id and sub differ")
    return TokenClaims(
        lease_id=LeaseId.parse(_text(payload["jti"])),
        task_id=TaskId.parse(_text(payload["task"])),
        subject=subject,
        audience=_text(payload["aud"]),
        scope=_text(payload["scope"]),
        issuer=_text(payload["iss"]),
        issued_ms=_seconds(payload["iat"]) * 1000,
        expires_ms=_seconds(payload["exp"]) * 1000,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a claim is not text")
    return value


def _seconds(value: object) -> int:
    if type(value) is not int:  # a bool is an int to isinstance
        raise TypeError("a time is not a whole number of seconds")
    return value


def _decode(part: str) -> bytes:
    """Decode base64url, refusing what another spelling of the same bytes would be (RFC 7515 §2)."""
    data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=") != part.encode("ascii"):
        raise ValueError("not canonical base64url")
    return data


def _verifier(key: VerificationKey) -> Verifier:
    """Return a function (signature, signed bytes) that raises InvalidSignature unless they match."""
    jwk = key.jwk
    match key.algorithm:
        case "ES256":
            x, y = (int.from_bytes(_decode(jwk[name]), "big") for name in "xy")
            return _ecdsa_verifier(ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key())
        case "EdDSA":
            return Ed25519PublicKey.from_public_bytes(_decode(jwk["x"])).verify
        case "RS256":
            n, e = (int.from_bytes(_decode(jwk[name]), "big") for name in "ne")
            rsa_key = RSAPublicNumbers(e, n).public_key()
            return lambda signature, data: rsa_key.verify(
                signature, data, padding.PKCS1v15(), hashes.SHA256()
            )
        case _:
            raise ValueError("a token key has an algorithm that is not ours")


def _ecdsa_verifier(key: ec.EllipticCurvePublicKey) -> Verifier:
    algorithm = ec.ECDSA(hashes.SHA256())

    def verify(signature: bytes, data: bytes) -> None:
        # RFC 7518 §3.4: r and s, 32 bytes each; another length is another signature.
        if len(signature) != 2 * _P256_BYTES:
            raise InvalidSignature
        r = int.from_bytes(signature[:_P256_BYTES], "big")
        s = int.from_bytes(signature[_P256_BYTES:], "big")
        key.verify(encode_dss_signature(r, s), data, algorithm)

    return verify
