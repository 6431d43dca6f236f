"""From a request's proofs to its Caller, and what is remembered in between."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from broker.authn import authenticator as module
from broker.authn.authenticator import Authenticator, PeerCertificates, bearer_token
from broker.authn.bundles import BundleStore
from broker.core.caller import AuthMethod
from broker.core.clock import ManualClock
from broker.core.errors import Unauthenticated
from tests.support.pki import NOW, NOW_MS, Authority, JwtAuthority

if TYPE_CHECKING:
    from broker.core.caller import Caller

ID = "spiffe://example.org/agent"
ROOT = Authority.root()
SIGNER = JwtAuthority.new()


class Verifications:
    """Counts real validations, so that a test sees what was remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        self.chains = 0
        real_token, real_chain = module.validate_jwt_svid, module.validate_x509_svid

        def count_token(*args: object, **limits: object) -> object:
            self.tokens += 1
            return real_token(*args, **limits)  # type: ignore[arg-type]  # passed on untouched

        def count_chain(*args: object) -> object:
            self.chains += 1
            return real_chain(*args)  # type: ignore[arg-type]  # passed on untouched

        monkeypatch.setattr(module, "validate_jwt_svid", count_token)
        monkeypatch.setattr(module, "validate_x509_svid", count_chain)


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> Verifications:
    return Verifications(monkeypatch)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW_MS)


@pytest.fixture
def store() -> BundleStore:
    return BundleStore([ROOT.bundle(SIGNER.public)])


@pytest.fixture
def authenticator(store: BundleStore, clock: ManualClock) -> Authenticator:
    return Authenticator(store, clock, "nhi-broker", remembered_tokens_max=3)


def by_token(authenticator: Authenticator, token: str) -> Caller:
    return authenticator.authenticate(bearer=token, peer=None)


def by_chain(authenticator: Authenticator, peer: PeerCertificates) -> Caller:
    return authenticator.authenticate(bearer=None, peer=peer)


def refusal(
    authenticator: Authenticator, *, bearer: str | None = None, peer: PeerCertificates | None = None
) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as refused:
        authenticator.authenticate(bearer=bearer, peer=peer)
    return refused.value


def rotate_away(store: BundleStore) -> None:
    """Take every key of the domain out of force."""
    store.replace("example.org", Authority.root().bundle(JwtAuthority.new().public))


# --- who it is ------------------------------------------------------------------------------------


def test_a_token_makes_a_caller(authenticator: Authenticator) -> None:
    token = SIGNER.token()
    caller = by_token(authenticator, token)
    assert caller.spiffe_id == ID
    assert caller.method is AuthMethod.JWT_SVID
    assert caller.bundle_generation == 0
    assert caller.svid_digest == hashlib.sha256(token.encode()).hexdigest()
    assert caller.not_after_ms == NOW_MS + 305_000 - 1


def test_a_certificate_makes_a_caller(authenticator: Authenticator) -> None:
    leaf = ROOT.leaf()
    caller = by_chain(authenticator, PeerCertificates(leaf.chain))
    assert caller.spiffe_id == ID
    assert caller.method is AuthMethod.X509_SVID
    assert caller.svid_digest == hashlib.sha256(leaf.chain[0]).hexdigest()
    assert caller.not_after_ms == NOW_MS + 3_600_000


def test_a_2_both_of_one_identity_make_one_caller(authenticator: Authenticator) -> None:
    token = SIGNER.token()
    peer = PeerCertificates(ROOT.leaf(not_after=NOW + timedelta(seconds=60)).chain)
    caller = authenticator.authenticate(bearer=token, peer=peer)
    assert caller.method is AuthMethod.BOTH
    assert caller.not_after_ms == NOW_MS + 60_000
    assert caller.svid_digest == hashlib.sha256(token.encode()).hexdigest()


def test_a_2_proofs_of_two_identities_make_none(authenticator: Authenticator) -> None:
    peer = PeerCertificates(ROOT.leaf(path="/other").chain)
    assert refusal(authenticator, bearer=SIGNER.token(), peer=peer).rule == "A-2"


def test_a_good_certificate_does_not_excuse_a_bad_token(authenticator: Authenticator) -> None:
    peer = PeerCertificates(ROOT.leaf().chain)
    assert refusal(authenticator, bearer="x", peer=peer).rule == "J-1"
    assert refusal(authenticator, bearer="", peer=peer).rule == "J-1"


def test_a_good_token_does_not_excuse_a_bad_certificate(authenticator: Authenticator) -> None:
    peer = PeerCertificates(Authority.root().leaf().chain)
    assert refusal(authenticator, bearer=SIGNER.token(), peer=peer).rule == "X-2"


def test_a_1_no_proof_makes_nobody(authenticator: Authenticator) -> None:
    assert refusal(authenticator).rule == "A-1"
    assert refusal(authenticator, peer=PeerCertificates([])).rule == "A-1"


def test_an_empty_chain_beside_a_token_is_no_fault(authenticator: Authenticator) -> None:
    caller = authenticator.authenticate(bearer=SIGNER.token(), peer=PeerCertificates([]))
    assert caller.method is AuthMethod.JWT_SVID


def test_the_limits_given_are_the_limits_kept(store: BundleStore, clock: ManualClock) -> None:
    strict = Authenticator(store, clock, "nhi-broker", lifetime_seconds_max=299, leeway_seconds=0)
    assert refusal(strict, bearer=SIGNER.token()).rule == "J-11"
    assert refusal(strict, bearer=SIGNER.token(claims={"nbf": NOW_MS // 1000 + 1})).rule == "J-12"


def test_j_7_there_is_no_authenticator_without_an_audience(store: BundleStore, clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="audience"):
        Authenticator(store, clock, "")


# --- what is remembered ---------------------------------------------------------------------------


def test_a_token_is_verified_once(authenticator: Authenticator, verifications: Verifications) -> None:
    token = SIGNER.token()
    assert by_token(authenticator, token) == by_token(authenticator, token)
    assert verifications.tokens == 1


def test_a_token_is_verified_again_after_sixty_seconds(
    authenticator: Authenticator, clock: ManualClock, verifications: Verifications
) -> None:
    token = SIGNER.token()
    by_token(authenticator, token)
    clock.advance(seconds=60)
    by_token(authenticator, token)
    assert verifications.tokens == 1
    clock.advance(ms=1)
    by_token(authenticator, token)
    assert verifications.tokens == 2


def test_j_8_a_remembered_token_ends_with_its_exp(
    authenticator: Authenticator, clock: ManualClock, verifications: Verifications
) -> None:
    token = SIGNER.token(claims={"exp": NOW_MS // 1000 + 10})
    by_token(authenticator, token)
    clock.advance(ms=14_999)
    by_token(authenticator, token)
    assert verifications.tokens == 1
    clock.advance(ms=1)
    assert refusal(authenticator, bearer=token).rule == "J-8"


def test_j_12_a_clock_set_back_makes_a_remembered_token_be_verified_again(
    authenticator: Authenticator, clock: ManualClock
) -> None:
    token = SIGNER.token(claims={"nbf": NOW_MS // 1000, "iat": None})
    by_token(authenticator, token)
    clock.advance(seconds=-10)
    assert refusal(authenticator, bearer=token).rule == "J-12"


def test_j_9_a_rotation_is_felt_by_remembered_tokens(
    authenticator: Authenticator, store: BundleStore, verifications: Verifications
) -> None:
    token = SIGNER.token()
    by_token(authenticator, token)
    store.replace("example.org", replace(ROOT.bundle(SIGNER.public), sequence=1))
    assert by_token(authenticator, token).bundle_generation == 1
    assert verifications.tokens == 2
    rotate_away(store)
    assert refusal(authenticator, bearer=token).rule == "J-9"
    store.remove("example.org")
    assert refusal(authenticator, bearer=token).rule == "J-9"


def test_a_rotation_drops_every_remembered_token(authenticator: Authenticator, store: BundleStore) -> None:
    by_token(authenticator, SIGNER.token())
    rotate_away(store)
    refusal(authenticator, bearer=SIGNER.token(claims={"jti": "other"}))
    assert authenticator._tokens == {}


def test_a_refused_token_is_not_remembered(authenticator: Authenticator) -> None:
    refusal(authenticator, bearer=JwtAuthority.new().token())
    assert authenticator._tokens == {}


def test_a_token_that_shares_all_but_its_signature_is_not_taken_for_another(
    authenticator: Authenticator,
) -> None:
    token = SIGNER.token()
    by_token(authenticator, token)
    forged = JwtAuthority.new().token()
    assert forged.rpartition(".")[0] == token.rpartition(".")[0]
    assert refusal(authenticator, bearer=forged).rule == "J-9"


def test_the_number_of_remembered_tokens_is_bounded(
    authenticator: Authenticator, verifications: Verifications
) -> None:
    tokens = [SIGNER.token(claims={"jti": str(number)}) for number in range(4)]
    for token in tokens:
        by_token(authenticator, token)
    assert len(authenticator._tokens) == 3
    by_token(authenticator, tokens[3])
    assert verifications.tokens == 4
    by_token(authenticator, tokens[0])
    assert verifications.tokens == 5


def test_j_13_an_oversized_token_is_not_even_hashed(
    authenticator: Authenticator, verifications: Verifications
) -> None:
    assert refusal(authenticator, bearer="a" * 10_000).rule == "J-13"
    assert verifications.tokens == 0


@pytest.mark.parametrize("token", ["\ud800", "\u20ac.a.b", "a.b.\x00"])
def test_a_token_of_any_characters_is_refused_quietly(authenticator: Authenticator, token: str) -> None:
    assert refusal(authenticator, bearer=token).rule in {"J-1", "J-13"}


def test_a_chain_is_verified_once_per_connection(
    authenticator: Authenticator, verifications: Verifications
) -> None:
    leaf = ROOT.leaf()
    first, second = PeerCertificates(leaf.chain), PeerCertificates(leaf.chain)
    for peer in (first, first, second, second):
        by_chain(authenticator, peer)
    assert verifications.chains == 2


def test_x_2_a_warm_connection_ends_with_its_certificate(
    authenticator: Authenticator, clock: ManualClock, verifications: Verifications
) -> None:
    peer = PeerCertificates(ROOT.leaf(not_after=NOW + timedelta(seconds=90)).chain)
    by_chain(authenticator, peer)
    clock.advance(seconds=90)
    by_chain(authenticator, peer)
    assert verifications.chains == 1
    clock.advance(ms=1)
    assert refusal(authenticator, peer=peer).rule == "X-2"


def test_x_2_a_clock_set_back_makes_a_warm_connection_be_verified_again(
    authenticator: Authenticator, clock: ManualClock
) -> None:
    peer = PeerCertificates(ROOT.leaf(not_before=NOW - timedelta(seconds=5)).chain)
    by_chain(authenticator, peer)
    clock.advance(seconds=-6)
    assert refusal(authenticator, peer=peer).rule == "X-2"


def test_x_10_a_rotation_is_felt_on_a_warm_connection(
    authenticator: Authenticator, store: BundleStore, verifications: Verifications
) -> None:
    peer = PeerCertificates(ROOT.leaf().chain)
    by_chain(authenticator, peer)
    store.replace("other.example", Authority.root("other.example").bundle())
    assert by_chain(authenticator, peer).bundle_generation == 1
    assert verifications.chains == 2
    rotate_away(store)
    assert refusal(authenticator, peer=peer).rule == "X-2"
    store.remove("example.org")
    assert refusal(authenticator, peer=peer).rule == "X-10"


# --- the header -----------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Bearer a.b.c", "bearer a.b.c", "BEARER  a.b.c "])
def test_j_10_a_bearer_header_holds_a_token(header: str) -> None:
    assert bearer_token(header) == "a.b.c"


def test_j_10_no_header_is_no_token() -> None:
    assert bearer_token(None) is None


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic a.b.c", "a.b.c", "Bearer\ta.b.c", " Bearer a"]
)
def test_j_10_another_header_is_refused(header: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        bearer_token(header)
    assert refused.value.rule == "J-10"
