"""The Workload API client against a server on a real socket."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
import uvloop
from cryptography import x509

from broker.authn.bundles import BundleStore, TrustBundle
from broker.authn.workload_api import OwnSvid, OwnSvidError, WorkloadApiSource, parse_own_svid
from broker.core.spiffe_id import SpiffeId
from tests.support.pki import NOW, NOW_MS, Authority, JwtAuthority, bundle_json, ec_key, key_der
from tests.support.workload_api import FakeAgent, joined, x509_answer, x509_svid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

ID = SpiffeId.parse("spiffe://example.org/broker")
ROOT = Authority.root()
NEW_ROOT = Authority.root()
FRIEND = Authority.root("friend.example")
LEAF = ROOT.intermediate().leaf(path="/broker")
RENEWED = ROOT.leaf(path="/broker", not_after=NOW + timedelta(hours=2))
OTHER = ROOT.leaf(path="/other")
NAMELESS = ROOT.leaf(replaced={x509.SubjectAlternativeName: None})
SIGNER = JwtAuthority.new()

OURS = x509_svid(LEAF, ID, [ROOT])
ANOTHERS = x509_svid(OTHER, "spiffe://example.org/other", [ROOT])


class Watch:
    """Waits, without polling, until something holds: woken by every change of store and SVID."""

    def __init__(self, store: BundleStore, source: WorkloadApiSource) -> None:
        self._changed = asyncio.Event()
        self.rotations: list[OwnSvid] = []
        store.subscribe(lambda _bundles: self._changed.set())
        source.on_rotation(self._rotated)

    def _rotated(self, svid: OwnSvid) -> None:
        self.rotations.append(svid)
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await self._changed.wait()
                self._changed.clear()


async def seen(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  a problem has no event to wait for
            await asyncio.sleep(0)


class Scene:
    def __init__(self, agent: FakeAgent, spiffe_id: SpiffeId | None) -> None:
        self.agent = agent
        self.store = BundleStore()
        self.source = WorkloadApiSource(f"unix://{agent.path}", spiffe_id)
        self.watch = Watch(self.store, self.source)

    def bundle(self, trust_domain: str = "example.org") -> TrustBundle:
        return self.store.current.get(trust_domain) or TrustBundle(trust_domain=trust_domain)

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            await self.source.wait_ready()


@asynccontextmanager
async def running(
    path: Path, *, spiffe_id: SpiffeId | None = ID, started: bool = True
) -> AsyncIterator[Scene]:
    agent = FakeAgent(path / "agent.sock")
    await agent.say(x509=x509_answer(OURS), jwt={"spiffe://example.org": bundle_json(SIGNER.jwk(use=None))})
    if started:
        await agent.start()
    scene = Scene(agent, spiffe_id)
    run = asyncio.create_task(scene.source.run(scene.store))
    try:
        yield scene
        assert not run.done(), "nothing an agent does ends the source"
    finally:
        await scene.source.close()
        await scene.source.close()
        await run
        await agent.stop()


# --- what arrives ---------------------------------------------------------------------------------


async def test_svid_and_bundles_arrive_and_are_joined_per_trust_domain(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        bundle = scene.bundle()
        assert bundle.x509_authorities == (ROOT.certificate,)
        assert bundle.jwt_keys["key-1"] == SIGNER.public
        svid = scene.source.svid()
        assert svid is not None
        assert svid.spiffe_id == ID
        assert svid.not_after_ms == NOW_MS + 3_600_000
        assert svid.chain_pem.count(b"BEGIN CERTIFICATE") == 2
        assert scene.source.problems == {}


async def test_the_svid_serves_a_tls_listener(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        svid = scene.source.svid()
        assert svid is not None
        (short_dir / "chain.pem").write_bytes(svid.chain_pem)
        (short_dir / "key.pem").write_bytes(svid.key_pem.reveal())
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            short_dir / "chain.pem", short_dir / "key.pem"
        )
        assert "PRIVATE" not in repr(svid)


async def test_federated_domains_stay_apart_and_end_with_the_federation(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        friend_keys = {"friend.example": bundle_json(JwtAuthority.new("key-1").jwk())}
        await scene.agent.say(
            x509=x509_answer(OURS, federated={"spiffe://friend.example": joined(FRIEND)}), jwt=friend_keys
        )
        await scene.watch.until(lambda: len(scene.bundle("friend.example").jwt_keys) == 1)
        await scene.watch.until(
            lambda: scene.bundle("friend.example").x509_authorities == (FRIEND.certificate,)
        )
        assert scene.bundle().x509_authorities == (ROOT.certificate,)
        assert scene.bundle("friend.example").jwt_keys["key-1"] != SIGNER.public
        await scene.agent.say(x509=x509_answer(OURS), jwt={"example.org": bundle_json(SIGNER.jwk())})
        await scene.watch.until(lambda: scene.store.current.get("friend.example") is None)


async def test_a_federated_bundle_cannot_replace_our_own(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.agent.say(x509=x509_answer(OURS, federated={"example.org": joined(FRIEND)}))
        await scene.ready()
        assert scene.bundle().x509_authorities == (ROOT.certificate,)


async def test_a_rotated_bundle_takes_effect(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        await scene.agent.say(x509=x509_answer(x509_svid(LEAF, ID, [ROOT, NEW_ROOT])))
        both = (ROOT.certificate, NEW_ROOT.certificate)
        await scene.watch.until(lambda: scene.bundle().x509_authorities == both)
        assert scene.bundle().jwt_keys.keys() == {"key-1"}


async def test_a_bundle_becoming_empty_takes_effect(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        await scene.agent.say(
            x509=x509_answer(x509_svid(LEAF, ID, [])), jwt={"example.org": b'{"keys": null}'}
        )
        await scene.watch.until(lambda: scene.bundle().is_empty)
        assert scene.store.current.get("example.org") is not None


async def test_j_14_a_keys_alg_survives_the_way_here(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.agent.say(jwt={"example.org": bundle_json(SIGNER.jwk(alg="ES256"))})
        await scene.watch.until(lambda: "key-1" in scene.bundle().jwt_keys)
        await scene.watch.until(lambda: scene.bundle().jwt_keys["key-1"].algorithm == "ES256")


async def test_a_malformed_bundle_keeps_what_its_domain_had_and_holds_up_no_other(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.agent.say(
            x509=x509_answer(OURS, federated={"friend.example": joined(FRIEND)}),
        )
        await scene.watch.until(lambda: not scene.bundle("friend.example").is_empty)
        await scene.agent.say(
            x509=x509_answer(
                x509_svid(LEAF, ID, [NEW_ROOT]),
                federated={"friend.example": b"\x00", "Friend.example": joined(FRIEND)},
            )
        )
        await scene.watch.until(lambda: scene.bundle().x509_authorities == (NEW_ROOT.certificate,))
        assert scene.bundle("friend.example").x509_authorities == (FRIEND.certificate,)
        assert scene.store.current.by_trust_domain.keys() == {"example.org", "friend.example"}
        assert scene.source.problems.keys() == {"x509-bundle friend.example", "x509-bundle Friend.example"}


# --- which SVID is ours ---------------------------------------------------------------------------


@pytest.mark.parametrize("svids", [(OURS, ANOTHERS), (ANOTHERS, OURS)])
async def test_our_svid_is_chosen_by_its_id_and_not_by_its_place(
    short_dir: Path, svids: tuple[object]
) -> None:
    async with running(short_dir) as scene:
        await scene.agent.say(x509=x509_answer(*svids))  # type: ignore[arg-type]  # a table of answers
        await scene.ready()
        assert [svid.spiffe_id for svid in scene.watch.rotations] == [ID]


async def test_several_svids_and_no_id_configured_is_a_problem_and_no_guess(short_dir: Path) -> None:
    async with running(short_dir, spiffe_id=None, started=False) as scene:
        await scene.agent.say(x509=x509_answer(OURS, ANOTHERS))
        await scene.agent.start()
        await scene.watch.until(lambda: bool(scene.bundle().x509_authorities))
        assert scene.source.svid() is None
        assert "2 identities" in scene.source.problems["x509-svid"]


async def test_a_single_svid_needs_no_id_configured(short_dir: Path) -> None:
    async with running(short_dir, spiffe_id=None) as scene:
        await scene.ready()
        assert scene.watch.rotations[0].spiffe_id == ID


async def test_another_identity_alone_is_not_taken_for_ours(short_dir: Path) -> None:
    async with running(short_dir, started=False) as scene:
        await scene.agent.say(x509=x509_answer(ANOTHERS))
        await scene.agent.start()
        await scene.watch.until(lambda: bool(scene.bundle().x509_authorities))
        assert scene.source.svid() is None
        assert ID in scene.source.problems["x509-svid"]


async def test_each_new_svid_is_announced_once(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        await scene.agent.say(x509=x509_answer(x509_svid(LEAF, ID, [ROOT, NEW_ROOT])))
        await scene.watch.until(lambda: len(scene.bundle().x509_authorities) == 2)
        await scene.agent.say(x509=x509_answer(x509_svid(RENEWED, ID, [ROOT])))
        await scene.watch.until(lambda: len(scene.watch.rotations) == 2)
        assert [svid.not_after_ms for svid in scene.watch.rotations] == [
            NOW_MS + 3_600_000,
            NOW_MS + 7_200_000,
        ]


async def test_of_two_svids_of_our_id_the_longer_lived_is_taken(short_dir: Path) -> None:
    async with running(short_dir, started=False) as scene:
        await scene.agent.say(x509=x509_answer(OURS, x509_svid(RENEWED, ID, [ROOT])))
        await scene.agent.start()
        await scene.ready()
        assert scene.watch.rotations[0].not_after_ms == NOW_MS + 7_200_000


async def test_a_listener_that_fails_keeps_no_other_from_the_new_svid(short_dir: Path) -> None:
    def fail(_svid: OwnSvid) -> None:
        raise RuntimeError("a bug")

    async with running(short_dir, started=False) as scene:
        heard: list[OwnSvid] = []
        scene.source.on_rotation(fail)
        scene.source.on_rotation(heard.append)
        await scene.agent.start()
        await scene.ready()
        assert len(heard) == 1


BROKEN_SVIDS = {
    "another's key": (ID, b"".join(LEAF.chain), key_der(ec_key())),
    "no key": (ID, b"".join(LEAF.chain), b""),
    "no certificate": (ID, b"", key_der(LEAF.key)),
    "a corrupt certificate": (ID, LEAF.chain[0][:-1], key_der(LEAF.key)),
    "another ID than the leaf's": ("spiffe://example.org/x", b"".join(LEAF.chain), key_der(LEAF.key)),
    "no SPIFFE ID": ("broker", b"".join(LEAF.chain), key_der(LEAF.key)),
    "a leaf without a URI": (ID, NAMELESS.chain[0], key_der(NAMELESS.key)),
}


@pytest.mark.parametrize("case", BROKEN_SVIDS)
def test_a_broken_svid_is_refused(case: str) -> None:
    with pytest.raises(OwnSvidError):
        parse_own_svid(*BROKEN_SVIDS[case])


async def test_a_broken_svid_does_not_replace_a_good_one(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        broken = x509_svid(RENEWED, ID, [NEW_ROOT], x509_svid_key=key_der(ec_key()))
        await scene.agent.say(x509=x509_answer(broken))
        await scene.watch.until(lambda: scene.bundle().x509_authorities == (NEW_ROOT.certificate,))
        assert len(scene.watch.rotations) == 1
        assert scene.source.svid() is scene.watch.rotations[0]
        assert "key" in scene.source.problems["x509-svid"]


# --- bad luck -------------------------------------------------------------------------------------


async def test_a_restarted_agent_is_survived(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        generation = scene.store.current.generation
        await scene.agent.stop()
        # What a restarted SPIRE agent says until it has synchronised:
        await scene.agent.say(x509=grpc.StatusCode.PERMISSION_DENIED, jwt=grpc.StatusCode.PERMISSION_DENIED)
        calls = scene.agent.calls
        await scene.agent.start()
        await seen(lambda: scene.agent.calls >= calls + 2)
        assert scene.store.current.generation == generation
        assert scene.source.svid() is not None
        await scene.agent.say(
            x509=x509_answer(x509_svid(RENEWED, ID, [NEW_ROOT])),
            jwt={"example.org": bundle_json(SIGNER.jwk(kid="key-2"))},
        )
        await scene.watch.until(lambda: len(scene.watch.rotations) == 2)
        await scene.watch.until(lambda: scene.bundle().jwt_keys.keys() == {"key-2"})
        assert scene.bundle().x509_authorities == (NEW_ROOT.certificate,)
        assert scene.source.problems == {}


async def test_a_socket_that_is_not_there_yet_is_waited_for(short_dir: Path) -> None:
    async with running(short_dir, started=False) as scene:
        await seen(lambda: bool(scene.source.problems))
        assert scene.source.svid() is None
        await scene.agent.start()
        await scene.ready()
        assert scene.source.problems == {}


async def test_an_answer_without_svids_takes_nothing_away(short_dir: Path) -> None:
    async with running(short_dir) as scene:
        await scene.ready()
        await scene.agent.say(x509=x509_answer())
        await seen(lambda: "no X.509-SVID" in scene.source.problems.get("x509-svid", ""))
        assert not scene.bundle().is_empty
        await scene.agent.say(x509=x509_answer(x509_svid(RENEWED, ID, [ROOT])))
        await scene.watch.until(lambda: len(scene.watch.rotations) == 2)
        assert scene.source.problems == {}


def test_it_works_on_the_loop_of_production(short_dir: Path) -> None:
    async def scenario() -> None:
        async with running(short_dir) as scene:
            await scene.ready()
            await scene.agent.stop()
            await scene.agent.say(x509=x509_answer(x509_svid(RENEWED, ID, [ROOT])))
            await scene.agent.start()
            await scene.watch.until(lambda: len(scene.watch.rotations) == 2)

    uvloop.run(scenario())


@pytest.mark.parametrize(
    "address", ["", "agent.sock", "unix:agent.sock", "tcp://127.0.0.1:8081", "https://a/b"]
)
def test_an_address_that_is_no_socket_path_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="socket path"):
        WorkloadApiSource(address)
