"""X.509-SVID validation, rules X-1 to X-13.

The order gives away the least attack surface: bounds (X-12), parse, one URI SAN
(X-1), SPIFFE ID (ID-*), leaf profile (X-3 to X-9), the bundle of that trust domain (X-10),
path validation against it alone (X-2).

Path validation is `cryptography`'s. Measured with version 50: left alone it refuses
SVIDs that are legal (a critical EKU, a critical SAN beside a subject, no
authorityKeyIdentifier) and accepts what is not (two URI SANs, cRLSign, a missing
keyUsage, weak leaf keys, a leaf found in the trust store, critical name constraints
it cannot evaluate). So its extension policies are loosened where ours decide, and
everything else is checked here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from broker.authn.explain import shown
from broker.authn.trust_bundle import is_authority
from broker.core.clock import MS_PER_SECOND
from broker.core.errors import Unauthenticated
from broker.core.spiffe_id import SCHEME, SpiffeId, SpiffeIdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.authn.bundles import TrustBundles
    from broker.authn.trust_bundle import TrustBundle

CHAIN_CERTIFICATES_MAX: Final = 6
CERTIFICATE_BYTES_MAX: Final = 16_384
RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 8192
_EC_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)

# Every extension that path validation or this module acts on; any other critical one refuses.
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    }
)
# What the library evaluates; of other kinds it ignores some and some only when not critical.
_EVALUATED_CONSTRAINTS: Final = (x509.DNSName, x509.IPAddress, x509.RFC822Name)
_NAME_CONSTRAINT: Final = re.compile("name ?constraint", re.IGNORECASE)
_CLIENT_USES: Final = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})

_E = TypeVar("_E", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class X509Svid:
    """A chain that passed.

    Attributes:
        not_after_ms: the last moment at which every certificate of the verified path is valid.
        leaf_sha256: SHA-256 of the leaf's DER, hex.

    """

    spiffe_id: SpiffeId
    not_after_ms: int
    leaf_sha256: str


def validate_x509_svid(chain_der: Sequence[bytes], bundles: TrustBundles, now_ms: int) -> X509Svid:
    """Return the identity that a certificate chain proves.

    The caller has proof of possession: the chain comes out of a finished TLS handshake.

    Args:
        chain_der: as the peer sent it, leaf first, DER.
        bundles: trusted authorities by trust domain.
        now_ms: milliseconds since the Unix epoch.

    Raises:
        Unauthenticated: with the id of the first rule broken.

    """
    certificates = [_parse(der) for der in _bounded(chain_der)]
    leaf, intermediates = certificates[0], certificates[1:]
    spiffe_id = _spiffe_id(leaf)
    _check_leaf_profile(leaf)
    for certificate in intermediates:
        _check_signing_profile(certificate, spiffe_id)
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        raise Unauthenticated("X-10", f"no bundle for trust domain {spiffe_id.trust_domain}")
    path = _verified_path(leaf, intermediates, bundle, now_ms)
    not_after_ms = min(_not_after_ms(certificate) for certificate in path)
    if now_ms > not_after_ms:  # the library compares whole seconds
        raise Unauthenticated("X-2", "a certificate of the path has expired")
    return X509Svid(
        spiffe_id=spiffe_id,
        not_after_ms=not_after_ms,
        leaf_sha256=hashlib.sha256(chain_der[0]).hexdigest(),
    )


# --- before any work -----------------------------------------------------------------------------


def _bounded(chain_der: Sequence[bytes]) -> list[bytes]:
    """Return the chain without repetitions, leaf first, or refuse its size (X-12)."""
    if not chain_der:
        raise Unauthenticated("X-12", "the chain is empty")
    if len(chain_der) > CHAIN_CERTIFICATES_MAX:
        raise Unauthenticated("X-12", f"the chain has more than {CHAIN_CERTIFICATES_MAX} certificates")
    if any(len(der) > CERTIFICATE_BYTES_MAX for der in chain_der):
        raise Unauthenticated("X-12", f"a certificate is larger than {CERTIFICATE_BYTES_MAX} bytes")
    return list(dict.fromkeys(chain_der))


def _parse(der: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        # The library parses lazily; read here, nothing below meets a part that is malformed.
        _ = (certificate.subject, certificate.issuer, certificate.not_valid_after_utc)
        unknown = [
            extension.oid
            for extension in certificate.extensions
            if extension.critical and extension.oid not in _UNDERSTOOD
        ]
        public_key = certificate.public_key()
    except Exception as error:  # which ones the library raises over foreign bytes is written nowhere
        raise Unauthenticated("X-2", f"a certificate cannot be read ({type(error).__name__})") from error
    # The only octet that no signature covers: how many bits the last one leaves unused. With another
    # value the library reads the same certificate, and one SVID would have two digests in the audit.
    if der[-len(certificate.signature) - 1] != 0:
        raise Unauthenticated("X-2", "a certificate's signature is not a whole number of octets")
    if unknown:
        raise Unauthenticated("X-11", f"unknown critical extension {unknown[0].dotted_string}")
    _check_key(public_key)
    return certificate


def _check_key(key: object) -> None:
    """Hold a key to our allow-list: the specification names none (X-13)."""
    match key:
        case ec.EllipticCurvePublicKey():
            if not isinstance(key.curve, _EC_CURVES):
                raise Unauthenticated("X-13", "an EC key is on another curve than P-256 and P-384")
        case rsa.RSAPublicKey():
            if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
                raise Unauthenticated(
                    "X-13", f"an RSA key of {key.key_size} bits, not {RSA_BITS_MIN} to {RSA_BITS_MAX}"
                )
        case ed25519.Ed25519PublicKey():
            return
        case _:
            raise Unauthenticated("X-13", "a key of an algorithm that is not allowed")


# --- profiles ------------------------------------------------------------------------------------


def _extension(certificate: x509.Certificate, kind: type[_E]) -> x509.Extension[_E] | None:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _uris(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return [] if names is None else names.value.get_values_for_type(x509.UniformResourceIdentifier)


def _parse_id(uri: str) -> SpiffeId:
    try:
        return SpiffeId.parse(uri)
    except SpiffeIdError as error:
        raise Unauthenticated(error.rule, f"URI SAN {shown(uri)}: {error}") from error


def _spiffe_id(leaf: x509.Certificate) -> SpiffeId:
    uris = _uris(leaf)
    if len(uris) != 1:
        raise Unauthenticated("X-1", f"the leaf has {len(uris)} URI SANs, not exactly one")
    spiffe_id = _parse_id(uris[0])
    if not spiffe_id.path:
        raise Unauthenticated("X-5", f"{spiffe_id} names a trust domain, not a workload")
    return spiffe_id


def _check_leaf_profile(leaf: x509.Certificate) -> None:
    # Absent basicConstraints mean cA=false (RFC 5280 4.2.1.9).
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.value.ca:
        raise Unauthenticated("X-3", "the leaf is a CA certificate")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None:
        raise Unauthenticated("X-6", "the leaf has no keyUsage")
    if usage.value.key_cert_sign:
        raise Unauthenticated("X-4", "the leaf's keyUsage has keyCertSign")
    if usage.value.crl_sign:
        raise Unauthenticated("X-4", "the leaf's keyUsage has cRLSign")
    if not usage.value.digital_signature:
        raise Unauthenticated("X-6", "the leaf's keyUsage lacks digitalSignature")
    if not usage.critical:
        raise Unauthenticated("X-6", "the leaf's keyUsage is not critical")
    purposes = _extension(leaf, x509.ExtendedKeyUsage)
    if purposes is not None and ExtendedKeyUsageOID.CLIENT_AUTH not in purposes.value:
        raise Unauthenticated("X-7", "the leaf's extendedKeyUsage lacks clientAuth")
    names = _extension(leaf, x509.SubjectAlternativeName)
    if not leaf.subject.rdns and names is not None and not names.critical:
        raise Unauthenticated("X-9", "the subject is empty and the SAN is not critical")


def _check_signing_profile(certificate: x509.Certificate, spiffe_id: SpiffeId) -> None:
    """Hold a certificate sent beside the leaf to X-8: nothing else has a place in the chain."""
    if not is_authority(certificate):
        raise Unauthenticated("X-8", "an intermediate is not a CA with keyCertSign")
    for uri in _uris(certificate):
        if not uri.startswith(SCHEME):
            continue
        signer = _parse_id(uri)
        if signer.path:
            raise Unauthenticated("X-8", f"an intermediate's SPIFFE ID {shown(signer)} has a path")
        if signer.trust_domain != spiffe_id.trust_domain:
            raise Unauthenticated("X-8", f"an intermediate belongs to {shown(signer)}")
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and not _CLIENT_USES & set(purposes.value):
        raise Unauthenticated("X-7", "an intermediate's extendedKeyUsage excludes clientAuth")


# --- path ----------------------------------------------------------------------------------------

# No authorityKeyIdentifier or subjectKeyIdentifier is demanded: SPIFFE does not, and paths are
# found by name and proven by signature. Criticality of the others is checked above, by our rules.
_EE_POLICY: Final = (
    ExtensionPolicy.webpki_defaults_ee()
    .may_be_present(x509.AuthorityKeyIdentifier, Criticality.AGNOSTIC, None)
    .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
    .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, None)
    .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
)
_CA_POLICY: Final = (
    ExtensionPolicy.webpki_defaults_ca()
    .may_be_present(x509.AuthorityKeyIdentifier, Criticality.AGNOSTIC, None)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
    .may_be_present(x509.SubjectKeyIdentifier, Criticality.AGNOSTIC, None)
)


def _verified_path(
    leaf: x509.Certificate, intermediates: list[x509.Certificate], bundle: TrustBundle, now_ms: int
) -> list[x509.Certificate]:
    """Return the path from leaf to trust anchor (X-2), proven against this bundle alone."""
    # A bundle is filtered when it is read; checked again, because the library takes a leaf that
    # lies in its store as proven by itself.
    anchors = [authority for authority in bundle.x509_authorities if is_authority(authority)]
    if not anchors:
        raise Unauthenticated("X-10", f"the bundle of {bundle.trust_domain} has no X.509 authority")
    verifier = (
        PolicyBuilder()
        .store(Store(anchors))
        .time(datetime.fromtimestamp(now_ms // MS_PER_SECOND, UTC))
        .max_chain_depth(CHAIN_CERTIFICATES_MAX - 1)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_EE_POLICY)
        .build_client_verifier()
    )
    try:
        path = verifier.verify(leaf, intermediates).chain
    except VerificationError as error:
        rule = "X-11" if _NAME_CONSTRAINT.search(str(error)) else "X-2"
        raise Unauthenticated(rule, f"no valid path to {bundle.trust_domain}: {shown(error)}") from error
    except Exception as error:  # as in _parse
        raise Unauthenticated("X-2", f"the path cannot be read ({type(error).__name__})") from error
    for certificate in path[1:]:
        _check_key(certificate.public_key())
        _check_name_constraints(certificate)
    return path


def _check_name_constraints(certificate: x509.Certificate) -> None:
    """Refuse constraints that path validation did not evaluate, whatever their criticality (X-11)."""
    constraints = _extension(certificate, x509.NameConstraints)
    if constraints is None:
        return
    trees = [*(constraints.value.permitted_subtrees or ()), *(constraints.value.excluded_subtrees or ())]
    for tree in trees:
        if not isinstance(tree, _EVALUATED_CONSTRAINTS):
            raise Unauthenticated("X-11", f"a name constraint of kind {type(tree).__name__}")


def _not_after_ms(certificate: x509.Certificate) -> int:
    return int(certificate.not_valid_after_utc.timestamp()) * MS_PER_SECOND
