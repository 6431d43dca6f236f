"""The keys of a development trust domain: what they sign, and how others check it.

A production trust domain is SPIRE's business; this one exists so that development takes the
same path through the Workload API.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import jwt
import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from jwt.algorithms import ECAlgorithm

from broker.core.clock import MS_PER_SECOND
from broker.core.spiffe_id import SCHEME, SpiffeId

if TYPE_CHECKING:
    from collections.abc import Sequence

SVID_TTL_SECONDS_MAX: Final = 3600
"""No SVID lives longer, so that a retired authority can leave the bundle after as long."""

AUTHORITY_TTL_SECONDS: Final = 365 * 24 * 3600
REFRESH_HINT_SECONDS: Final = 10

_BACKDATE_SECONDS: Final = 10  # for verifiers whose clock is a little behind
_NAME: Final = "nhi development"
_KID_CHARACTERS: Final = 32


@dataclass(frozen=True, slots=True)
class IssuedX509Svid:
    """An X.509-SVID with its private key.

    Attributes:
        certificate: the leaf; it is signed by the authority itself, so it is the whole chain.
        not_before_ms, not_after_ms: its validity.

    """

    spiffe_id: SpiffeId
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def not_before_ms(self) -> int:
        """When it begins to be valid."""
        return int(self.certificate.not_valid_before_utc.timestamp()) * MS_PER_SECOND

    @property
    def not_after_ms(self) -> int:
        """When it ends."""
        return int(self.certificate.not_valid_after_utc.timestamp()) * MS_PER_SECOND

    @property
    def half_life_ms(self) -> int:
        """When the next one should take over."""
        return (self.not_before_ms + _BACKDATE_SECONDS * MS_PER_SECOND + self.not_after_ms) // 2

    def chain_der(self) -> bytes:
        """Return the chain as the Workload API carries it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def chain_pem(self) -> bytes:
        """Return the chain for a TLS library."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_der(self) -> bytes:
        """Return the private key, PKCS#8, unencrypted: a secret."""
        return _key_bytes(self.key, serialization.Encoding.DER)

    def key_pem(self) -> bytes:
        """Return the private key, PKCS#8, unencrypted: a secret."""
        return _key_bytes(self.key, serialization.Encoding.PEM)


def _key_bytes(key: ec.EllipticCurvePrivateKey, encoding: serialization.Encoding) -> bytes:
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _moment(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms // MS_PER_SECOND, tz=dt.UTC)


@dataclass(frozen=True, slots=True)
class Authority:
    """One generation of a trust domain's keys; X.509 and JWT never share one.

    Attributes:
        certificate: self-signed, with the trust domain's own ID (X-8).
        forget_ms: when it leaves the bundle, None while it is the one that signs.

    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    jwt_key: ec.EllipticCurvePrivateKey
    forget_ms: int | None = None

    @classmethod
    def generate(cls, trust_domain: str, now_ms: int) -> Authority:
        """Draw fresh keys."""
        key = ec.generate_private_key(ec.SECP256R1())
        # Each generation has a name of its own: paths are found by name.
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, _NAME),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(8)),
            ]
        )
        usage = _key_usage(signs_certificates=True)
        certificate = (
            x509.CertificateBuilder(subject_name=name, issuer_name=name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_moment(now_ms - _BACKDATE_SECONDS * MS_PER_SECOND))
            .not_valid_after(_moment(now_ms + AUTHORITY_TTL_SECONDS * MS_PER_SECOND))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(_alternative_names(SCHEME + trust_domain, (), ()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key, ec.generate_private_key(ec.SECP256R1()))

    @property
    def kid(self) -> str:
        """Names the JWT key: a digest of it."""
        public = self.jwt_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(public).hexdigest()[:_KID_CHARACTERS]

    @property
    def half_life_ms(self) -> int:
        """When a new authority should take over."""
        begin, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return int((begin + (end - begin) / 2).timestamp()) * MS_PER_SECOND

    def issue_x509_svid(
        self,
        spiffe_id: SpiffeId,
        *,
        now_ms: int,
        ttl_seconds: int,
        dns_names: Sequence[str] = (),
        ip_addresses: Sequence[str] = (),
    ) -> IssuedX509Svid:
        """Sign a leaf for a fresh key: X-1, X-3 to X-7, X-9."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, _NAME)])
        both_uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        certificate = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_moment(now_ms - _BACKDATE_SECONDS * MS_PER_SECOND))
            .not_valid_after(_moment(now_ms + ttl_seconds * MS_PER_SECOND))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(both_uses, critical=False)
            .add_extension(_alternative_names(spiffe_id, dns_names, ip_addresses), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        return IssuedX509Svid(spiffe_id, certificate, key)

    def issue_jwt_svid(self, spiffe_id: SpiffeId, audience: str, *, now_ms: int, ttl_seconds: int) -> str:
        """Sign a token for one audience: J-2 to J-8."""
        issued = now_ms // MS_PER_SECOND
        claims = {"sub": str(spiffe_id), "aud": [audience], "iat": issued, "exp": issued + ttl_seconds}
        return jwt.encode(claims, self.jwt_key, algorithm="ES256", headers={"kid": self.kid, "typ": "JWT"})


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(
    uri: str, dns_names: Sequence[str], ip_addresses: Sequence[str]
) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    names += (x509.DNSName(name) for name in dns_names)
    names += (x509.IPAddress(ipaddress.ip_address(address)) for address in ip_addresses)
    return x509.SubjectAlternativeName(names)


# --- bundles -------------------------------------------------------------------------------------


def x509_bundle(authorities: Sequence[Authority]) -> bytes:
    """Return the authorities' certificates as the Workload API carries them: DER, one after another."""
    return b"".join(a.certificate.public_bytes(serialization.Encoding.DER) for a in authorities)


def jwt_bundle(authorities: Sequence[Authority]) -> bytes:
    """Return the JWT keys as a JWK Set."""
    return orjson.dumps({"keys": [_jwt_jwk(authority) for authority in authorities]})


def spiffe_bundle(authorities: Sequence[Authority], sequence: int) -> bytes:
    """Return the SPIFFE bundle document, X.509 and JWT keys together."""
    keys = [jwk(authority) for jwk in (_x509_jwk, _jwt_jwk) for authority in authorities]
    hint = REFRESH_HINT_SECONDS
    return orjson.dumps({"keys": keys, "spiffe_sequence": sequence, "spiffe_refresh_hint": hint})


def _x509_jwk(authority: Authority) -> dict[str, object]:
    public = ECAlgorithm.to_jwk(authority.key.public_key(), as_dict=True)
    der = authority.certificate.public_bytes(serialization.Encoding.DER)
    return {**public, "use": "x509-svid", "x5c": [base64.b64encode(der).decode("ascii")]}


def _jwt_jwk(authority: Authority) -> dict[str, object]:
    public = ECAlgorithm.to_jwk(authority.jwt_key.public_key(), as_dict=True)
    return {**public, "use": "jwt-svid", "kid": authority.kid, "alg": "ES256"}
