from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.fake import FakeServer, Fault, Operation
from broker.core.errors import (
    BackendUnavailable,
    BudgetExhausted,
    IdempotencyMismatch,
    IdentityRefused,
    LeaseLost,
    MintFailed,
    PolicyDenied,
    StillMinting,
    TaskClosed,
    UnknownObject,
)
from broker.core.lease import Cause, LeaseState
from broker.service.tasks import TaskSpec
from inventory import ledger, tasks
from tests.support.world import CHURN, STRANGER, SUPPORT, World, caller, opened

if TYPE_CHECKING:
    from pathlib import Path

    from broker.service.issue import Issued


def credential_works(world: World, issued: Issued) -> bool:
    assert issued.credential is not None
    fields = issued.credential.reveal()
    return world.server.log_in(str(fields["username"]), str(fields["password"])) is not None


def lease_state(world: World, issued: Issued) -> LeaseState:
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    return lease.state


async def test_a_credential_is_issued_used_and_proven_dead_when_its_task_ends(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    assert issued.lease.state is LeaseState.ACTIVE
    assert credential_works(world, issued)

    await world.end(task)
    await world.drain()

    assert not credential_works(world, issued)
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert lease.state is LeaseState.REVOKED
    assert lease.cause is Cause.TASK_END
    assert lease.evidence is not None
    assert lease.evidence["exists"] is False


async def test_the_intent_is_durable_before_the_backend_is_called(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.HANG_BEFORE)
    task = await world.open_task()
    asking = asyncio.create_task(world.ask(task))
    await world.server.until_hanging()
    rows = ledger.of_task(world.store.reader, task.id)
    assert [row.state for row in rows] == [LeaseState.INTENT]
    world.server.release()
    await asking


async def test_a_task_that_ends_during_the_mint_leaves_nothing_alive(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.HANG_AFTER)
    task = await world.open_task()
    asking = asyncio.create_task(world.ask(task))
    await world.server.until_hanging()
    await world.end(task)
    world.server.release()
    with pytest.raises(LeaseLost) as lost:
        await asking
    assert lost.value.lease_id is not None
    await world.drain()
    assert world.server.logins == {}


async def test_a_lost_answer_counts_as_maybe_minted(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.FAIL_AFTER)
    task = await world.open_task()
    with pytest.raises(MintFailed) as failed:
        await world.ask(task)
    assert failed.value.lease_id is not None
    assert failed.value.retry_after_seconds is not None
    await world.drain()
    assert world.server.logins == {}
    lease = ledger.get(world.store.reader, failed.value.lease_id)
    assert lease is not None
    assert (lease.state, lease.cause) == (LeaseState.REVOKED, Cause.MINT_AMBIGUOUS)


async def test_a_late_mint_finds_the_fence(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.LATE)
    task = await world.open_task()
    with pytest.raises(MintFailed):
        await world.ask(task)
    await world.drain()
    world.server.land()
    assert world.server.logins == {}


async def test_a_late_mint_without_a_fence_is_found_by_the_second_look(tmp_path: Path) -> None:
    server = FakeServer(strong_fence=False)
    async with opened(tmp_path, server=server) as world:
        server.clock = world.clock
        server.inject(Operation.MINT, Fault.LATE)
        task = await world.open_task()
        with pytest.raises(MintFailed):
            await world.ask(task)
        await world.drain()
        server.land()
        assert server.logins
        for _ in range(5):
            world.clock.advance(seconds=60)
            await world.drain()
        assert server.logins == {}


async def test_a_clear_refusal_fails_the_lease_and_revokes_nothing(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.REFUSE)
    task = await world.open_task()
    with pytest.raises(MintFailed) as failed:
        await world.ask(task)
    assert failed.value.lease_id is not None
    lease = ledger.get(world.store.reader, failed.value.lease_id)
    assert lease is not None
    assert lease.state is LeaseState.FAILED
    await world.drain()
    assert Operation.REVOKE not in [operation for operation, _ in world.server.calls]


async def test_a_denial_is_recorded_and_nothing_is_minted(world: World) -> None:
    task = await world.open_task()
    with pytest.raises(PolicyDenied) as denied:
        await world.ask(task, "payments-ledger", "read")
    assert denied.value.detail
    row = world.store.reader.execute(
        "SELECT outcome FROM decisions WHERE id = ?", (denied.value.decision_id,)
    ).fetchone()
    assert row == ("deny",)
    assert ledger.of_task(world.store.reader, task.id) == []


async def test_an_unknown_resource_is_denied_like_a_forbidden_one(world: World) -> None:
    task = await world.open_task()
    with pytest.raises(PolicyDenied):
        await world.ask(task, "no-such-thing", "read")


async def test_another_identitys_task_answers_as_an_unknown_one(world: World) -> None:
    task = await world.open_task()
    with pytest.raises(UnknownObject):
        await world.ask(task, who=SUPPORT)


async def test_an_ended_task_issues_nothing(world: World) -> None:
    task = await world.open_task()
    await world.end(task)
    with pytest.raises(TaskClosed):
        await world.ask(task)


async def test_a_task_past_its_deadline_issues_nothing_and_is_ended_by_the_sweeper(world: World) -> None:
    task = await world.open_task(deadline_seconds=60)
    issued = await world.ask(task, ttl_seconds=3600)
    assert issued.lease.expires_ms <= task.deadline_ms
    world.clock.advance(seconds=61)
    with pytest.raises(TaskClosed):
        await world.ask(task)
    await world.drain()
    assert lease_state(world, issued) is LeaseState.REVOKED
    assert not credential_works(world, issued)


async def test_the_budget_is_exact(world: World) -> None:
    task = await world.open_task(budget_leases=2)
    results = await asyncio.gather(*(world.ask(task) for _ in range(5)), return_exceptions=True)
    assert sum(not isinstance(result, BaseException) for result in results) == 2
    assert all(isinstance(r, BudgetExhausted) for r in results if isinstance(r, BaseException))


async def test_an_orphan_identity_gets_nothing_where_an_owner_is_required(world: World) -> None:
    with pytest.raises(IdentityRefused):
        await world.open_task(STRANGER)


async def test_an_expired_lease_is_revoked_and_proven_dead(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task, ttl_seconds=60)
    world.clock.advance(seconds=60)
    await world.drain()
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert (lease.state, lease.cause) == (LeaseState.REVOKED, Cause.EXPIRY)


async def test_an_inline_task_ends_with_its_only_lease(world: World) -> None:
    issued = await world.ask(TaskSpec(purpose="churn-report"))
    await world.services.revoke.release(caller(CHURN), issued.lease.id)
    await world.drain()
    task = tasks.get(world.store.reader, issued.lease.task_id)
    assert task is not None
    assert task.state == "ended"
    assert not credential_works(world, issued)


async def test_a_lease_can_be_looked_at_only_by_its_own_identity(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    with pytest.raises(UnknownObject):
        world.services.revoke.get(caller(SUPPORT), issued.lease.id)
    with pytest.raises(UnknownObject):
        await world.services.revoke.release(caller(SUPPORT), issued.lease.id)
    assert credential_works(world, issued)


# --- idempotency (DESIGN 4, rule 8) ---------------------------------------------------------------


async def test_a_repeated_request_supersedes_and_leaves_one_credential(world: World) -> None:
    task = await world.open_task()
    first = await world.ask(task, key="k")
    second = await world.ask(task, key="k")
    assert first.lease.id != second.lease.id
    await world.drain()
    assert not credential_works(world, first)
    assert credential_works(world, second)
    assert lease_state(world, first) is LeaseState.REVOKED


async def test_the_same_key_with_another_body_is_refused(world: World) -> None:
    task = await world.open_task()
    await world.ask(task, key="k")
    with pytest.raises(IdempotencyMismatch):
        await world.ask(task, key="k", request_hash="other")


async def test_a_repeat_during_the_mint_is_told_to_wait(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.HANG_BEFORE)
    task = await world.open_task()
    asking = asyncio.create_task(world.ask(task, key="k"))
    await world.server.until_hanging()
    with pytest.raises(StillMinting):
        await world.ask(task, key="k")
    world.server.release()
    await asking


async def test_a_repeat_after_a_503_gets_its_credential(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.FAIL_AFTER)
    task = await world.open_task()
    with pytest.raises(MintFailed):
        await world.ask(task, key="k")
    again = await world.ask(task, key="k")
    assert credential_works(world, again)
    await world.drain()
    assert len(world.server.logins) == 1


async def test_a_repeat_after_the_end_is_told_so_without_a_credential(world: World) -> None:
    task = await world.open_task()
    first = await world.ask(task, key="k", ttl_seconds=60)
    world.clock.advance(seconds=61)
    await world.drain()
    again = await world.ask(task, key="k", ttl_seconds=60)
    assert again.credential is None
    assert again.lease.id == first.lease.id
    assert again.lease.state is LeaseState.REVOKED


# --- backends that fail ------------------------------------------------------------------------


async def test_a_dead_backend_opens_its_breaker_and_costs_no_lease(world: World) -> None:
    world.server.down = True
    task = await world.open_task()
    for _ in range(5):
        with pytest.raises(MintFailed):
            await world.ask(task)
    with pytest.raises(BackendUnavailable):
        await world.ask(task)
    assert len(ledger.of_task(world.store.reader, task.id)) == 5
    tokens = await world.ask(task, "reports-api", "write")
    assert tokens.lease.state is LeaseState.ACTIVE


async def test_revocation_is_retried_until_the_backend_is_back(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task, ttl_seconds=3600)
    world.server.down = True
    await world.end(task)
    for _ in range(30):
        await world.drain()
        world.clock.advance(seconds=60)
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert lease.state is LeaseState.REVOKE_PENDING
    assert lease.stuck
    assert credential_works(world, issued)

    world.server.clear()
    world.clock.advance(seconds=16 * 60)
    await world.drain()
    assert lease_state(world, issued) is LeaseState.REVOKED
    assert not credential_works(world, issued)


async def test_an_unknown_verification_is_never_success(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    world.server.inject(Operation.VERIFY, Fault.UNKNOWN)
    await world.end(task)
    await world.drain()
    assert lease_state(world, issued) is LeaseState.VERIFYING
    world.clock.advance(seconds=60)
    await world.drain()
    assert lease_state(world, issued) is LeaseState.REVOKED
