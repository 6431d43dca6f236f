"""The suite every adapter passes before it is trusted with a lease.

Give it a `Harness` for your backend and subclass the class that fits::

    class TestMyBackend(ExternalAdapterConformance):
        @pytest_asyncio.fixture
        async def harness(self) -> AsyncIterator[Harness]:
            async with my_harness() as harness:
                yield harness

Every word of the port's docstrings that a backend could break is tried here, and the dead
are recognised by **using** the credential, not by reading the backend's catalogue.
``docs/adding-an-adapter.md`` walks through it.
"""
# ruff: noqa: D102  a test's name is its documentation

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

import pytest

from broker.core.ids import LeaseId, TaskId, backend_name
from broker.core.ports import (
    NATIVE_EXPIRY_MARGIN_SECONDS,
    Capabilities,
    Effect,
    ErrorClass,
    Fence,
    Liveness,
    MintRequest,
    Naming,
    Presence,
    Target,
    Verification,
)
from broker.core.spiffe_id import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from broker.core.ids import InstanceTag
    from broker.core.ports import Adapter, Credential, Minted

IDENTITY: Final = SpiffeId.parse("spiffe://conformance.test/agent")
LIFE_SECONDS: Final = 300
INTERLEAVINGS: Final = (0, 1, 2, 3, 5, 8, 13, 21, 34)
"""Turns of the event loop that a mint is ahead of what interrupts it."""

GUARD_SECONDS: Final = 60
"""A call without an end is a fault of the adapter, not of the test run."""


class Trouble(StrEnum):
    """What a harness can do to the way between adapter and backend.

    ``down``: connections are refused or broken off.
    ``silent``: nothing comes through, nothing is refused.
    ``answer_lost``: what the adapter asks is done, what the backend answers is lost.
    """

    DOWN = "down"
    SILENT = "silent"
    ANSWER_LOST = "answer_lost"


class Session(Protocol):
    """Something opened with a credential that may outlive it: a connection, a shell."""

    async def is_alive(self) -> bool:
        """Use it, and say whether it still works."""
        ...


class Harness(ABC):
    """Your backend, as the suite needs it.

    Attributes:
        adapter: the one under test, with short timeouts.
        instance: its tag.
        recipe: one that works.
        bad_recipes: as many ways to get one wrong as there are members.

    """

    adapter: Adapter
    instance: InstanceTag
    recipe: Mapping[str, object]
    bad_recipes: Sequence[Mapping[str, object]]

    def now_ms(self) -> int:
        """Return the time as the backend tells it."""
        return time.time_ns() // 1_000_000

    def request(self, lease_id: LeaseId | None = None, *, life_seconds: int = LIFE_SECONDS) -> MintRequest:
        """Return a request for a fresh lease; a negative life makes one that is over already."""
        lease = lease_id or LeaseId.new()
        now_ms = self.now_ms()
        expires_ms = now_ms + life_seconds * 1000
        margin_ms = NATIVE_EXPIRY_MARGIN_SECONDS * 1000 if life_seconds > 0 else 0
        return MintRequest(
            lease_id=lease,
            task_id=TaskId.new(),
            identity=IDENTITY,
            backend_name=backend_name(self.instance, lease),
            resource="conformance",
            action="read",
            recipe=self.recipe,
            now_ms=now_ms,
            expires_ms=expires_ms,
            not_after_ms=expires_ms + margin_ms,
        )


class ExternalHarness(Harness):
    """A `Harness` for a backend outside the broker."""

    @abstractmethod
    def neighbour(self) -> tuple[InstanceTag, Adapter]:
        """Return another deployment's tag and adapter on the same backend."""

    @abstractmethod
    def powerless(self) -> Adapter:
        """Return an adapter whose rights do not suffice to mint or to revoke."""

    @abstractmethod
    def trouble(self, kind: Trouble) -> AbstractAsyncContextManager[None]:
        """Cut the way to the backend for a while; afterwards everything works again."""

    @abstractmethod
    async def open_session(self, credential: Credential) -> Session | None:
        """Open something with the credential that could outlive it, None where nothing can."""


def target_of(request: MintRequest, minted: Minted | None = None) -> Target:
    """Return what revokes the lease: from the lease id alone where the mint never answered."""
    return Target(
        lease_id=request.lease_id,
        backend_name=request.backend_name,
        recipe=request.recipe,
        handle=minted.handle if minted is not None else request.handle,
        kept=minted.keep if minted is not None else None,
    )


async def mint(adapter: Adapter, request: MintRequest) -> Minted:
    """Mint as the service does: first the handle, where there is one."""
    return await adapter.mint(replace(request, handle=await adapter.prepare(request)))


async def turns(count: int) -> None:
    """Let the event loop go round `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


class AdapterConformance(ABC):
    """What holds for every adapter."""

    @pytest.fixture
    @abstractmethod
    def harness(self) -> Harness:
        """Return the backend to try; override it."""

    async def test_declarations_agree_with_each_other(self, harness: Harness) -> None:
        declared = harness.adapter.capabilities
        assert isinstance(declared, Capabilities)
        assert harness.adapter.name
        assert 0 < declared.ttl_seconds_min <= declared.ttl_seconds_max
        assert (declared.t_inflight_seconds > 0) is declared.external_effect
        is_eventual = declared.revocability.effect is Effect.EVENTUAL
        assert (declared.revocability.bound_seconds is not None) is is_eventual

    async def test_a_good_recipe_has_no_faults(self, harness: Harness) -> None:
        assert harness.adapter.validate_recipe(harness.recipe) == []

    async def test_every_bad_recipe_is_refused_in_words(self, harness: Harness) -> None:
        assert harness.bad_recipes
        for recipe in harness.bad_recipes:
            faults = harness.adapter.validate_recipe(recipe)
            assert faults, recipe
            assert all(isinstance(fault, str) and fault for fault in faults)

    async def test_prepare_returns_a_handle_only_where_naming_has_two_steps(self, harness: Harness) -> None:
        handle = await harness.adapter.prepare(harness.request())
        assert (handle is not None) is (harness.adapter.capabilities.naming is Naming.TWO_STEP)

    async def test_check_finds_nothing_missing_where_nothing_is(self, harness: Harness) -> None:
        checks = await harness.adapter.check([harness.recipe])
        assert checks
        assert [check for check in checks if not check.ok] == []

    async def test_a_minted_credential_works(self, harness: Harness) -> None:
        minted = await mint(harness.adapter, harness.request())
        assert await harness.adapter.probe(minted.credential) is Liveness.ALIVE

    async def test_a_secret_is_kept_only_where_revoking_needs_it(self, harness: Harness) -> None:
        minted = await mint(harness.adapter, harness.request())
        assert (minted.keep is not None) is harness.adapter.capabilities.needs_secret_to_revoke

    async def test_the_secret_is_in_no_repr_and_no_log(
        self, harness: Harness, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        request = harness.request()
        minted = await mint(harness.adapter, request)
        await harness.adapter.revoke(target_of(request, minted))
        shown = "\n".join(
            [
                repr(minted),
                str(minted.credential),
                repr(harness.adapter),
                caplog.text,
                str(minted.credential.public),
            ]
        )
        assert minted.credential.secret
        for secret in minted.credential.secret.values():
            assert secret.reveal() not in shown

    async def test_every_mint_draws_a_new_secret(self, harness: Harness) -> None:
        first = await mint(harness.adapter, harness.request())
        second = await mint(harness.adapter, harness.request())
        for member, secret in first.credential.secret.items():
            assert secret.reveal() != second.credential.secret[member].reveal()

    async def test_close_can_be_repeated(self, harness: Harness) -> None:
        await harness.adapter.close()
        await harness.adapter.close()


class ExternalAdapterConformance(AdapterConformance):
    """What holds for every adapter that changes something outside the broker."""

    @pytest.fixture
    @abstractmethod
    def harness(self) -> ExternalHarness:
        """Return the backend to try; override it."""

    async def test_it_declares_its_external_effect(self, harness: ExternalHarness) -> None:
        assert harness.adapter.capabilities.external_effect

    async def test_check_names_each_missing_right_and_its_remedy(self, harness: ExternalHarness) -> None:
        adapter = harness.powerless()
        try:
            missing = [check for check in await adapter.check([harness.recipe]) if not check.ok]
        finally:
            await adapter.close()
        assert missing
        assert all(check.name and check.remedy for check in missing)

    async def test_check_of_an_unreachable_backend_answers_instead_of_raising(
        self, harness: ExternalHarness
    ) -> None:
        async with harness.trouble(Trouble.DOWN):
            checks = await harness.adapter.check([harness.recipe])
        assert any(not check.ok and check.remedy for check in checks)

    # --- death --------------------------------------------------------------------------------

    async def test_a_revoked_credential_is_dead_and_the_evidence_says_so(
        self, harness: ExternalHarness
    ) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        target = target_of(request, minted)
        assert (await harness.adapter.verify(target)).presence is Presence.PRESENT
        await harness.adapter.revoke(target)
        verification = await harness.adapter.verify(target)
        assert verification.presence is Presence.ABSENT
        assert verification.evidence
        assert await harness.adapter.probe(minted.credential) is Liveness.DEAD

    async def test_revoking_twice_is_harmless(self, harness: ExternalHarness) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        await harness.adapter.revoke(target_of(request, minted))
        await harness.adapter.revoke(target_of(request, minted))
        await assert_dead(harness, request, minted)

    async def test_two_revocations_at_once_are_harmless(self, harness: ExternalHarness) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        target = target_of(request, minted)
        await asyncio.gather(*(harness.adapter.revoke(target) for _ in range(4)))
        await assert_dead(harness, request, minted)

    async def test_revoking_one_leaves_the_others_alive(self, harness: ExternalHarness) -> None:
        doomed, kept = harness.request(), harness.request()
        first, second = await mint(harness.adapter, doomed), await mint(harness.adapter, kept)
        await harness.adapter.revoke(target_of(doomed, first))
        assert await harness.adapter.probe(second.credential) is Liveness.ALIVE
        assert (await harness.adapter.verify(target_of(kept, second))).presence is Presence.PRESENT

    async def test_many_are_minted_and_revoked_at_once(self, harness: ExternalHarness) -> None:
        requests = [harness.request() for _ in range(20)]
        minted = await asyncio.gather(*(mint(harness.adapter, request) for request in requests))
        pairs = list(zip(requests, minted, strict=True))
        await asyncio.gather(*(harness.adapter.revoke(target_of(*pair)) for pair in pairs))
        await asyncio.gather(*(assert_dead(harness, *pair) for pair in pairs))

    async def test_a_session_opened_before_is_cut_exactly_where_declared(
        self, harness: ExternalHarness
    ) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        session = await harness.open_session(minted.credential)
        if session is not None:
            assert await session.is_alive()
        await harness.adapter.revoke(target_of(request, minted))
        alive = session is not None and await session.is_alive()
        assert harness.adapter.capabilities.cuts_sessions is (session is not None and not alive)

    async def test_an_expired_credential_does_not_work(self, harness: ExternalHarness) -> None:
        request = harness.request(life_seconds=-1)
        minted = await mint(harness.adapter, request)
        assert await harness.adapter.probe(minted.credential) is Liveness.DEAD
        await harness.adapter.revoke(target_of(request, minted))
        await assert_dead(harness, request, minted)

    # --- the fence ----------------------------------------------------------------------------

    async def test_revoking_what_was_never_minted_succeeds_and_fences(self, harness: ExternalHarness) -> None:
        request = harness.request()
        await harness.adapter.revoke(target_of(request))
        assert (await harness.adapter.verify(target_of(request))).presence is Presence.ABSENT
        late = await attempt(harness.adapter, request)
        if harness.adapter.capabilities.fence is not Fence.STRONG:
            await harness.adapter.revoke(target_of(request, late))
        await assert_dead(harness, request, late)

    async def test_a_lease_nobody_revoked_is_never_called_absent_behind_a_strong_fence(
        self, harness: ExternalHarness
    ) -> None:
        verification = await harness.adapter.verify(target_of(harness.request()))
        if harness.adapter.capabilities.fence is Fence.STRONG:
            assert verification.presence is Presence.UNKNOWN
        else:
            assert verification.presence is not Presence.PRESENT

    async def test_one_lease_minted_twice_has_at_most_one_live_credential(
        self, harness: ExternalHarness
    ) -> None:
        request = harness.request()
        tries = [await attempt(harness.adapter, request), await attempt(harness.adapter, request)]
        minted = [one for one in tries if one is not None]
        alive = [one for one in minted if await harness.adapter.probe(one.credential) is Liveness.ALIVE]
        assert len(alive) == 1
        await harness.adapter.revoke(target_of(request, alive[0]))
        for one in minted:
            await assert_dead(harness, request, one)

    @pytest.mark.parametrize("ahead", INTERLEAVINGS)
    async def test_a_mint_overtaken_by_its_revocation_leaves_nothing_alive(
        self, harness: ExternalHarness, ahead: int
    ) -> None:
        request = harness.request()
        minting = asyncio.create_task(attempt(harness.adapter, request))
        await turns(ahead)
        await harness.adapter.revoke(target_of(request))
        minted = await minting
        if harness.adapter.capabilities.fence is not Fence.STRONG:
            await harness.adapter.revoke(target_of(request, minted))  # the second look
        await assert_dead(harness, request, minted)

    @pytest.mark.parametrize("ahead", INTERLEAVINGS)
    async def test_a_cancelled_mint_can_be_revoked(self, harness: ExternalHarness, ahead: int) -> None:
        request = harness.request()
        minting = asyncio.create_task(attempt(harness.adapter, request))
        await turns(ahead)
        minting.cancel()
        await asyncio.wait([minting])
        await harness.adapter.revoke(target_of(request))
        await assert_dead(harness, request, None)
        # What was cancelled must not spoil the next mint.
        assert await attempt(harness.adapter, harness.request()) is not None

    @pytest.mark.parametrize("ahead", INTERLEAVINGS)
    async def test_a_cancelled_revocation_can_be_repeated(self, harness: ExternalHarness, ahead: int) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        revoking = asyncio.create_task(harness.adapter.revoke(target_of(request, minted)))
        await turns(ahead)
        revoking.cancel()
        await asyncio.wait([revoking])
        await harness.adapter.revoke(target_of(request, minted))
        await assert_dead(harness, request, minted)

    # --- trouble ------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", list(Trouble))
    async def test_a_mint_in_trouble_is_ambiguous_and_can_be_ended(
        self, harness: ExternalHarness, kind: Trouble
    ) -> None:
        await mint(harness.adapter, harness.request())  # so that a connection stands open
        request = harness.request()
        async with harness.trouble(kind):
            error = await error_of(mint(harness.adapter, request))
        assert harness.adapter.classify(error) is ErrorClass.RETRY
        await harness.adapter.revoke(target_of(request))
        await assert_dead(harness, request, None)

    @pytest.mark.parametrize("kind", list(Trouble))
    async def test_a_revocation_in_trouble_raises_and_can_be_repeated(
        self, harness: ExternalHarness, kind: Trouble
    ) -> None:
        request = harness.request()
        minted = await mint(harness.adapter, request)
        async with harness.trouble(kind):
            error = await error_of(harness.adapter.revoke(target_of(request, minted)))
        assert harness.adapter.classify(error) is ErrorClass.RETRY
        await harness.adapter.revoke(target_of(request, minted))
        await assert_dead(harness, request, minted)

    @pytest.mark.parametrize("kind", list(Trouble))
    async def test_a_backend_that_does_not_answer_is_never_called_absent(
        self, harness: ExternalHarness, kind: Trouble
    ) -> None:
        request = harness.request()
        await harness.adapter.revoke(target_of(request))
        async with harness.trouble(kind):
            presence = await presence_of(harness, request)
        assert presence is Presence.UNKNOWN

    async def test_a_probe_that_gets_no_answer_does_not_call_the_credential_dead(
        self, harness: ExternalHarness
    ) -> None:
        minted = await mint(harness.adapter, harness.request())
        async with harness.trouble(Trouble.SILENT):
            assert await harness.adapter.probe(minted.credential) is Liveness.UNKNOWN
        assert await harness.adapter.probe(minted.credential) is Liveness.ALIVE

    async def test_no_error_shows_the_secret_of_a_mint_whose_answer_was_lost(
        self, harness: ExternalHarness, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        request = harness.request()
        minted = await mint(harness.adapter, request)
        again = await error_of(mint(harness.adapter, request))
        shown = f"{again!r} {again} {caplog.text}"
        for secret in minted.credential.secret.values():
            assert secret.reveal() not in shown

    async def test_an_error_nobody_knows_is_never_proof_of_anything(self, harness: ExternalHarness) -> None:
        class NeverSeenError(Exception):
            pass

        for error in (NeverSeenError(), TimeoutError(), ConnectionResetError(), OSError()):
            assert harness.adapter.classify(error) is ErrorClass.RETRY

    async def test_a_mint_with_a_bad_recipe_is_refused_for_good(self, harness: ExternalHarness) -> None:
        for recipe in harness.bad_recipes:
            request = replace(harness.request(), recipe=recipe)
            error = await error_of(mint(harness.adapter, request))
            assert harness.adapter.classify(error) is ErrorClass.PERMANENT
            await harness.adapter.revoke(target_of(replace(request, recipe=harness.recipe)))
            await assert_dead(harness, request, None)

    # --- the scan -----------------------------------------------------------------------------

    async def test_a_scan_sees_the_living_of_this_instance_alone(self, harness: ExternalHarness) -> None:
        live, dead = harness.request(), harness.request()
        await mint(harness.adapter, live)
        ended = await mint(harness.adapter, dead)
        await harness.adapter.revoke(target_of(dead, ended))
        foreign_tag, foreign = harness.neighbour()
        lease = LeaseId.new()
        alien = replace(harness.request(lease), backend_name=backend_name(foreign_tag, lease))
        try:
            theirs = await mint(foreign, alien)
            found = {one.backend_name: one async for one in harness.adapter.scan([harness.recipe])}
            await foreign.revoke(target_of(alien, theirs))
        finally:
            await foreign.close()
        if not harness.adapter.capabilities.listable:
            assert found == {}
            return
        assert live.backend_name in found
        assert dead.backend_name not in found
        assert alien.backend_name not in found

    async def test_the_living_of_another_instance_cannot_be_revoked(self, harness: ExternalHarness) -> None:
        foreign_tag, foreign = harness.neighbour()
        lease = LeaseId.new()
        alien = replace(harness.request(lease), backend_name=backend_name(foreign_tag, lease))
        try:
            theirs = await mint(foreign, alien)
            await error_of(harness.adapter.revoke(target_of(alien, theirs)))
            assert await foreign.probe(theirs.credential) is Liveness.ALIVE
            await foreign.revoke(target_of(alien, theirs))
        finally:
            await foreign.close()


async def attempt(adapter: Adapter, request: MintRequest) -> Minted | None:
    """Mint, or return None where the adapter refuses."""
    try:
        return await mint(adapter, request)
    except Exception as error:  # noqa: BLE001  an adapter may raise what its backend's client raises
        adapter.classify(error)
        return None


async def error_of(call: Awaitable[object]) -> Exception:
    """Return what a call raises; it must raise, and before the guard's time is up."""
    guard = asyncio.timeout(GUARD_SECONDS)
    try:
        async with guard:
            await call
    except Exception as error:  # what kind it is, is what the caller looks at
        if guard.expired():
            raise AssertionError("the call has no deadline of its own") from error
        return error
    raise AssertionError("the call was expected to fail")


async def presence_of(harness: ExternalHarness, request: MintRequest) -> Presence:
    """Return what verification says; an error that is worth a retry says as little as UNKNOWN."""
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            return (await harness.adapter.verify(target_of(request))).presence
    except Exception as error:
        if harness.adapter.classify(error) is not ErrorClass.RETRY:
            raise
        return Presence.UNKNOWN


async def assert_dead(harness: ExternalHarness, request: MintRequest, minted: Minted | None) -> None:
    """Assert that nothing of a lease is alive: by verification, by use and by scan."""
    verification: Verification = await harness.adapter.verify(target_of(request, minted))
    assert verification.presence is Presence.ABSENT
    if minted is not None:
        assert await harness.adapter.probe(minted.credential) is Liveness.DEAD
    names = {one.backend_name async for one in harness.adapter.scan([harness.recipe])}
    assert request.backend_name not in names
