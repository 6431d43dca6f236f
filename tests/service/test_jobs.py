from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from adapters.fake import FakeLogin
from broker.core.ids import LeaseId, backend_name
from broker.service.audit_heads import AuditHeads
from broker.service.jobs import TICK_SECONDS, Jobs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.world import World

HOUR = 3600


@pytest.fixture
def jobs(world: World, tmp_path: Path) -> Jobs:
    heads = AuditHeads(world.ctx, tmp_path / "heads")
    return Jobs(world.services, heads, scan_seconds=HOUR, sign_seconds=1.0)


async def tick(jobs: Jobs, name: str) -> None:
    """What APScheduler does at each tick of a job."""
    job: Any = jobs._scheduler.get_job(name)
    await job.func()


def test_every_job_is_asked_often_whether_it_is_due(jobs: Jobs) -> None:
    intervals = [job.trigger.interval.total_seconds() for job in jobs._scheduler.get_jobs()]
    assert len(intervals) >= 4
    assert max(intervals) <= TICK_SECONDS


def put_orphan(world: World) -> None:
    now_ms = world.clock.now_ms()
    name = backend_name(world.store.instance, LeaseId.new())
    world.server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**9))


def orphans(world: World) -> int:
    row = world.store.reader.execute("SELECT count(*) FROM leases WHERE cause = 'orphan'").fetchone()
    return int(row[0])


async def test_the_scan_runs_hourly_however_the_ticks_fall(world: World, jobs: Jobs) -> None:
    scans = 0
    for _ in range(3 * HOUR // TICK_SECONDS):
        put_orphan(world)
        before = orphans(world)
        await tick(jobs, "scan")
        scans += orphans(world) > before
        world.clock.advance(ms=TICK_SECONDS * 1000 - 1)
    assert scans == 3


async def test_a_broker_restarted_within_the_hour_still_scans_when_the_hour_is_over(
    world: World, jobs: Jobs, tmp_path: Path
) -> None:
    await tick(jobs, "scan")
    world.clock.advance(seconds=HOUR - 1)
    again = Jobs(
        world.services, AuditHeads(world.ctx, tmp_path / "more"), scan_seconds=HOUR, sign_seconds=1.0
    )
    put_orphan(world)
    await tick(again, "scan")
    assert orphans(world) == 0
    world.clock.advance(seconds=1)
    await tick(again, "scan")
    assert orphans(world) == 1


async def test_a_rotated_key_is_audited_with_what_is_published(world: World, jobs: Jobs) -> None:
    before = world.keys.token_keys()
    await tick(jobs, "token-keys")
    assert world.keys.token_keys() is before
    world.clock.advance(seconds=7 * 86_400)
    await tick(jobs, "token-keys")
    assert len(world.keys.token_keys()) > len(before)
    kinds = world.store.reader.execute("SELECT count(*) FROM audit WHERE kind = 'key.rotated'").fetchone()
    assert kinds == (1,)


async def test_old_idempotency_keys_are_forgotten_and_young_ones_kept(world: World, jobs: Jobs) -> None:
    task = await world.open_task()
    await world.ask(task, "reports-api", "read", key="old")
    world.clock.advance(seconds=24 * HOUR - 1)
    await world.ask(await world.open_task(), "reports-api", "read", key="young")
    world.clock.advance(seconds=1)
    await tick(jobs, "idempotency-purge")
    keys = world.store.reader.execute("SELECT key FROM idempotency").fetchall()
    assert keys == [("young",)]


async def test_a_job_whose_ledger_is_down_is_postponed_and_raises_nothing(world: World, jobs: Jobs) -> None:
    world.store.writer._closing = True
    await tick(jobs, "scan")
    world.store.writer._closing = False
    put_orphan(world)
    await tick(jobs, "scan")
    assert orphans(world) == 1
