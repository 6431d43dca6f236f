"""A whole broker behind its three listeners, spoken to without sockets."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import httpx
import orjson

from broker.api import operator, ops, workload
from broker.api.limits import LimitSettings, RequestLimiter
from broker.api.logs import AccessLog
from broker.api.metrics import PrometheusTelemetry
from broker.api.middleware import RequestBoundary
from broker.api.protocol import PEER_CERTIFICATES, UNIX_PEER, UnixPeer
from broker.api.readiness import Readiness
from broker.authn.authenticator import Authenticator, PeerCertificates
from broker.authn.bundles import BundleStore
from broker.core.spiffe_id import SpiffeId
from tests.support.pki import Authority, JwtAuthority
from tests.support.world import CHURN, World, opened

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

AUDIENCE = "nhi-broker"
TRUST_DOMAIN = "dev.nhi.internal"
PARTNER_DOMAIN = "partner.example"
PARTNER = SpiffeId(f"spiffe://{PARTNER_DOMAIN}/agent/churn-report")
"""Of a trust domain that we know, with a path that ours have too."""

ROOT = UnixPeer(pid=1, uid=0, gid=0)
OPERATIONS = {"workload": workload.OPERATIONS, "operator": operator.OPERATIONS, "ops": ops.OPERATIONS}


class _WithState:
    """Puts into the request's state what a real connection would have put there."""

    def __init__(self, app: ASGIApp, state: Mapping[str, Any]) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = dict(self._state)
        await self._app(scope, receive, send)


@dataclass
class Issuer:
    """One trust domain's keys."""

    x509: Authority
    jwt: JwtAuthority

    @classmethod
    def of(cls, trust_domain: str, now_ms: int, kid: str) -> Self:
        now = datetime.fromtimestamp(now_ms // 1000, UTC)
        return cls(Authority.root(trust_domain, now=now), JwtAuthority.new(kid))


class Api:
    """The three applications, each inside its boundary, and the SVIDs to call them with."""

    def __init__(self, world: World, limits: LimitSettings | None = None) -> None:
        self.world = world
        now_ms = world.clock.now_ms()
        self.home = Issuer.of(TRUST_DOMAIN, now_ms, "home")
        self.partner = Issuer.of(PARTNER_DOMAIN, now_ms, "partner")
        self.stranger = Issuer.of("stranger.example", now_ms, "stranger")
        self.bundles = BundleStore()
        self.bundles.replace(TRUST_DOMAIN, self.home.x509.bundle(self.home.jwt.public))
        self.bundles.replace(PARTNER_DOMAIN, self.partner.x509.bundle(self.partner.jwt.public))
        self.readiness = Readiness()
        self.telemetry = PrometheusTelemetry(["orders-postgres", "tokens"], list(OPERATIONS))
        self.access_lines = io.StringIO()
        limiter = RequestLimiter(limits or LimitSettings(requests_per_second=1e6, burst=1_000_000))
        authenticator = Authenticator(self.bundles, world.clock, AUDIENCE)
        self.apps: dict[str, ASGIApp] = {
            "workload": workload.workload_app(world.services, authenticator, limiter),
            "operator": operator.operator_app(world.services, self.readiness),
            "ops": ops.ops_app(self.readiness, self.telemetry),
        }
        self.boundaries = {
            name: RequestBoundary(
                app,
                listener=name,
                telemetry=self.telemetry,
                access_log=AccessLog(self.access_lines, as_text=False),
                limiter=limiter if name == "workload" else None,
            )
            for name, app in self.apps.items()
        }

    def token(self, who: str = CHURN, *, issuer: Issuer | None = None, **changes: Any) -> str:
        """A correct JWT-SVID of five minutes, unless `changes` say otherwise."""
        changes.setdefault("aud", AUDIENCE)
        signer = issuer or (self.partner if who.startswith(f"spiffe://{PARTNER_DOMAIN}/") else self.home)
        return signer.jwt.token(who, now_ms=self.world.clock.now_ms(), **changes)

    def client(
        self, who: str | None = CHURN, *, token: str | None = None, chain: tuple[bytes, ...] = ()
    ) -> httpx.AsyncClient:
        """A client of the workload listener; `who` None carries no SVID unless `token` or `chain` does."""
        bearer = self.token(who) if token is None and who is not None else token
        headers = {} if bearer is None else {"authorization": f"Bearer {bearer}"}
        return self._client("workload", {PEER_CERTIFICATES: PeerCertificates(chain)}, headers)

    def operator(self, peer: UnixPeer | None = ROOT) -> httpx.AsyncClient:
        return self._client("operator", {} if peer is None else {UNIX_PEER: peer}, {})

    def ops(self) -> httpx.AsyncClient:
        return self._client("ops", {}, {})

    def asgi(self, listener: str, state: Mapping[str, Any]) -> ASGIApp:
        return _WithState(self.boundaries[listener], state)

    def _client(
        self, listener: str, state: Mapping[str, Any], headers: Mapping[str, str]
    ) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.asgi(listener, state))
        return httpx.AsyncClient(transport=transport, base_url="https://broker.test", headers=headers)

    def audited(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind in the audit log, oldest first."""
        rows = self.world.store.reader.execute("SELECT body FROM audit WHERE kind = ? ORDER BY seq", (kind,))
        return [orjson.loads(body)["event"] for (body,) in rows]


@asynccontextmanager
async def api_opened(
    directory: Path | os.PathLike[str], *, limits: LimitSettings | None = None, **how: Any
) -> AsyncIterator[Api]:
    async with opened(directory, **how) as world:  # type: ignore[arg-type]  # a path
        yield Api(world, limits)


def credential_body(task: object, resource: str = "reports-api", action: str = "write") -> dict[str, Any]:
    return {
        "task": task,
        "resource": resource,
        "action": action,
        "intent": {"tool": "reports.publish", "reason": "weekly report"},
    }
