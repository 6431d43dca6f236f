"""The faults of the fake, which machine and service tests rely on."""

from __future__ import annotations

import asyncio

import pytest

from adapters.conformance import error_of, mint, target_of
from adapters.fake import FakeAdapter, FakeServer, Fault, Operation
from broker.core.clock import ManualClock
from broker.core.ids import InstanceTag
from broker.core.ports import ErrorClass, Liveness, Presence
from tests.contract.test_fake_conformance import FakeHarness


@pytest.fixture
def harness() -> FakeHarness:
    return FakeHarness(strong_fence=True, two_step=False)


async def test_a_late_mint_lands_after_the_call_failed(harness: FakeHarness) -> None:
    request = harness.request()
    harness.server.inject(Operation.MINT, Fault.LATE)
    error = await error_of(mint(harness.adapter, request))
    assert harness.adapter.classify(error) is ErrorClass.RETRY
    assert request.backend_name not in harness.server.logins
    harness.server.land()
    assert request.backend_name in harness.server.logins


async def test_a_late_mint_behind_a_strong_fence_lands_nowhere(harness: FakeHarness) -> None:
    request = harness.request()
    harness.server.inject(Operation.MINT, Fault.LATE)
    await error_of(mint(harness.adapter, request))
    await harness.adapter.revoke(target_of(request))
    harness.server.land()
    assert request.backend_name not in harness.server.logins


async def test_a_late_mint_without_a_fence_outlives_a_revocation_that_came_too_early() -> None:
    harness = FakeHarness(strong_fence=False, two_step=False)
    request = harness.request()
    harness.server.inject(Operation.MINT, Fault.LATE)
    await error_of(mint(harness.adapter, request))
    await harness.adapter.revoke(target_of(request))
    assert (await harness.adapter.verify(target_of(request))).presence is Presence.ABSENT
    harness.server.land()
    assert (await harness.adapter.verify(target_of(request))).presence is Presence.PRESENT


async def test_faults_are_met_in_order_and_once(harness: FakeHarness) -> None:
    harness.server.inject(Operation.VERIFY, Fault.UNKNOWN, Fault.FAIL_BEFORE)
    request = harness.request()
    await mint(harness.adapter, request)
    assert (await harness.adapter.verify(target_of(request))).presence is Presence.UNKNOWN
    await error_of(harness.adapter.verify(target_of(request)))
    assert (await harness.adapter.verify(target_of(request))).presence is Presence.PRESENT


async def test_a_hanging_call_goes_on_when_released(harness: FakeHarness) -> None:
    adapter = FakeAdapter(name="fake", instance=harness.instance, server=harness.server)
    harness.server.inject(Operation.MINT, Fault.HANG_BEFORE)
    request = harness.request()
    minting = asyncio.create_task(mint(adapter, request))
    await harness.server.until_hanging()
    assert request.backend_name not in harness.server.logins
    harness.server.release()
    assert await adapter.probe((await minting).credential) is Liveness.ALIVE


async def test_native_expiry_follows_the_servers_clock() -> None:
    clock = ManualClock()
    instance = InstanceTag.new()
    adapter = FakeAdapter(name="fake", instance=instance, server=FakeServer(clock))
    harness = FakeHarness(strong_fence=True, two_step=False)
    harness.instance = instance
    harness.now_ms = clock.now_ms  # type: ignore[method-assign]  # the suite's clock is the server's
    minted = await mint(adapter, harness.request())
    assert await adapter.probe(minted.credential) is Liveness.ALIVE
    clock.advance(seconds=7 * 24 * 3600)
    assert await adapter.probe(minted.credential) is Liveness.DEAD


async def test_the_calls_are_on_record(harness: FakeHarness) -> None:
    request = harness.request()
    await mint(harness.adapter, request)
    await harness.adapter.revoke(target_of(request))
    assert harness.server.calls == [
        (Operation.MINT, request.backend_name),
        (Operation.REVOKE, request.backend_name),
    ]
