"""JWT-SVID validation, rules J-1 to J-14.

PyJWT's algorithm objects verify the signature over bytes we cut out ourselves; parsing,
header, claims and key choice are ours, because libraries accept spellings that the
specification does not (measured: padded base64, repeated members, foreign headers).

Stricter than the specification, on purpose:

- J-3: a token without ``kid`` is refused (as SPIRE does).
- J-5: any header besides ``alg``, ``kid`` and ``typ`` is refused.
- J-6: a ``sub`` without a path names a trust domain, not a workload, and is refused.
- J-7: ``aud`` holds exactly one value, ours: a token that others accept too can be
  replayed to us by any of them.
- J-11: ``exp - iat`` has a ceiling; without ``iat``, ``exp - now`` has it.
- J-13: ``exp``, ``nbf`` and ``iat`` are integers, as in the specification's schema.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import get_default_algorithms

from broker.authn import strict_json
from broker.authn.explain import shown
from broker.core.clock import MS_PER_SECOND
from broker.core.errors import Unauthenticated
from broker.core.spiffe_id import SpiffeId, SpiffeIdError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jwt.algorithms import Algorithm

    from broker.authn.bundles import TrustBundles
    from broker.authn.trust_bundle import JwtKey

TOKEN_BYTES_MAX: Final = 8192
KID_CHARACTERS_MAX: Final = 256
RSA_BITS_MIN: Final = 2048
SECONDS_END: Final = 253_402_300_800
"""The year 10000: a NumericDate from there on is refused."""

_ALGORITHMS: Final[Mapping[str, Algorithm]] = MappingProxyType(
    {
        name: get_default_algorithms()[name]
        for name in ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512")
    }
)
_CURVES: Final[Mapping[str, type[ec.EllipticCurve]]] = MappingProxyType(
    {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
)
_HEADERS: Final = frozenset({"alg", "kid", "typ"})
_COMPACT_PARTS: Final = 3


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A token that passed.

    Attributes:
        expires_ms: the token's ``exp``, without leeway.
        token_sha256: SHA-256 of the whole token, hex.

    """

    spiffe_id: SpiffeId
    expires_ms: int
    token_sha256: str


@dataclass(frozen=True, slots=True)
class _Claims:
    spiffe_id: SpiffeId
    expires_ms: int


def validate_jwt_svid(
    token: str,
    audience: str,
    bundles: TrustBundles,
    now_ms: int,
    *,
    lifetime_seconds_max: int,
    leeway_seconds: int,
) -> JwtSvid:
    """Return the identity that a bearer token proves.

    Args:
        token: JWS compact serialization.
        audience: our own; the token's only one.
        bundles: trusted keys by trust domain.
        now_ms: milliseconds since the Unix epoch.
        lifetime_seconds_max: ceiling on ``exp - iat``.
        leeway_seconds: clock difference tolerated at ``exp``, ``nbf`` and ``iat``.

    Raises:
        Unauthenticated: with the id of the first rule broken.
        ValueError: `audience` is empty: it is never optional.

    """
    if not audience:
        raise ValueError("the expected audience is empty")
    header_text, payload_text, signature_text = _parts(token)
    algorithm, kid = _header(_json(header_text, "header"))
    payload = _json(payload_text, "payload")
    claims = _claims(payload, audience, now_ms, lifetime_seconds_max, leeway_seconds)
    key = _signing_key(bundles, claims.spiffe_id, kid)
    _check_key(key, algorithm)
    signature = _base64url(signature_text, "signature")
    signed = f"{header_text}.{payload_text}".encode("ascii")
    # Claims come before the signature because they cost less; nothing of them is believed yet.
    if not _ALGORITHMS[algorithm].verify(signed, key.public_key, signature):
        raise Unauthenticated("J-9", f"the signature is not of key {shown(kid)}")
    return JwtSvid(
        spiffe_id=claims.spiffe_id,
        expires_ms=claims.expires_ms,
        token_sha256=hashlib.sha256(token.encode("ascii")).hexdigest(),
    )


# --- serialization -------------------------------------------------------------------------------


def _parts(token: str) -> tuple[str, str, str]:
    if len(token) > TOKEN_BYTES_MAX:
        raise Unauthenticated("J-13", f"the token is longer than {TOKEN_BYTES_MAX} bytes")
    parts = token.split(".")
    if len(parts) != _COMPACT_PARTS or not all(parts) or token.lstrip().startswith("{"):
        raise Unauthenticated("J-1", "not a signed token in JWS compact serialization")
    return parts[0], parts[1], parts[2]


def _base64url(text: str, part: str) -> bytes:
    try:
        return strict_json.decode_base64url(text)
    except strict_json.StrictJsonError as error:
        raise Unauthenticated("J-13", f"the {part}: {error}") from error


def _json(text: str, part: str) -> strict_json.JsonObject:
    data = _base64url(text, part)
    try:
        return strict_json.parse_object(data)
    except strict_json.StrictJsonError as error:
        raise Unauthenticated("J-13", f"the {part}: {error}") from error


# --- header --------------------------------------------------------------------------------------


def _header(header: strict_json.JsonObject) -> tuple[str, str]:
    """Return (alg, kid); ``alg`` is settled before anything else is looked at (J-2)."""
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise Unauthenticated("J-2", f"alg {shown(algorithm)} is not allowed")
    if "typ" in header and header["typ"] not in ("JWT", "JOSE"):
        raise Unauthenticated("J-4", f"typ {shown(header['typ'])} is not JWT or JOSE")
    foreign = sorted(header.keys() - _HEADERS)
    if foreign:
        raise Unauthenticated("J-5", f"header {shown(foreign[0])} is not allowed")
    kid = header.get("kid")
    if not isinstance(kid, str) or not kid or len(kid) > KID_CHARACTERS_MAX:
        raise Unauthenticated("J-3", "kid is missing, empty, too long or no string")
    return algorithm, kid


# --- claims --------------------------------------------------------------------------------------


def _claims(
    payload: strict_json.JsonObject,
    audience: str,
    now_ms: int,
    lifetime_seconds_max: int,
    leeway_seconds: int,
) -> _Claims:
    spiffe_id = _subject(payload)
    _check_audience(payload, audience)
    leeway_ms = leeway_seconds * MS_PER_SECOND
    expires_ms = _numeric_date(payload, "exp", "J-8")
    if expires_ms is None:
        raise Unauthenticated("J-8", "exp is missing")
    if now_ms >= expires_ms + leeway_ms:
        raise Unauthenticated("J-8", f"expired {(now_ms - expires_ms) // MS_PER_SECOND} s ago")
    not_before_ms = _numeric_date(payload, "nbf", "J-12")
    if not_before_ms is not None and now_ms < not_before_ms - leeway_ms:
        raise Unauthenticated("J-12", f"not valid for another {(not_before_ms - now_ms) // MS_PER_SECOND} s")
    issued_ms = _numeric_date(payload, "iat", "J-11")
    if issued_ms is not None and now_ms < issued_ms - leeway_ms:
        # A future iat would make a long life look short.
        raise Unauthenticated("J-11", "iat lies in the future")
    lifetime_ms = expires_ms - (now_ms if issued_ms is None else issued_ms)
    if lifetime_ms > lifetime_seconds_max * MS_PER_SECOND:
        raise Unauthenticated("J-11", f"lives longer than {lifetime_seconds_max} s")
    return _Claims(spiffe_id, expires_ms)


def _subject(payload: strict_json.JsonObject) -> SpiffeId:
    subject = payload.get("sub")
    if not isinstance(subject, str):
        raise Unauthenticated("J-6", "sub is missing or no string")
    try:
        spiffe_id = SpiffeId.parse(subject)
    except SpiffeIdError as error:
        raise Unauthenticated(error.rule, f"sub {shown(subject)}: {error}") from error
    if not spiffe_id.path:
        raise Unauthenticated("J-6", f"sub {shown(spiffe_id)} names a trust domain, not a workload")
    return spiffe_id


def _check_audience(payload: strict_json.JsonObject, audience: str) -> None:
    """Demand exactly one audience, ours, as a string or as an array of one (J-7)."""
    claimed = payload.get("aud")
    values = [claimed] if isinstance(claimed, str) else claimed
    if not isinstance(values, list) or not values:
        raise Unauthenticated("J-7", "aud is missing, empty or of the wrong type")
    if len(values) != 1:
        raise Unauthenticated("J-7", f"{len(values)} audiences where only one is accepted")
    if values[0] != audience:
        raise Unauthenticated("J-7", f"aud {shown(values[0])} is not this broker")


def _numeric_date(payload: strict_json.JsonObject, name: str, rule: str) -> int | None:
    """Return a claim in milliseconds, None where it is absent."""
    if name not in payload:
        return None
    value = payload[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < SECONDS_END:
        raise Unauthenticated(rule, f"{name} is not an integer number of seconds")
    return value * MS_PER_SECOND


# --- key -----------------------------------------------------------------------------------------


def _signing_key(bundles: TrustBundles, spiffe_id: SpiffeId, kid: str) -> JwtKey:
    """Return the key of that ``kid`` in the bundle of the trust domain of ``sub``, no other (J-9)."""
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        raise Unauthenticated("J-9", f"no bundle for trust domain {spiffe_id.trust_domain}")
    key = bundle.jwt_keys.get(kid)
    if key is None:
        raise Unauthenticated("J-9", f"no key {shown(kid)} in the bundle of {spiffe_id.trust_domain}")
    return key


def _check_key(key: JwtKey, algorithm: str) -> None:
    if key.algorithm is not None and key.algorithm != algorithm:
        raise Unauthenticated("J-14", f"the key is for {shown(key.algorithm)}, the token says {algorithm}")
    curve = _CURVES.get(algorithm)
    match key.public_key:
        case rsa.RSAPublicKey() as public_key if curve is None:
            if public_key.key_size < RSA_BITS_MIN:
                raise Unauthenticated("J-14", f"an RSA key of {public_key.key_size} bits")
        case ec.EllipticCurvePublicKey() as public_key if curve is not None:
            if not isinstance(public_key.curve, curve):
                raise Unauthenticated("J-14", f"the key's curve does not fit {algorithm}")
        case _:
            raise Unauthenticated("J-14", f"the key is of another type than {algorithm} needs")
