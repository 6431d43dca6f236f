"""The demo's internal tool: a small resource server that trusts a token only while the broker does."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, Self

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from broker.api.listeners import Listener, TcpBind
from broker.api.metrics import SilentEdgeTelemetry
from broker.api.tls import ServerTls
from nhi_sdk import WorkloadApiSource

if TYPE_CHECKING:
    from starlette.requests import Request

    from broker.dev.environment import DevEnvironment

REPORTS_API: Final = "spiffe://dev.nhi.internal/tool/reports-api"
SCOPE: Final = "reports:write"


class ReportsApi:
    """Serves `POST /reports` over TLS with its own SVID, and asks the broker about each token."""

    def __init__(self, environment: DevEnvironment) -> None:
        self._environment = environment
        self._titles: list[str] = []
        self._svids: WorkloadApiSource
        self._broker: httpx.AsyncClient
        self._listener: Listener

    @property
    def url(self) -> str:
        """Where the tool is reached."""
        return f"https://localhost:{self._listener.port}"

    async def __aenter__(self) -> Self:
        domain = self._environment.trust_domain
        domain.register(REPORTS_API, dns_names=["localhost"], ip_addresses=["127.0.0.1"])
        self._svids = WorkloadApiSource(f"unix://{domain.socket_for(REPORTS_API)}")
        own = await asyncio.to_thread(self._svids.client_certificate)
        authorities = await asyncio.to_thread(self._svids.authorities)
        self._broker = httpx.AsyncClient(
            base_url=self._environment.broker_url, verify=ssl.create_default_context(cadata=authorities)
        )
        self._listener = Listener(
            "reports-api",
            Starlette(routes=[Route("/reports", self._publish, methods=["POST"])]),
            TcpBind("127.0.0.1", 0),
            telemetry=SilentEdgeTelemetry(),
            tls=ServerTls(own.chain.encode(), own.key.encode(), [authorities.encode()]),
        )
        await self._listener.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._listener.stop()
        await self._broker.aclose()
        self._svids.close()

    async def _publish(self, request: Request) -> JSONResponse:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        claims = await self._introspect(token) if scheme.lower() == "bearer" else {"active": False}
        if claims.get("active") is not True or claims.get("aud") != REPORTS_API:
            return JSONResponse({"error": "invalid_token"}, status_code=401)
        if SCOPE not in str(claims.get("scope")).split():
            return JSONResponse({"error": "insufficient_scope"}, status_code=403)
        self._titles.append(str((await request.json())["title"]))
        return JSONResponse({"stored": self._titles[-1], "by": claims["sub"]}, status_code=201)

    async def _introspect(self, token: str) -> dict[str, object]:
        """Ask the broker, as ourselves: the signature alone would not show a revocation."""
        audience = self._environment.settings.identity.audience
        svid = await asyncio.to_thread(self._svids.token, audience)
        answer = await self._broker.post(
            "/oauth2/introspect", data={"token": token}, headers={"Authorization": f"Bearer {svid}"}
        )
        answer.raise_for_status()
        claims: dict[str, object] = answer.json()
        return claims
