"""One HTTP/1.1 connection: uvicorn's httptools protocol, with bounds and with the peer's identity.

What uvicorn leaves open and this closes: the size of a request's head, the time a
request may take to arrive (also on a connection that never sent one), refusals in the
shape of every other problem, and a cap on connections that answers instead of hanging.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from broker.api.edge_errors import BodyTooSlow, EdgeError, HeadTooLarge, MalformedHttp
from broker.api.problems import Rendered, render
from broker.api.tls import peer_chain_der
from broker.authn.authenticator import PeerCertificates
from broker.core.errors import BrokerError, Overloaded

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    from broker.api.metrics import EdgeTelemetry

_OVERHEAD_PER_HEADER: Final = 4  # `: ` and the line's end
HEADERS_MAX: Final = 100

PEER_CERTIFICATES: Final = "peer_certificates"
UNIX_PEER: Final = "unix_peer"
"""Names in the request's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of one listener's connections.

    Attributes:
        connections: served at the same time; those above it are told 503.
        handshakes: TLS handshakes at the same time; one more ends the oldest.
        handshake_seconds: how long a TLS handshake may take.
        head_bytes: request line and headers.
        request_seconds: from a connection's start, or a request's first byte, to the request's last.
        keep_alive_seconds: how long a connection may rest between requests.
        backlog: connections the kernel keeps for us.

    """

    connections: int = 1_000
    handshakes: int = 128
    handshake_seconds: float = 10.0
    head_bytes: int = 16_384
    request_seconds: float = 15.0
    keep_alive_seconds: float = 75.0
    backlog: int = 1_024


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """Who is at the other end of a Unix socket, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_certificates(scope: Scope) -> PeerCertificates | None:
    """Return what the connection presented; None on a listener without TLS."""
    peer: PeerCertificates | None = scope["state"].get(PEER_CERTIFICATES)
    return peer


def unix_peer(scope: Scope) -> UnixPeer | None:
    """Return the peer of a Unix socket; None on any other listener."""
    peer: UnixPeer | None = scope["state"].get(UNIX_PEER)
    return peer


AppState: TypeAlias = dict[str, Any]


class _HeadWithBody:
    """A connection's transport as one request's answer writes to it: head and body in one piece.

    uvicorn writes them apart, which costs a TLS record and a system call more per answer.
    """

    __slots__ = ("_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Keep the head until the body follows it, or the loop has its turn."""
        if self._head is None:
            self._head = data
            self._loop.call_soon(self._flush)
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Write what is kept, and close."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closing."""
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class BrokerHttpProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        config: uvicorn's, loaded.
        server_state: the listener's connections and tasks.
        listener: the listener's name.
        limits: its bounds.
        telemetry: counts connections that were refused.
        on_lost: called when the connection has ended.
        unix_peer: who is at the other end of a Unix socket.

    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        listener: str,
        limits: ConnectionLimits,
        telemetry: EdgeTelemetry,
        on_lost: Callable[[], None],
        unix_peer: UnixPeer | None = None,
    ) -> None:
        app_state: AppState = {} if unix_peer is None else {UNIX_PEER: unix_peer}
        super().__init__(config, server_state, app_state)
        self._listener = listener
        self._limits = limits
        self._telemetry = telemetry
        self._on_lost = on_lost
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: EdgeError | None = None
        self._in_head = False
        self._whole = True
        self._head_bytes = 0
        self._spent = 0

    @property
    def is_connected(self) -> bool:
        """Whether the connection, its TLS handshake included, came about."""
        return self.transport is not None

    # --- the connection ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        """Take over a connection whose TLS handshake, if any, is complete."""
        super().connection_made(transport)
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None:
            # One object for the connection: requests share it, and what was verified with it.
            self.app_state[PEER_CERTIFICATES] = PeerCertificates(peer_chain_der(ssl_object))
        if len(self.connections) > self._limits.connections:
            self._telemetry.connection_refused(self._listener)
            self.app = _too_many_connections
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._disarm()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._on_lost()

    # --- time ----------------------------------------------------------------------------------

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._limits.request_seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._whole and not self._head_bytes:
            self.transport.close()  # nothing was asked, so nothing is answered
        else:
            self._refuse(BodyTooSlow("The request did not arrive whole in time."))

    # --- bytes ---------------------------------------------------------------------------------

    @property
    def _serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Feed the parser; whatever is not a whole request afterwards is on the clock."""
        if self.transport.is_closing():
            return
        if self._in_head or self._whole:
            # The parser keeps an unfinished header to itself: without this it could grow for ever.
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or (self._whole and self._serving):
            return
        if (self._in_head or self._whole) and self._head_bytes > self._limits.head_bytes:
            self._refuse(self._head_too_large())
        else:
            self._arm()

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self._in_head, self._whole = True, False
        self._spent = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._spend(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._spend(len(name) + len(value) + _OVERHEAD_PER_HEADER)
        if not self._in_head:
            return  # a trailer: it would join the headers that the application already acts on
        if len(self.headers) >= HEADERS_MAX:
            self._refusal = self._head_too_large()
            raise self._refusal
        super().on_header(name, value)

    def _spend(self, size: int) -> None:
        self._spent += size
        if self._spent > self._limits.head_bytes:
            self._refusal = self._head_too_large()
            raise self._refusal

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"Request line and headers may have {self._limits.head_bytes} bytes and {HEADERS_MAX} headers."
        )

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = _HeadWithBody(self.transport, self.loop)  # type: ignore[assignment]  # what a cycle uses of it
        self._in_head, self._head_bytes = False, 0

    def on_message_complete(self) -> None:
        """Stop the clock."""
        self._whole = True
        self._disarm()
        super().on_message_complete()

    # --- refusals ------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that the parser refused; `msg` is uvicorn's and not used."""
        del msg
        self._refuse(self._refusal or MalformedHttp("The bytes sent are not a well-formed HTTP/1.1 request."))

    def _refuse(self, error: EdgeError) -> None:
        """Answer outside the application, and close.

        Where an answer is under way or owed to an earlier request, this one would be taken for
        it: then the connection is cut, and the application learns of it when it reads.
        """
        self._disarm()
        if self.transport.is_closing():
            return
        in_body = not self._in_head and not self._whole
        owed = self.cycle.response_started if in_body else self._serving
        if owed or self.pipeline:
            self.transport.abort()
            return
        rendered = _closing_problem(error)
        head = [STATUS_LINE[rendered.status]]
        for name, value in (*self.server_state.default_headers, *rendered.headers):
            head += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*head, b"\r\n", rendered.body]))
        self._telemetry.refused(error.code)
        if self._serving:  # the application hears that its client is gone, and is counted there
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            self._telemetry.answered(self._listener, rendered.status, 0.0)
        self.transport.close()


def _closing_problem(error: BrokerError) -> Rendered:
    """Return a problem whose connection ends with it, for requests that reach no application."""
    trace_id = os.urandom(16).hex()
    rendered = render(error, trace_id)
    closing = [(b"trace-id", trace_id.encode("ascii")), (b"connection", b"close")]
    return replace(rendered, headers=[*rendered.headers, *closing])


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive
    rendered = _closing_problem(
        Overloaded("The broker holds as many connections as it may.", retry_after_seconds=1)
    )
    await send({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
    await send({"type": "http.response.body", "body": rendered.body})
