"""The workload listener as callers reach it: TLS 1.3, client certificates, keep-alive connections."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx
import pytest

from broker.api import schemas
from broker.api.listeners import Listener
from broker.api.metrics import SilentEdgeTelemetry
from broker.api.tls import ServerTls
from broker.core.clock import ManualClock
from tests.support.api import Api, api_opened, credential_body
from tests.support.edge import LOOPBACK, chain_and_key, client_context, pem, server_leaf
from tests.support.world import CHURN, SUPPORT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.pki import Leaf


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[Api, Listener]]:
    """The broker on a real socket. TLS itself goes by the host's clock, so ours starts there."""
    clock = ManualClock(int(time.time() * 1000))
    async with api_opened(directory, clock=clock) as api:
        root = api.home.x509
        tls = ServerTls(*chain_and_key(server_leaf(root)), [pem(root.certificate)])
        listener = Listener(
            "workload", api.boundaries["workload"], LOOPBACK, telemetry=SilentEdgeTelemetry(), tls=tls
        )
        await listener.start()
        try:
            yield api, listener
        finally:
            await listener.stop(0.1)


def leaf_of(api: Api, path: str) -> Leaf:
    return api.home.x509.leaf(path=path, now=datetime.now(UTC))


def connect(
    api: Api, listener: Listener, leaf: Leaf | None = None, token: str | None = None
) -> httpx.AsyncClient:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    context = client_context(api.home.x509, leaf, named=False)
    return httpx.AsyncClient(verify=context, base_url=f"https://127.0.0.1:{listener.port}", headers=headers)


def connect_as_support(api: Api, listener: Listener) -> httpx.AsyncClient:
    return connect(api, listener, leaf_of(api, "/agent/support-bot"))


@pytest.mark.parametrize("proof", ["certificate", "token", "both"])
async def test_a_caller_is_served_by_what_proves_it(tmp_path: Path, proof: str) -> None:
    async with served(tmp_path) as (api, listener):
        leaf = None if proof == "token" else leaf_of(api, "/agent/churn-report")
        token = None if proof == "certificate" else api.token(CHURN)
        async with connect(api, listener, leaf, token) as client:
            body = credential_body({"purpose": "churn-report"})
            issued = await client.post("/credentials/request", json=body)
            assert issued.status_code == 201, issued.text
            path = f"/credentials/{issued.json()['lease_id']}"
            assert (await client.post(f"{path}/revoke")).json()["state"] == "revoked"
        assert listener.connections <= 1, "the second request did not use the first one's connection"
        moved = [event for event in api.audited("lease.moved") if event["fields"]["from"] is None]
        methods = {"certificate": "x509-svid", "token": "jwt-svid", "both": "x509-svid+jwt-svid"}
        assert [event["fields"]["auth_method"] for event in moved] == [methods[proof]]


async def test_a_connection_without_proof_reads_the_public_keys_and_nothing_else(tmp_path: Path) -> None:
    async with served(tmp_path) as (api, listener), connect(api, listener) as client:
        assert (await client.get("/oauth2/jwks")).status_code == 200
        refused = await client.get("/catalog")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        schemas.Problem.model_validate_json(refused.content)
        (event,) = api.audited("authentication.refused")
        assert event["fields"]["rule"] == "A-1"
        assert event["fields"]["peer"] == "127.0.0.1"
        assert event["fields"]["trace_id"] == refused.headers["trace-id"]


async def test_a_token_of_one_identity_on_a_connection_of_another_is_401(tmp_path: Path) -> None:
    async with served(tmp_path) as (api, listener):
        leaf = leaf_of(api, "/agent/support-bot")
        async with connect(api, listener, leaf, api.token(CHURN)) as client:
            assert (await client.get("/catalog")).status_code == 401
        (event,) = api.audited("authentication.refused")
        assert event["fields"]["rule"] == "A-2"


async def test_a_warm_connection_of_a_suspended_identity_gets_nothing_more(tmp_path: Path) -> None:
    async with served(tmp_path) as (api, listener), connect_as_support(api, listener) as client:
        assert (await client.get("/catalog")).status_code == 200
        await api.world.services.inventory.suspend(SUPPORT, reason="theft", actor="operator:uid=0")
        assert (await client.get("/catalog")).status_code == 403


async def test_a_warm_connection_of_an_expired_certificate_gets_nothing_more(tmp_path: Path) -> None:
    async with served(tmp_path) as (api, listener), connect_as_support(api, listener) as client:
        assert (await client.get("/catalog")).status_code == 200
        api.world.clock.advance(seconds=7200)
        assert (await client.get("/catalog")).status_code == 401
