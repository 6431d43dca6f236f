"""The whole way with a real trust domain: sockets, bundles, SVIDs and a rotation."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.serialization import Encoding

from broker.authn.authenticator import Authenticator, PeerCertificates
from broker.authn.bundles import BundleStore
from broker.authn.trust_bundle import parse_der_certificates
from broker.authn.workload_api import WorkloadApiSource
from broker.core.caller import AuthMethod
from broker.core.clock import SystemClock
from broker.dev.trust_domain import EmbeddedTrustDomain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BROKER = "spiffe://dev.nhi.internal/broker"
AGENT = "spiffe://dev.nhi.internal/agent/report"
AUDIENCE = "nhi-broker"


@asynccontextmanager
async def following(domain: EmbeddedTrustDomain, store: BundleStore) -> AsyncIterator[WorkloadApiSource]:
    source = WorkloadApiSource(str(domain.register(BROKER)))
    run = asyncio.create_task(source.run(store))
    try:
        async with asyncio.timeout(20):
            await source.wait_ready()
        yield source
    finally:
        await source.close()
        await run


def connection_of(domain: EmbeddedTrustDomain) -> PeerCertificates:
    chain = parse_der_certificates(domain.issue_x509_svid(AGENT).chain_der())
    return PeerCertificates([certificate.public_bytes(Encoding.DER) for certificate in chain])


def change_event(store: BundleStore) -> asyncio.Event:
    changed = asyncio.Event()
    store.subscribe(lambda _bundles: changed.set())
    return changed


async def test_svids_of_the_embedded_trust_domain_prove_who_is_asking(short_dir: Path) -> None:
    store = BundleStore()
    authenticator = Authenticator(store, SystemClock(), AUDIENCE)
    async with EmbeddedTrustDomain(short_dir) as domain, following(domain, store) as source:
        svid = source.svid()
        assert svid is not None
        assert svid.spiffe_id == BROKER
        caller = authenticator.authenticate(
            bearer=domain.issue_jwt_svid(AGENT, AUDIENCE), peer=connection_of(domain)
        )
        assert caller.spiffe_id == AGENT
        assert caller.method is AuthMethod.BOTH


async def test_a_rotated_authority_is_trusted_without_a_restart_and_the_old_one_meanwhile(
    short_dir: Path,
) -> None:
    store = BundleStore()
    authenticator = Authenticator(store, SystemClock(), AUDIENCE)
    async with EmbeddedTrustDomain(short_dir) as domain, following(domain, store):
        old_token, old_connection = domain.issue_jwt_svid(AGENT, AUDIENCE), connection_of(domain)
        before = authenticator.authenticate(bearer=old_token, peer=old_connection).bundle_generation
        changed = change_event(store)
        domain.rotate_ca()
        async with asyncio.timeout(20):
            while len(store.current.by_trust_domain[domain.trust_domain].jwt_keys) < 2:
                await changed.wait()
                changed.clear()
            while len(store.current.by_trust_domain[domain.trust_domain].x509_authorities) < 2:
                await changed.wait()
                changed.clear()
        after = authenticator.authenticate(bearer=old_token, peer=old_connection).bundle_generation
        assert after > before
        new_proofs = authenticator.authenticate(
            bearer=domain.issue_jwt_svid(AGENT, AUDIENCE), peer=connection_of(domain)
        )
        assert new_proofs.spiffe_id == AGENT
