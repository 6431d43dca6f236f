"""Token signing keys and their life: published, then signing, then only verifying, then gone.

Verifiers cache the JWKS. A key that signed before they could have fetched it would fail
good tokens, and a key dropped with its last token alive would too; so a key is published
three cache lifetimes before it signs, and its public half stays until the last token it
signed has expired.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import orjson
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.core.ports import VerificationKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

ALGORITHMS: Final = ("ES256", "EdDSA", "RS256")
"""What a token may be signed with. RFC 9068 §2.1 wants RS256 supported; ES256 is the default."""

_P256_BYTES: Final = 32
_RSA_BITS: Final = 2048
_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_PUBLISH_CACHE_LIFETIMES: Final = 3


class Phase(StrEnum):
    """Where a token key stands."""

    NEXT = "next"
    CURRENT = "current"
    RETIRING = "retiring"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKeyPolicy:
    """How long token keys live.

    Attributes:
        signing_seconds: how long one key signs.
        jwks_cache_seconds: how long verifiers may cache the JWKS: what its Cache-Control says.
        token_ttl_seconds_max: the longest life of any token: the catalog's highest ceiling.
        skew_seconds: how far a verifier's clock may be behind ours.

    """

    signing_seconds: int = 7 * 86_400
    jwks_cache_seconds: int = 300
    token_ttl_seconds_max: int = 3600
    skew_seconds: int = 60

    def __post_init__(self) -> None:
        if min(self.signing_seconds, self.jwks_cache_seconds, self.token_ttl_seconds_max) <= 0:
            raise ValueError("lifetimes of token keys are positive")
        if self.skew_seconds < 0:
            raise ValueError("the clock skew allowed for is not negative")
        if self.signing_seconds * 1000 <= self.publish_ahead_ms:
            raise ValueError("a token key must sign for longer than its successor is published ahead")

    @property
    def publish_ahead_ms(self) -> int:
        """How long before its first signature a key is published."""
        return _PUBLISH_CACHE_LIFETIMES * self.jwks_cache_seconds * 1000

    @property
    def linger_ms(self) -> int:
        """How long after its last signature a public key is kept."""
        return (self.token_ttl_seconds_max + self.skew_seconds) * 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenKey:
    """One signing key.

    Attributes:
        kid: RFC 7638 thumbprint of the public key, so that an id can never name another key.
        published_ms: since when the JWKS shows it.
        activates_ms: when it starts, or started, to sign.
        retires_ms: when it stops, or stopped, signing.
        gone_ms: when its public half leaves the JWKS.

    """

    kid: str
    algorithm: str
    phase: Phase
    private: PrivateKey = field(repr=False)
    published_ms: int
    activates_ms: int
    retires_ms: int
    gone_ms: int

    def verification_key(self) -> VerificationKey:
        """Return the public half as the JWKS shows it."""
        jwk = {**public_members(self.private), "kid": self.kid, "alg": self.algorithm, "use": "sig"}
        return VerificationKey(self.kid, self.algorithm, jwk)


def generate(
    algorithm: str, phase: Phase, *, now_ms: int, activates_ms: int, policy: TokenKeyPolicy
) -> TokenKey:
    """Make a key; RS256 takes a noticeable part of a second.

    Raises:
        ValueError: the algorithm is none of `ALGORITHMS`.

    """
    private: PrivateKey
    match algorithm:
        case "ES256":
            private = ec.generate_private_key(ec.SECP256R1())
        case "EdDSA":
            private = ed25519.Ed25519PrivateKey.generate()
        case "RS256":
            private = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
        case _:
            raise ValueError(f"tokens are signed with {', '.join(ALGORITHMS)}, nothing else")
    retires_ms = activates_ms + policy.signing_seconds * 1000
    return TokenKey(
        kid=thumbprint(private),
        algorithm=algorithm,
        phase=phase,
        private=private,
        published_ms=now_ms,
        activates_ms=activates_ms,
        retires_ms=retires_ms,
        gone_ms=retires_ms + policy.linger_ms,
    )


def is_due(keys: tuple[TokenKey, ...], now_ms: int, policy: TokenKeyPolicy) -> bool:
    """Whether `advance` would change anything; makes no key."""
    waiting = {key.algorithm for key in keys if key.phase is Phase.NEXT}
    for key in keys:
        match key.phase:
            case Phase.RETIRING:
                due_ms = key.gone_ms
            case Phase.NEXT:
                due_ms = key.activates_ms
            case Phase.CURRENT:
                if key.algorithm in waiting:
                    continue
                due_ms = key.retires_ms - policy.publish_ahead_ms
        if now_ms >= due_ms:
            return True
    return False


def advance(keys: tuple[TokenKey, ...], now_ms: int, policy: TokenKeyPolicy) -> tuple[TokenKey, ...]:
    """Return the keys as they should be at `now_ms`; the same tuple where nothing is due.

    Phases only ever move forward: a clock that jumps back brings no retired key back.
    """
    if not is_due(keys, now_ms, policy):
        return keys
    kept = [key for key in keys if key.phase is not Phase.RETIRING or now_ms < key.gone_ms]
    result: list[TokenKey] = []
    for algorithm in {key.algorithm: None for key in kept}:
        result += _advance_one([key for key in kept if key.algorithm == algorithm], now_ms, policy)
    return tuple(result)


def _advance_one(keys: list[TokenKey], now_ms: int, policy: TokenKeyPolicy) -> list[TokenKey]:
    retiring = [key for key in keys if key.phase is Phase.RETIRING]
    current = next(key for key in keys if key.phase is Phase.CURRENT)
    upcoming = next((key for key in keys if key.phase is Phase.NEXT), None)
    if upcoming is not None and upcoming.activates_ms <= now_ms:
        # It signed until now, however long ago it was due: its last token lives from now.
        gone_ms = now_ms + policy.linger_ms
        retiring.append(replace(current, phase=Phase.RETIRING, retires_ms=now_ms, gone_ms=gone_ms))
        current, upcoming = promote(upcoming, now_ms, policy), None
    if upcoming is None and now_ms >= current.retires_ms - policy.publish_ahead_ms:
        activates_ms = max(now_ms + policy.publish_ahead_ms, current.retires_ms)
        upcoming = generate(
            current.algorithm, Phase.NEXT, now_ms=now_ms, activates_ms=activates_ms, policy=policy
        )
    return [current, *([] if upcoming is None else [upcoming]), *retiring]


def promote(key: TokenKey, now_ms: int, policy: TokenKeyPolicy) -> TokenKey:
    """Return the key as the one that signs from now on."""
    retires_ms = now_ms + policy.signing_seconds * 1000
    return replace(
        key,
        phase=Phase.CURRENT,
        activates_ms=now_ms,
        retires_ms=retires_ms,
        gone_ms=retires_ms + policy.linger_ms,
    )


def drop(
    keys: tuple[TokenKey, ...], kids: Iterable[str], now_ms: int, policy: TokenKeyPolicy
) -> tuple[TokenKey, ...]:
    """Return the keys without `kids`, each algorithm that lost its signer having a new one at once.

    A successor that is already published takes over, for verifiers may know it; else a fresh
    key signs before anybody could have cached it, which is what an emergency costs.
    """
    gone = frozenset(kids)
    result: list[TokenKey] = []
    for algorithm in {key.algorithm: None for key in keys}:
        kept = [key for key in keys if key.algorithm == algorithm and key.kid not in gone]
        if not any(key.phase is Phase.CURRENT for key in kept):
            successor = next((key for key in kept if key.phase is Phase.NEXT), None)
            if successor is None:
                successor = generate(
                    algorithm, Phase.CURRENT, now_ms=now_ms, activates_ms=now_ms, policy=policy
                )
            kept = [promote(successor, now_ms, policy), *(key for key in kept if key is not successor)]
        result += kept
    return tuple(result)


def signer(private: PrivateKey) -> Callable[[bytes], bytes]:
    """Return a function that signs as JWS wants it (RFC 7518 §3.3, §3.4; RFC 8037 §3.1)."""
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign
    if isinstance(private, rsa.RSAPrivateKey):
        rsa_key = private

        def sign_rsa(data: bytes) -> bytes:
            return rsa_key.sign(data, padding.PKCS1v15(), hashes.SHA256())

        return sign_rsa
    ec_key = private

    def sign_ecdsa(data: bytes) -> bytes:
        r, s = decode_dss_signature(ec_key.sign(data, _ECDSA))
        return r.to_bytes(_P256_BYTES, "big") + s.to_bytes(_P256_BYTES, "big")

    return sign_ecdsa


def algorithm_of(private: object) -> str | None:
    """Return the one algorithm a private key signs with, None where it is no kind of ours."""
    if isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP256R1):
        return "ES256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "EdDSA"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= _RSA_BITS:
        return "RS256"
    return None


def public_members(private: PrivateKey) -> dict[str, str]:
    """Return the JWK members that RFC 7638 hashes: the key itself, without labels."""
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return {"crv": "Ed25519", "kty": "OKP", "x": _base64url(private.public_key().public_bytes_raw())}
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.public_key().public_numbers()
        return {"e": _base64url_int(numbers.e), "kty": "RSA", "n": _base64url_int(numbers.n)}
    point = private.public_key().public_numbers()
    return {
        "crv": "P-256",
        "kty": "EC",
        "x": _base64url(point.x.to_bytes(_P256_BYTES, "big")),
        "y": _base64url(point.y.to_bytes(_P256_BYTES, "big")),
    }


def thumbprint(private: PrivateKey) -> str:
    """Return the RFC 7638 thumbprint of the public half."""
    canonical = orjson.dumps(public_members(private), option=orjson.OPT_SORT_KEYS)
    return _base64url(hashlib.sha256(canonical).digest())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _base64url_int(number: int) -> str:
    return _base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))
