from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from adapters.fake import FakeLogin
from broker.core.errors import IdentityRefused, InvalidRequest
from broker.core.ids import InstanceTag, LeaseId, backend_name
from broker.core.lease import Cause, LeaseState
from broker.service.kill import KillOrder
from inventory import findings, ledger
from inventory.kills import KillScope
from tests.support.world import CHURN, CHURN_OWNER, REPORTS_API, STRANGER, SUPPORT, World, caller

if TYPE_CHECKING:
    from broker.service.issue import Issued


def order(scope: KillScope, value: str) -> KillOrder:
    return KillOrder(scope=scope, value=value, reason="suspected theft", actor="operator:uid=0")


def is_active(world: World, issued: Issued) -> bool:
    assert issued.credential is not None
    token = str(issued.credential.reveal()["access_token"])
    return world.services.tokens.introspect(caller(REPORTS_API), token)["active"] is True


@pytest.mark.parametrize(
    ("scope", "value"),
    [
        (KillScope.IDENTITY, str(CHURN)),
        (KillScope.OWNER, CHURN_OWNER),
        (KillScope.RESOURCE, "reports-api"),
    ],
)
async def test_a_kill_stops_issue_and_introspection_at_once(
    world: World, scope: KillScope, value: str
) -> None:
    task = await world.open_task()
    issued = await world.ask(task, "reports-api", "write")
    assert is_active(world, issued)
    result = await world.services.kill.kill(order(scope, value))
    assert result.leases_moved + result.tasks_ended >= 1
    assert not is_active(world, issued)
    with pytest.raises((IdentityRefused, Exception)) as refused:
        await world.ask(await world.open_task(), "reports-api", "write")
    assert type(refused.value).__name__ in {"IdentityRefused", "TaskClosed"}


async def test_a_killed_identitys_database_login_is_proven_dead(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    result = await world.services.kill.kill(order(KillScope.IDENTITY, CHURN))
    assert (result.tasks_ended, result.leases_moved) == (1, 1)
    await world.drain()
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert (lease.state, lease.cause) == (LeaseState.REVOKED, Cause.KILL)
    assert world.server.logins == {}


async def test_a_kill_of_a_task_ends_it(world: World) -> None:
    task = await world.open_task()
    await world.ask(task)
    result = await world.services.kill.kill(order(KillScope.TASK, task.id))
    assert (result.tasks_ended, result.leases_moved) == (1, 1)
    await world.drain()
    assert world.server.logins == {}


@pytest.mark.parametrize("scope", [KillScope.IDENTITY, KillScope.OWNER, KillScope.RESOURCE])
async def test_a_kill_with_a_typing_error_says_so(world: World, scope: KillScope) -> None:
    with pytest.raises(InvalidRequest, match="nothing was killed"):
        await world.services.kill.kill(order(scope, "mistyped"))


async def test_a_lifted_kill_lets_the_identity_ask_again_and_revives_nothing(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task, "reports-api", "write")
    await world.services.kill.kill(order(KillScope.IDENTITY, CHURN))
    assert await world.services.kill.lift(order(KillScope.IDENTITY, CHURN))
    assert not is_active(world, issued)
    again = await world.ask(await world.open_task(), "reports-api", "write")
    assert is_active(world, again)


async def test_a_suspended_identity_gets_nothing_and_loses_what_it_has(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    await world.services.inventory.suspend(CHURN, reason="leak", actor="operator:uid=0")
    with pytest.raises(IdentityRefused):
        await world.ask(task)
    await world.drain()
    assert world.server.logins == {}
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert lease.state is LeaseState.REVOKED
    await world.services.inventory.resume(CHURN, reason="mended", actor="operator:uid=0")
    assert (await world.ask(await world.open_task())).credential is not None


async def test_every_caller_is_in_the_inventory_from_first_sight(world: World) -> None:
    with pytest.raises(IdentityRefused):
        await world.services.admission.admit(caller(STRANGER))
    seen = world.services.inventory.get(STRANGER)
    assert seen.is_orphan
    assert seen.first_seen_ms == world.clock.now_ms()
    await world.services.admission.admit(caller(CHURN))
    known = world.services.inventory.get(CHURN)
    assert (known.owner, known.team, known.environment) == (CHURN_OWNER, "analytics", "prod")


async def test_an_orphan_given_an_owner_is_admitted(world: World) -> None:
    with pytest.raises(IdentityRefused):
        await world.services.admission.admit(caller(STRANGER))
    await world.services.inventory.set_owner(
        STRANGER, owner="zo@example.com", team="support", environment="prod", actor="operator:uid=0"
    )
    facts = await world.services.admission.admit(caller(STRANGER))
    assert facts.owner == "zo@example.com"


async def test_last_use_is_written_at_most_once_a_minute(world: World) -> None:
    await world.services.admission.admit(caller(CHURN))
    first = world.services.inventory.get(CHURN).last_used_ms
    world.clock.advance(seconds=59)
    await world.services.admission.admit(caller(CHURN))
    assert world.services.inventory.get(CHURN).last_used_ms == first
    world.clock.advance(seconds=2)
    await world.services.admission.admit(caller(CHURN))
    assert world.services.inventory.get(CHURN).last_used_ms == world.clock.now_ms()


async def test_introspection_tells_only_audience_and_holder(world: World) -> None:
    issued = await world.ask(await world.open_task(), "reports-api", "write")
    assert issued.credential is not None
    token = str(issued.credential.reveal()["access_token"])
    for who, active in ((REPORTS_API, True), (CHURN, True), (SUPPORT, False)):
        assert world.services.tokens.introspect(caller(who), token)["active"] is active
    assert world.services.tokens.introspect(caller(REPORTS_API), token[:-2] + "AA") == {"active": False}
    assert world.services.tokens.introspect(caller(REPORTS_API), "nonsense") == {"active": False}


async def test_a_task_end_makes_its_tokens_inactive_in_that_commit(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task, "reports-api", "write")
    await world.end(task)
    assert not is_active(world, issued)


# --- stuck leases ------------------------------------------------------------------------------


async def stuck_lease(world: World) -> Issued:
    task = await world.open_task()
    issued = await world.ask(task, ttl_seconds=3600)
    world.server.down = True
    await world.end(task)
    for _ in range(20):
        await world.drain()
        world.clock.advance(seconds=60)
    assert world.services.leases.get(issued.lease.id).stuck
    return issued


async def test_an_operator_retries_a_stuck_lease_at_once(world: World) -> None:
    issued = await stuck_lease(world)
    assert [f.check_id for f in findings.open_findings(world.store.reader)] == ["lease-stuck"]
    world.server.clear()
    await world.services.leases.retry(issued.lease.id, actor="operator:uid=0")
    await world.drain()
    assert world.services.leases.get(issued.lease.id).state is LeaseState.REVOKED
    assert findings.open_findings(world.store.reader) == []


async def test_only_a_stuck_lease_can_be_abandoned(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    with pytest.raises(InvalidRequest):
        await world.services.leases.abandon(issued.lease.id, reason="gone", actor="operator:uid=0")
    world.server.down = True
    await world.end(task)
    with pytest.raises(InvalidRequest, match="stuck"):
        await world.services.leases.abandon(issued.lease.id, reason="gone", actor="operator:uid=0")


async def test_an_abandoned_lease_is_never_called_revoked(world: World) -> None:
    issued = await stuck_lease(world)
    lease = await world.services.leases.abandon(
        issued.lease.id, reason="server scrapped", actor="operator:uid=0"
    )
    assert lease.state is LeaseState.ABANDONED
    assert lease.evidence is not None
    assert "not proven" in str(lease.evidence["basis"])


# --- the scan, both ways -----------------------------------------------------------------------


async def test_the_scan_adopts_a_live_object_without_a_row(world: World) -> None:
    lost = LeaseId.new()
    name = backend_name(world.store.instance, lost)
    now_ms = world.clock.now_ms()
    world.server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**6))
    await world.services.reconcile.scan_all()
    assert world.services.leases.get(lost).cause is Cause.ORPHAN
    await world.drain()
    assert world.server.logins == {}
    assert world.services.leases.get(lost).state is LeaseState.REVOKED


async def test_the_scan_adopts_an_object_that_came_back_after_its_lease_ended(world: World) -> None:
    task = await world.open_task()
    issued = await world.ask(task)
    await world.end(task)
    await world.drain()
    name = issued.lease.backend_name
    now_ms = world.clock.now_ms()
    world.server.tombstones.clear()
    world.server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**6))
    await world.services.reconcile.scan_all()
    await world.services.reconcile.scan_all()
    await world.drain()
    assert world.server.logins == {}
    orphans = world.store.reader.execute("SELECT count(*) FROM leases WHERE cause = 'orphan'").fetchone()
    assert orphans == (1,)


async def test_the_scan_leaves_alone_what_is_live_and_known(world: World) -> None:
    issued = await world.ask(await world.open_task())
    world.clock.advance(seconds=60)
    await world.services.reconcile.scan_all()
    await world.drain()
    assert world.services.leases.get(issued.lease.id).state is LeaseState.ACTIVE
    assert len(world.server.logins) == 1


async def test_the_scan_leaves_another_deployments_objects_alone(world: World) -> None:
    name = backend_name(InstanceTag.new(), LeaseId.new())
    world.server.create(name, FakeLogin("p", "read", 0, world.clock.now_ms() + 10**6))
    await world.services.reconcile.scan_all()
    await world.drain()
    assert name in world.server.logins


async def test_an_active_lease_whose_object_is_gone_closes_with_a_finding(world: World) -> None:
    issued = await world.ask(await world.open_task())
    world.server.logins.clear()
    world.clock.advance(seconds=60)
    await world.services.reconcile.scan_all()
    await world.drain()
    lease = world.services.leases.get(issued.lease.id)
    assert (lease.state, lease.cause) == (LeaseState.REVOKED, Cause.OBJECT_GONE)
    assert "credential-gone" in [f.check_id for f in findings.open_findings(world.store.reader)]
