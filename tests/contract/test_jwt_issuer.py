from __future__ import annotations

from typing import TYPE_CHECKING

import jwt
import pytest

from adapters.conformance import AdapterConformance, Harness
from adapters.jwt_issuer import JwtIssuer
from broker.core.clock import ManualClock, SystemClock
from broker.core.ids import InstanceTag, LeaseId, TaskId, backend_name
from broker.core.ports import Effect, ErrorClass, Liveness, MintRequest, Naming, Presence, Target
from broker.core.spiffe_id import SpiffeId
from broker.core.status_list import SIZE
from broker.keys import FileKeyStore, TokenReader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from broker.core.ports import Adapter, Minted

ISSUER = "https://broker.test"
LISTS = "https://broker.test/statuslists"
AGENT = SpiffeId.parse("spiffe://demo.test/agent/report")
TOOL = "spiffe://demo.test/tool"
RECIPE: Mapping[str, object] = {"audience": TOOL, "scope": "orders:read"}
NOW_MS = 1_700_000_000_250
INSTANCE = InstanceTag.new()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> FileKeyStore:
    return FileKeyStore(tmp_path_factory.mktemp("keys") / "keys.json", ManualClock(NOW_MS))


@pytest.fixture
def issuer(keys: FileKeyStore) -> Adapter:
    return JwtIssuer(name="tokens", issuer=ISSUER, keys=keys, status_lists=LISTS)


def _request(
    recipe: Mapping[str, object] = RECIPE, *, ttl_ms: int = 300_000, status_index: int | None = 3 * SIZE + 17
) -> MintRequest:
    lease_id = LeaseId.new()
    return MintRequest(
        lease_id=lease_id,
        task_id=TaskId.new(),
        identity=AGENT,
        backend_name=backend_name(INSTANCE, lease_id),
        resource="orders-api",
        action="read",
        recipe=recipe,
        now_ms=NOW_MS,
        expires_ms=NOW_MS + ttl_ms,
        not_after_ms=NOW_MS + ttl_ms + 60_000,
        status_index=status_index,
    )


def _token(minted: Minted) -> str:
    return minted.credential.secret["access_token"].reveal()


def _target(request: MintRequest) -> Target:
    return Target(lease_id=request.lease_id, backend_name=request.backend_name, recipe=request.recipe)


@pytest.mark.parametrize("algorithm", [None, "ES256", "EdDSA", "RS256"])
async def test_the_token_is_an_rfc_9068_access_token_to_a_foreign_library(
    issuer: Adapter, keys: FileKeyStore, algorithm: str | None
) -> None:
    request = _request({**RECIPE, **({} if algorithm is None else {"algorithm": algorithm})})
    token = _token(await issuer.mint(request))
    header = jwt.get_unverified_header(token)
    jwk = next(jwt.PyJWK(dict(key.jwk)) for key in keys.token_keys() if key.kid == header["kid"])
    claims = jwt.decode(
        token,
        jwk,
        algorithms=[algorithm or "ES256"],
        audience=TOOL,
        issuer=ISSUER,
        options={"verify_exp": False, "require": ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"]},
    )
    assert header == {"alg": algorithm or "ES256", "kid": header["kid"], "typ": "at+jwt"}
    assert claims == {
        "iss": ISSUER,
        "sub": AGENT,
        "client_id": AGENT,
        "aud": TOOL,
        "iat": 1_700_000_000,
        "exp": 1_700_000_300,
        "jti": request.lease_id,
        "task": request.task_id,
        "scope": "orders:read",
        "status": {"status_list": {"idx": 17, "uri": f"{LISTS}/3"}},
    }


async def test_our_own_reader_reads_what_was_minted(issuer: Adapter, keys: FileKeyStore) -> None:
    request = _request()
    claims = TokenReader(keys, ISSUER).read(_token(await issuer.mint(request)), NOW_MS)
    assert claims is not None
    assert (claims.lease_id, claims.task_id, claims.subject) == (request.lease_id, request.task_id, AGENT)


async def test_the_token_never_outlives_its_lease(issuer: Adapter) -> None:
    minted = await issuer.mint(_request(ttl_ms=10_900))
    claims = jwt.decode(_token(minted), options={"verify_signature": False})
    assert claims["exp"] * 1000 <= NOW_MS + 10_900
    assert minted.credential.public["expires_in"] == claims["exp"] - claims["iat"]


async def test_a_token_without_a_place_in_the_lists_claims_none(issuer: Adapter) -> None:
    token = _token(await issuer.mint(_request(status_index=None)))
    assert "status" not in jwt.decode(token, options={"verify_signature": False})


async def test_the_credential_says_all_and_shows_nothing(issuer: Adapter) -> None:
    minted = await issuer.mint(_request())
    token = _token(minted)
    assert minted.credential.reveal() == {
        "kind": "access_token",
        "access_token": token,
        "token_type": "Bearer",
        "issuer": ISSUER,
        "audience": TOOL,
        "expires_in": 300,
    }
    assert token not in repr(minted)
    assert token.split(".")[2] not in repr(minted)
    assert minted.handle is None
    assert minted.keep is None


def test_the_declarations_are_those_of_a_ledger_backed_token(issuer: Adapter) -> None:
    declared = issuer.capabilities
    assert declared.external_effect is False
    assert declared.naming is Naming.DETERMINISTIC
    assert declared.revocability.effect is Effect.IMMEDIATE
    assert declared.cuts_sessions is False
    assert declared.needs_secret_to_revoke is False


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        {**RECIPE, "algorithm": "RS256"},
        {**RECIPE, "scope": "orders:read orders:write"},
    ],
    ids=str,
)
def test_a_good_recipe_has_nothing_wrong(issuer: Adapter, recipe: Mapping[str, object]) -> None:
    assert issuer.validate_recipe(recipe) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"audience": None}, "audience"),
        ({"audience": "https://tool.test"}, "audience"),
        ({"audience": "spiffe://demo.test"}, "audience"),
        ({"audience": [TOOL]}, "audience"),
        ({"scope": None}, "scope"),
        ({"scope": ""}, "scope"),
        ({"scope": "two  spaces"}, "scope"),
        ({"scope": 'quo"te'}, "scope"),
        ({"scope": "line\n"}, "scope"),
        ({"scope": ["orders:read"]}, "scope"),
        ({"algorithm": "HS256"}, "algorithm"),
        ({"algorithm": None}, "algorithm"),
        ({"algorithm": ["ES256"]}, "algorithm"),
        ({"audience_": TOOL}, "audience_"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_named_in_one_sentence(
    issuer: Adapter, change: Mapping[str, object], word: str
) -> None:
    (sentence,) = issuer.validate_recipe({**RECIPE, **change})
    assert f"'{word}'" in sentence
    assert sentence.endswith(".")


def test_an_empty_recipe_lacks_audience_and_scope(issuer: Adapter) -> None:
    assert len(issuer.validate_recipe({})) == 2


async def test_revoke_may_be_repeated_and_nothing_is_ever_outside(issuer: Adapter) -> None:
    minted_never = _target(_request())
    for _ in range(2):
        await issuer.revoke(minted_never)
    seen = await issuer.verify(minted_never)
    assert seen.presence is Presence.ABSENT
    assert seen.evidence == {"backend": "ledger", "external_effect": False}
    assert [found async for found in issuer.scan([RECIPE])] == []


async def test_a_mint_that_raises_left_nothing_behind(issuer: Adapter) -> None:
    with pytest.raises(ValueError, match="signed with") as caught:
        await issuer.mint(_request({**RECIPE, "algorithm": "none"}))
    assert issuer.classify(caught.value) is ErrorClass.PERMANENT


async def test_check_makes_the_keys_that_the_recipes_need(tmp_path: Path) -> None:
    keys = FileKeyStore(tmp_path / "keys.json", ManualClock(NOW_MS))
    issuer = JwtIssuer(name="tokens", issuer=ISSUER, keys=keys, status_lists=LISTS)
    checks = await issuer.check([RECIPE, {**RECIPE, "algorithm": "RS256"}])
    assert [(check.name, check.ok) for check in checks] == [
        ("sign tokens with ES256", True),
        ("sign tokens with RS256", True),
    ]
    assert {key.algorithm for key in keys.token_keys()} == {"ES256", "RS256"}


async def test_check_says_what_to_do_when_the_keys_are_gone(tmp_path: Path) -> None:
    keys = FileKeyStore(tmp_path / "keys.json", ManualClock(NOW_MS))
    issuer = JwtIssuer(name="tokens", issuer=ISSUER, keys=keys, status_lists=LISTS)
    (tmp_path / "keys.json").unlink()
    (check,) = await issuer.check([RECIPE])
    assert check.ok is False
    assert "restore it" in check.remedy


async def test_probe_answers_what_introspection_says_of_the_very_token(keys: FileKeyStore) -> None:
    alive: set[str] = set()

    async def introspect(token: str) -> bool:
        return token in alive

    issuer = JwtIssuer(name="t", issuer=ISSUER, keys=keys, status_lists=LISTS, introspect=introspect)
    credential = (await issuer.mint(_request())).credential
    assert await issuer.probe(credential) is Liveness.DEAD
    alive.add(credential.secret["access_token"].reveal())
    assert await issuer.probe(credential) is Liveness.ALIVE


async def test_probe_does_not_know_without_introspection_or_when_it_fails(keys: FileKeyStore) -> None:
    async def broken(_token: str) -> bool:
        raise ConnectionError

    for introspect in (None, broken):
        issuer = JwtIssuer(name="t", issuer=ISSUER, keys=keys, status_lists=LISTS, introspect=introspect)
        assert await issuer.probe((await issuer.mint(_request())).credential) is Liveness.UNKNOWN


@pytest.mark.parametrize(
    "url", ["http://broker.test", "https://", "https://b.test?x", "https://b.test#x", "b.test"]
)
def test_only_https_urls_without_query_and_fragment_issue(keys: FileKeyStore, url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        JwtIssuer(name="t", issuer=url, keys=keys, status_lists=LISTS)
    with pytest.raises(ValueError, match="https"):
        JwtIssuer(name="t", issuer=ISSUER, keys=keys, status_lists=url)


async def test_close_may_be_repeated(issuer: Adapter) -> None:
    await issuer.close()
    await issuer.close()


class JwtHarness(Harness):
    """Introspection as far as a token alone can tell: genuine and not expired."""

    def __init__(self, keys: FileKeyStore) -> None:
        reader = TokenReader(keys, ISSUER)

        async def introspect(token: str) -> bool:
            return reader.read(token, self.now_ms()) is not None

        self.instance = INSTANCE
        self.recipe = RECIPE
        self.bad_recipes = (
            {},
            {**RECIPE, "audience": "x"},
            {**RECIPE, "scope": 1},
            {**RECIPE, "algorithm": "x"},
        )
        self.adapter = JwtIssuer(
            name="tokens", issuer=ISSUER, keys=keys, status_lists=LISTS, introspect=introspect
        )


class TestJwtIssuer(AdapterConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> JwtHarness:
        return JwtHarness(FileKeyStore(tmp_path / "keys.json", SystemClock()))
