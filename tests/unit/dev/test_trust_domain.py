"""The embedded trust domain, through its real sockets and the real Workload API client."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import jwt
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from spiffe import JwtSource, SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe._proto import workload_pb2, workload_pb2_grpc

from broker.authn.bundles import TrustBundles
from broker.authn.jwt_svid import validate_jwt_svid
from broker.authn.trust_bundle import parse_spiffe_bundle
from broker.authn.x509_svid import validate_x509_svid
from broker.core.clock import ManualClock
from broker.core.errors import Unauthenticated
from broker.dev.authority import SVID_TTL_SECONDS_MAX
from broker.dev.authority_file import AuthorityFileError
from broker.dev.trust_domain import EmbeddedTrustDomain, TrustDomainError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

ROOT = Path(__file__).parents[3]
DOMAIN = "dev.nhi.internal"
AGENT = f"spiffe://{DOMAIN}/agents/churn"
BROKER = f"spiffe://{DOMAIN}/broker"
AUDIENCE = f"spiffe://{DOMAIN}/broker"
WAIT_SECONDS = 30


@pytest.fixture
def clock() -> ManualClock:
    """Starts at the real time, because the client compares tokens with it."""
    return ManualClock(time.time_ns() // 1_000_000)


@pytest.fixture
async def steered(short_dir: Path, clock: ManualClock) -> AsyncIterator[EmbeddedTrustDomain]:
    async with EmbeddedTrustDomain(short_dir / "steered", clock=clock) as domain:
        yield domain


def _client(socket: Path) -> WorkloadApiClient:
    return WorkloadApiClient(f"unix://{socket}", default_timeout=WAIT_SECONDS)


def _bundles(domain: EmbeddedTrustDomain) -> TrustBundles:
    return TrustBundles({DOMAIN: parse_spiffe_bundle(DOMAIN, domain.bundle_json())})


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _check_token(domain: EmbeddedTrustDomain, token: str, audience: str = AUDIENCE) -> str:
    return validate_jwt_svid(
        token, audience, _bundles(domain), _now_ms(), lifetime_seconds_max=3600, leeway_seconds=5
    ).spiffe_id


class Updates:
    """Counts what a source was pushed."""

    def __init__(self, source: X509Source | JwtSource) -> None:
        self._event = threading.Event()
        source.subscribe_for_updates(self._event.set)

    def wait(self) -> None:
        assert self._event.wait(WAIT_SECONDS), "nothing was pushed"
        self._event.clear()


# --- what the client gets ------------------------------------------------------------------------


def test_an_x509_svid_comes_through_the_socket_and_passes_the_brokers_rules(
    trust_domain: EmbeddedTrustDomain,
) -> None:
    with _client(trust_domain.register(AGENT)) as client:
        svid = client.fetch_x509_svid()
    chain = [certificate.public_bytes(Encoding.DER) for certificate in svid.cert_chain]
    accepted = validate_x509_svid(chain, _bundles(trust_domain), _now_ms())
    assert accepted.spiffe_id == AGENT
    assert svid.private_key.public_key() == svid.leaf.public_key()


def test_the_leaf_has_the_profile_of_an_x509_svid_x_1_to_x_9(trust_domain: EmbeddedTrustDomain) -> None:
    leaf = trust_domain.issue_x509_svid(
        BROKER, dns_names=["localhost"], ip_addresses=["127.0.0.1"]
    ).certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [BROKER]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not usage.value.crl_sign
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert leaf.subject.rdns
    leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    authority = x509.load_der_x509_certificate(trust_domain.x509_bundle())
    issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert issuer.key_identifier == own.key_identifier
    leaf.verify_directly_issued_by(authority)


def test_the_authority_has_the_profile_of_a_signing_certificate_x_8(
    trust_domain: EmbeddedTrustDomain,
) -> None:
    authority = x509.load_der_x509_certificate(trust_domain.x509_bundle())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://{DOMAIN}"]


def test_a_jwt_svid_comes_through_the_socket_and_passes_the_brokers_rules(
    trust_domain: EmbeddedTrustDomain,
) -> None:
    with _client(trust_domain.register(AGENT)) as client:
        token = client.fetch_jwt_svid({AUDIENCE}).token
    assert _check_token(trust_domain, token) == AGENT
    assert set(jwt.get_unverified_header(token)) == {"alg", "kid", "typ"}
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["aud"] == [AUDIENCE]
    assert claims["exp"] - claims["iat"] == 300
    with pytest.raises(Unauthenticated, match="J-7"):
        _check_token(trust_domain, token, "spiffe://dev.nhi.internal/tools/mail")


def test_bundles_come_through_the_socket(trust_domain: EmbeddedTrustDomain) -> None:
    with _client(trust_domain.register(AGENT)) as client:
        x509_bundle = client.fetch_x509_bundles().get_bundle_for_trust_domain(TrustDomain(DOMAIN))
        jwt_bundle = client.fetch_jwt_bundles().get_bundle_for_trust_domain(TrustDomain(DOMAIN))
        token = client.fetch_jwt_svid({AUDIENCE}).token
    assert x509_bundle is not None
    assert jwt_bundle is not None
    [authority] = x509_bundle.x509_authorities
    assert authority == x509.load_der_x509_certificate(trust_domain.x509_bundle())
    assert set(jwt_bundle.jwt_authorities) == {jwt.get_unverified_header(token)["kid"]}


def test_the_bundle_document_has_sequence_and_hint_and_no_private_key(
    trust_domain: EmbeddedTrustDomain,
) -> None:
    document = json.loads(trust_domain.bundle_json())
    assert document["spiffe_sequence"] == 1
    assert document["spiffe_refresh_hint"] > 0
    assert [key["use"] for key in document["keys"]] == ["x509-svid", "jwt-svid"]
    assert "kid" not in document["keys"][0]
    assert not any("d" in key for key in document["keys"])


def test_the_socket_answers_a_client_in_another_process(trust_domain: EmbeddedTrustDomain) -> None:
    program = "from spiffe import WorkloadApiClient as C; print(C().fetch_x509_svid().spiffe_id)"
    environment = {**os.environ, "SPIFFE_ENDPOINT_SOCKET": f"unix://{trust_domain.register(AGENT)}"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    assert done.stdout.decode().strip() == AGENT


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_client_that_blocks_the_loop_is_answered(
    short_dir: Path, run: Callable[[Coroutine[None, None, str]], str]
) -> None:
    async def blocking_client() -> str:
        async with EmbeddedTrustDomain(short_dir) as domain:
            socket = domain.register(AGENT)
            with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
                return str(source.get_x509_context().default_svid.spiffe_id)

    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(run(blocking_client())))
    thread.start()
    thread.join(WAIT_SECONDS)
    assert answers == [AGENT]


# --- what it refuses -----------------------------------------------------------------------------


def test_a_socket_never_speaks_for_another_identity(trust_domain: EmbeddedTrustDomain) -> None:
    trust_domain.register(BROKER)
    with _client(trust_domain.register(AGENT)) as client:
        with pytest.raises(Exception, match="PERMISSION_DENIED"):
            client.fetch_jwt_svid({AUDIENCE}, subject=SpiffeId(BROKER))
        assert str(client.fetch_jwt_svid({AUDIENCE}, subject=SpiffeId(AGENT)).spiffe_id) == AGENT
        assert [str(svid.spiffe_id) for svid in client.fetch_x509_svids()] == [AGENT]


def test_a_token_has_one_audience_j_7(trust_domain: EmbeddedTrustDomain) -> None:
    with _client(trust_domain.register(AGENT)) as client, pytest.raises(Exception, match="INVALID_ARGUMENT"):
        client.fetch_jwt_svid({AUDIENCE, "another"})
    with pytest.raises(ValueError, match="audience"):
        trust_domain.issue_jwt_svid(AGENT, "")


CALLS = {
    "FetchX509SVID": workload_pb2.X509SVIDRequest(),
    "FetchX509Bundles": workload_pb2.X509BundlesRequest(),
    "FetchJWTSVID": workload_pb2.JWTSVIDRequest(audience=[AUDIENCE]),
    "FetchJWTBundles": workload_pb2.JWTBundlesRequest(),
    "ValidateJWTSVID": workload_pb2.ValidateJWTSVIDRequest(audience=AUDIENCE, svid="a.b.c"),
}


@pytest.mark.parametrize(
    "header", [(), (("workload.spiffe.io", "True"),), (("workload.spiffe.io", ""),)], ids=str
)
@pytest.mark.parametrize("method", CALLS)
def test_a_call_without_the_security_header_gets_nothing(
    trust_domain: EmbeddedTrustDomain, method: str, header: tuple[tuple[str, str], ...]
) -> None:
    with grpc.insecure_channel(f"unix:{trust_domain.register(AGENT)}") as channel:
        call = getattr(workload_pb2_grpc.SpiffeWorkloadAPIStub(channel), method)
        with pytest.raises(grpc.RpcError) as refused:
            next(iter(call(CALLS[method], metadata=header, timeout=WAIT_SECONDS)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "security header" in refused.value.details()


@pytest.mark.parametrize(
    "request_message",
    [
        workload_pb2.JWTSVIDRequest(),
        workload_pb2.JWTSVIDRequest(audience=[""]),
        workload_pb2.JWTSVIDRequest(audience=["x" * 3000]),
    ],
    ids=["none", "empty", "huge"],
)
def test_a_token_request_without_a_usable_audience_is_refused(
    trust_domain: EmbeddedTrustDomain, request_message: workload_pb2.JWTSVIDRequest
) -> None:
    with grpc.insecure_channel(f"unix:{trust_domain.register(AGENT)}") as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.FetchJWTSVID(
                request_message, metadata=(("workload.spiffe.io", "true"),), timeout=WAIT_SECONDS
            )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_validation_accepts_only_this_domains_tokens_for_the_audience(
    trust_domain: EmbeddedTrustDomain, short_dir: Path
) -> None:
    async with EmbeddedTrustDomain(short_dir / "twin") as twin:
        forged = twin.issue_jwt_svid(AGENT, AUDIENCE)
    good = trust_domain.issue_jwt_svid(AGENT, AUDIENCE)
    with _client(trust_domain.register(AGENT)) as client:
        assert str(client.validate_jwt_svid(good, AUDIENCE).spiffe_id) == AGENT
        for token, audience in [(good, "another"), (forged, AUDIENCE), (good[:-4], AUDIENCE), ("", AUDIENCE)]:
            with pytest.raises(Exception, match=r"not valid|empty"):
                client.validate_jwt_svid(token, audience)


@pytest.mark.parametrize(
    "spiffe_id",
    ["spiffe://prod.example.com/agents/churn", f"spiffe://{DOMAIN}", f"spiffe://{DOMAIN}.example.com/a"],
)
def test_only_workloads_of_the_trust_domain_get_anything(
    trust_domain: EmbeddedTrustDomain, spiffe_id: str
) -> None:
    for refused in (
        lambda: trust_domain.register(spiffe_id),
        lambda: trust_domain.issue_x509_svid(spiffe_id),
        lambda: trust_domain.issue_jwt_svid(spiffe_id, AUDIENCE),
        lambda: trust_domain.socket_for(spiffe_id),
    ):
        with pytest.raises(TrustDomainError, match=f"begin it with spiffe://{DOMAIN}/"):
            refused()


@pytest.mark.parametrize("ttl_seconds", [0, -1, SVID_TTL_SECONDS_MAX + 1])
def test_no_svid_outlives_the_hour_after_which_its_authority_is_forgotten(
    trust_domain: EmbeddedTrustDomain, short_dir: Path, ttl_seconds: int
) -> None:
    with pytest.raises(ValueError, match="an SVID lives"):
        trust_domain.issue_jwt_svid(AGENT, AUDIENCE, ttl_seconds)
    with pytest.raises(ValueError, match="an SVID lives"):
        trust_domain.issue_x509_svid(AGENT, ttl_seconds=ttl_seconds)
    with pytest.raises(ValueError, match="an SVID lives"):
        EmbeddedTrustDomain(short_dir, x509_ttl_seconds=ttl_seconds)


def test_nothing_is_issued_before_the_start(short_dir: Path) -> None:
    with pytest.raises(TrustDomainError, match="start"):
        EmbeddedTrustDomain(short_dir).issue_jwt_svid(AGENT, AUDIENCE)


def test_an_unregistered_identity_has_no_socket(trust_domain: EmbeddedTrustDomain) -> None:
    with pytest.raises(TrustDomainError, match="register it first"):
        trust_domain.socket_for(AGENT)


# --- rotation ------------------------------------------------------------------------------------


def test_an_svid_is_reissued_at_half_life_and_pushed(
    steered: EmbeddedTrustDomain, clock: ManualClock
) -> None:
    socket = steered.register(AGENT)
    with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
        updates = Updates(source)
        first = source.get_x509_context().default_svid.leaf
        clock.advance(seconds=SVID_TTL_SECONDS_MAX / 2 - 2)
        assert not steered.rotate_due()
        clock.advance(seconds=2)
        assert steered.rotate_due()
        updates.wait()
        second = source.get_x509_context().default_svid.leaf
        assert second.serial_number != first.serial_number
        assert second.not_valid_after_utc > first.not_valid_after_utc
        assert not steered.rotate_due()


def test_rotation_needs_nobody_to_ask_for_it(short_dir: Path) -> None:
    async def wait_for_push() -> None:
        async with EmbeddedTrustDomain(short_dir, x509_ttl_seconds=2) as domain:
            socket = domain.register(AGENT)
            with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
                Updates(source).wait()

    thread = threading.Thread(target=lambda: asyncio.run(wait_for_push()))
    thread.start()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


def test_a_new_authority_signs_at_once_and_the_old_one_stays_until_its_svids_have_ended(
    steered: EmbeddedTrustDomain, clock: ManualClock
) -> None:
    socket = steered.register(AGENT)
    old_token = steered.issue_jwt_svid(AGENT, AUDIENCE, SVID_TTL_SECONDS_MAX)
    old_leaf = steered.issue_x509_svid(AGENT).chain_der()
    sequence = json.loads(steered.bundle_json())["spiffe_sequence"]
    with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
        updates = Updates(source)
        steered.rotate_ca()
        updates.wait()
        context = source.get_x509_context()
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(TrustDomain(DOMAIN))
        assert bundle is not None
        assert len(bundle.x509_authorities) == 2
        new_leaf = context.default_svid.leaf
        assert new_leaf.issuer != x509.load_der_x509_certificate(old_leaf).issuer

        clock.advance(seconds=SVID_TTL_SECONDS_MAX)
        steered.rotate_due()
        assert len(_bundles(steered).by_trust_domain[DOMAIN].jwt_keys) == 2
        validate_x509_svid([old_leaf], _bundles(steered), clock.now_ms() - 1000)
        assert _check_token(steered, old_token) == AGENT

        clock.advance(seconds=60)
        assert steered.rotate_due()
        assert len(_bundles(steered).by_trust_domain[DOMAIN].jwt_keys) == 1
        with pytest.raises(Unauthenticated, match="J-9"):
            _check_token(steered, old_token)
        assert json.loads(steered.bundle_json())["spiffe_sequence"] > sequence + 1


def test_a_new_jwt_authority_is_pushed(trust_domain: EmbeddedTrustDomain) -> None:
    socket = trust_domain.register(AGENT)
    with JwtSource(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
        updates = Updates(source)
        trust_domain.rotate_ca()
        updates.wait()
        bundle = source.get_bundle_for_trust_domain(TrustDomain(DOMAIN))
        assert bundle is not None
        assert len(bundle.jwt_authorities) == 2


def test_an_authority_is_replaced_at_half_of_its_own_life(
    steered: EmbeddedTrustDomain, clock: ManualClock
) -> None:
    before = steered.x509_bundle()
    clock.advance(seconds=365 * 24 * 3600 / 2)
    assert steered.rotate_due()
    assert steered.x509_bundle() != before
    assert not steered.rotate_due()


def test_other_names_for_a_registered_identity_are_pushed_and_the_same_names_are_not(
    trust_domain: EmbeddedTrustDomain,
) -> None:
    socket = trust_domain.register(BROKER)
    with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
        first = trust_domain.current_x509_svid(BROKER)
        assert trust_domain.register(BROKER) == socket
        assert trust_domain.current_x509_svid(BROKER) is first
        updates = Updates(source)
        assert trust_domain.register(BROKER, ["localhost"]) == socket
        updates.wait()
        leaf = source.get_x509_context().default_svid.leaf
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


# --- state ---------------------------------------------------------------------------------------


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directories_sockets_and_keys_are_private(trust_domain: EmbeddedTrustDomain) -> None:
    socket = trust_domain.register(AGENT)
    assert socket == trust_domain.socket_for(AGENT)
    assert _mode(socket) == 0o600
    assert _mode(socket.parent) == 0o700
    assert _mode(socket.parent.parent) == 0o700
    assert _mode(socket.parent.parent / "authority.json") == 0o600


async def test_a_directory_that_was_open_is_closed(short_dir: Path) -> None:
    loose = short_dir / "loose"
    loose.mkdir(mode=0o755)
    async with EmbeddedTrustDomain(loose):
        assert _mode(loose) == 0o700


async def test_a_restart_keeps_the_trust_domain(short_dir: Path) -> None:
    async with EmbeddedTrustDomain(short_dir) as first:
        first.rotate_ca()
        token = first.issue_jwt_svid(AGENT, AUDIENCE)
        bundle = first.bundle_json()
    async with EmbeddedTrustDomain(short_dir) as second:
        assert second.bundle_json() == bundle
        assert _check_token(second, token) == AGENT


async def test_a_source_survives_a_restart(short_dir: Path) -> None:
    domain = await EmbeddedTrustDomain(short_dir).start()
    socket = domain.register(AGENT)
    with X509Source(socket_path=f"unix://{socket}", timeout_in_seconds=WAIT_SECONDS) as source:
        updates = Updates(source)
        await domain.close()
        await domain.close()
        assert not socket.exists()
        async with EmbeddedTrustDomain(short_dir) as again:
            again.register(AGENT)
            await asyncio.to_thread(updates.wait)
            assert not source.is_closed()


async def test_a_stream_ends_with_unavailable_which_clients_retry(short_dir: Path) -> None:
    domain = await EmbeddedTrustDomain(short_dir).start()
    with grpc.insecure_channel(f"unix:{domain.register(AGENT)}") as channel:
        stream = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel).FetchX509SVID(
            workload_pb2.X509SVIDRequest(), metadata=(("workload.spiffe.io", "true"),), timeout=WAIT_SECONDS
        )
        await asyncio.to_thread(next, stream)
        await domain.close()
        with pytest.raises(grpc.RpcError) as ended:
            await asyncio.to_thread(next, stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "is closing" in ended.value.details()


async def test_two_processes_never_serve_one_directory(short_dir: Path) -> None:
    async with EmbeddedTrustDomain(short_dir) as first:
        socket = first.register(AGENT)
        with pytest.raises(TrustDomainError, match="another process serves"):
            await EmbeddedTrustDomain(short_dir).start()
        with _client(socket) as client:
            assert str(client.fetch_x509_svid().spiffe_id) == AGENT
    await (await EmbeddedTrustDomain(short_dir).start()).close()


def test_a_socket_left_by_a_killed_process_is_replaced(short_dir: Path) -> None:
    program = f"""
import asyncio, os, pathlib, signal
from broker.dev.trust_domain import EmbeddedTrustDomain

async def main():
    domain = EmbeddedTrustDomain(pathlib.Path({str(short_dir)!r}))
    domain.register({AGENT!r})
    await domain.start()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=WAIT_SECONDS)
    assert list((short_dir / "workload").iterdir())

    async def serve_again() -> str:
        async with EmbeddedTrustDomain(short_dir) as domain:
            with _client(domain.register(AGENT)) as client:
                return str(client.fetch_x509_svid().spiffe_id)

    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(serve_again())))
    thread.start()
    thread.join(WAIT_SECONDS)
    assert answers == [AGENT]


@pytest.fixture
async def used(short_dir: Path) -> Path:
    """A state directory that was served before."""
    async with EmbeddedTrustDomain(short_dir):
        return short_dir / "authority.json"


def test_keys_that_others_may_read_are_refused(used: Path) -> None:
    used.chmod(0o640)
    with pytest.raises(AuthorityFileError, match="chmod 600"):
        EmbeddedTrustDomain(used.parent)._start()


@pytest.mark.parametrize("damage", ["", "{}", '{"trust_domain": 1, "sequence": 1, "generations": []}', "[1]"])
def test_damaged_keys_are_refused(used: Path, damage: str) -> None:
    used.write_text(damage)
    with pytest.raises(AuthorityFileError, match="is damaged: delete it"):
        EmbeddedTrustDomain(used.parent)._start()


async def test_another_trust_domains_keys_are_refused(used: Path) -> None:
    with pytest.raises(AuthorityFileError, match="belongs to trust domain"):
        await EmbeddedTrustDomain(used.parent, "other.internal").start()


def test_a_socket_path_that_is_too_long_is_refused_with_the_mend(short_dir: Path) -> None:
    domain = EmbeddedTrustDomain(short_dir / ("d" * 70))
    with pytest.raises(TrustDomainError, match="choose a shorter state directory"):
        domain.register(AGENT)


@pytest.mark.parametrize("name", ["a b", "a%20b", "a?b", "a#b", "ä"])
def test_a_socket_path_that_is_no_plain_uri_is_refused_with_the_mend(short_dir: Path, name: str) -> None:
    with pytest.raises(TrustDomainError, match="choose a state directory of letters"):
        EmbeddedTrustDomain(short_dir / name).register(AGENT)


def test_ids_that_look_alike_have_different_sockets(short_dir: Path) -> None:
    domain = EmbeddedTrustDomain(short_dir)
    ids = [f"spiffe://{DOMAIN}/{path}" for path in ("a/b", "a-b", "A/b", "a.b", "a_b", "x" * 200, "x" * 201)]
    assert len({domain.register(spiffe_id) for spiffe_id in ids}) == len(ids)


def test_no_private_key_is_shown(trust_domain: EmbeddedTrustDomain) -> None:
    svid = trust_domain.issue_x509_svid(AGENT)
    shown = repr(trust_domain) + repr(svid) + repr(trust_domain._authorities)
    assert "PRIVATE" not in shown
    assert svid.key_der().hex() not in shown
