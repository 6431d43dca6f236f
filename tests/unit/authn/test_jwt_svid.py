"""Rules J-1 to J-14, each both ways, with tokens forged for the case."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from broker.authn.bundles import JwtKey, TrustBundle, TrustBundles
from broker.authn.jwt_svid import TOKEN_BYTES_MAX, JwtSvid, validate_jwt_svid
from broker.core.errors import Unauthenticated
from tests.support.pki import NOW_MS, JwtAuthority, base64url, ec_key, forge_jws, rsa_key

if TYPE_CHECKING:
    from collections.abc import Callable

ID = "spiffe://example.org/agent"
AUDIENCE = "nhi-broker"
NOW = NOW_MS // 1000
SIGNER = JwtAuthority.new()
ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512")
CURVES: dict[str, ec.EllipticCurve] = {
    "ES256": ec.SECP256R1(),
    "ES384": ec.SECP384R1(),
    "ES512": ec.SECP521R1(),
}


def trusting(*keys: JwtKey, trust_domain: str = "example.org") -> TrustBundles:
    bundle = TrustBundle(trust_domain=trust_domain, jwt_keys={key.kid: key for key in keys})
    return TrustBundles({trust_domain: bundle})


TRUSTING_SIGNER = trusting(SIGNER.public)


def validate(
    token: str,
    bundles: TrustBundles = TRUSTING_SIGNER,
    *,
    now_ms: int = NOW_MS,
    lifetime_seconds_max: int = 600,
    leeway_seconds: int = 5,
) -> JwtSvid:
    return validate_jwt_svid(
        token,
        AUDIENCE,
        bundles,
        now_ms,
        lifetime_seconds_max=lifetime_seconds_max,
        leeway_seconds=leeway_seconds,
    )


def refusal(token: str, bundles: TrustBundles = TRUSTING_SIGNER, **limits: int) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as refused:
        validate(token, bundles, **limits)
    assert refused.value.explanation.isascii()
    assert refused.value.explanation.isprintable()
    return refused.value


def outcome_of(token: str) -> JwtSvid | Unauthenticated:
    try:
        return validate(token)
    except Unauthenticated as refused:
        return refused


def key_for(algorithm: str) -> JwtAuthority:
    key = ec_key(CURVES[algorithm]) if algorithm in CURVES else rsa_key(2048)
    return JwtAuthority(key, alg=algorithm)


def header(**changes: Any) -> Callable[[], str]:
    return lambda: SIGNER.token(header=changes)


def claims(**changes: Any) -> Callable[[], str]:
    return lambda: SIGNER.token(claims=changes)


def raw(header_bytes: bytes | None = None, payload_bytes: bytes | None = None) -> Callable[[], str]:
    right_header = json.dumps({"alg": "ES256", "kid": "key-1"}).encode()
    right_payload = json.dumps({"sub": ID, "aud": AUDIENCE, "iat": NOW, "exp": NOW + 300}).encode()
    return lambda: forge_jws(
        header_bytes or right_header, payload_bytes or right_payload, SIGNER.key, "ES256"
    )


def resigned(change: Callable[[str, str], str]) -> Callable[[], str]:
    """Change the signed text of a right token, then sign what came out of it."""

    def forge() -> str:
        first, second, _ = SIGNER.token().split(".")

        signed = change(first, second)
        signature = get_default_algorithms()["ES256"].sign(signed.encode(), SIGNER.key)
        return f"{signed}.{base64url(signature)}"

    return forge


# --- what is legal ---------------------------------------------------------------------------------


def test_a_correct_token_proves_its_subject() -> None:
    token = SIGNER.token()
    svid = validate(token)
    assert svid.spiffe_id == ID
    assert svid.expires_ms == NOW_MS + 300_000
    assert svid.token_sha256 == hashlib.sha256(token.encode()).hexdigest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_j_2_every_allowed_algorithm_is_accepted(algorithm: str) -> None:
    signer = key_for(algorithm)
    assert validate(signer.token(), trusting(signer.public)).spiffe_id == ID


LEGAL: dict[str, Callable[[], str]] = {
    "J-4 no typ": header(typ=None),
    "J-4 typ JOSE": header(typ="JOSE"),
    "J-7 aud as an array of one": claims(aud=[AUDIENCE]),
    "J-8 within the leeway after exp": claims(iat=NOW - 100, exp=NOW - 4),
    "J-11 no iat": claims(iat=None),
    "J-11 iat within the leeway": claims(iat=NOW + 5),
    "J-11 a jti": claims(jti="one"),
    "J-11 the longest life allowed": claims(exp=NOW + 600),
    "J-12 nbf in the past": claims(nbf=NOW - 1),
    "J-12 nbf within the leeway": claims(nbf=NOW + 5),
    "J-13 claims of others, nested and fractional": claims(extra={"a": [1.5, None, True, {"b": "\u20ac"}]}),
    "J-13 insignificant whitespace in JSON": raw(b' {"alg" : "ES256",\n"kid":"key-1" } '),
}


@pytest.mark.parametrize("case", LEGAL)
def test_a_legal_token_is_accepted(case: str) -> None:
    assert validate(LEGAL[case]()).spiffe_id == ID


def test_j_11_a_second_presentation_is_no_offence() -> None:
    token = SIGNER.token(claims={"jti": "one"})
    assert validate(token) == validate(token)


# --- what is not -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Illegal:
    rule: str
    why: str
    forge: Callable[[], str]


def hmac_with_the_public_key() -> str:
    """The classic confusion: the public key, which everybody has, taken as an HMAC secret."""

    secret = SIGNER.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    first, second, _ = SIGNER.token(header={"alg": "HS256"}).split(".")
    digest = hmac.new(secret, f"{first}.{second}".encode(), hashlib.sha256).digest()
    return f"{first}.{second}.{base64url(digest)}"


def json_serialization() -> str:
    first, second, third = SIGNER.token().split(".")
    return json.dumps({"protected": first, "payload": second, "signature": third})


ILLEGAL = [
    Illegal("J-1", "empty", lambda: ""),
    Illegal("J-1", "no dots", lambda: "token"),
    Illegal("J-1", "two parts", lambda: ".".join(SIGNER.token().split(".")[:2])),
    Illegal("J-1", "no signature", lambda: ".".join([*SIGNER.token().split(".")[:2], ""])),
    Illegal("J-1", "no payload", lambda: SIGNER.token().split(".")[0] + "..abc"),
    Illegal("J-1", "five parts, a JWE", lambda: "a.b.c.d.e"),
    Illegal("J-1", "JSON serialization", json_serialization),
    Illegal("J-1", "JSON serialization with two dots in it", lambda: '{"payload": "a.b.c"}'),
    Illegal("J-2", "alg none", header(alg="none")),
    Illegal("J-2", "alg None", header(alg="None")),
    Illegal("J-2", "alg HS256 over the public key", hmac_with_the_public_key),
    Illegal("J-2", "alg EdDSA", header(alg="EdDSA")),
    Illegal("J-2", "alg ES256K", header(alg="ES256K")),
    Illegal("J-2", "alg in lower case", header(alg="es256")),
    Illegal("J-2", "no alg", header(alg=None)),
    Illegal("J-2", "alg is a list", header(alg=["ES256"])),
    Illegal("J-2", "alg before every other fault", header(alg="none", typ="at+jwt", kid=None, crit=["x"])),
    Illegal("J-3", "no kid", header(kid=None)),
    Illegal("J-3", "an empty kid", header(kid="")),
    Illegal("J-3", "kid is a number", header(kid=1)),
    Illegal("J-3", "kid is too long", header(kid="k" * 257)),
    *(
        Illegal("J-4", f"typ {typ!r}", header(typ=typ))
        for typ in (
            "wit+jwt",
            "at+jwt",
            "application/at+jwt",
            "txntoken+jwt",
            "dpop+jwt",
            "logout+jwt",
            "secevent+jwt",
            "jwt",
            "",
            1,
            ["JWT"],
        )
    ),
    *(
        Illegal("J-5", f"header {member}", header(**{member: value}))
        for member, value in {
            "crit": ["exp"],
            "jku": "https://attacker.example/keys",
            "jwk": {"kty": "EC"},
            "x5u": "https://attacker.example/certificate",
            "x5c": ["MIIB"],
            "x5t": "abc",
            "b64": False,
            "zip": "DEF",
            "cty": "JWT",
            "anything": 1,
        }.items()
    ),
    Illegal("J-6", "no sub", claims(sub=None)),
    Illegal("J-6", "sub is a number", claims(sub=1)),
    Illegal("J-6", "sub is a list", claims(sub=[ID])),
    Illegal("J-6", "sub has a root path", claims(sub="spiffe://example.org")),
    Illegal("ID-1", "sub is empty", claims(sub="")),
    Illegal("ID-1", "sub is no SPIFFE ID", claims(sub="agent")),
    Illegal("ID-1", "sub with an upper-case scheme", claims(sub="Spiffe://example.org/agent")),
    Illegal("ID-2", "sub with an upper-case trust domain", claims(sub="spiffe://Example.org/agent")),
    Illegal("ID-3", "sub with a trailing newline", claims(sub=ID + "\n")),
    Illegal("ID-3", "sub with a NUL", claims(sub=ID + "\x00")),
    Illegal("ID-3", "sub with a lone surrogate", claims(sub=ID + "\ud800")),
    Illegal("ID-4", "sub of 2049 bytes", claims(sub="spiffe://example.org/".ljust(2049, "a"))),
    Illegal("J-7", "no aud", claims(aud=None)),
    Illegal("J-7", "aud is empty", claims(aud="")),
    Illegal("J-7", "aud is an empty list", claims(aud=[])),
    Illegal("J-7", "aud is another's", claims(aud="other")),
    Illegal("J-7", "aud only starts like ours", claims(aud="nhi-broker-2")),
    Illegal("J-7", "aud in another case", claims(aud="NHI-Broker")),
    Illegal("J-7", "ours beside another", claims(aud=[AUDIENCE, "other"])),
    Illegal("J-7", "ours twice", claims(aud=[AUDIENCE, AUDIENCE])),
    Illegal("J-7", "aud is a number", claims(aud=7)),
    Illegal("J-7", "aud is a list of numbers", claims(aud=[7])),
    Illegal("J-7", "aud is an object", claims(aud={AUDIENCE: 1})),
    Illegal("J-7", "aud is a list in a list", claims(aud=[[AUDIENCE]])),
    Illegal("J-8", "no exp", claims(exp=None)),
    Illegal("J-8", "expired", claims(iat=NOW - 300, exp=NOW - 5)),
    Illegal("J-8", "exp is a string", claims(exp=str(NOW + 300))),
    Illegal("J-8", "exp is fractional", claims(exp=NOW + 300.5)),
    Illegal(
        "J-8", "exp is a float", raw(None, json.dumps({"sub": ID, "aud": AUDIENCE, "exp": 2e9}).encode())
    ),
    Illegal("J-8", "exp is true", claims(exp=True)),
    Illegal("J-8", "exp is negative", claims(exp=-1)),
    Illegal("J-8", "exp is huge", claims(exp=10**30)),
    Illegal("J-8", "exp is a list", claims(exp=[NOW])),
    Illegal("J-11", "lives too long", claims(exp=NOW + 601)),
    Illegal("J-11", "lives too long without iat", claims(iat=None, exp=NOW + 601)),
    Illegal("J-11", "iat in the future, to look short-lived", claims(iat=NOW + 5000, exp=NOW + 5300)),
    Illegal("J-11", "iat is a string", claims(iat=str(NOW))),
    Illegal("J-11", "iat is huge", claims(iat=10**30)),
    Illegal("J-12", "nbf in the future", claims(nbf=NOW + 6)),
    Illegal("J-12", "nbf is a string", claims(nbf="0")),
    Illegal(
        "J-12",
        "nbf is null",
        raw(None, json.dumps({"sub": ID, "aud": AUDIENCE, "exp": NOW + 9, "nbf": None}).encode()),
    ),
    Illegal("J-13", "longer than we read", claims(extra="a" * TOKEN_BYTES_MAX)),
    Illegal("J-13", "a repeated header", raw(b'{"alg":"ES256","kid":"key-1","kid":"key-1"}')),
    Illegal(
        "J-13",
        "a repeated claim",
        raw(None, f'{{"sub":"{ID}","sub":"{ID}","aud":"{AUDIENCE}","exp":{NOW + 9}}}'.encode()),
    ),
    Illegal(
        "J-13",
        "a repeated member deep inside",
        raw(None, f'{{"sub":"{ID}","aud":"{AUDIENCE}","exp":{NOW + 9},"x":[{{"a":1,"a":2}}]}}'.encode()),
    ),
    Illegal("J-13", "NaN", raw(None, b'{"exp":NaN}')),
    Illegal("J-13", "Infinity", raw(None, b'{"exp":Infinity}')),
    Illegal("J-13", "more digits than anybody needs", raw(None, b'{"exp":' + b"9" * 5000 + b"}")),
    Illegal("J-13", "nested deeper than a stack", raw(None, b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}")),
    Illegal("J-13", "payload is a list", raw(None, b"[]")),
    Illegal("J-13", "payload is no JSON", raw(None, b"{'a':1}")),
    Illegal("J-13", "bytes after the payload", raw(None, b"{} {}")),
    Illegal("J-13", "header is a string", raw(b'"ES256"')),
    Illegal("J-13", "UTF-16", raw(None, '{"a":1}'.encode("utf-16"))),
    Illegal("J-13", "a byte order mark", raw(b'\xef\xbb\xbf{"alg":"ES256","kid":"key-1"}')),
    Illegal("J-13", "bytes that are not UTF-8", raw(None, b'{"a":"\xff"}')),
    Illegal("J-13", "a signed padded part", resigned(lambda a, b: f"{a}=.{b}")),
    Illegal("J-13", "a signed part with a newline", resigned(lambda a, b: f"{a}\n.{b}")),
    Illegal("J-13", "a padded signature", lambda: SIGNER.token() + "=="),
    Illegal("J-13", "whitespace around the token", lambda: f" {SIGNER.token()}"),
    Illegal("J-13", "a newline at the end", lambda: f"{SIGNER.token()}\n"),
    Illegal("J-13", "the other base64 alphabet", lambda: SIGNER.token().replace(".", "+.", 1)),
    Illegal("J-13", "characters outside ASCII", lambda: f"\u20ac{SIGNER.token()}"),
]


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: f"{case.rule} {case.why}")
def test_an_illegal_token_is_refused_by_its_rule(case: Illegal) -> None:
    refused = refusal(case.forge())
    assert refused.rule == case.rule, refused.explanation


def test_j_13_bits_left_over_at_the_end_of_a_part() -> None:
    token = SIGNER.token()
    first, second, third = token.split(".")
    alphabet = f"{string.ascii_uppercase}{string.ascii_lowercase}{string.digits}-_"
    assert len(third) % 4 == 2, "64 bytes of signature leave four bits over"
    twin = third[:-1] + alphabet[alphabet.index(third[-1]) + 1]
    assert base64.urlsafe_b64decode(twin + "==") == base64.urlsafe_b64decode(third + "==")
    assert refusal(f"{first}.{second}.{twin}").rule == "J-13"


# --- keys ------------------------------------------------------------------------------------------


def test_j_9_no_bundle_for_the_trust_domain() -> None:
    assert refusal(SIGNER.token(), trusting(SIGNER.public, trust_domain="other.example")).rule == "J-9"


def test_j_9_an_empty_bundle_lets_nobody_in() -> None:
    assert refusal(SIGNER.token(), trusting()).rule == "J-9"


def test_j_9_kid_not_in_the_bundle() -> None:
    assert refusal(SIGNER.token(header={"kid": "key-2"})).rule == "J-9"


def test_j_9_the_right_kid_and_the_wrong_key() -> None:
    assert refusal(JwtAuthority.new().token()).rule == "J-9"


def test_j_9_another_domains_key_of_the_same_kid_proves_nothing() -> None:
    other = JwtAuthority.new()
    bundles = TrustBundles(
        trusting(SIGNER.public).by_trust_domain
        | trusting(other.public, trust_domain="other.example").by_trust_domain
    )
    assert refusal(other.token(), bundles).rule == "J-9"
    assert validate(other.token(sub="spiffe://other.example/a"), bundles).spiffe_id.endswith("/a")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_j_9_any_part_changed(part: int) -> None:
    other = SIGNER.token(header={"typ": None}, claims={"sub": "spiffe://example.org/admin"}).split(".")
    parts = SIGNER.token().split(".")
    parts[part] = other[part]
    assert refusal(".".join(parts)).rule == "J-9"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_j_14_a_key_with_an_alg_accepts_only_that_one(algorithm: str) -> None:
    signer = key_for(algorithm)
    bound = JwtKey("key-1", signer.key.public_key(), algorithm)
    assert validate(signer.token(), trusting(bound)).spiffe_id == ID
    others = "PS256" if algorithm == "RS256" else "RS256"
    elsewhere = JwtKey("key-1", signer.key.public_key(), others)
    assert refusal(signer.token(), trusting(elsewhere)).rule == "J-14"


def test_j_14_a_weak_rsa_key() -> None:
    weak = JwtAuthority(rsa_key(1024), alg="RS256")
    assert refusal(SIGNER.token(header={"alg": "RS256"}), trusting(weak.public)).rule == "J-14"


@pytest.mark.parametrize(
    ("algorithm", "curve"),
    [
        ("ES256", ec.SECP384R1()),
        ("ES384", ec.SECP256R1()),
        ("ES512", ec.SECP256R1()),
        ("ES256", ec.SECP256K1()),
    ],
)
def test_j_14_a_curve_that_does_not_fit_the_algorithm(algorithm: str, curve: ec.EllipticCurve) -> None:
    signer = JwtAuthority(ec_key(curve))
    token = forge_jws(
        {"alg": algorithm, "kid": "key-1"},
        {"sub": ID, "aud": AUDIENCE, "exp": NOW + 9},
        signer.key,
        "ES256" if curve.name != "secp384r1" else "ES384",
    )
    assert refusal(token, trusting(signer.public)).rule == "J-14"


@pytest.mark.parametrize(("algorithm", "key"), [("RS256", SIGNER.public), ("ES256", key_for("RS256").public)])
def test_j_14_a_key_of_the_wrong_type(algorithm: str, key: JwtKey) -> None:
    assert refusal(SIGNER.token(header={"alg": algorithm}), trusting(key)).rule == "J-14"


# --- limits ----------------------------------------------------------------------------------------


def test_j_8_the_leeway_ends_to_the_millisecond() -> None:
    token = SIGNER.token()
    assert validate(token, now_ms=NOW_MS + 304_999).expires_ms == NOW_MS + 300_000
    assert refusal(token, now_ms=NOW_MS + 305_000).rule == "J-8"
    assert refusal(token, now_ms=NOW_MS + 300_000, leeway_seconds=0).rule == "J-8"


def test_j_7_the_audience_is_never_optional() -> None:
    with pytest.raises(ValueError, match="audience"):
        validate_jwt_svid(
            SIGNER.token(aud=""), "", TRUSTING_SIGNER, NOW_MS, lifetime_seconds_max=600, leeway_seconds=5
        )


# --- anything --------------------------------------------------------------------------------------


@given(st.text(max_size=200) | st.lists(st.binary(max_size=60).map(base64url), max_size=5).map(".".join))
def test_no_text_does_anything_but_be_refused(token: str) -> None:
    refusal(token)


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(["sub", "aud", "exp", "nbf", "iat"]), _json_values)
def test_no_value_of_a_claim_does_anything_but_pass_or_be_refused(claim: str, value: object) -> None:
    payload = {"sub": ID, "aud": AUDIENCE, "iat": NOW, "exp": NOW + 300, claim: value}
    token = forge_jws({"alg": "ES256", "kid": "key-1"}, payload, SIGNER.key, "ES256")
    outcome = outcome_of(token)
    if isinstance(outcome, Unauthenticated):
        assert outcome.explanation.isprintable()
    else:
        assert outcome.spiffe_id.trust_domain == "example.org"


@given(st.sampled_from(["alg", "kid", "typ", "crit", "jwk"]), _json_values)
def test_no_value_of_a_header_does_anything_but_pass_or_be_refused(member: str, value: object) -> None:
    fields = {"alg": "ES256", "kid": "key-1", member: value}
    token = forge_jws(fields, {"sub": ID, "aud": AUDIENCE, "exp": NOW + 9}, SIGNER.key, "ES256")
    assert refusal(token).rule in {"J-2", "J-3", "J-4", "J-5", "J-9", "J-13"}
