"""SPIFFE bundle documents: what counts, what is left out, what refuses the whole."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm

from broker.authn.bundles import BundleError, TrustBundle, parse_spiffe_bundle, parse_x509_pem
from broker.authn.trust_bundle import (
    BUNDLE_BYTES_MAX,
    KEYS_MAX,
    parse_jwks,
    parse_x509_der,
    trust_domain_name,
)
from tests.support.pki import Authority, JwtAuthority, base64url, bundle_json, der, ec_key, rsa_key, x5c_jwk

if TYPE_CHECKING:
    from collections.abc import Callable

TD = "example.org"
ROOT = Authority.root()
OTHER_ROOT = Authority.root()
SIGNER = JwtAuthority.new()
RSA_SIGNER = JwtAuthority(rsa_key(), "rsa-1", "RS256")


def parse(*keys: dict[str, Any], **members: Any) -> TrustBundle:
    return parse_spiffe_bundle(TD, bundle_json(*keys, **members))


def test_a_bundle_holds_its_authorities_and_its_keys_by_kid() -> None:
    bundle = parse(
        x5c_jwk(ROOT.certificate), SIGNER.jwk(), RSA_SIGNER.jwk(), spiffe_sequence=7, spiffe_refresh_hint=60
    )
    assert bundle.trust_domain == TD
    assert bundle.x509_authorities == (ROOT.certificate,)
    assert dict(bundle.jwt_keys) == {"key-1": SIGNER.public, "rsa-1": RSA_SIGNER.public}
    assert (bundle.sequence, bundle.refresh_hint_seconds, bundle.ignored) == (7, 60, ())


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_the_allowed_algorithms_is_read(curve: ec.EllipticCurve) -> None:
    signer = JwtAuthority(ec_key(curve))
    assert parse(signer.jwk()).jwt_keys["key-1"] == signer.public


def test_a_keys_alg_is_kept_for_j_14() -> None:
    assert parse(SIGNER.jwk(alg="ES256")).jwt_keys["key-1"].algorithm == "ES256"


@pytest.mark.parametrize("document", [b'{"keys": []}', b'{"keys": null}'])
def test_a_bundle_may_be_empty_and_then_lets_nobody_in(document: bytes) -> None:
    assert parse_spiffe_bundle(TD, document).is_empty


def test_the_first_of_several_x5c_certificates_counts() -> None:
    assert parse(x5c_jwk(ROOT.certificate, OTHER_ROOT.certificate)).x509_authorities == (ROOT.certificate,)


def test_the_same_authority_twice_is_one() -> None:
    assert parse(x5c_jwk(ROOT.certificate), x5c_jwk(ROOT.certificate)).x509_authorities == (ROOT.certificate,)


def test_members_defined_nowhere_are_passed_over() -> None:
    assert parse(SIGNER.jwk(foo=1), bar={"a": []}).jwt_keys.keys() == {"key-1"}


PRIVATE_JWK = ECAlgorithm.to_jwk(SIGNER.key, as_dict=True) | {"kid": "private", "use": "jwt-svid"}

UNUSABLE: dict[str, dict[str, Any]] = {
    "use is missing": SIGNER.jwk(kid="2", use=None),
    "use is unknown": SIGNER.jwk(kid="2", use="sig"),
    "use in another case": SIGNER.jwk(kid="2", use="JWT-SVID"),
    "use is wit-svid": SIGNER.jwk(kid="2", use="wit-svid"),
    "use is no string": SIGNER.jwk(kid="2", use=["jwt-svid"]),
    "kid is missing": SIGNER.jwk(kid=None),
    "kid is empty": SIGNER.jwk(kid=""),
    "kid is a number": SIGNER.jwk(kid=2),
    "kty is missing": SIGNER.jwk(kid="2", kty=None),
    "kty is unknown": SIGNER.jwk(kid="2", kty="OKP"),
    "kty is symmetric": {"kty": "oct", "k": "c2VjcmV0", "kid": "2", "use": "jwt-svid"},
    "private key material": PRIVATE_JWK,
    "x is missing": SIGNER.jwk(kid="2", x=None),
    "x is padded": SIGNER.jwk(kid="2", x=SIGNER.jwk()["x"] + "="),
    "x is short": SIGNER.jwk(kid="2", x="AQ"),
    "a point off the curve": SIGNER.jwk(kid="2", y=SIGNER.jwk()["x"]),
    "an unknown curve": SIGNER.jwk(kid="2", crv="P-257"),
    "crv is a list": SIGNER.jwk(kid="2", crv=["P-256"]),
    "alg is a number": SIGNER.jwk(kid="2", alg=1),
    "an even RSA exponent": RSA_SIGNER.jwk(kid="2", e="Ag"),
    "an RSA modulus too large to work with": RSA_SIGNER.jwk(kid="2", n="_" * 4000),
    "x5c is missing": x5c_jwk(x5c=None),
    "x5c is empty": x5c_jwk(),
    "x5c is a string": x5c_jwk(x5c="abc"),
    "x5c is not base64": x5c_jwk(x5c=["*"]),
    "x5c is no certificate": x5c_jwk(x5c=["AAAA"]),
    "x5c is a leaf": x5c_jwk(ROOT.leaf().certificate),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_entry_is_left_out_and_named(case: str) -> None:
    bundle = parse(x5c_jwk(OTHER_ROOT.certificate), UNUSABLE[case], SIGNER.jwk())
    assert bundle.x509_authorities == (OTHER_ROOT.certificate,)
    assert dict(bundle.jwt_keys) == {"key-1": SIGNER.public}
    assert len(bundle.ignored) == 1
    assert bundle.ignored[0].startswith("entry 1: ")


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "truncated": bundle_json(SIGNER.jwk())[:-3],
    "no keys": b"{}",
    "keys is an object": b'{"keys": {}}',
    "keys of strings": b'{"keys": ["a"]}',
    "a list": b"[]",
    "a repeated member": b'{"keys": [], "keys": []}',
    "a repeated member in a key": b'{"keys": [{"use": "a", "use": "b"}]}',
    "not UTF-8": b'{"keys": [], "a": "\xff"}',
    "two keys of one kid": bundle_json(SIGNER.jwk(), JwtAuthority.new().jwk()),
    "too many keys": bundle_json(*({} for _ in range(KEYS_MAX + 1))),
    "too large": b'{"keys": []}' + b" " * BUNDLE_BYTES_MAX,
    **{
        f"{member} is {value!r}": json.dumps({"keys": [], member: value}).encode()
        for member, value in [
            ("spiffe_sequence", "1"),
            ("spiffe_sequence", 1.5),
            ("spiffe_sequence", True),
            ("spiffe_sequence", -1),
            ("spiffe_sequence", 2**64),
            ("spiffe_refresh_hint", "60"),
            ("spiffe_refresh_hint", 1.5),
            ("spiffe_refresh_hint", True),
        ]
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_document_is_refused_whole(case: str) -> None:
    with pytest.raises(BundleError):
        parse_spiffe_bundle(TD, MALFORMED[case])


def test_coordinates_that_only_together_have_the_right_size_are_left_out() -> None:
    x, y = (base64.urlsafe_b64decode(SIGNER.jwk()[name] + "=") for name in "xy")
    assert parse(SIGNER.jwk(x=base64url(x[:-1]), y=base64url(x[-1:] + y))).is_empty


@pytest.mark.parametrize(
    ("hint", "seconds"),
    [(None, 300), (0, 300), (-1, 300), (1, 1), (60, 60), (86_400, 86_400), (10**12, 86_400)],
)
def test_a_refresh_hint_is_kept_within_reason(hint: int | None, seconds: int) -> None:
    assert parse(spiffe_refresh_hint=hint).refresh_hint_seconds == seconds


def test_a_sequence_has_64_bits() -> None:
    assert parse(spiffe_sequence=2**64 - 1).sequence == 2**64 - 1


@pytest.mark.parametrize("name", ["", "Example.org", "td/path", "a b", "td\n"])
def test_a_bundle_belongs_to_a_legal_trust_domain(name: str) -> None:
    with pytest.raises(BundleError):
        parse_spiffe_bundle(name, b'{"keys": []}')
    with pytest.raises(BundleError):
        trust_domain_name(f"spiffe://{name}")


def test_both_spellings_of_a_bundle_maps_key_are_known() -> None:
    assert trust_domain_name("spiffe://example.org") == trust_domain_name("example.org") == "example.org"


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=9)
        | st.sampled_from(["EC", "RSA", "jwt-svid"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["keys", "kty", "use", "kid", "x5c", "x", "y", "n", "e", "crv"]), inner
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_bundle_or_is_refused(value: object) -> None:
    try:
        bundle = parse_spiffe_bundle(TD, json.dumps({"keys": [value]}).encode())
    except BundleError:
        return
    assert bundle.is_empty


# --- other forms ----------------------------------------------------------------------------------


def test_a_plain_jwks_may_leave_out_use_as_spire_does() -> None:
    bundle = parse_jwks(TD, bundle_json(SIGNER.jwk(use=None), RSA_SIGNER.jwk(use="x509-svid")))
    assert bundle.jwt_keys.keys() == {"key-1"}
    assert len(bundle.ignored) == 1


def test_a_plain_jwks_yields_no_x509_authority() -> None:
    assert parse_jwks(TD, bundle_json(x5c_jwk(ROOT.certificate))).is_empty


@pytest.mark.parametrize("parse_other", [parse_x509_pem, parse_x509_der, parse_jwks])
def test_no_form_of_bundle_is_read_beyond_its_bound(
    parse_other: Callable[[str, bytes], TrustBundle],
) -> None:
    with pytest.raises(BundleError, match="larger than"):
        parse_other(TD, b" " * (BUNDLE_BYTES_MAX + 1))


def test_der_is_not_read_beyond_its_bound_of_certificates() -> None:
    with pytest.raises(BundleError, match="more than"):
        parse_x509_der(TD, der(ROOT.certificate) * (KEYS_MAX + 1))


def test_a_pem_bundle_holds_the_cas_in_it() -> None:
    certificates = [ROOT.certificate, ROOT.leaf().certificate, OTHER_ROOT.certificate]
    pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
    bundle = parse_x509_pem(TD, pem)
    assert bundle.x509_authorities == (ROOT.certificate, OTHER_ROOT.certificate)
    assert len(bundle.ignored) == 1


@pytest.mark.parametrize(
    "content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_pem_file_without_certificates_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        parse_x509_pem(TD, content)


def test_concatenated_der_is_taken_apart() -> None:
    small, large = Authority.root(), Authority.root(key=rsa_key())
    joined = der(small.certificate) + der(large.certificate)
    assert parse_x509_der(TD, joined).x509_authorities == (small.certificate, large.certificate)
    assert parse_x509_der(TD, b"").is_empty


@pytest.mark.parametrize(
    "content",
    [
        b"\x00",
        b"\x30",
        b"\x30\x80",
        b"\x30\x85\x01\x00\x00\x00\x00",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x00",
        der(ROOT.certificate)[:-1],
        der(ROOT.certificate) + b"\x00",
    ],
)
def test_der_that_is_no_sequence_of_certificates_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        parse_x509_der(TD, content)
