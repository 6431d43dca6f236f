"""What every request of a caller passes before its route sees it: who is it, and may it ask at all?

Authentication, then the caller's own limits, then the inventory. In this order: only a
proven identity has limits of its own, and only one within them costs a look into the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.api.middleware import remember_identity, trace_id_of
from broker.api.protocol import peer_certificates, unix_peer
from broker.api.request_headers import authorization
from broker.authn.authenticator import bearer_token
from broker.core.errors import IdentityRefused, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Scope

    from broker.api.limits import RequestLimiter
    from broker.api.operations import Endpoint
    from broker.authn.authenticator import Authenticator
    from broker.core.caller import Caller
    from broker.core.facts import IdentityFacts
    from broker.service.admit import Admission
    from broker.service.refusals import AuthenticationRefusals

    CallerRoute: TypeAlias = Callable[[Request, "Admitted"], Awaitable[Response]]
    OperatorRoute: TypeAlias = Callable[[Request, str], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A caller that may ask, and what the inventory knows of it."""

    caller: Caller
    facts: IdentityFacts


class Gate:
    """Puts authentication, limits and admission before a route."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: RequestLimiter,
        admission: Admission,
        refusals: AuthenticationRefusals,
    ) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._admission = admission
        self._refusals = refusals

    def guard(self, route: CallerRoute) -> Endpoint:
        """Return `route` for admitted callers only.

        The endpoint raises `Unauthenticated` (audited), `RateLimited` and `IdentityRefused`.
        """

        async def endpoint(request: Request) -> Response:
            caller = await self._authenticate(request.scope)
            with self._limiter.identity(caller.spiffe_id):
                facts = await self._admission.admit(caller)
                return await route(request, Admitted(caller, facts))

        return endpoint

    async def _authenticate(self, scope: Scope) -> Caller:
        try:
            caller = self._authenticator.authenticate(
                bearer=bearer_token(authorization(scope)), peer=peer_certificates(scope)
            )
        except Unauthenticated as refusal:
            await self._refusals.record(
                refusal, peer=_address_of(scope), path=scope["route"].path, trace_id=trace_id_of(scope)
            )
            raise
        remember_identity(scope, caller.spiffe_id)
        return caller


def _address_of(scope: Scope) -> str:
    """Return the peer's address without its port, for the audit."""
    client = scope.get("client")
    return "unknown" if client is None else str(client[0])


class OperatorGate:
    """Names the operator at the other end of the Unix socket; nobody else gets through.

    The socket's mode keeps others out already. This holds where somebody widened it: a user
    who is neither root nor the broker's own has no business here.
    """

    def __init__(self, *, own_uid: int) -> None:
        self._allowed: Final = frozenset({0, own_uid})

    def guard(self, route: OperatorRoute) -> Endpoint:
        """Return `route` for operators only; it is given the actor that the audit will name."""

        async def endpoint(request: Request) -> Response:
            actor = self._actor(request.scope)
            remember_identity(request.scope, actor)
            return await route(request, actor)

        return endpoint

    def _actor(self, scope: Scope) -> str:
        peer = unix_peer(scope)
        if peer is None or peer.uid not in self._allowed:
            raise IdentityRefused(
                "Only root and the broker's own user operate it, over its Unix socket. "
                "Run the command as one of them, on the broker's host."
            )
        return f"operator:uid={peer.uid}"
