"""One trust domain's bundle, and the documents it is read from (SPIFFE Trust Domain and Bundle §4)."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.authn import strict_json
from broker.core.spiffe_id import SCHEME, SpiffeIdError, check_trust_domain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BUNDLE_BYTES_MAX: Final = 4 * 1024 * 1024
KEYS_MAX: Final = 1024
REFRESH_HINT_SECONDS_DEFAULT: Final = 300
REFRESH_HINT_SECONDS_MAX: Final = 24 * 3600
_SEQUENCE_END: Final = 2**64
_RSA_MODULUS_BITS_MAX: Final = 16_384

JwtPublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

_CURVES: Final[Mapping[str, tuple[ec.EllipticCurve, int]]] = MappingProxyType(
    {"P-256": (ec.SECP256R1(), 32), "P-384": (ec.SECP384R1(), 48), "P-521": (ec.SECP521R1(), 66)}
)


class BundleError(ValueError):
    """A document is not a trust bundle, or an older one than we hold; the message is for operators."""


class _UnusableKeyError(Exception):
    """One entry of a bundle cannot be used; the others still can."""


@dataclass(frozen=True, slots=True)
class JwtKey:
    """A JWT-SVID signing key. `algorithm` is the JWK's ``alg``: only that one is accepted (J-14)."""

    kid: str
    public_key: JwtPublicKey
    algorithm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustBundle:
    """The authorities of one trust domain; equal when they hold the same keys.

    Attributes:
        x509_authorities: CA certificates.
        jwt_keys: JWT-SVID keys by ``kid``.
        sequence: ``spiffe_sequence``, None where the source has none.
        refresh_hint_seconds: how often to ask again, 1 to 86,400.
        ignored: why entries were left out, a sentence each; for logs and ``nhi doctor``.

    """

    trust_domain: str
    x509_authorities: tuple[x509.Certificate, ...] = ()
    jwt_keys: Mapping[str, JwtKey] = field(default_factory=dict)
    sequence: int | None = None
    refresh_hint_seconds: int = REFRESH_HINT_SECONDS_DEFAULT
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        try:
            check_trust_domain(self.trust_domain)
        except SpiffeIdError as error:
            raise BundleError(str(error)) from error
        object.__setattr__(self, "jwt_keys", MappingProxyType(dict(self.jwt_keys)))

    @property
    def is_empty(self) -> bool:
        """Whether nobody of this trust domain can get in."""
        return not self.x509_authorities and not self.jwt_keys


def trust_domain_name(text: str) -> str:
    """Return the trust domain in ``example.org`` or ``spiffe://example.org``.

    Workload API servers key their bundle maps by either form.

    Raises:
        BundleError: it is neither.

    """
    name = text.removeprefix(SCHEME)
    try:
        check_trust_domain(name)
    except SpiffeIdError as error:
        raise BundleError(f"not a trust domain: {error}") from error
    return name


def is_authority(certificate: x509.Certificate) -> bool:
    """Say whether a certificate may sign SVIDs: a CA with ``keyCertSign`` (X-8)."""
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except Exception:  # noqa: BLE001  whatever is wrong with it, what cannot be read signs nothing
        return False
    return constraints.ca and usage.key_cert_sign


def parse_spiffe_bundle(trust_domain: str, json_bytes: bytes) -> TrustBundle:
    """Return the SPIFFE bundle document (a JWK Set) of `trust_domain`.

    An entry that cannot be used (unknown ``kty`` or ``use``, no ``x5c``, no ``kid``, a
    certificate that is no CA, private key material) is left out and named in `ignored`.
    Of several certificates in ``x5c`` the first counts.

    Raises:
        BundleError: the document as a whole is malformed. Keep what you had.

    """
    document = _document(json_bytes)
    authorities: list[x509.Certificate] = []
    jwt_keys: dict[str, JwtKey] = {}
    ignored: list[str] = []
    for position, jwk in enumerate(_entries(document)):
        try:
            _add_entry(jwk, authorities, jwt_keys)
        except _UnusableKeyError as error:
            ignored.append(f"entry {position}: {error}")
    return TrustBundle(
        trust_domain=trust_domain,
        x509_authorities=tuple(authorities),
        jwt_keys=jwt_keys,
        sequence=_sequence(document),
        refresh_hint_seconds=_refresh_hint(document),
        ignored=tuple(ignored),
    )


def parse_jwks(trust_domain: str, json_bytes: bytes) -> TrustBundle:
    """Return the JWT keys of a plain JWK Set, as the Workload API serves it per trust domain.

    There ``use`` may be absent (SPIRE leaves it out); another ``use`` is still left out.

    Raises:
        BundleError: the document as a whole is malformed.

    """
    jwt_keys: dict[str, JwtKey] = {}
    ignored: list[str] = []
    for position, jwk in enumerate(_entries(_document(json_bytes))):
        try:
            _add_entry({"use": "jwt-svid", **jwk}, [], jwt_keys)
        except _UnusableKeyError as error:
            ignored.append(f"entry {position}: {error}")
    return TrustBundle(trust_domain=trust_domain, jwt_keys=jwt_keys, ignored=tuple(ignored))


def parse_x509_pem(trust_domain: str, pem_bytes: bytes) -> TrustBundle:
    """Return a bundle of the CA certificates in `pem_bytes`; it holds no JWT keys.

    Raises:
        BundleError: there is no certificate, or one cannot be read.

    """
    if len(pem_bytes) > BUNDLE_BYTES_MAX:
        raise BundleError(f"the bundle is larger than {BUNDLE_BYTES_MAX} bytes")
    try:
        certificates = x509.load_pem_x509_certificates(pem_bytes)
    except ValueError as error:
        raise BundleError("not a PEM file of certificates") from error
    return x509_bundle(trust_domain, certificates)


def parse_x509_der(trust_domain: str, der_bytes: bytes) -> TrustBundle:
    """Return a bundle of concatenated DER certificates, as the Workload API serves them.

    Raises:
        BundleError: the bytes are not a sequence of certificates.

    """
    return x509_bundle(trust_domain, parse_der_certificates(der_bytes))


def x509_bundle(trust_domain: str, certificates: Iterable[x509.Certificate]) -> TrustBundle:
    """Return a bundle of those `certificates` that are CAs."""
    authorities: list[x509.Certificate] = []
    ignored: list[str] = []
    for position, certificate in enumerate(certificates):
        try:
            _add_authority(authorities, certificate)
        except _UnusableKeyError as error:
            ignored.append(f"entry {position}: {error}")
    return TrustBundle(trust_domain=trust_domain, x509_authorities=tuple(authorities), ignored=tuple(ignored))


def parse_der_certificates(der_bytes: bytes) -> list[x509.Certificate]:
    """Return the certificates of a DER concatenation, in order.

    Raises:
        BundleError: the bytes are not a sequence of certificates.

    """
    if len(der_bytes) > BUNDLE_BYTES_MAX:
        raise BundleError(f"the certificates are larger than {BUNDLE_BYTES_MAX} bytes")
    certificates: list[x509.Certificate] = []
    rest = memoryview(der_bytes)
    while rest:
        if len(certificates) == KEYS_MAX:
            raise BundleError(f"more than {KEYS_MAX} certificates")
        size = _der_element_size(rest)
        try:
            certificates.append(x509.load_der_x509_certificate(bytes(rest[:size])))
        except ValueError as error:
            raise BundleError("not a sequence of DER certificates") from error
        rest = rest[size:]
    return certificates


_DER_SEQUENCE: Final = 0x30
_DER_LONG_FORM: Final = 0x80
_DER_LENGTH_BYTES_MAX: Final = 4


def _der_element_size(data: memoryview) -> int:
    """Return the whole size of the DER SEQUENCE that `data` starts with (X.690 8.1.3)."""
    if len(data) >= 2 and data[0] == _DER_SEQUENCE:  # noqa: PLR2004  tag and first length byte
        first = data[1]
        if first < _DER_LONG_FORM:
            return 2 + first
        count = first - _DER_LONG_FORM
        if 0 < count <= _DER_LENGTH_BYTES_MAX and len(data) >= 2 + count:
            return 2 + count + int.from_bytes(data[2 : 2 + count], "big")
    raise BundleError("not a sequence of DER certificates")


def _document(json_bytes: bytes) -> strict_json.JsonObject:
    if len(json_bytes) > BUNDLE_BYTES_MAX:
        raise BundleError(f"the bundle is larger than {BUNDLE_BYTES_MAX} bytes")
    try:
        return strict_json.parse_object(json_bytes)
    except strict_json.StrictJsonError as error:
        raise BundleError(f"the bundle is not strict JSON: {error}") from error


def _entries(document: strict_json.JsonObject) -> list[strict_json.JsonObject]:
    if "keys" not in document:
        raise BundleError("the bundle has no keys member")
    keys = document["keys"]
    if keys is None:  # how SPIRE, written in Go, renders a bundle without keys
        return []
    if not isinstance(keys, list) or not all(isinstance(entry, dict) for entry in keys):
        raise BundleError("the keys member is not a list of objects")
    if len(keys) > KEYS_MAX:
        raise BundleError(f"the bundle has more than {KEYS_MAX} keys")
    return keys


def _sequence(document: strict_json.JsonObject) -> int | None:
    value = document.get("spiffe_sequence")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _SEQUENCE_END:
        raise BundleError("spiffe_sequence is not an unsigned 64-bit integer")
    return value


def _refresh_hint(document: strict_json.JsonObject) -> int:
    value = document.get("spiffe_refresh_hint")
    if value is None:
        return REFRESH_HINT_SECONDS_DEFAULT
    if not isinstance(value, int) or isinstance(value, bool):
        raise BundleError("spiffe_refresh_hint is not an integer")
    # A hint is advice: zero and less would be a busy loop, a year would freeze a rotation.
    return min(value, REFRESH_HINT_SECONDS_MAX) if value > 0 else REFRESH_HINT_SECONDS_DEFAULT


def _add_entry(
    jwk: strict_json.JsonObject, authorities: list[x509.Certificate], jwt_keys: dict[str, JwtKey]
) -> None:
    match jwk.get("use"):
        case "x509-svid":
            _add_authority(authorities, _x5c_authority(jwk))
        case "jwt-svid":
            _add_jwt_key(jwt_keys, _jwt_key(jwk))
        case _:
            raise _UnusableKeyError("its use is missing or unknown")


def _add_authority(authorities: list[x509.Certificate], certificate: x509.Certificate) -> None:
    if not is_authority(certificate):
        raise _UnusableKeyError("its certificate is not a CA with keyCertSign")
    if certificate not in authorities:
        authorities.append(certificate)


def _add_jwt_key(jwt_keys: dict[str, JwtKey], key: JwtKey) -> None:
    if key.kid in jwt_keys:
        raise BundleError("two JWT keys share one kid")
    jwt_keys[key.kid] = key


def _x5c_authority(jwk: strict_json.JsonObject) -> x509.Certificate:
    chain = jwk.get("x5c")
    if not isinstance(chain, list) or not chain or not isinstance(chain[0], str):
        raise _UnusableKeyError("it has no x5c certificate")
    try:
        # x5c is standard base64, not base64url (RFC 7517 4.7).
        return x509.load_der_x509_certificate(base64.b64decode(chain[0], validate=True))
    except (ValueError, binascii.Error) as error:
        raise _UnusableKeyError("its x5c certificate cannot be read") from error


def _jwt_key(jwk: strict_json.JsonObject) -> JwtKey:
    if "d" in jwk or "k" in jwk:
        raise _UnusableKeyError("it carries private or symmetric key material")
    kid = jwk.get("kid")
    if not isinstance(kid, str) or not kid:
        raise _UnusableKeyError("it has no kid")
    algorithm = jwk.get("alg")
    if algorithm is not None and not isinstance(algorithm, str):
        raise _UnusableKeyError("its alg is not a string")
    try:
        return JwtKey(kid, _public_key(jwk), algorithm)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _UnusableKeyError("its key is not valid") from error


def _public_key(jwk: strict_json.JsonObject) -> JwtPublicKey:
    match jwk.get("kty"):
        case "RSA":
            modulus = int.from_bytes(_member(jwk, "n"), "big")
            if modulus.bit_length() > _RSA_MODULUS_BITS_MAX:
                raise _UnusableKeyError("its RSA modulus is too large to work with")
            return rsa.RSAPublicNumbers(int.from_bytes(_member(jwk, "e"), "big"), modulus).public_key()
        case "EC":
            curve_name = jwk.get("crv")
            if not isinstance(curve_name, str) or curve_name not in _CURVES:
                raise _UnusableKeyError("its curve is unknown")
            curve, size = _CURVES[curve_name]
            x, y = _member(jwk, "x"), _member(jwk, "y")
            if len(x) != size or len(y) != size:
                raise _UnusableKeyError("its coordinates do not fit its curve")
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)
        case _:
            raise _UnusableKeyError("its kty is missing or unknown")


def _member(jwk: strict_json.JsonObject, name: str) -> bytes:
    value = jwk.get(name)
    if not isinstance(value, str) or not value:
        raise _UnusableKeyError(f"its {name} is missing")
    try:
        return strict_json.decode_base64url(value)
    except strict_json.StrictJsonError as error:
        raise _UnusableKeyError(f"its {name} is not base64url") from error
