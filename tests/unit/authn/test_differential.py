"""Our verdicts beside those of the `spiffe` package, an independent implementation.

Where both agree there is nothing to say. Where they do not, the case stands in a list of
known differences with the reason; a difference that is in no list, and a listed one that
has gone away, fail the test.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import spiffe
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from spiffe.errors import PySpiffeError

from broker.authn.bundles import BundleError, TrustBundle, TrustBundles, parse_spiffe_bundle
from broker.authn.jwt_svid import validate_jwt_svid
from broker.authn.x509_svid import validate_x509_svid
from broker.core.errors import Unauthenticated
from broker.core.spiffe_id import SpiffeId, SpiffeIdError
from tests.support.pki import (
    Authority,
    Extension,
    JwtAuthority,
    bundle_json,
    ca_extensions,
    ec_key,
    key_der,
    key_usage,
    name,
    rsa_key,
    san,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# The package reads the host's clock and takes no other. Read here once; tokens live long enough
# for the slowest run of the whole suite.
NOW_SECONDS = int(time.time())
NOW_MS = NOW_SECONDS * 1000
NOW = datetime.fromtimestamp(NOW_SECONDS, UTC)
ID = "spiffe://example.org/agent"
AUDIENCE = "nhi-broker"
SIGNER = JwtAuthority.new()
ROOT = Authority.root(now=NOW)


@dataclass(frozen=True, slots=True)
class Known:
    """A difference we mean: who accepts, and why we do as we do."""

    ours: bool
    reason: str


def compare(case: str, *, ours: bool, theirs: bool, known: dict[str, Known]) -> None:
    difference = known.get(case)
    if difference is None:
        assert ours == theirs, f"a new difference: we {_verb(ours)}, spiffe {_verb(theirs)}"
    else:
        assert ours == difference.ours
        assert theirs != difference.ours, "no difference any more: take it off the list"


def _verb(accepted: bool) -> str:  # noqa: FBT001  one word out of two
    return "accept" if accepted else "refuse"


# --- SPIFFE IDs -----------------------------------------------------------------------------------

KNOWN_IDS = {
    "spiffe://td/a\n": Known(ours=False, reason="ID-3: a $-anchored pattern lets the newline pass"),
    "spiffe://td\n": Known(ours=False, reason="ID-2: a $-anchored pattern lets the newline pass"),
    "spiffe://Td/a": Known(ours=False, reason="ID-5: it lower-cases, we refuse"),
    "SPIFFE://td/a": Known(ours=False, reason="ID-5: it lower-cases, we refuse"),
    "spiffe://" + "a" * 256 + "/p": Known(ours=False, reason="ID-4: it bounds no trust domain"),
    "spiffe://td/" + "a" * 2048: Known(ours=False, reason="ID-4: it bounds no ID"),
}
IDS = [
    *KNOWN_IDS,
    "spiffe://td/a",
    "spiffe://td",
    "spiffe://td/...",
    "spiffe://192.0.2.1/a",
    "spiffe://",
    "spiffe:///a",
    "http://td/a",
    "spiffe://td/",
    "spiffe://td//a",
    "spiffe://td/a/../b",
    "spiffe://td/.",
    "spiffe://td:80/a",
    "spiffe://u@td/a",
    "spiffe://td/a?b",
    "spiffe://td/a#b",
    "spiffe://td/%61",
    "spiffe://[::1]/a",
    "spiffe://\uff54\uff44/a",
    "spiffe://td/\u00e9",
    "spiffe://td/a\x00",
    "\tspiffe://td/a",
    "",
]


@pytest.mark.parametrize("text", IDS, ids=lambda text: ascii(text[:30]))
def test_spiffe_ids(text: str) -> None:
    try:
        SpiffeId.parse(text)
        ours = True
    except SpiffeIdError:
        ours = False
    try:
        spiffe.SpiffeId(text)
        theirs = True
    except PySpiffeError:
        theirs = False
    compare(text, ours=ours, theirs=theirs, known=KNOWN_IDS)


# --- JWT-SVIDs ------------------------------------------------------------------------------------


def token(header: dict[str, Any] | None = None, **claims: Any) -> str:
    return SIGNER.token(now_ms=NOW_MS, header=header, claims={"exp": NOW_SECONDS + 7200} | claims)


TOKENS: dict[str, str] = {
    "correct": token(),
    "typ JOSE": token({"typ": "JOSE"}),
    "no typ": token({"typ": None}),
    "aud as a list": token(aud=[AUDIENCE]),
    "two audiences": token(aud=[AUDIENCE, "other"]),
    "another audience": token(aud="other"),
    "no aud": token(aud=None),
    "empty aud": token(aud=[]),
    "expired": token(iat=NOW_SECONDS - 900, exp=NOW_SECONDS - 600),
    "no exp": token(exp=None),
    "exp as a string": token(exp=str(NOW_SECONDS + 7200)),
    "exp as a float": token(exp=NOW_SECONDS + 7200.5),
    "iat in the future": token(iat=NOW_SECONDS + 3600),
    "nbf in the future": token(nbf=NOW_SECONDS + 3600),
    "lives for a year": token(exp=NOW_SECONDS + 365 * 86_400),
    "no sub": token(sub=None),
    "sub no SPIFFE ID": token(sub="agent"),
    "sub with a newline": token(sub=ID + "\n"),
    "sub of a trust domain": token(sub="spiffe://example.org"),
    "sub in upper case": token(sub="spiffe://Example.org/agent"),
    "sub of another trust domain": token(sub="spiffe://other.example/agent"),
    "no kid": token({"kid": None}),
    "unknown kid": token({"kid": "key-2"}),
    "wrong key": JwtAuthority.new().token(now_ms=NOW_MS),
    "typ wit+jwt": token({"typ": "wit+jwt"}),
    "typ at+jwt": token({"typ": "at+jwt"}),
    "crit": token({"crit": ["x"]}),
    "jku": token({"jku": "https://attacker.example"}),
    "alg none": token({"alg": "none"}),
    "alg HS256": token({"alg": "HS256"}),
    "malformed": "a.b",
}
KNOWN_TOKENS = {
    "two audiences": Known(ours=False, reason="J-7: we demand a sole audience"),
    "exp as a string": Known(ours=False, reason="J-8: the schema says number"),
    "exp as a float": Known(ours=False, reason="J-13: integers only, our choice"),
    "iat in the future": Known(ours=False, reason="J-11: it would hide a long life"),
    "lives for a year": Known(ours=False, reason="J-11: a ceiling on exp - iat, ours"),
    "sub with a newline": Known(ours=False, reason="ID-3"),
    "sub of a trust domain": Known(ours=False, reason="J-6: no workload has a root path"),
    "sub in upper case": Known(ours=False, reason="ID-5"),
    "jku": Known(ours=False, reason="J-5: no foreign header"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_jwt_svids(case: str) -> None:
    bundle = TrustBundle(trust_domain="example.org", jwt_keys={"key-1": SIGNER.public})
    try:
        validate_jwt_svid(
            TOKENS[case],
            AUDIENCE,
            TrustBundles({"example.org": bundle}),
            NOW_MS,
            lifetime_seconds_max=7200,
            leeway_seconds=0,
        )
        ours = True
    except Unauthenticated:
        ours = False
    trust_domain = spiffe.TrustDomain("example.org")
    their_bundle = spiffe.JwtBundle(trust_domain, {"key-1": SIGNER.key.public_key()})
    try:
        svid = spiffe.JwtSvid.parse_and_validate(TOKENS[case], their_bundle, {AUDIENCE})
        # Choosing the bundle by trust domain is left to the package's caller; done here as J-9 says.
        theirs = svid.spiffe_id.trust_domain == trust_domain
    except (PySpiffeError, KeyError):  # without exp it falls over instead of refusing
        theirs = False
    compare(case, ours=ours, theirs=theirs, known=KNOWN_TOKENS)


# --- X.509-SVIDs ----------------------------------------------------------------------------------
# The package parses a chain and holds it to the profile; it validates no path.


def chain(authority: Authority = ROOT, **leaf: Any) -> Callable[[], tuple[tuple[bytes, ...], Any]]:
    def issue() -> tuple[tuple[bytes, ...], Any]:
        issued = authority.leaf(now=NOW, **leaf)
        return issued.chain, issued.key

    return issue


def replaced(kind: type[x509.ExtensionType], extension: Extension | None) -> dict[str, Any]:
    return {"replaced": {kind: extension}}


CA_BIT = (x509.BasicConstraints(ca=True, path_length=None), True)
SERVER_ONLY = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
CHAINS: dict[str, Callable[[], tuple[tuple[bytes, ...], Any]]] = {
    "correct": chain(),
    "with an intermediate": chain(ROOT.intermediate(now=NOW)),
    "no URI": chain(**replaced(x509.SubjectAlternativeName, None)),
    "two URIs": chain(uris=[ID, ID + "2"]),
    "the same URI twice": chain(uris=[ID, ID]),
    "another scheme": chain(uris=["https://example.org/agent"]),
    "root path": chain(uris=["spiffe://example.org"]),
    "upper-case trust domain": chain(uris=["spiffe://Example.org/agent"]),
    "trailing newline": chain(uris=[ID + "\n"]),
    "cA=true": chain(**replaced(x509.BasicConstraints, CA_BIT)),
    "no basicConstraints": chain(**replaced(x509.BasicConstraints, None)),
    "no keyUsage": chain(**replaced(x509.KeyUsage, None)),
    "no digitalSignature": chain(**replaced(x509.KeyUsage, (key_usage("key_agreement"), True))),
    "keyCertSign": chain(**replaced(x509.KeyUsage, (key_usage("digital_signature", "key_cert_sign"), True))),
    "cRLSign": chain(**replaced(x509.KeyUsage, (key_usage("digital_signature", "crl_sign"), True))),
    "keyUsage not critical": chain(**replaced(x509.KeyUsage, (key_usage("digital_signature"), False))),
    "EKU for servers only": chain(**replaced(x509.ExtendedKeyUsage, SERVER_ONLY)),
    "empty subject, SAN not critical": chain(subject=name()),
    "empty subject, SAN critical": chain(
        subject=name(), **replaced(x509.SubjectAlternativeName, (san(ID), True))
    ),
    "weak RSA key": chain(key=rsa_key(1024)),
    "intermediate without cA": chain(
        ROOT.intermediate(
            now=NOW,
            extensions=[
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (key_usage("key_cert_sign"), True),
            ],
        )
    ),
    "intermediate without keyCertSign": chain(
        ROOT.intermediate(now=NOW, extensions=[CA_BIT, (key_usage("crl_sign"), True)])
    ),
    "intermediate with a path in its ID": chain(
        ROOT.intermediate(now=NOW, extensions=[*ca_extensions(), (san("spiffe://example.org/ca"), False)])
    ),
    "garbage": lambda: ((b"\x30\x03abc",), ec_key()),
}
KNOWN_CHAINS = {
    "upper-case trust domain": Known(ours=False, reason="ID-5"),
    "trailing newline": Known(ours=False, reason="ID-3"),
    "no basicConstraints": Known(ours=True, reason="X-3: absent is cA=false (RFC 5280 4.2.1.9)"),
    "keyUsage not critical": Known(ours=False, reason="X-6"),
    "EKU for servers only": Known(ours=False, reason="X-7"),
    "empty subject, SAN not critical": Known(ours=False, reason="X-9"),
    "weak RSA key": Known(ours=False, reason="X-13: our allow-list"),
    "intermediate with a path in its ID": Known(ours=False, reason="X-8"),
}


@pytest.mark.parametrize("case", CHAINS)
def test_x509_svids(case: str) -> None:
    certificates, key = CHAINS[case]()
    try:
        validate_x509_svid(certificates, TrustBundles({"example.org": ROOT.bundle()}), NOW_MS)
        ours = True
    except Unauthenticated:
        ours = False
    try:
        spiffe.X509Svid.parse_raw(b"".join(certificates), key_der(key))
        theirs = True
    except PySpiffeError:
        theirs = False
    compare(case, ours=ours, theirs=theirs, known=KNOWN_CHAINS)


# --- bundles --------------------------------------------------------------------------------------

BUNDLES: dict[str, bytes] = {
    "one key": bundle_json(SIGNER.jwk()),
    "RSA": bundle_json(JwtAuthority(rsa_key(), alg="RS256").jwk()),
    "no keys": bundle_json(),
    "keys missing": b"{}",
    "truncated": bundle_json(SIGNER.jwk())[:-2],
    "kid missing": bundle_json(SIGNER.jwk(kid=None)),
    "EC key without x": bundle_json(SIGNER.jwk(x=None)),
    "a repeated member": b'{"keys": [], "keys": []}',
    "two keys of one kid": bundle_json(SIGNER.jwk(), JwtAuthority.new().jwk()),
}
KNOWN_BUNDLES = {
    "keys missing": Known(ours=False, reason="the keys member MUST be present"),
    "kid missing": Known(ours=True, reason="the entry is left out, the bundle stands"),
    "EC key without x": Known(ours=True, reason="RFC 7517 5: an entry we cannot use is left out"),
    "a repeated member": Known(ours=False, reason="strict JSON"),
    "two keys of one kid": Known(ours=False, reason="which of them signed is anybody's guess"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_jwt_bundles(case: str) -> None:
    try:
        parse_spiffe_bundle("example.org", BUNDLES[case])
        ours = True
    except BundleError:
        ours = False
    try:
        spiffe.JwtBundle.parse(spiffe.TrustDomain("example.org"), BUNDLES[case])
        theirs = True
    except PySpiffeError:
        theirs = False
    compare(case, ours=ours, theirs=theirs, known=KNOWN_BUNDLES)
