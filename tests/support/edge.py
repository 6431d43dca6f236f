"""Real listeners on loopback and plain clients, for tests of the HTTP edge."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

import orjson
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.responses import Response

from broker.api.listeners import Listener, TcpBind
from broker.api.metrics import SilentEdgeTelemetry
from broker.api.middleware import RequestBoundary
from broker.api.operations import Operation, listener_app
from broker.api.protocol import ConnectionLimits, peer_certificates, unix_peer
from broker.api.strict_json import read_body
from tests.support.pki import Authority, Leaf, san

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from broker.api.listeners import Bind
    from broker.api.operations import Endpoint
    from broker.api.tls import ServerTls

LOOPBACK = TcpBind("127.0.0.1", 0)


def routed(endpoints: Mapping[str, Endpoint]) -> ASGIApp:
    """The listeners' own router over endpoints named ``GET /path``."""
    bound = []
    for name, endpoint in endpoints.items():
        method, path = name.split(" ")
        operation = Operation(method=method, path=path, id=name, summary="Of a test", answers={})
        bound.append((operation, endpoint))
    return listener_app(bound)


class RecordingTelemetry(SilentEdgeTelemetry):
    """Remembers what the edge counted, and wakes whoever waits for it."""

    def __init__(self) -> None:
        self.tls: list[str] = []
        self.connections: list[str] = []
        self.refusals: list[str] = []
        self._changed = asyncio.Event()

    def tls_failed(self, reason: str) -> None:
        self.tls.append(reason)
        self._changed.set()

    def connection_refused(self, listener: str) -> None:
        self.connections.append(listener)
        self._changed.set()

    def refused(self, reason_code: str) -> None:
        self.refusals.append(reason_code)
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


class EdgeUnderTest:
    """One listener with an application that says what it was told."""

    def __init__(
        self,
        *,
        bind: Bind = LOOPBACK,
        tls: ServerTls | None = None,
        limits: ConnectionLimits | None = None,
        name: str = "workload",
    ) -> None:
        self.telemetry = RecordingTelemetry()
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self._clients: list[Client] = []
        boundary = RequestBoundary(self._application(), listener=name, telemetry=self.telemetry)
        self.listener = Listener(name, boundary, bind, telemetry=self.telemetry, tls=tls, limits=limits)

    def _application(self) -> ASGIApp:
        async def peer(request: Request) -> Response:
            certificates, unix = peer_certificates(request.scope), unix_peer(request.scope)
            return Response(
                orjson.dumps(
                    {
                        "chain": None
                        if certificates is None
                        else [each.hex() for each in certificates.chain_der],
                        "slot": id(certificates),
                        "unix": None if unix is None else [unix.pid, unix.uid, unix.gid],
                    }
                )
            )

        async def echo(request: Request) -> Response:
            self.reached.set()
            body = await read_body(request.scope, request.receive)
            names = sorted({name.decode() for name, _ in request.scope["headers"]})
            return Response(orjson.dumps({"size": len(body), "headers": names}))

        async def slow(_request: Request) -> Response:
            self.reached.set()
            await self.go.wait()
            return Response(b"done")

        return routed({"GET /peer": peer, "POST /echo": echo, "GET /slow": slow})

    async def __aenter__(self) -> Self:
        await self.listener.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for client in self._clients:
            await client.close()
        await self.listener.stop(0.1)

    async def connect(self, context: ssl.SSLContext | None = None, host: str | None = "localhost") -> Client:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.listener.port,
            ssl=context,
            server_hostname=None if context is None else host or "",
        )
        client = Client(reader, writer)
        self._clients.append(client)
        return client


class Client:
    """A raw connection: sends bytes, reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one whole answer: status, headers, body."""
        async with asyncio.timeout(10):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
            }
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split(" ")[1]), headers, body

    async def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        await self.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        return await self.answer()

    async def rest(self) -> bytes:
        """Read until the server closes; what it cut counts as closed."""
        async with asyncio.timeout(10):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            return


# --- certificates -------------------------------------------------------------------------------


def authority(trust_domain: str = "example.org") -> Authority:
    return Authority.root(trust_domain, now=datetime.now(UTC))


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def server_leaf(signer: Authority) -> Leaf:
    names = san(f"spiffe://{signer.trust_domain}/broker", others=[x509.DNSName("localhost")])
    return signer.leaf(now=datetime.now(UTC), replaced={x509.SubjectAlternativeName: (names, False)})


def client_leaf(signer: Authority) -> Leaf:
    return signer.leaf(now=datetime.now(UTC))


def chain_and_key(leaf: Leaf) -> tuple[bytes, bytes]:
    chain = b"".join(ssl.DER_cert_to_PEM_cert(each).encode("ascii") for each in leaf.chain)
    return chain, leaf.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def client_context(trusted: Authority, leaf: Leaf | None = None, *, named: bool = True) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = named
    context.load_verify_locations(cadata=pem(trusted.certificate).decode("ascii"))
    if leaf is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(chain_and_key(leaf)))
            file.flush()
            context.load_cert_chain(file.name)
    return context
