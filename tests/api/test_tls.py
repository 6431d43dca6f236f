from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import uvloop
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from broker.api import tls
from broker.api.protocol import ConnectionLimits
from broker.api.tls import ServerTls, TlsConfigError, TlsUnusableError, check_chain_extraction
from broker.core.secret import Secret
from tests.support.edge import (
    EdgeUnderTest,
    authority,
    chain_and_key,
    client_context,
    client_leaf,
    pem,
    server_leaf,
)
from tests.support.pki import ec_key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.support.pki import Authority

    Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run under each loop the broker supports: their TLS is two implementations."""
    return asyncio.run if request.param == "asyncio" else uvloop.run


def server_tls(root: Authority, *others: Authority) -> ServerTls:
    return ServerTls(*chain_and_key(server_leaf(root)), [pem(each.certificate) for each in (root, *others)])


def test_the_whole_chain_arrives_once_per_connection(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        leaf = client_leaf(root.intermediate(now=root.certificate.not_valid_before_utc))
        async with EdgeUnderTest(tls=server_tls(root)) as edge:
            client = await edge.connect(client_context(root, leaf))
            first, second = [orjson.loads((await client.get("/peer"))[2]) for _ in range(2)]
        assert first["chain"] == [each.hex() for each in leaf.chain]
        assert len(leaf.chain) == 2
        assert second["slot"] == first["slot"]

    run(scenario())


def test_a_client_without_certificate_is_served(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        async with EdgeUnderTest(tls=server_tls(root)) as edge:
            client = await edge.connect(client_context(root))
            status, _, body = await client.get("/peer")
        assert (status, orjson.loads(body)["chain"]) == (200, [])

    run(scenario())


def test_every_trust_domains_authorities_open_the_door(run: Run) -> None:
    async def scenario() -> None:
        home, partner = authority(), authority("partner.test")
        async with EdgeUnderTest(tls=server_tls(home, partner)) as edge:
            client = await edge.connect(client_context(home, client_leaf(partner)))
            assert (await client.get("/peer"))[0] == 200

    run(scenario())


async def refused(edge: EdgeUnderTest, context: ssl.SSLContext) -> None:
    """In TLS 1.3 the client learns of it with the first bytes it reads."""
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await (await edge.connect(context)).get("/peer")


def test_a_stranger_dies_in_the_handshake_and_is_counted(run: Run) -> None:
    async def scenario() -> None:
        home, stranger = authority(), authority("stranger.test")
        async with EdgeUnderTest(tls=server_tls(home)) as edge:
            await refused(edge, client_context(home, client_leaf(stranger)))
            await edge.telemetry.until(lambda: edge.telemetry.tls == ["certificate_verify_failed"])

    run(scenario())


def test_no_authorities_means_no_client_certificates(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        async with EdgeUnderTest(tls=ServerTls(*chain_and_key(server_leaf(root)), [])) as edge:
            await refused(edge, client_context(root, client_leaf(root)))
            client = await edge.connect(client_context(root))
            assert (await client.get("/peer"))[0] == 200

    run(scenario())


def test_tls_1_2_is_refused_and_counted(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        old = client_context(root)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with EdgeUnderTest(tls=server_tls(root)) as edge:
            await refused(edge, old)
            await edge.telemetry.until(lambda: edge.telemetry.tls == ["unsupported_protocol"])

    run(scenario())


def test_plain_http_on_the_tls_port_is_counted(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(tls=server_tls(authority())) as edge:
            client = await edge.connect()
            await client.send(b"GET / HTTP/1.1\r\n\r\n")
            await client.rest()
            await edge.telemetry.until(lambda: edge.telemetry.tls == ["http_request"])

    run(scenario())


def test_sessions_are_never_resumed(run: Run) -> None:
    root = authority()
    leaf = client_leaf(root.intermediate(now=root.certificate.not_valid_before_utc))
    context = client_context(root, leaf)

    def talk(port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None, bytes]:
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost", session=session) as wrapped,
        ):
            wrapped.sendall(b"GET /peer HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: wrapped.recv(65_536), b""))
            return wrapped.session, wrapped.session_reused, answer

    async def scenario() -> None:
        async with EdgeUnderTest(tls=server_tls(root)) as edge:
            session, _, _ = await asyncio.to_thread(talk, edge.listener.port, None)
            assert session is None or not session.has_ticket
            _, reused, answer = await asyncio.to_thread(talk, edge.listener.port, session)
        assert reused is False
        assert all(each.hex().encode() in answer for each in leaf.chain)

    run(scenario())


@pytest.mark.parametrize("named", [True, False], ids=["with SNI", "without SNI"])
def test_certificate_and_bundles_rotate_while_listening(run: Run, named: bool) -> None:  # noqa: FBT001  a parameter
    async def scenario() -> None:
        before, after = authority(), authority()
        host = "localhost" if named else None
        server = server_tls(before)
        async with EdgeUnderTest(tls=server) as edge:
            established = await edge.connect(client_context(before, client_leaf(before), named=named), host)
            assert (await established.get("/peer"))[0] == 200
            server.rotate(*chain_and_key(server_leaf(after)), [pem(after.certificate)])
            newcomer = await edge.connect(client_context(after, client_leaf(after), named=named), host)
            assert (await newcomer.get("/peer"))[0] == 200
            # The old bundle is gone for new connections, and the old server certificate with it.
            await refused(edge, client_context(after, client_leaf(before), named=named))
            await refused(edge, client_context(before, named=named))
            assert (await established.get("/peer"))[0] == 200

    run(scenario())


def test_a_rotation_that_cannot_serve_changes_nothing(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        server = server_tls(root)
        chain, _ = chain_and_key(server_leaf(root))
        _, other_key = chain_and_key(server_leaf(root))
        async with EdgeUnderTest(tls=server) as edge:
            for bad_chain, bad_key in ((chain, other_key), (b"", other_key), (chain, b"rubbish")):
                with pytest.raises(TlsConfigError):
                    server.rotate(bad_chain, bad_key, [pem(root.certificate)])
            client = await edge.connect(client_context(root))
            assert (await client.get("/peer"))[0] == 200

    run(scenario())


def test_an_encrypted_key_is_refused_instead_of_asked_for() -> None:
    root = authority()
    leaf = server_leaf(root)
    key = leaf.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hunter2"))
    with pytest.raises(TlsConfigError, match="encrypted"):
        ServerTls(chain_and_key(leaf)[0], key, [])


def test_a_key_may_come_as_a_secret_and_one_bad_authority_spoils_nothing(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        chain, key = chain_and_key(server_leaf(root))
        server = ServerTls(chain, Secret(key), [b"rubbish", b"", pem(root.certificate)])
        async with EdgeUnderTest(tls=server) as edge:
            client = await edge.connect(client_context(root, client_leaf(root)))
            assert (await client.get("/peer"))[0] == 200

    run(scenario())


@pytest.mark.parametrize("memory", [True, False])
def test_the_keys_file_is_gone_at_once(monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:  # noqa: FBT001  a parameter
    if not memory:
        monkeypatch.delattr(os, "memfd_create")
    with tls._as_file(b"secret") as path:
        assert Path(path).read_bytes() == b"secret"
        assert Path(path).stat().st_mode & 0o077 == 0 or memory
        before = Path(path).resolve()
    assert not Path(path).exists()
    assert not before.exists()


def test_the_start_up_check_passes_here() -> None:
    check_chain_extraction()


def test_the_start_up_check_fails_clearly_where_intermediates_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tls.peer_chain_der
    monkeypatch.setattr(tls, "peer_chain_der", lambda ssl_object: whole(ssl_object)[:1])
    with pytest.raises(TlsUnusableError, match=r"1 of 2 certificates .* Python 3"):
        check_chain_extraction()


def test_the_start_up_check_fails_clearly_where_there_is_no_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_ssl_object: Any) -> tuple[bytes, ...]:
        raise AttributeError

    monkeypatch.setattr(tls, "peer_chain_der", missing)
    with pytest.raises(TlsUnusableError, match="cannot be read on Python 3"):
        check_chain_extraction()


def test_a_silent_handshake_times_out_and_holds_nobody_up(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        limits = ConnectionLimits(handshake_seconds=0.3)
        async with EdgeUnderTest(tls=server_tls(root), limits=limits) as edge:
            silent = await edge.connect()
            client = await edge.connect(client_context(root))
            assert (await client.get("/peer"))[0] == 200
            await edge.telemetry.until(lambda: edge.telemetry.tls == ["timeout"])
            assert await silent.rest() == b""

    run(scenario())


def test_half_open_handshakes_are_bounded_and_starve_nobody(run: Run) -> None:
    async def scenario() -> None:
        root = authority()
        async with EdgeUnderTest(tls=server_tls(root), limits=ConnectionLimits(handshakes=4)) as edge:
            for _ in range(12):
                await edge.connect()
            client = await edge.connect(client_context(root))
            assert (await client.get("/peer"))[0] == 200
            assert edge.listener.handshakes <= 4
            await edge.telemetry.until(lambda: edge.telemetry.tls.count("closed") >= 8)

    run(scenario())


def test_a_peer_that_hangs_up_midway_is_counted(run: Run) -> None:
    async def scenario() -> None:
        async with EdgeUnderTest(tls=server_tls(authority())) as edge:
            client = await edge.connect()
            await client.send(b"\x16\x03\x01")
            await client.close()
            await edge.telemetry.until(lambda: edge.telemetry.tls == ["closed"])

    run(scenario())


def test_a_leaf_key_of_another_kind_serves_too() -> None:
    root = authority()
    leaf = root.leaf(key=ec_key(), now=root.certificate.not_valid_before_utc)
    context = ServerTls(*chain_and_key(leaf), [pem(root.certificate)]).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.num_tickets == 0
    assert context.verify_mode is ssl.CERT_OPTIONAL
