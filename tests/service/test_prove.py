"""Proving a backend: whatever goes wrong, the ledger knows the lease and nothing lives on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.fake import Fault, Operation
from broker.core.errors import IdentityRefused, InvalidRequest, MintFailed
from broker.core.lease import Cause, LeaseState
from broker.service.kill import KillOrder
from inventory import ledger
from inventory.kills import KillScope
from tests.support.world import World, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from broker.core.lease import Lease

ACTOR = "operator:uid=0"


@pytest.fixture
async def sweeping(world: World) -> AsyncIterator[World]:
    """A world whose sweeper runs, as it does wherever a backend is proven."""
    world.services.sweeper.start()
    yield world
    world.server.clear()


def leases(world: World) -> list[Lease]:
    return ledger.page(world.store.reader)


async def test_a_credential_lives_works_dies_and_stays_dead(sweeping: World) -> None:
    proof = await sweeping.services.prove.run("orders-db", "read", actor=ACTOR)
    assert proof.proven
    assert [step.name for step in proof.steps if step.ok] == [
        "minted",
        "it works",
        "revoked and verified dead",
        "it no longer works",
        "revoking it again is harmless",
    ]
    (lease,) = leases(sweeping)
    assert (lease.id, lease.state, lease.cause) == (proof.lease_id, LeaseState.REVOKED, Cause.RELEASED)
    assert (lease.identity, lease.task_id) == ("", "")
    assert sweeping.server.logins == {}


async def test_the_intent_is_in_the_ledger_before_the_backend_is_called(sweeping: World) -> None:
    sweeping.server.inject(Operation.MINT, Fault.HANG_BEFORE)
    proving = asyncio.ensure_future(sweeping.services.prove.run("orders-db", None, actor=ACTOR))
    await sweeping.server.until_hanging()
    (lease,) = leases(sweeping)
    assert lease.state is LeaseState.INTENT
    sweeping.server.release()
    assert (await proving).proven


@pytest.mark.parametrize("operation", [Operation.MINT, Operation.PROBE])
@pytest.mark.parametrize("fault", [Fault.HANG_BEFORE, Fault.HANG_AFTER])
async def test_an_interrupted_proof_leaves_nothing_alive(
    sweeping: World, operation: Operation, fault: Fault
) -> None:
    sweeping.server.inject(operation, fault)
    proving = asyncio.ensure_future(sweeping.services.prove.run("orders-db", None, actor=ACTOR))
    await sweeping.server.until_hanging()
    proving.cancel()
    sweeping.server.release()
    with pytest.raises(asyncio.CancelledError):
        await proving
    (lease,) = leases(sweeping)
    assert lease.state is LeaseState.REVOKED
    assert sweeping.server.logins == {}


async def test_a_process_that_dies_while_proving_leaves_a_lease_that_the_next_one_ends(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as world:
        world.server.inject(Operation.MINT, Fault.HANG_AFTER)
        proving = asyncio.ensure_future(world.services.prove.run("orders-db", None, actor=ACTOR))
        await world.server.until_hanging()
        assert len(world.server.logins) == 1
        server, clock = world.server, world.clock
        (lease,) = leases(world)
        clock.advance(seconds=world.ctx.limits.mint_deadline_seconds + 2)
        await world.drain()  # what the next process does first
        assert server.logins == {}
        assert ledger.get(world.store.reader, lease.id).state is LeaseState.REVOKED  # type: ignore[union-attr]  # it is there
        server.release()
        with pytest.raises(MintFailed):
            await proving
    assert server.logins == {}


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (Fault.FAIL_BEFORE, LeaseState.REVOKED),
        (Fault.FAIL_AFTER, LeaseState.REVOKED),
        (Fault.REFUSE, LeaseState.FAILED),
    ],
)
async def test_a_mint_that_fails_is_ended_as_any_other(
    sweeping: World, fault: Fault, state: LeaseState
) -> None:
    sweeping.server.inject(Operation.MINT, fault)
    with pytest.raises(MintFailed):
        await sweeping.services.prove.run("orders-db", None, actor=ACTOR)
    (lease,) = leases(sweeping)
    assert lease.state is state
    assert sweeping.server.logins == {}


async def test_a_credential_that_outlives_its_revocation_is_no_proof(sweeping: World) -> None:
    sweeping.server.inject(Operation.PROBE, Fault.FAIL_BEFORE)
    proof = await sweeping.services.prove.run("orders-db", None, actor=ACTOR)
    assert not proof.proven
    assert [step.name for step in proof.steps if not step.ok] == ["it works"]


async def test_a_backend_that_fails_the_second_revocation_is_no_proof(sweeping: World) -> None:
    sweeping.server.inject(Operation.VERIFY, Fault.HANG_BEFORE)
    proving = asyncio.ensure_future(sweeping.services.prove.run("orders-db", None, actor=ACTOR))
    await sweeping.server.until_hanging()  # the sweeper's own verification
    sweeping.server.inject(Operation.REVOKE, Fault.FAIL_AFTER)
    sweeping.server.release()
    proof = await proving
    assert [(step.name, step.detail) for step in proof.steps if not step.ok] == [
        ("revoking it again is harmless", {"error": "FakeTroubleError"})
    ]
    assert not proof.proven


async def test_where_a_right_is_missing_nothing_is_minted(sweeping: World) -> None:
    sweeping.server.down = True
    proof = await sweeping.services.prove.run("orders-db", None, actor=ACTOR)
    assert not proof.proven
    assert [check.remedy for check in proof.checks if not check.ok] == ["start the backend"]
    assert proof.lease_id is None
    assert leases(sweeping) == []


async def test_a_killed_resource_is_not_minted_for(sweeping: World) -> None:
    order = KillOrder(scope=KillScope.RESOURCE, value="orders-db", reason="incident", actor=ACTOR)
    await sweeping.services.kill.kill(order)
    with pytest.raises(IdentityRefused, match="killed"):
        await sweeping.services.prove.run("orders-db", None, actor=ACTOR)
    assert leases(sweeping) == []
    assert Operation.MINT not in [operation for operation, _ in sweeping.server.calls]


@pytest.mark.parametrize(
    ("resource", "action", "expected"),
    [
        ("no-such", None, "no such resource"),
        ("orders-db", "no-such", "it has: read, write"),
        ("reports-api", "read", "own tokens"),
    ],
)
async def test_what_cannot_be_proven_says_why(
    sweeping: World, resource: str, action: str | None, expected: str
) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        await sweeping.services.prove.run(resource, action, actor=ACTOR)


async def test_a_two_step_backend_is_proven_too(tmp_path: Path) -> None:
    async with opened(tmp_path, two_step=True) as world:
        world.services.sweeper.start()
        assert (await world.services.prove.run("orders-db", None, actor=ACTOR)).proven
        assert world.server.logins == {}
