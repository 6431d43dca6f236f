"""One operation per route and method: what the router, the OpenAPI document and the denial tests share.

Starlette's router carries the routes. FastAPI above it would double what an endpoint costs, and
gives nothing that the strict readers of bodies do not do better (docs/adr/0012).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Router

from broker.api import edge_errors as edge
from broker.core import errors as core

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from pydantic import BaseModel
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
    Errors: TypeAlias = tuple[type[core.BrokerError], ...]

JSON: Final = "application/json"
FORM: Final = "application/x-www-form-urlencoded"

ANYWHERE: Final[Errors] = (
    edge.MalformedHttp,
    edge.BodyTooSlow,
    edge.WrongHost,
    edge.HeadTooLarge,
    core.BrokerError,
    core.Overloaded,
)
"""What any request may be answered."""

WITH_BODY: Final[Errors] = (
    edge.UnsupportedMediaType,
    edge.BodyTooLarge,
    edge.InvalidInput,
)

AS_CALLER: Final[Errors] = (
    core.Unauthenticated,
    core.IdentityRefused,
    core.RateLimited,
    core.LedgerUnavailable,
)
"""What a caller who has to prove who it is may be answered before its request is looked at."""

AS_OPERATOR: Final[Errors] = (core.IdentityRefused, core.LedgerUnavailable)


@dataclass(frozen=True, slots=True)
class Answer:
    """One documented answer that is not a problem.

    Attributes:
        description: what it means.
        model: the shape of its body; None where the body is no JSON.
        media_type: its Content-Type.
        max_age_seconds: how long it may be cached; None for ``no-store``.

    """

    description: str
    model: type[BaseModel] | None = None
    media_type: str = JSON
    max_age_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """One request header that a route acts on."""

    name: str
    description: str
    pattern: str


IDEMPOTENCY_KEY: Final = Header(
    "Idempotency-Key",
    "Makes a repeated request safe for 24 hours: the same key and body act once.",
    r"^[A-Za-z0-9._:~+/=-]{1,128}$",
)
PREFER: Final = Header(
    "Prefer",
    "`wait=N`: hold the answer back for proof, at most N seconds and never more than 30 (RFC 7240).",
    r"^wait=[0-9]{1,2}$",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        id: OpenAPI's operationId; unique over all listeners.
        answers: documented answers that are no problems, by status.
        refusals: errors it may end in, besides those that its other attributes imply.
        body: shape of the request's body; None where it takes none.
        body_optional: whether an empty body will do.
        form: whether the body is a form instead of JSON.
        query: shape of the query; None where it takes none.
        headers: request headers it acts on.
        security: how a caller proves itself: ``svid``, ``operator``, or nothing.

    """

    method: str
    path: str
    id: str
    summary: str
    answers: Mapping[int, Answer]
    refusals: Errors = ()
    body: type[BaseModel] | None = None
    body_optional: bool = False
    form: bool = False
    query: type[BaseModel] | None = None
    headers: tuple[Header, ...] = ()
    security: str | None = None
    path_patterns: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the path's parameters."""
        return tuple(_PARAMETER.findall(self.path))

    @property
    def errors(self) -> Errors:
        """Every error it is documented to end in."""
        found = [*ANYWHERE, *self.refusals]
        if self.security is not None:
            found += AS_CALLER if self.security == "svid" else AS_OPERATOR
        if self.body is not None:
            found += WITH_BODY
            if not self.form:
                found.append(edge.MalformedJson)
        if self.query is not None or self.headers:
            found.append(edge.InvalidInput)
        return tuple(dict.fromkeys(found))


_PARAMETER: Final = re.compile(r"\{(\w+)\}")


class PathRoute(BaseRoute):
    """One path with every method it answers.

    A wrong method ends here with 405: it does not go on to a pattern that happens to fit too.
    """

    def __init__(self, path: str, endpoints: Mapping[str, Endpoint]) -> None:
        self.path = path
        self._endpoints = dict(endpoints)
        self.methods = frozenset(endpoints)
        self._allow = ", ".join(sorted(endpoints))
        self._exact = path if "{" not in path else None
        # Not Starlette's own pattern: its `$` would let a trailing line break through.
        self._pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Say whether the path is this one, whatever the method."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path: str = scope["path"]
        if self._exact is not None:
            return (Match.FULL, _NO_PARAMETERS) if path == self._exact else (Match.NONE, {})
        found = self._pattern.fullmatch(path)
        return (Match.NONE, {}) if found is None else (Match.FULL, {"path_params": found.groupdict()})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; errors are left to `broker.api.middleware.RequestBoundary`."""
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is None:
            raise edge.MethodNotAllowed(self._allow)
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


_NO_PARAMETERS: Final[dict[str, object]] = {"path_params": {}}


def listener_app(bound: Iterable[tuple[Operation, Endpoint]]) -> ASGIApp:
    """Return the application of one listener: these operations, and 404 for every other path.

    The paths are tried in the order given: put the hot one first, and exact ones before patterns.
    """
    by_path: dict[str, dict[str, Endpoint]] = {}
    for operation, endpoint in bound:
        by_path.setdefault(operation.path, {})[operation.method] = endpoint
    routes = [PathRoute(path, endpoints) for path, endpoints in by_path.items()]
    return Router(routes, redirect_slashes=False, default=_no_such_path)


async def _no_such_path(_scope: Scope, _receive: Receive, _send: Send) -> NoReturn:
    raise edge.NoSuchPath("This listener has no such path.")
