"""Serves the SPIFFE Workload API: one gRPC server and one Unix socket per identity.

It runs on a thread and an event loop of its own. The Workload API's client blocks while it
waits for its first answer, and may do so on the very loop (asyncio or uvloop) that started
the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
import structlog
from spiffe._proto import workload_pb2 as pb

from broker.core.errors import Unauthenticated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
    from concurrent.futures import Future
    from pathlib import Path

    from broker.core.spiffe_id import SpiffeId
    from broker.dev.authority import IssuedX509Svid

_T = TypeVar("_T")
_Response = TypeVar("_Response", pb.X509SVIDResponse, pb.X509BundlesResponse, pb.JWTBundlesResponse)

_log: Final = structlog.get_logger(__name__)

_SERVICE: Final = "SpiffeWorkloadAPI"
_SECURITY_HEADER: Final = ("workload.spiffe.io", "true")
_CALLS_MAX: Final = 256
_REQUEST_BYTES_MAX: Final = 64 * 1024
_AUDIENCE_CHARACTERS_MAX: Final = 2048
_STOP_GRACE_SECONDS: Final = 2
_BLOCK_SECONDS_MAX: Final = 30
_OPTIONS: Final = (("grpc.max_receive_message_length", _REQUEST_BYTES_MAX),)


class Issuer(Protocol):
    """What the servers ask for, on the serving thread."""

    @property
    def trust_domain_id(self) -> str:
        """The trust domain's SPIFFE ID: the key in every map of bundles."""
        ...

    def current_x509_svid(self, spiffe_id: SpiffeId) -> IssuedX509Svid:
        """Return the SVID an identity should use now."""
        ...

    def x509_bundle(self) -> bytes:
        """Return the X.509 bundle, DER."""
        ...

    def jwt_bundle(self) -> bytes:
        """Return the JWT bundle, a JWK Set."""
        ...

    def issue_jwt_svid(self, spiffe_id: SpiffeId, audience: str) -> str:
        """Return a fresh token."""
        ...

    def validate_jwt_svid(self, token: str, audience: str) -> tuple[SpiffeId, Mapping[str, object]]:
        """Return identity and claims; raise `Unauthenticated` where a rule is broken."""
        ...

    def rotate_due(self) -> bool:
        """Re-issue what is due; called every few seconds."""
        ...


class _News:
    """Wakes every stream after a change. Belongs to the serving loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.closing = False

    def tell(self) -> None:
        """Wake whoever waits now."""
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Return what the next change sets."""
        return self._event


async def _refuse(context: grpc.aio.ServicerContext, code: grpc.StatusCode, why: str) -> NoReturn:
    await context.abort(code, why)
    raise AssertionError("abort raises")


async def _check_header(context: grpc.aio.ServicerContext) -> None:
    """Refuse a call without the security header, so that a forged web request gets nothing.

    SPIFFE Workload Endpoint, sections 3 and 6: InvalidArgument, which clients do not retry.
    """
    if _SECURITY_HEADER not in [(key, value) for key, value in context.invocation_metadata() or ()]:
        await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")


class _Endpoint:
    """One identity's view. The socket is the attestation: whoever connects here is this identity."""

    def __init__(self, spiffe_id: SpiffeId, issuer: Issuer, news: _News) -> None:
        self._spiffe_id = spiffe_id
        self._issuer = issuer
        self._news = news

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service definition's methods, bound to this identity."""
        handlers = {
            "FetchX509SVID": grpc.unary_stream_rpc_method_handler(
                self._fetch_x509_svid,
                pb.X509SVIDRequest.FromString,
                pb.X509SVIDResponse.SerializeToString,
            ),
            "FetchX509Bundles": grpc.unary_stream_rpc_method_handler(
                self._fetch_x509_bundles,
                pb.X509BundlesRequest.FromString,
                pb.X509BundlesResponse.SerializeToString,
            ),
            "FetchJWTSVID": grpc.unary_unary_rpc_method_handler(
                self._fetch_jwt_svid,
                pb.JWTSVIDRequest.FromString,
                pb.JWTSVIDResponse.SerializeToString,
            ),
            "FetchJWTBundles": grpc.unary_stream_rpc_method_handler(
                self._fetch_jwt_bundles,
                pb.JWTBundlesRequest.FromString,
                pb.JWTBundlesResponse.SerializeToString,
            ),
            "ValidateJWTSVID": grpc.unary_unary_rpc_method_handler(
                self._validate_jwt_svid,
                pb.ValidateJWTSVIDRequest.FromString,
                pb.ValidateJWTSVIDResponse.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(_SERVICE, handlers)

    async def _fetch_x509_svid(
        self, _request: pb.X509SVIDRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.X509SVIDResponse]:
        async for message in self._stream(context, self._x509_svid_response):
            yield message

    async def _fetch_x509_bundles(
        self, _request: pb.X509BundlesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.X509BundlesResponse]:
        async for message in self._stream(context, self._x509_bundles_response):
            yield message

    async def _fetch_jwt_bundles(
        self, _request: pb.JWTBundlesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.JWTBundlesResponse]:
        async for message in self._stream(context, self._jwt_bundles_response):
            yield message

    async def _fetch_jwt_svid(
        self, request: pb.JWTSVIDRequest, context: grpc.aio.ServicerContext
    ) -> pb.JWTSVIDResponse:
        await _check_header(context)
        audiences = list(request.audience)
        if len(audiences) != 1 or not 0 < len(audiences[0]) <= _AUDIENCE_CHARACTERS_MAX:
            # With a token for several audiences each of them could act as the holder at the others (J-7).
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "name exactly one audience")
        if request.spiffe_id not in {"", self._spiffe_id}:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "this socket serves another identity")
        token = self._issuer.issue_jwt_svid(self._spiffe_id, audiences[0])
        return pb.JWTSVIDResponse(svids=[pb.JWTSVID(spiffe_id=self._spiffe_id, svid=token)])

    async def _validate_jwt_svid(
        self, request: pb.ValidateJWTSVIDRequest, context: grpc.aio.ServicerContext
    ) -> pb.ValidateJWTSVIDResponse:
        await _check_header(context)
        if not request.audience or not request.svid:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "audience and svid are required")
        try:
            spiffe_id, claims = self._issuer.validate_jwt_svid(request.svid, request.audience)
        except Unauthenticated as refused:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"not a valid JWT-SVID ({refused.rule})")
        response = pb.ValidateJWTSVIDResponse(spiffe_id=spiffe_id)
        response.claims.update(dict(claims))
        return response

    async def _stream(
        self, context: grpc.aio.ServicerContext, current: Callable[[], _Response]
    ) -> AsyncIterator[_Response]:
        await _check_header(context)
        sent: _Response | None = None
        while not self._news.closing:
            news = self._news.next()  # before reading, so that no change falls between
            message = current()
            if message != sent:
                sent = message
                yield message
            await news.wait()
        # Unavailable, and not the Cancelled of a plain stop: clients reconnect after it.
        await _refuse(context, grpc.StatusCode.UNAVAILABLE, "the development trust domain is closing")

    def _x509_svid_response(self) -> pb.X509SVIDResponse:
        issued = self._issuer.current_x509_svid(self._spiffe_id)
        svid = pb.X509SVID(
            spiffe_id=self._spiffe_id,
            x509_svid=issued.chain_der(),
            x509_svid_key=issued.key_der(),
            bundle=self._issuer.x509_bundle(),
        )
        return pb.X509SVIDResponse(svids=[svid])

    def _x509_bundles_response(self) -> pb.X509BundlesResponse:
        return pb.X509BundlesResponse(bundles={self._issuer.trust_domain_id: self._issuer.x509_bundle()})

    def _jwt_bundles_response(self) -> pb.JWTBundlesResponse:
        return pb.JWTBundlesResponse(bundles={self._issuer.trust_domain_id: self._issuer.jwt_bundle()})


class WorkloadApiServers:
    """Every socket of one trust domain, served by one thread. All methods block for milliseconds."""

    def __init__(self, issuer: Issuer, *, tick_seconds: float) -> None:
        self._issuer = issuer
        self._tick_seconds = tick_seconds
        self._servers: dict[SpiffeId, grpc.aio.Server] = {}
        # Not the policy's loop, which may be uvloop's: gRPC is tried with this one.
        self._loop = asyncio.SelectorEventLoop()
        self._news = _News()
        self._ticker: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="workload-api", daemon=True)
        self._thread.start()
        self._call(self._begin())

    def open(self, spiffe_id: SpiffeId, socket: Path) -> None:
        """Serve one identity on its socket, in a directory that is already private."""
        self._call(self._open(spiffe_id, socket))
        socket.chmod(0o600)

    def announce(self) -> None:
        """Wake every stream; from any thread."""
        self._loop.call_soon_threadsafe(self._news.tell)

    def close(self) -> None:
        """End every stream and server, then the thread."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_BLOCK_SECONDS_MAX)
        self._loop.close()

    def _call(self, work: Coroutine[None, None, _T]) -> _T:
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(_BLOCK_SECONDS_MAX)

    async def _begin(self) -> None:
        self._ticker = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while not self._news.closing:
            await asyncio.sleep(self._tick_seconds)
            try:
                self._issuer.rotate_due()
            except OSError:
                # The keys could not be written: what is served stays valid, and the next tick tries again.
                _log.exception("development_trust_domain_rotation_failed")

    async def _open(self, spiffe_id: SpiffeId, socket: Path) -> None:
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_CALLS_MAX)
        server.add_generic_rpc_handlers((_Endpoint(spiffe_id, self._issuer, self._news).handler(),))
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        self._servers[spiffe_id] = server

    async def _end(self) -> None:
        self._news.closing = True
        self._news.tell()
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        await asyncio.gather(*(server.stop(_STOP_GRACE_SECONDS) for server in self._servers.values()))
        self._servers.clear()
