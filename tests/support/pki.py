"""Forging tools: certificates, tokens and bundles, right in every detail unless a test says otherwise.

Every key is made at run time. Nothing here validates anything: a test that wants a
broken SVID gets exactly the one it describes.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from jwt.algorithms import ECAlgorithm, RSAAlgorithm, get_default_algorithms

from broker.authn.trust_bundle import JwtKey, TrustBundle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Extension = tuple[x509.ExtensionType, bool]

NOW_MS: Final = 1_800_000_000_000
NOW: Final = datetime.fromtimestamp(NOW_MS // 1000, UTC)
_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """One RSA key per size and test run: making them is slow."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def ec_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP256R1())


def name(common_name: str = "") -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def key_usage(*on: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in on for usage in _USAGES})


def san(*uris: str, others: Sequence[x509.GeneralName] = ()) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([*(unchecked_uri(uri) for uri in uris), *others])


def unchecked_uri(uri: str) -> x509.UniformResourceIdentifier:
    """A URI name that the library would not write of its own accord."""
    return x509.UniformResourceIdentifier._init_without_validation(uri)


CLIENT_AND_SERVER: Final = x509.ExtendedKeyUsage(
    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def key_der(key: Key) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def certify(
    *,
    key: Key,
    issuer: x509.Name,
    signer: Key,
    subject: x509.Name,
    extensions: Sequence[Extension],
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer, algorithm)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A workload's certificate and key; `chain` is what it sends in a handshake."""

    certificate: x509.Certificate
    key: Key
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Authority:
    """A signing certificate, root or intermediate, and its key."""

    trust_domain: str
    certificate: x509.Certificate
    key: Key
    above: tuple[bytes, ...] = ()
    """Intermediates from this one up, as a leaf sends them; the root is not among them."""

    @classmethod
    def root(
        cls,
        trust_domain: str = "example.org",
        *,
        key: Key | None = None,
        extensions: Sequence[Extension] | None = None,
        now: datetime = NOW,
        not_after: datetime | None = None,
    ) -> Authority:
        key = key or ec_key()
        subject = name(f"root of {trust_domain}")
        certificate = certify(
            key=key,
            issuer=subject,
            signer=key,
            subject=subject,
            extensions=ca_extensions(trust_domain) if extensions is None else extensions,
            not_before=now - timedelta(minutes=5),
            not_after=not_after or now + timedelta(days=1),
        )
        return cls(trust_domain, certificate, key)

    def intermediate(
        self,
        *,
        key: Key | None = None,
        extensions: Sequence[Extension] | None = None,
        extra: Sequence[Extension] = (),
        common_name: str = "intermediate",
        now: datetime = NOW,
        not_after: datetime | None = None,
    ) -> Authority:
        key = key or ec_key()
        chosen = ca_extensions(self.trust_domain) if extensions is None else extensions
        certificate = certify(
            key=key,
            issuer=self.certificate.subject,
            signer=self.key,
            subject=name(common_name),
            extensions=[*chosen, *extra],
            not_before=now - timedelta(minutes=5),
            not_after=not_after or now + timedelta(hours=12),
        )
        return Authority(self.trust_domain, certificate, key, (der(certificate), *self.above))

    def leaf(
        self,
        *,
        uris: Sequence[str] | None = None,
        path: str = "/agent",
        key: Key | None = None,
        subject: x509.Name | None = None,
        replaced: Mapping[type[x509.ExtensionType], Extension | None] | None = None,
        extra: Sequence[Extension] = (),
        now: datetime = NOW,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Leaf:
        """Issue a correct SVID; `replaced` exchanges extensions by type, or leaves them out (None)."""
        key = key or ec_key()
        ids = [f"spiffe://{self.trust_domain}{path}"] if uris is None else uris
        extensions: dict[type[x509.ExtensionType], Extension | None] = {
            x509.BasicConstraints: (x509.BasicConstraints(ca=False, path_length=None), True),
            x509.KeyUsage: (key_usage("digital_signature"), True),
            x509.ExtendedKeyUsage: (CLIENT_AND_SERVER, False),
            x509.AuthorityKeyIdentifier: (
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                False,
            ),
            x509.SubjectAlternativeName: (san(*ids), False),
        }
        extensions.update(replaced or {})
        certificate = certify(
            key=key,
            issuer=self.certificate.subject,
            signer=self.key,
            subject=name("workload") if subject is None else subject,
            extensions=[*(each for each in extensions.values() if each is not None), *extra],
            not_before=not_before or now - timedelta(minutes=5),
            not_after=not_after or now + timedelta(hours=1),
        )
        return Leaf(certificate, key, (der(certificate), *self.above))

    def bundle(self, *jwt_keys: JwtKey) -> TrustBundle:
        return TrustBundle(
            trust_domain=self.trust_domain,
            x509_authorities=(self.certificate,),
            jwt_keys={key.kid: key for key in jwt_keys},
        )


def ca_extensions(trust_domain: str | None = None) -> list[Extension]:
    extensions: list[Extension] = [
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (key_usage("key_cert_sign", "crl_sign"), True),
    ]
    if trust_domain is not None:
        extensions.append((san(f"spiffe://{trust_domain}"), False))
    return extensions


# --- tokens --------------------------------------------------------------------------------------


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _segment(value: Mapping[str, Any] | bytes) -> str:
    return base64url(value if isinstance(value, bytes) else json.dumps(value).encode())


def forge_jws(
    header: Mapping[str, Any] | bytes, payload: Mapping[str, Any] | bytes, key: Key, alg: str
) -> str:
    """Sign any header over any payload, objects or raw bytes, with `alg` whatever the header says."""
    signed = f"{_segment(header)}.{_segment(payload)}"
    return f"{signed}.{base64url(get_default_algorithms()[alg].sign(signed.encode('ascii'), key))}"


@dataclass(frozen=True, slots=True)
class JwtAuthority:
    """A JWT-SVID signing key."""

    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    kid: str = "key-1"
    alg: str = "ES256"

    @classmethod
    def new(cls, kid: str = "key-1") -> JwtAuthority:
        return cls(ec_key(), kid)

    @property
    def public(self) -> JwtKey:
        return JwtKey(self.kid, self.key.public_key())

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """The public JWK of a SPIFFE bundle; a change to None leaves a member out."""
        kind = ECAlgorithm if isinstance(self.key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
        jwk = {
            member: value
            for member, value in kind.to_jwk(self.key.public_key(), as_dict=True).items()
            if member in {"kty", "crv", "x", "y", "n", "e"}
        }
        jwk |= {"kid": self.kid, "use": "jwt-svid"} | changes
        return {member: value for member, value in jwk.items() if value is not None}

    def token(
        self,
        sub: str = "spiffe://example.org/agent",
        aud: Any = "nhi-broker",
        *,
        now_ms: int = NOW_MS,
        header: Mapping[str, Any] | None = None,
        claims: Mapping[str, Any] | None = None,
    ) -> str:
        """A correct JWT-SVID of five minutes; `header` and `claims` change it, None leaves out."""
        now = now_ms // 1000
        full_header = {"alg": self.alg, "kid": self.kid, "typ": "JWT"} | dict(header or {})
        full_claims = {"sub": sub, "aud": aud, "iat": now, "exp": now + 300} | dict(claims or {})
        return forge_jws(
            {member: value for member, value in full_header.items() if value is not None},
            {member: value for member, value in full_claims.items() if value is not None},
            self.key,
            self.alg,
        )


def x5c_jwk(*certificates: x509.Certificate, **changes: Any) -> dict[str, Any]:
    """An ``x509-svid`` entry of a SPIFFE bundle; a change to None leaves a member out."""
    jwk = {
        "kty": "EC",
        "use": "x509-svid",
        "x5c": [base64.b64encode(der(certificate)).decode("ascii") for certificate in certificates],
    } | changes
    return {member: value for member, value in jwk.items() if value is not None}


def bundle_json(*keys: Mapping[str, Any], **members: Any) -> bytes:
    return json.dumps({"keys": list(keys)} | members).encode()
