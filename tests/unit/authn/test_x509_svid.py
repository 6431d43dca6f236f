"""Rules X-1 to X-13, each both ways, with certificates forged for the case."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.authn.bundles import TrustBundle, TrustBundles
from broker.authn.x509_svid import (
    CERTIFICATE_BYTES_MAX,
    CHAIN_CERTIFICATES_MAX,
    X509Svid,
    validate_x509_svid,
)
from broker.core.errors import Unauthenticated
from tests.support.pki import (
    CLIENT_AND_SERVER,
    NOW,
    NOW_MS,
    Authority,
    Leaf,
    ca_extensions,
    der,
    ec_key,
    key_usage,
    name,
    rsa_key,
    san,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ID = "spiffe://example.org/agent"
UNKNOWN_CRITICAL = (
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00"),
    True,
)
CA = (x509.BasicConstraints(ca=True, path_length=None), True)
SIGNS = (key_usage("key_cert_sign", "crl_sign"), True)


def trusting(*authorities: Authority) -> TrustBundles:
    return TrustBundles({authority.trust_domain: authority.bundle() for authority in authorities})


def validate(leaf: Leaf, *authorities: Authority, now_ms: int = NOW_MS) -> X509Svid:
    return validate_x509_svid(leaf.chain, trusting(*authorities), now_ms)


def refusal(chain: Sequence[bytes], bundles: TrustBundles, now_ms: int = NOW_MS) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as refused:
        validate_x509_svid(chain, bundles, now_ms)
    return refused.value


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority.root()


# --- what is legal ---------------------------------------------------------------------------------

LEGAL: dict[str, Callable[[Authority], Leaf]] = {
    "directly under the root": lambda root: root.leaf(),
    "under an intermediate": lambda root: root.intermediate().leaf(),
    "under two intermediates": lambda root: root.intermediate(common_name="1").intermediate().leaf(),
    "X-1 other SAN types in any number": lambda root: root.leaf(
        replaced={
            x509.SubjectAlternativeName: (
                san(
                    ID,
                    others=[
                        x509.DNSName("a.example.org"),
                        x509.DNSName("b.example.org"),
                        x509.RFC822Name("a@example.org"),
                        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
                        x509.OtherName(x509.ObjectIdentifier("1.2.3.4"), b"\x0c\x01a"),
                        x509.DirectoryName(name("other")),
                        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
                    ],
                ),
                False,
            )
        }
    ),
    "X-3 no basicConstraints is cA=false": lambda root: root.leaf(replaced={x509.BasicConstraints: None}),
    "X-6 keyEncipherment and keyAgreement beside digitalSignature": lambda root: root.leaf(
        replaced={x509.KeyUsage: (key_usage("digital_signature", "key_encipherment", "key_agreement"), True)}
    ),
    "X-7 no extendedKeyUsage": lambda root: root.leaf(replaced={x509.ExtendedKeyUsage: None}),
    "X-7 a critical extendedKeyUsage": lambda root: root.leaf(
        replaced={x509.ExtendedKeyUsage: (CLIENT_AND_SERVER, True)}
    ),
    "X-7 only clientAuth": lambda root: root.leaf(
        replaced={x509.ExtendedKeyUsage: (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)}
    ),
    "X-8 an intermediate without a SPIFFE ID": lambda root: root.intermediate(
        extensions=ca_extensions(None)
    ).leaf(),
    "X-9 an empty subject with a critical SAN": lambda root: root.leaf(
        subject=name(), replaced={x509.SubjectAlternativeName: (san(ID), True)}
    ),
    "X-9 a critical SAN beside a subject": lambda root: root.leaf(
        replaced={x509.SubjectAlternativeName: (san(ID), True)}
    ),
    "X-11 a name constraint that holds": lambda root: root.intermediate(
        extra=[(x509.NameConstraints([x509.DNSName("example.org")], None), True)]
    ).leaf(replaced={x509.SubjectAlternativeName: (san(ID, others=[x509.DNSName("a.example.org")]), False)}),
    "X-11 an unknown extension that is not critical": lambda root: root.leaf(
        extra=[(UNKNOWN_CRITICAL[0], False)]
    ),
    "X-13 P-256": lambda root: root.leaf(key=ec_key(ec.SECP256R1())),
    "X-13 P-384": lambda root: root.leaf(key=ec_key(ec.SECP384R1())),
    "X-13 RSA 2048": lambda root: root.leaf(key=rsa_key(2048)),
    "X-13 Ed25519": lambda root: root.leaf(key=ed25519.Ed25519PrivateKey.generate()),
    "X-13 a P-384 intermediate": lambda root: root.intermediate(key=ec_key(ec.SECP384R1())).leaf(),
    "X-13 an RSA intermediate": lambda root: root.intermediate(key=rsa_key(2048)).leaf(),
    "no authorityKeyIdentifier": lambda root: root.leaf(replaced={x509.AuthorityKeyIdentifier: None}),
}


@pytest.mark.parametrize("case", LEGAL)
def test_a_legal_svid_is_accepted(root: Authority, case: str) -> None:
    leaf = LEGAL[case](root)
    svid = validate(leaf, root)
    assert svid.spiffe_id == ID
    assert svid.leaf_sha256 == hashlib.sha256(leaf.chain[0]).hexdigest()


# --- what is not -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Illegal:
    rule: str
    why: str
    leaf: Callable[[Authority], Leaf]


def with_uris(*uris: str) -> Callable[[Authority], Leaf]:
    return lambda root: root.leaf(uris=uris)


def with_usage(*on: str, critical: bool = True) -> Callable[[Authority], Leaf]:
    return lambda root: root.leaf(replaced={x509.KeyUsage: (key_usage(*on), critical)})


def under(**intermediate: object) -> Callable[[Authority], Leaf]:
    return lambda root: root.intermediate(**intermediate).leaf()  # type: ignore[arg-type]  # a table of cases


def under_constraint(
    permitted: list[x509.GeneralName] | None = None,
    excluded: list[x509.GeneralName] | None = None,
    *,
    critical: bool = True,
    others: Sequence[x509.GeneralName] = (),
) -> Callable[[Authority], Leaf]:
    return lambda root: root.intermediate(extra=[(x509.NameConstraints(permitted, excluded), critical)]).leaf(
        replaced={x509.SubjectAlternativeName: (san(ID, others=others), False)}
    )


ILLEGAL = [
    Illegal("X-1", "no SAN", lambda root: root.leaf(replaced={x509.SubjectAlternativeName: None})),
    Illegal(
        "X-1",
        "no URI SAN",
        lambda root: root.leaf(
            replaced={x509.SubjectAlternativeName: (san(others=[x509.DNSName("a.example.org")]), False)}
        ),
    ),
    Illegal("X-1", "the same URI SAN twice", with_uris(ID, ID)),
    Illegal("X-1", "two different URI SANs", with_uris(ID, "spiffe://example.org/other")),
    Illegal("X-1", "a foreign URI beside the SPIFFE ID", with_uris(ID, "https://example.org/")),
    Illegal("ID-1", "another scheme", with_uris("https://example.org/agent")),
    Illegal("ID-1", "an upper-case scheme", with_uris("SPIFFE://example.org/agent")),
    Illegal("ID-1", "a query", with_uris(ID + "?a=b")),
    Illegal("ID-2", "an upper-case trust domain", with_uris("spiffe://Example.org/agent")),
    Illegal("ID-2", "a port", with_uris("spiffe://example.org:1/agent")),
    Illegal("ID-3", "a trailing newline", with_uris(ID + "\n")),
    Illegal("ID-3", "a NUL", with_uris(ID + "\x00")),
    Illegal("ID-3", "a trailing slash", with_uris(ID + "/")),
    Illegal("ID-3", "percent-encoding", with_uris("spiffe://example.org/%61gent")),
    Illegal("ID-4", "an ID of 2049 bytes", with_uris("spiffe://example.org/".ljust(2049, "a"))),
    Illegal("X-3", "cA=true", lambda root: root.leaf(replaced={x509.BasicConstraints: CA})),
    Illegal("X-4", "keyCertSign", with_usage("digital_signature", "key_cert_sign")),
    Illegal("X-4", "cRLSign", with_usage("digital_signature", "crl_sign")),
    Illegal("X-5", "a root path", with_uris("spiffe://example.org")),
    Illegal("X-6", "no keyUsage", lambda root: root.leaf(replaced={x509.KeyUsage: None})),
    Illegal("X-6", "no digitalSignature", with_usage("key_agreement")),
    Illegal("X-6", "keyUsage that is not critical", with_usage("digital_signature", critical=False)),
    Illegal(
        "X-7",
        "extendedKeyUsage without clientAuth",
        lambda root: root.leaf(
            replaced={
                x509.ExtendedKeyUsage: (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            }
        ),
    ),
    Illegal(
        "X-7",
        "an intermediate for servers only",
        under(extra=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), True)]),
    ),
    Illegal(
        "X-8",
        "an intermediate without cA",
        under(extensions=[(x509.BasicConstraints(ca=False, path_length=None), True), SIGNS]),
    ),
    Illegal("X-8", "an intermediate without basicConstraints", under(extensions=[SIGNS])),
    Illegal("X-8", "an intermediate without keyUsage", under(extensions=[CA])),
    Illegal(
        "X-8", "an intermediate without keyCertSign", under(extensions=[CA, (key_usage("crl_sign"), True)])
    ),
    Illegal(
        "X-8",
        "an intermediate whose SPIFFE ID has a path",
        under(extensions=[CA, SIGNS, (san("spiffe://example.org/signer"), False)]),
    ),
    Illegal(
        "X-8",
        "an intermediate of another trust domain",
        under(extensions=[CA, SIGNS, (san("spiffe://other.example"), False)]),
    ),
    Illegal(
        "ID-2",
        "an intermediate with a malformed SPIFFE ID",
        under(extensions=[CA, SIGNS, (san("spiffe://Example.org"), False)]),
    ),
    Illegal(
        "X-9", "an empty subject with a SAN that is not critical", lambda root: root.leaf(subject=name())
    ),
    Illegal(
        "X-11",
        "a violated DNS constraint",
        under_constraint([x509.DNSName("other.example")], others=[x509.DNSName("a.example.org")]),
    ),
    Illegal(
        "X-11",
        "a DNS name that is excluded",
        under_constraint(None, [x509.DNSName("example.org")], others=[x509.DNSName("a.example.org")]),
    ),
    Illegal("X-11", "a URI constraint", under_constraint([x509.UniformResourceIdentifier("example.org")])),
    Illegal(
        "X-11", "an excluded URI", under_constraint(None, [x509.UniformResourceIdentifier("example.org")])
    ),
    Illegal("X-11", "a directoryName constraint", under_constraint([x509.DirectoryName(name("zz"))])),
    Illegal(
        "X-11",
        "a directoryName constraint that is not critical",
        under_constraint([x509.DirectoryName(name("zz"))], critical=False),
    ),
    Illegal(
        "X-11",
        "an otherName constraint",
        under_constraint(None, [x509.OtherName(x509.ObjectIdentifier("1.2.3.4"), b"\x0c\x01a")]),
    ),
    Illegal("X-11", "an unknown critical extension", lambda root: root.leaf(extra=[UNKNOWN_CRITICAL])),
    Illegal("X-11", "an unknown critical extension above", under(extra=[UNKNOWN_CRITICAL])),
    Illegal(
        "X-2",
        "name constraints on a leaf",
        lambda root: root.leaf(extra=[(x509.NameConstraints([x509.DNSName("a")], None), True)]),
    ),
    Illegal(
        "X-2",
        "a path longer than pathLenConstraint",
        lambda root: (
            root.intermediate(
                common_name="upper",
                extensions=[(x509.BasicConstraints(ca=True, path_length=0), True), SIGNS],
            )
            .intermediate()
            .leaf()
        ),
    ),
    Illegal("X-2", "expired", lambda root: root.leaf(not_after=NOW - timedelta(seconds=1))),
    Illegal(
        "X-2",
        "not valid yet",
        lambda root: root.leaf(not_before=NOW + timedelta(seconds=2)),
    ),
    Illegal("X-2", "an expired intermediate", under(not_after=NOW - timedelta(seconds=1))),
    Illegal("X-2", "signed by an unknown authority", lambda _root: Authority.root().leaf()),
    Illegal(
        "X-2",
        "the intermediate is missing",
        lambda root: without_intermediates(root.intermediate().leaf()),
    ),
    Illegal("X-13", "P-521", lambda root: root.leaf(key=ec_key(ec.SECP521R1()))),
    Illegal("X-13", "secp256k1", lambda root: root.leaf(key=ec_key(ec.SECP256K1()))),
    Illegal("X-13", "RSA 1024", lambda root: root.leaf(key=rsa_key(1024))),
    Illegal(
        "X-13",
        "DSA",
        lambda root: root.leaf(key=dsa.generate_private_key(2048)),  # type: ignore[arg-type]  # a key we never use
    ),
    Illegal("X-13", "an RSA 1024 intermediate", under(key=rsa_key(1024))),
]


def without_intermediates(leaf: Leaf) -> Leaf:
    return Leaf(leaf.certificate, leaf.key, leaf.chain[:1])


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: f"{case.rule} {case.why}")
def test_an_illegal_svid_is_refused_by_its_rule(root: Authority, case: Illegal) -> None:
    refused = refusal(case.leaf(root).chain, trusting(root))
    assert refused.rule == case.rule, refused.explanation
    assert refused.explanation.isascii()
    assert refused.explanation.isprintable()


def test_x_5_a_signing_certificate_authenticates_nobody(root: Authority) -> None:
    assert refusal(root.intermediate().above, trusting(root)).rule == "X-5"
    assert refusal([der(root.certificate)], trusting(root)).rule == "X-5"


def test_x_3_a_signing_certificate_with_a_workloads_id_is_still_refused(root: Authority) -> None:
    signer = root.intermediate(extensions=[CA, SIGNS, (san(ID), False)])
    assert refusal(signer.above, trusting(root)).rule == "X-3"


# --- bundles ---------------------------------------------------------------------------------------


def test_x_10_another_domains_authority_proves_nothing(root: Authority) -> None:
    other = Authority.root("other.example")
    forged = other.leaf(uris=[ID])
    assert refusal(forged.chain, trusting(root, other)).rule == "X-2"


def test_x_10_no_bundle_for_the_trust_domain(root: Authority) -> None:
    assert refusal(root.leaf().chain, trusting(Authority.root("other.example"))).rule == "X-10"


def test_x_10_no_bundles_at_all(root: Authority) -> None:
    assert refusal(root.leaf().chain, TrustBundles()).rule == "X-10"


def test_x_10_a_bundle_without_authorities_lets_nobody_in(root: Authority) -> None:
    empty = TrustBundles({"example.org": TrustBundle(trust_domain="example.org")})
    assert refusal(root.leaf().chain, empty).rule == "X-10"


def test_x_10_roots_filed_under_another_domain_prove_only_that_domain(root: Authority) -> None:
    misfiled = TrustBundles(
        {"other.example": TrustBundle(trust_domain="other.example", x509_authorities=(root.certificate,))}
    )
    assert refusal(root.leaf().chain, misfiled).rule == "X-10"


def test_x_10_one_key_in_two_trust_domains_serves_both_and_mixes_nothing(root: Authority) -> None:
    shared = TrustBundles(
        {
            domain: TrustBundle(trust_domain=domain, x509_authorities=(root.certificate,))
            for domain in ("example.org", "other.example")
        }
    )
    for domain in ("example.org", "other.example"):
        leaf = root.leaf(uris=[f"spiffe://{domain}/agent"])
        assert validate_x509_svid(leaf.chain, shared, NOW_MS).spiffe_id == f"spiffe://{domain}/agent"


def test_x_8_a_leaf_in_the_trust_store_is_no_authority(root: Authority) -> None:
    leaf = root.leaf()
    alone = TrustBundle(trust_domain="example.org", x509_authorities=(leaf.certificate,))
    assert refusal(leaf.chain, TrustBundles({"example.org": alone})).rule == "X-10"
    beside = TrustBundle(
        trust_domain="example.org", x509_authorities=(Authority.root().certificate, leaf.certificate)
    )
    assert refusal(leaf.chain, TrustBundles({"example.org": beside})).rule == "X-2"


def test_x_2_an_old_and_a_new_root_are_trusted_side_by_side(root: Authority) -> None:
    new = Authority.root()
    both = TrustBundle(trust_domain="example.org", x509_authorities=(root.certificate, new.certificate))
    for authority in (root, new):
        validate_x509_svid(authority.leaf().chain, TrustBundles({"example.org": both}), NOW_MS)


def test_x_2_an_expired_root_proves_nothing() -> None:
    expired = Authority.root(not_after=NOW - timedelta(seconds=1))
    assert refusal(expired.leaf().chain, trusting(expired)).rule == "X-2"


def test_x_2_a_root_without_key_usage_is_not_used() -> None:
    weak = Authority.root(extensions=[CA])
    assert refusal(weak.leaf().chain, trusting(weak)).rule == "X-10"


@pytest.mark.parametrize(
    "key", [ec_key(ec.SECP521R1()), ec_key(ec.SECP384R1()), rsa_key(1024), rsa_key(2048)]
)
def test_x_13_the_roots_key_counts_too(key: ec.EllipticCurvePrivateKey) -> None:
    root = Authority.root(key=key)
    if key.key_size in {384, 2048}:
        assert validate(root.leaf(), root).spiffe_id == ID
    else:
        assert refusal(root.leaf().chain, trusting(root)).rule in {"X-13", "X-2"}


def test_x_11_constraints_of_the_root_count_too() -> None:
    constraint = (
        x509.NameConstraints(None, [x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")]),
        True,
    )
    root = Authority.root(extensions=[*ca_extensions("example.org"), constraint])
    assert refusal(root.leaf().chain, trusting(root)).rule == "X-11"


# --- time ------------------------------------------------------------------------------------------


def test_x_2_the_end_is_the_end_of_the_shortest_lived_certificate_of_the_path(root: Authority) -> None:
    intermediate = root.intermediate(not_after=NOW + timedelta(minutes=10))
    leaf = intermediate.leaf(not_after=NOW + timedelta(hours=1))
    svid = validate(leaf, root)
    assert svid.not_after_ms == NOW_MS + 600_000
    assert validate(leaf, root, now_ms=svid.not_after_ms) == svid
    assert refusal(leaf.chain, trusting(root), svid.not_after_ms + 1).rule == "X-2"


# --- bounds ----------------------------------------------------------------------------------------


def test_x_12_an_empty_chain(root: Authority) -> None:
    assert refusal([], trusting(root)).rule == "X-12"


def test_x_12_interchangeable_intermediates_are_refused_unread(root: Authority) -> None:
    key = ec_key()
    leaf = root.intermediate(key=key).leaf()
    crowd = [der(root.intermediate(key=key).certificate) for _ in range(CHAIN_CERTIFICATES_MAX)]
    assert refusal([leaf.chain[0], *crowd], trusting(root)).rule == "X-12"
    assert validate_x509_svid([leaf.chain[0], *crowd[1:]], trusting(root), NOW_MS).spiffe_id == ID


def test_x_12_a_repeated_certificate_is_looked_at_once(root: Authority) -> None:
    leaf = root.intermediate().leaf()
    repeated = [leaf.chain[0], leaf.chain[0], leaf.chain[1], leaf.chain[1]]
    assert validate_x509_svid(repeated, trusting(root), NOW_MS).spiffe_id == ID


def test_x_12_the_root_may_be_sent_along(root: Authority) -> None:
    leaf = root.intermediate().leaf()
    assert validate_x509_svid([*leaf.chain, der(root.certificate)], trusting(root), NOW_MS).spiffe_id == ID


def test_x_12_an_oversized_certificate_is_refused_unread(root: Authority) -> None:
    assert refusal([b"\x30" * (CERTIFICATE_BYTES_MAX + 1)], trusting(root)).rule == "X-12"
    assert refusal([b"\x30" * CERTIFICATE_BYTES_MAX], trusting(root)).rule == "X-2"


# --- garbage ---------------------------------------------------------------------------------------


def test_x_2_any_byte_changed_is_refused(root: Authority) -> None:
    leaf = root.intermediate().leaf()
    bundles = trusting(root)
    for index in range(len(leaf.chain)):
        for position in range(len(leaf.chain[index])):
            chain = list(leaf.chain)
            broken = bytearray(chain[index])
            broken[position] ^= 0x01
            chain[index] = bytes(broken)
            refused = refusal(chain, bundles)
            assert refused.explanation.isprintable()


def test_x_2_a_signature_that_leaves_bits_unused_is_no_second_spelling(root: Authority) -> None:
    leaf = next(leaf for leaf in iter(root.leaf, None) if leaf.certificate.signature[-1] % 2 == 0)
    twin = bytearray(leaf.chain[0])
    twin[-len(leaf.certificate.signature) - 1] = 1
    assert x509.load_der_x509_certificate(bytes(twin)).signature == leaf.certificate.signature
    assert refusal([bytes(twin)], trusting(root)).rule == "X-2"


@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_x_2_a_truncated_certificate(root: Authority, cut: int) -> None:
    assert refusal([root.leaf().chain[0][:cut]], trusting(root)).rule == "X-2"


def test_x_2_bytes_after_the_certificate(root: Authority) -> None:
    assert refusal([root.leaf().chain[0] + b"\x00"], trusting(root)).rule == "X-2"


def test_x_2_a_name_the_library_chokes_on(root: Authority) -> None:
    certificate = root.leaf(subject=name("workload")).chain[0]
    tag = certificate.rindex(b"\x0c\x08workload")
    as_bit_string = certificate[:tag] + b"\x03\x08\x00orkload" + certificate[tag + 10 :]
    with pytest.raises(TypeError):
        _ = x509.load_der_x509_certificate(as_bit_string).subject
    assert refusal([as_bit_string], trusting(root)).rule == "X-2"


def test_a_refusal_shows_foreign_text_escaped_and_cut(root: Authority) -> None:
    refused = refusal(root.leaf(uris=["spiffe://td/\x1b[2J" + "a" * 500]).chain, trusting(root))
    assert "\x1b" not in refused.explanation
    assert len(refused.explanation) < 300
    assert refused.detail == Unauthenticated.PUBLIC_DETAIL
