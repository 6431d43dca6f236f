from __future__ import annotations

import base64
import hmac
import string
from typing import TYPE_CHECKING

import jwt
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.clock import ManualClock
from broker.core.ids import LeaseId, TaskId
from broker.keys import ALGORITHMS, FileKeyStore, TokenReader
from broker.keys.token_keys import signer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ISSUER = "https://broker.test"
NOW_MS = 1_700_000_000_000
AGENT = "spiffe://demo.test/agent/report"


def _claims(**changes: object) -> dict[str, object]:
    claims: dict[str, object] = {
        "iss": ISSUER,
        "sub": AGENT,
        "client_id": AGENT,
        "aud": "spiffe://demo.test/tool",
        "iat": NOW_MS // 1000,
        "exp": NOW_MS // 1000 + 300,
        "jti": LeaseId.new(),
        "task": TaskId.new(),
        "scope": "orders:read",
    }
    claims.update(changes)
    return {name: value for name, value in claims.items() if value is not ...}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileKeyStore:
    return FileKeyStore(tmp_path_factory.mktemp("keys") / "keys.json", ManualClock(NOW_MS))


@pytest.fixture
def reader(store: FileKeyStore) -> TokenReader:
    return TokenReader(store, ISSUER)


def _sign(
    store: FileKeyStore, claims: object, header: Mapping[str, object] | None = None, algorithm: str = "ES256"
) -> str:
    return store.sign_token(header or {"typ": "at+jwt"}, orjson.dumps(claims), algorithm=algorithm)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_genuine_token_reads_back(store: FileKeyStore, reader: TokenReader, algorithm: str) -> None:
    claims = _claims()
    token = _sign(store, claims, algorithm=algorithm)
    for _ in range(2):  # the second time from the remembered header
        read = reader.read(token, NOW_MS)
        assert read is not None
        assert read.lease_id == claims["jti"]
        assert read.task_id == claims["task"]
        assert read.subject == AGENT
        assert read.audience == "spiffe://demo.test/tool"
        assert read.scope == "orders:read"
        assert read.issued_ms == NOW_MS
        assert read.expires_ms == NOW_MS + 300_000


def test_a_token_ends_in_the_millisecond_of_its_exp(store: FileKeyStore, reader: TokenReader) -> None:
    token = _sign(store, _claims())
    assert reader.read(token, NOW_MS + 299_999) is not None
    assert reader.read(token, NOW_MS + 300_000) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://broker.test/"},
        {"iss": ...},
        {"exp": ...},
        {"exp": "1700000300"},
        {"exp": 1_700_000_300.5},
        {"exp": True},
        {"exp": 1e30},
        {"iat": ...},
        {"jti": ...},
        {"jti": "lse_"},
        {"jti": 5},
        {"task": None},
        {"sub": "spiffe://demo.test/agent\n"},
        {"sub": "spiffe://demo.test/other"},
        {"client_id": ...},
        {"aud": ["spiffe://demo.test/tool"]},
        {"scope": ...},
    ],
    ids=str,
)
def test_claims_that_we_do_not_make_are_refused_though_our_key_signed_them(
    store: FileKeyStore, reader: TokenReader, changes: dict[str, object]
) -> None:
    text = orjson.dumps(_claims(**changes))
    token = store.sign_token({"typ": "at+jwt"}, text, algorithm="ES256")
    assert reader.read(token, NOW_MS) is None


@pytest.mark.parametrize("payload", [[], "text", 5, None])
def test_a_payload_that_is_no_object_is_refused(
    store: FileKeyStore, reader: TokenReader, payload: object
) -> None:
    assert reader.read(_sign(store, payload), NOW_MS) is None


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "statuslist+jwt"},
        {"typ": "JWT"},
        {"typ": "AT+JWT"},
        {"typ": "application/at+jwt"},
        {"cty": "x"},
        {"typ": "at+jwt", "crit": ["exp"]},
        {"typ": "at+jwt", "jwk": {}},
    ],
    ids=str,
)
def test_another_kind_of_token_under_the_same_key_is_refused(
    store: FileKeyStore, reader: TokenReader, header: dict[str, object]
) -> None:
    assert reader.read(_sign(store, _claims(), header), NOW_MS) is None


def test_the_key_decides_the_algorithm(store: FileKeyStore, reader: TokenReader) -> None:
    _sign(store, _claims(), algorithm="RS256")
    claims = _claims()
    for key in store.token_keys():
        for algorithm in {*ALGORITHMS, "none", "HS256"} - {key.algorithm}:
            header = {"alg": algorithm, "kid": key.kid, "typ": "at+jwt"}
            _head, payload, signature = _sign(store, claims, algorithm=key.algorithm).split(".")
            head = _b64(orjson.dumps(header))
            assert reader.read(f"{head}.{payload}.{signature}", NOW_MS) is None
            assert reader.read(f"{head}.{payload}.", NOW_MS) is None


def test_a_header_that_disagrees_with_its_key_is_refused_though_that_key_signed_it(
    store: FileKeyStore, reader: TokenReader
) -> None:
    (key,) = [key for key in store._live.keyring.token if key.algorithm == "ES256"]
    for algorithm, genuine in (("ES256", True), ("EdDSA", False), ("none", False)):
        header = orjson.dumps({"alg": algorithm, "kid": key.kid, "typ": "at+jwt"})
        signed = f"{_b64(header)}.{_b64(orjson.dumps(_claims()))}"
        token = f"{signed}.{_b64(signer(key.private)(signed.encode()))}"
        assert (reader.read(token, NOW_MS) is not None) is genuine


def test_a_longer_spelling_of_a_genuine_signature_is_refused(
    store: FileKeyStore, reader: TokenReader
) -> None:
    signed, _dot, signature = _sign(store, _claims()).rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    assert reader.read(f"{signed}.{_b64(raw[:32] + raw[32:])}", NOW_MS) is not None
    assert reader.read(f"{signed}.{_b64(raw[:32] + bytes(1) + raw[32:])}", NOW_MS) is None


def test_a_token_too_long_to_be_ours_is_not_looked_into(store: FileKeyStore, reader: TokenReader) -> None:
    assert reader.read(_sign(store, _claims(scope="s" * 4000)), NOW_MS) is not None
    assert reader.read(_sign(store, _claims(scope="s" * 8000)), NOW_MS) is None


def test_a_public_key_used_as_an_hmac_secret_opens_nothing(store: FileKeyStore, reader: TokenReader) -> None:
    (key,) = [key for key in store.token_keys() if key.algorithm == "ES256"]
    header = orjson.dumps({"alg": "HS256", "kid": key.kid, "typ": "at+jwt"})
    signed = f"{_b64(header)}.{_b64(orjson.dumps(_claims()))}"
    for secret in (orjson.dumps(dict(key.jwk)), key.jwk["x"].encode(), key.kid.encode()):
        signature = hmac.digest(secret, signed.encode(), "sha256")
        assert reader.read(f"{signed}.{_b64(signature)}", NOW_MS) is None


def test_a_token_of_another_store_with_our_kid_is_refused(
    store: FileKeyStore, reader: TokenReader, tmp_path: Path
) -> None:
    other = FileKeyStore(tmp_path / "other.json", ManualClock(NOW_MS))
    assert reader.read(_sign(other, _claims()), NOW_MS) is None
    ours = _sign(store, _claims()).split(".")[0]
    _head, payload, signature = _sign(other, _claims()).split(".")
    assert reader.read(f"{ours}.{payload}.{signature}", NOW_MS) is None


def test_another_spelling_of_a_genuine_token_is_refused(store: FileKeyStore, reader: TokenReader) -> None:
    token = _sign(store, _claims())
    assert reader.read(token, NOW_MS) is not None
    last = f"{string.ascii_uppercase}{string.ascii_lowercase}{string.digits}-_"
    twin = token[:-1] + last[last.index(token[-1]) ^ 1]  # differs in bits that decoding throws away
    header, payload, signature = token.split(".")
    spellings = [
        twin,
        token + "=",
        token + "\n",
        " " + token,
        f"{header}.{payload}.{signature[:8]}\n{signature[8:]}",
    ]
    assert [reader.read(spelling, NOW_MS) for spelling in spellings] == [None] * len(spellings)


def test_every_changed_character_breaks_it(store: FileKeyStore, reader: TokenReader) -> None:
    token = _sign(store, _claims())
    reader.read(token, NOW_MS)
    for at in range(len(token)):
        changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        assert reader.read(changed, NOW_MS) is None


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "a.b.c.d.e",
        "\u00e9.\u00e9.\u00e9",
        "\ud800.a.b",
        "A" * 1_000_000,
        _b64(b"[") + ".e30.AA",
        _b64(b"[]") + ".e30.AA",
        _b64(b"5") + ".e30.AA",
        _b64(b"null") + ".e30.AA",
        _b64(b'{"alg":"ES256","kid":["x"],"typ":"at+jwt"}') + ".e30.AA",
        _b64(b'{"alg":"ES256","kid":{},"typ":"at+jwt"}') + ".e30.AA",
        _b64(b'{"alg":"ES256","kid":"unknown","typ":"at+jwt"}') + ".e30.AA",
        _b64(b"[" * 3000) + ".e30.AA",
        _b64(b"\xff\xfe") + ".e30.AA",
    ],
)
def test_hostile_text_is_refused_without_an_exception(reader: TokenReader, hostile: str) -> None:
    assert reader.read(hostile, NOW_MS) is None


@given(
    st.text(max_size=200) | st.lists(st.binary(max_size=60).map(_b64), min_size=3, max_size=3).map(".".join)
)
def test_no_text_at_all_raises(store: FileKeyStore, text: str) -> None:
    assert TokenReader(store, ISSUER).read(text, NOW_MS) is None


def test_a_key_revoked_after_its_token_was_read_verifies_it_no_more(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "keys.json", ManualClock(NOW_MS))
    reader = TokenReader(store, ISSUER)
    token = _sign(store, _claims())
    assert reader.read(token, NOW_MS) is not None
    store.revoke_token_key(str(jwt.get_unverified_header(token)["kid"]))
    assert reader.read(token, NOW_MS) is None


def test_hostile_headers_are_not_remembered(store: FileKeyStore) -> None:
    reader = TokenReader(store, ISSUER)
    (key,) = [key for key in store.token_keys() if key.algorithm == "ES256"]
    for spaces in range(50):
        header = f'{{"alg":"ES256","kid":"{key.kid}","typ":"at+jwt"{" " * spaces}}}'.encode()
        assert reader.read(f"{_b64(header)}.e30.{'A' * 86}", NOW_MS) is None
    assert not reader._headers
