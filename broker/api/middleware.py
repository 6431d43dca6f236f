"""What surrounds every request of every listener, as one plain ASGI layer.

Trace id in, security headers out, the last catch for exceptions, one access-log line and
one measurement. One layer rather than five, because each costs every request.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import TYPE_CHECKING, Any, Final

import structlog

from broker.api.edge_errors import ClientGone, WrongHost
from broker.api.logs import AccessRecord
from broker.api.problems import Rendered, code_of, render
from broker.api.strict_json import header
from broker.core.errors import BrokerError, Overloaded, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from broker.api.limits import RequestLimiter
    from broker.api.metrics import EdgeTelemetry

_log: Final = structlog.get_logger(__name__)

SERVER_ERROR: Final = 500
CLIENT_GONE_STATUS: Final = 499
"""For log and metrics only: nobody was left to be answered."""

_TRACEPARENT: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NOSNIFF: Final = (b"x-content-type-options", b"nosniff")
_NO_STORE: Final = (b"cache-control", b"no-store")


# --- what routes use ----------------------------------------------------------------------------


def trace_id_of(scope: Scope) -> str:
    """Return the request's trace id: 32 hex characters, named by log, audit and problem alike."""
    trace_id: str = scope["state"]["trace_id"]
    return trace_id


def remember_identity(scope: Scope, identity: str) -> None:
    """Name who is asking in the access log: a SPIFFE ID, or ``operator:uid=0``."""
    scope["state"]["identity"] = identity


# --- errors -------------------------------------------------------------------------------------


def _refuse(scope: Scope, error: BaseException) -> Rendered:
    """Render an error and log it, once; what a 4xx needs said stands in the access line."""
    state = scope["state"]
    trace_id, code = state["trace_id"], code_of(error)
    rendered = render(error, trace_id)
    state["problem"] = code
    if code == BrokerError.code:
        _log.error("request failed", trace_id=trace_id, exc_info=error)
    elif isinstance(error, Unauthenticated):
        _log.info("authentication refused", trace_id=trace_id, rule=error.rule, explanation=error.explanation)
    elif rendered.status >= SERVER_ERROR:
        cause = error.__cause__
        _log.warning(
            "request refused", trace_id=trace_id, problem=code, cause=None if cause is None else repr(cause)
        )
    return rendered


# --- the layer ----------------------------------------------------------------------------------


def _trace_id(scope: Scope) -> str:
    """Return the trace id of a valid W3C traceparent, else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"traceparent":
            match = _TRACEPARENT.fullmatch(value)
            if match:
                return match[1].decode("ascii")
    return os.urandom(16).hex()


class _Answer:
    """Stands between the application and the server's `send`: adds headers, remembers the outcome."""

    __slots__ = ("_send", "_trace_id", "status")

    def __init__(self, send: Send, trace_id: str) -> None:
        self._send = send
        self._trace_id = trace_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            headers.append((b"trace-id", self._trace_id.encode("ascii")))
            headers.append(_NOSNIFF)
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append(_NO_STORE)
            message = {**message, "headers": headers}
        await self._send(message)

    async def send(self, rendered: Rendered) -> None:
        """Send a whole problem."""
        await self({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
        await self({"type": "http.response.body", "body": rendered.body})


class RequestBoundary:
    """The outermost layer of one listener.

    Args:
        app: what answers.
        listener: the listener's name, for log and metrics.
        telemetry: counts answers and refusals.
        access_log: writes one line per request; None writes none.
        limiter: bounds requests at the same time, before anybody knows whose they are.
        allowed_hosts: names the Host header may carry, port left aside; None allows any. For
            loopback listeners of development, against pages that rebind a DNS name to them.

    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        listener: str,
        telemetry: EdgeTelemetry,
        access_log: Callable[[AccessRecord], None] | None = None,
        limiter: RequestLimiter | None = None,
        allowed_hosts: frozenset[str] | None = None,
    ) -> None:
        self._app = app
        self._listener = listener
        self._telemetry = telemetry
        self._access_log = access_log
        self._limiter = limiter
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        state = scope.setdefault("state", {})
        trace_id = state["trace_id"] = _trace_id(scope)
        answer = _Answer(send, trace_id)
        try:
            await self._serve(scope, receive, answer)
        except Exception as error:  # noqa: BLE001  the last catch: whatever it is becomes a problem
            await _recover(scope, answer, error)
        except asyncio.CancelledError:
            # Only the listener cancels this task, when the time for a graceful stop is over.
            # Nobody waits for the task, so the cancellation ends here, with an answer.
            if answer.status is None:
                await answer.send(
                    _refuse(scope, Overloaded("The broker is stopping.", retry_after_seconds=5))
                )
        self._record(scope, state, answer, time.perf_counter() - started)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if self._allowed_hosts is not None:
            _check_host(scope, self._allowed_hosts)
        if self._limiter is None:
            await self._app(scope, receive, answer)
            return
        self._limiter.enter()
        try:
            await self._app(scope, receive, answer)
        finally:
            self._limiter.leave()

    def _record(self, scope: Scope, state: dict[str, Any], answer: _Answer, seconds: float) -> None:
        status = CLIENT_GONE_STATUS if answer.status is None else answer.status
        code = state.get("problem")
        self._telemetry.answered(self._listener, status, seconds)
        if code is not None and code != ClientGone.code:  # who left was not refused
            self._telemetry.refused(code)
        if self._access_log is not None:
            method = scope["method"]
            self._access_log(
                AccessRecord(
                    listener=self._listener,
                    method=method if method in _METHODS else "-",
                    route=getattr(scope.get("route"), "path", "-"),
                    status=status,
                    seconds=seconds,
                    trace_id=state["trace_id"],
                    identity=state.get("identity"),
                    problem=code,
                )
            )


def _check_host(scope: Scope, allowed: frozenset[str]) -> None:
    raw = header(scope, b"host")
    host = "" if raw is None else raw.decode("latin-1").lower()
    name = host if host.endswith("]") else re.sub(r":[0-9]*\Z", "", host)
    if name not in allowed:
        raise WrongHost("The Host header does not name this listener.")


async def _recover(scope: Scope, answer: _Answer, error: Exception) -> None:
    if isinstance(error, ClientGone):
        scope["state"]["problem"] = error.code
    elif answer.status is None:
        await answer.send(_refuse(scope, error))
    else:
        # Where only half an answer is out, returning without the rest makes the server cut the
        # connection, so that the client does not take the half for the whole.
        _log.error("failed after its answer began", trace_id=trace_id_of(scope), exc_info=error)
