"""Listening sockets: several in one process and loop, each with its own application and bounds.

uvicorn parses and writes HTTP; accepting is done here, because its server cannot count or
bound TLS handshakes, cannot say whose Unix connection it is under every loop, and wants
the process's signals for itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import structlog
from uvicorn.config import Config
from uvicorn.server import ServerState

from broker.api.protocol import BrokerHttpProtocol, ConnectionLimits, UnixPeer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from starlette.types import ASGIApp

    from broker.api.metrics import EdgeTelemetry
    from broker.api.tls import ServerTls

_log: Final = structlog.get_logger(__name__)

ACCEPT_RETRY_SECONDS: Final = 0.5
STOP_SECONDS_DEFAULT: Final = 20.0
UNIX_PATH_BYTES_MAX: Final = 107
_CANCEL_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 1.0
_DATE_SECONDS: Final = 1.0
_OVERFLOW: Final = 2
_TLS_SHUTDOWN_SECONDS: Final = 2.0
_PEER_CREDENTIALS: Final = struct.Struct("3i")


class ListenerError(RuntimeError):
    """A listener cannot start; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class TcpBind:
    """An address.

    Attributes:
        port: 0 lets the kernel choose, see `Listener.port`.
        shared: lets other processes of our user bind the same port (SO_REUSEPORT). The kernel
            then spreads connections over them, where a listening socket that workers inherit
            lets the first to wake take them all. Off unless there are several processes by
            design: otherwise a second broker would silently take half the requests.

    """

    host: str
    port: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class UnixBind:
    """A path whose directory only we may write to; the socket is for our own user alone."""

    path: Path


Bind: TypeAlias = TcpBind | UnixBind


# --- sockets ------------------------------------------------------------------------------------


def _bind_tcp(name: str, bind: TcpBind) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenerError(
            f"the {name} listener's address {bind.host} is unusable: {error.strerror}"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bind.shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ListenerError(
            f"the {name} listener cannot bind {bind.host}:{bind.port}: {error.strerror}; "
            "choose another port or stop what uses it"
        ) from error
    return listening


def _bind_unix(name: str, bind: UnixBind) -> socket.socket:
    path = bind.path
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise ListenerError(
            f"the {name} listener's path is longer than {UNIX_PATH_BYTES_MAX} bytes: choose a shorter one"
        )
    _check_directory(name, path.parent)
    _remove_stale(name, path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # in time: nobody can connect before `listen`
    except OSError as error:
        listening.close()
        raise ListenerError(f"the {name} listener cannot bind {path}: {error.strerror}") from error
    return listening


def _check_directory(name: str, directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ListenerError(
            f"the {name} listener's directory {directory} is unusable: {error.strerror}"
        ) from error
    if status.st_uid not in {os.getuid(), 0} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ListenerError(
            f"the {name} listener's directory {directory} can be written by others, who could put their "
            "own socket in its place: make it ours alone (mode 0700)"
        )


def _remove_stale(name: str, path: Path) -> None:
    """Remove the socket of a process that is gone; refuse to take the place of a living one."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenerError(
            f"the {name} listener's path {path} exists and is no socket: remove it or choose another"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ListenerError(f"the {name} listener's path {path} is unusable: {error.strerror}") from error
    raise ListenerError(f"another process listens at {path}: stop it, or choose another path for {name}")


def _unix_peer(connection: socket.socket) -> UnixPeer | None:
    if connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, gid = _PEER_CREDENTIALS.unpack(raw)
    return UnixPeer(pid, uid, gid)


def _failure_reason(error: BaseException) -> str:
    """Return why a handshake failed, in a word of `broker.api.metrics.TLS_REASONS`."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "other").lower()
    # The loops abort a handshake that takes too long with this very class.
    return "timeout" if isinstance(error, ConnectionAbortedError | TimeoutError) else "closed"


# --- one listener -------------------------------------------------------------------------------


class Listener:
    """One listening socket and its connections.

    Args:
        name: for log, metrics and errors: ``workload``, ``operator``, ``ops``.
        app: what answers, usually a `broker.api.middleware.RequestBoundary`.
        bind: where to listen.
        telemetry: counts handshakes and connections that failed.
        tls: the TLS of a TCP listener, None for plain HTTP.
        limits: bounds on connections.

    """

    def __init__(
        self,
        name: str,
        app: ASGIApp,
        bind: Bind,
        *,
        telemetry: EdgeTelemetry,
        tls: ServerTls | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self.name = name
        self.started = asyncio.Event()
        self._bind = bind
        self._telemetry = telemetry
        self._tls = tls
        self._limits = limits or ConnectionLimits()
        self._config = Config(
            app,
            http=BrokerHttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=self._limits.keep_alive_seconds,  # type: ignore[arg-type]  # goes to call_later
        )
        self._state = ServerState()
        self._socket: socket.socket | None = None
        self._inode: int | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._date: asyncio.TimerHandle | None = None
        self._opening: dict[asyncio.Task[None], socket.socket] = {}
        self._empty = asyncio.Event()

    @property
    def port(self) -> int:
        """The TCP port in use, the kernel's choice included."""
        if self._socket is None or not isinstance(self._bind, TcpBind):
            raise ListenerError(f"the {self.name} listener has no port: it is not started, or not TCP")
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        """Established connections."""
        return len(self._state.connections)

    @property
    def handshakes(self) -> int:
        """Connections whose TLS handshake is under way."""
        return len(self._opening)

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            ListenerError: the socket cannot be had.

        """
        if not self._config.loaded:
            self._config.load()
        if isinstance(self._bind, TcpBind):
            listening = _bind_tcp(self.name, self._bind)
        else:
            listening = _bind_unix(self.name, self._bind)
            self._inode = self._bind.path.lstat().st_ino
        listening.setblocking(False)
        listening.listen(self._limits.backlog)
        self._socket = listening
        self._tick()
        self._accepting = asyncio.create_task(self._accept(listening), name=f"accept {self.name}")
        self.started.set()

    async def stop(self, grace_seconds: float = STOP_SECONDS_DEFAULT) -> None:
        """Accept no more, let requests in flight finish, then cut what is left. Idempotent.

        A request still running after `grace_seconds` is cancelled; `RequestBoundary` answers it 503.
        """
        await self._stop_accepting()
        for connection in list(self._state.connections):
            connection.shutdown()
        await _all_done(self._state.tasks, grace_seconds)
        for task in list(self._state.tasks):
            task.cancel()
        await _all_done(self._state.tasks, _CANCEL_SECONDS)
        await self._close_connections()
        if self._date is not None:
            self._date.cancel()
            self._date = None
        self.started.clear()

    async def _close_connections(self) -> None:
        """Close what is left, and cut who does not answer the close."""
        for end in ("close", "abort"):
            if not self._state.connections:
                return
            self._empty.clear()
            for connection in list(self._state.connections):
                getattr(connection.transport, end)()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), _CLOSE_SECONDS)

    def _lost(self) -> None:
        if not self._state.connections:
            self._empty.set()

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            with suppress(asyncio.CancelledError):
                await self._accepting
            self._accepting = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._unlink()
        for task, connection in list(self._opening.items()):
            _hang_up(connection)
            task.cancel()
        await _all_done(set(self._opening), _CANCEL_SECONDS)

    def _unlink(self) -> None:
        """Remove our socket's name, unless somebody else's took its place."""
        if isinstance(self._bind, UnixBind):
            with suppress(FileNotFoundError):
                if self._bind.path.lstat().st_ino == self._inode:
                    self._bind.path.unlink()

    def _tick(self) -> None:
        """Keep the Date header (RFC 9110 section 6.6.1) to the second without formatting it per answer."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode("ascii"))]
        self._date = asyncio.get_running_loop().call_later(_DATE_SECONDS, self._tick)

    # --- accepting -----------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:  # ends when it is cancelled
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                # Out of descriptors or memory: what is open goes on, and newcomers wait in the backlog.
                _log.error("cannot accept", listener=self.name, error=error.strerror)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            if len(self._state.connections) >= _OVERFLOW * self._limits.connections:
                # So many that even telling them would cost: the first overflow is answered 503.
                self._telemetry.connection_refused(self.name)
                connection.close()
                continue
            self._make_room()
            task = loop.create_task(self._open(connection))
            self._opening[task] = connection
            task.add_done_callback(self._opening.pop)

    def _make_room(self) -> None:
        """End the oldest handshake where too many are under way: half-open ones starve nobody."""
        if len(self._opening) >= self._limits.handshakes:
            _hang_up(next(iter(self._opening.values())))

    async def _open(self, connection: socket.socket) -> None:
        """Shake hands and give the connection to its protocol, which lives on by itself."""
        try:
            peer = _unix_peer(connection)
        except OSError:
            connection.close()
            return
        protocol = BrokerHttpProtocol(
            self._config,
            self._state,
            listener=self.name,
            limits=self._limits,
            telemetry=self._telemetry,
            unix_peer=peer,
            on_lost=self._lost,
        )
        loop = asyncio.get_running_loop()
        if self._tls is None:
            with suppress(OSError):  # gone before it was ours
                await loop.connect_accepted_socket(lambda: protocol, connection)
            return
        try:
            await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._limits.handshake_seconds,
                ssl_shutdown_timeout=_TLS_SHUTDOWN_SECONDS,
            )
        except OSError as error:  # the transport closes the socket: it is not ours any more
            self._telemetry.tls_failed(_failure_reason(error))
        else:
            if not protocol.is_connected:  # a peer that hangs up midway ends the wait without an error
                self._telemetry.tls_failed("closed")


def _hang_up(connection: socket.socket) -> None:
    """End a connection whose transport is not ours to close yet: its loop sees the end of the stream."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


async def _all_done(tasks: set[asyncio.Task[None]], seconds: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


# --- several of them ----------------------------------------------------------------------------


class Listeners:
    """Several listeners, started in order and stopped together; an async context manager."""

    def __init__(self, listeners: Sequence[Listener], *, grace_seconds: float = STOP_SECONDS_DEFAULT) -> None:
        self._listeners = tuple(listeners)
        self._grace_seconds = grace_seconds

    async def start(self) -> None:
        """Start all, or none.

        Raises:
            ListenerError: one cannot start; those before it are stopped again.

        """
        try:
            for listener in self._listeners:
                await listener.start()
        except ListenerError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop all at once, within the grace period."""
        await asyncio.gather(*(listener.stop(self._grace_seconds) for listener in self._listeners))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()
