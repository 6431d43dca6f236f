from __future__ import annotations

from typing import TYPE_CHECKING

import jwt
import pytest

from broker.core.clock import ManualClock
from broker.keys import FileKeyStore, TokenKeyPolicy
from broker.keys.token_keys import ALGORITHMS, Phase, advance, generate

if TYPE_CHECKING:
    from pathlib import Path

    from broker.keys.token_keys import TokenKey

POLICY = TokenKeyPolicy(
    signing_seconds=10_000, jwks_cache_seconds=300, token_ttl_seconds_max=600, skew_seconds=60
)
CACHE_MS = 300_000
LINGER_MS = 660_000


def _kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def _phases(keys: tuple[TokenKey, ...]) -> list[str]:
    return sorted(key.phase for key in keys)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> FileKeyStore:
    return FileKeyStore(tmp_path / "keys.json", clock, policy=POLICY)


def _sign(store: FileKeyStore, algorithm: str = "ES256") -> str:
    return store.sign_token({"typ": "at+jwt"}, b'{"a":1}', algorithm=algorithm)


def _published(store: FileKeyStore) -> set[str]:
    return {key.kid for key in store.token_keys()}


def _rotate(store: FileKeyStore, clock: ManualClock) -> bool:
    return store.rotate_token_keys(clock.now_ms())


def test_nothing_is_due_at_first(store: FileKeyStore, clock: ManualClock) -> None:
    assert _rotate(store, clock) is False
    assert len(store.token_keys()) == 1


def test_the_next_key_is_published_a_cache_lifetime_before_it_signs(
    store: FileKeyStore, clock: ManualClock
) -> None:
    first = _kid(_sign(store))
    published_at: int | None = None
    for _ in range(200):
        clock.advance(seconds=60)
        _rotate(store, clock)
        if published_at is None and len(_published(store)) == 2:
            published_at = clock.now_ms()
        if _kid(_sign(store)) != first:
            break
    assert published_at is not None
    assert clock.now_ms() - published_at >= CACHE_MS


def test_a_key_overdue_after_a_long_stop_is_still_published_before_it_signs(
    store: FileKeyStore, clock: ManualClock
) -> None:
    first = _kid(_sign(store))
    clock.advance(seconds=1_000_000)
    assert _rotate(store, clock) is True
    assert _kid(_sign(store)) == first
    assert len(_published(store)) == 2
    clock.advance(ms=CACHE_MS)
    _rotate(store, clock)
    assert _kid(_sign(store)) == first
    clock.advance(ms=2 * CACHE_MS)
    assert _rotate(store, clock) is True
    assert _kid(_sign(store)) != first


def test_a_retired_key_verifies_until_its_last_token_has_expired(
    store: FileKeyStore, clock: ManualClock
) -> None:
    first = _kid(_sign(store))
    clock.advance(seconds=1_000_000)
    _rotate(store, clock)
    clock.advance(ms=3 * CACHE_MS)
    _rotate(store, clock)
    assert _kid(_sign(store)) != first
    clock.advance(ms=LINGER_MS - 1)
    _rotate(store, clock)
    assert first in _published(store)
    clock.advance(ms=1)
    assert _rotate(store, clock) is True
    assert first not in _published(store)


def test_a_clock_that_jumps_back_brings_no_retired_key_back(store: FileKeyStore, clock: ManualClock) -> None:
    clock.advance(seconds=1_000_000)
    _rotate(store, clock)
    clock.advance(ms=3 * CACHE_MS)
    _rotate(store, clock)
    signing = _kid(_sign(store))
    clock.advance(seconds=-2_000_000)
    assert _rotate(store, clock) is False
    assert _kid(_sign(store)) == signing


def test_every_algorithm_keeps_one_signing_key_through_every_tick(
    store: FileKeyStore, clock: ManualClock
) -> None:
    for algorithm in ("ES256", "EdDSA"):
        _sign(store, algorithm)
    signers: dict[str, set[str]] = {"ES256": set(), "EdDSA": set()}
    for _ in range(60):
        clock.advance(seconds=700)
        _rotate(store, clock)
        for algorithm, kids in signers.items():
            token = _sign(store, algorithm)
            kids.add(_kid(token))
            assert _kid(token) in _published(store)
    assert all(len(kids) >= 3 for kids in signers.values())
    assert len(store.token_keys()) <= 6


def test_only_rs256_that_was_asked_for_is_made_and_it_is_durable(tmp_path: Path, clock: ManualClock) -> None:
    store = FileKeyStore(tmp_path / "keys.json", clock, policy=POLICY)
    assert [key.algorithm for key in store.token_keys()] == ["ES256"]
    kid = _kid(_sign(store, "RS256"))
    reopened = FileKeyStore(tmp_path / "keys.json", clock, policy=POLICY)
    assert {key.algorithm for key in reopened.token_keys()} == {"ES256", "RS256"}
    assert _kid(_sign(reopened, "RS256")) == kid


@pytest.mark.parametrize("algorithm", ["none", "HS256", "RS512", "es256", ""])
def test_no_other_algorithm_signs(store: FileKeyStore, algorithm: str) -> None:
    with pytest.raises(ValueError, match="ES256"):
        _sign(store, algorithm)
    assert len(store.token_keys()) == 1


def test_a_revoked_key_is_gone_at_once_and_a_fresh_one_signs(store: FileKeyStore) -> None:
    kid = _kid(_sign(store))
    assert store.revoke_token_key(kid) is True
    assert kid not in _published(store)
    assert _kid(_sign(store)) in _published(store)
    assert store.revoke_token_key(kid) is False


def test_the_published_successor_takes_over_from_a_revoked_key(
    store: FileKeyStore, clock: ManualClock
) -> None:
    first = _kid(_sign(store))
    clock.advance(seconds=10_000 - 600)
    _rotate(store, clock)
    (successor,) = _published(store) - {first}
    store.revoke_token_key(first)
    assert _kid(_sign(store)) == successor


def test_revoking_every_key_leaves_none_of_the_old_and_one_new_per_algorithm(store: FileKeyStore) -> None:
    for algorithm in ("ES256", "EdDSA"):
        _sign(store, algorithm)
    old = _published(store)
    assert set(store.revoke_all_token_keys()) == old
    assert not _published(store) & old
    assert sorted(key.algorithm for key in store.token_keys()) == ["ES256", "EdDSA"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_jwks_member_verifies_with_a_foreign_library(store: FileKeyStore, algorithm: str) -> None:
    token = _sign(store, algorithm)
    (key,) = [key for key in store.token_keys() if key.algorithm == algorithm]
    jwk = jwt.PyJWK(dict(key.jwk))
    assert jwt.decode(token, jwk, algorithms=[algorithm]) == {"a": 1}
    assert jwt.get_unverified_header(token) == {"alg": algorithm, "kid": key.kid, "typ": "at+jwt"}
    assert key.jwk["use"] == "sig"
    assert key.jwk["alg"] == algorithm
    assert not key.jwk.keys() & {"d", "p", "q", "dp", "dq", "qi", "k"}


def test_advance_makes_nothing_where_nothing_is_due() -> None:
    key = generate("ES256", Phase.CURRENT, now_ms=0, activates_ms=0, policy=POLICY)
    keys = (key,)
    assert advance(keys, POLICY.signing_seconds * 1000 - POLICY.publish_ahead_ms - 1, POLICY) is keys
    due = advance(keys, POLICY.signing_seconds * 1000 - POLICY.publish_ahead_ms, POLICY)
    assert _phases(due) == [Phase.CURRENT, Phase.NEXT]


def test_a_key_that_falls_due_takes_no_other_algorithm_along() -> None:
    due_ms = POLICY.signing_seconds * 1000
    waiting = (
        generate("ES256", Phase.CURRENT, now_ms=0, activates_ms=0, policy=POLICY),
        generate("ES256", Phase.NEXT, now_ms=0, activates_ms=due_ms + 1, policy=POLICY),
    )
    falling_due = (
        generate("EdDSA", Phase.CURRENT, now_ms=0, activates_ms=0, policy=POLICY),
        generate("EdDSA", Phase.NEXT, now_ms=0, activates_ms=due_ms, policy=POLICY),
    )
    before = {key.kid: key.phase for key in waiting}
    moved = advance((*waiting, *falling_due), due_ms, POLICY)
    assert {key.kid: key.phase for key in moved if key.algorithm == "ES256"} == before
    assert _phases(tuple(key for key in moved if key.algorithm == "EdDSA")) == ["current", "retiring"]


@pytest.mark.parametrize(
    "policy",
    [
        {"signing_seconds": 0},
        {"jwks_cache_seconds": 0},
        {"token_ttl_seconds_max": -1},
        {"skew_seconds": -1},
        {"signing_seconds": 900, "jwks_cache_seconds": 300},
    ],
)
def test_a_policy_that_would_break_tokens_is_refused(policy: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"token key|clock skew"):
        TokenKeyPolicy(**policy)
