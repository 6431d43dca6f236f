"""What the sweeper owes: backoff, stuck, urgency, claims, breakers, and clocks that jump."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.fake import FakeAdapter, FakeLogin, FakeServer, Fault, Operation
from broker.core.clock import ManualClock
from broker.core.errors import BackendUnavailable, LeaseLost, MintFailed, TaskClosed
from broker.core.ids import LeaseId, backend_name
from broker.core.lease import Cause, Lease, LeaseState, Urgency
from broker.service import moves
from broker.service.backends import FAILURES_MAX, OPEN_MS, Backend, Breaker
from broker.service.kill import KillOrder
from broker.service.limits import BACKOFF_SECONDS_MAX, STUCK_AFTER_SECONDS, STUCK_RETRY_SECONDS, Limits
from inventory import findings, identities, kills, ledger, meta
from inventory.kills import Kill, KillScope
from tests.support.world import CHURN, World, caller, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from broker.core.task import Task
    from broker.service.issue import Issued
    from inventory.store.writer import Transaction

JUMP_SECONDS = 600
OPERATOR = "operator:uid=0"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as built:
        yield built


@pytest.fixture
async def unfenced(tmp_path: Path) -> AsyncIterator[World]:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock, server=FakeServer(clock, strong_fence=False)) as built:
        yield built


def lease_of(world: World, what: Issued | LeaseId | Lease) -> Lease:
    lease_id = what if isinstance(what, LeaseId) else what.id if isinstance(what, Lease) else what.lease.id
    lease = ledger.get(world.store.reader, lease_id)
    assert lease is not None
    return lease


def works(world: World, issued: Issued) -> bool:
    assert issued.credential is not None
    fields = issued.credential.reveal()
    return world.server.log_in(str(fields["username"]), str(fields["password"])) is not None


async def until(true: Callable[[], bool]) -> None:
    """Let the loop run until something is true that no event tells of."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  what is waited for is a row, written by a thread
            await asyncio.sleep(0)


def open_checks(world: World) -> list[str]:
    return [finding.check_id for finding in findings.open_findings(world.store.reader)]


def moves_of(world: World, lease: Lease) -> int:
    row = world.store.reader.execute(
        "SELECT count(*) FROM audit WHERE kind = 'lease.moved' AND lease_id = ?", (lease.id,)
    ).fetchone()
    return int(row[0])


async def ending(world: World, **how: int) -> Issued:
    """A lease whose task has ended, and that the sweeper has not touched yet."""
    task = await world.open_task()
    issued = await world.ask(task, **how)  # type: ignore[arg-type]  # test shorthand
    await world.end(task)
    return issued


# --- backoff and stuck ---------------------------------------------------------------------------


async def test_backoff_grows_with_full_jitter_between_bounds_and_ends_in_stuck(world: World) -> None:
    issued = await ending(world)
    world.server.down = True
    began_ms = world.clock.now_ms()
    attempts = 0
    while not (lease := lease_of(world, issued)).stuck:
        due_ms = lease.next_action_ms
        assert due_ms is not None
        if attempts:
            ceiling = min(BACKOFF_SECONDS_MAX, 2 ** (attempts - 1))
            wait_ms = due_ms - world.clock.now_ms()
            assert 0.1 * ceiling * 1000 - 1 <= wait_ms <= ceiling * 1000
        # An open breaker lets one trial through per period; waiting for that is no attempt.
        world.clock.advance(ms=max(0, due_ms - world.clock.now_ms()) + OPEN_MS)
        await world.drain()
        attempts += 1
        assert lease_of(world, issued).attempts == attempts
        assert attempts < 100
    assert world.clock.now_ms() - began_ms >= STUCK_AFTER_SECONDS * 1000
    assert lease.next_action_ms == world.clock.now_ms() + STUCK_RETRY_SECONDS * 1000
    assert lease.state is LeaseState.REVOKE_PENDING
    assert open_checks(world) == [moves.FINDING_STUCK]


async def make_stuck(world: World) -> Issued:
    issued = await ending(world, ttl_seconds=3600)
    world.server.down = True
    for _ in range(20):
        await world.drain()
        world.clock.advance(seconds=60)
    assert lease_of(world, issued).stuck
    return issued


async def test_a_stuck_lease_is_tried_every_fifteen_minutes_for_ever(world: World) -> None:
    issued = await make_stuck(world)
    for _ in range(8):
        before = lease_of(world, issued).attempts
        world.clock.advance(seconds=STUCK_RETRY_SECONDS - 61)
        await world.drain()
        world.clock.advance(seconds=62)
        await world.drain()
        assert lease_of(world, issued).attempts == before + 1
    world.server.clear()
    world.clock.advance(seconds=STUCK_RETRY_SECONDS)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED
    assert not works(world, issued)
    assert open_checks(world) == []


async def test_a_clock_that_jumps_back_unsays_no_alert(world: World) -> None:
    issued = await make_stuck(world)
    world.clock.advance(seconds=-STUCK_AFTER_SECONDS * 3)
    await world.services.leases.retry(issued.lease.id, actor=OPERATOR)
    await world.drain()
    assert lease_of(world, issued).stuck
    world.server.clear()
    world.clock.advance(ms=OPEN_MS)
    await world.services.leases.retry(issued.lease.id, actor=OPERATOR)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED
    assert open_checks(world) == []


class Stubborn(FakeServer):
    """A backend that accepts every revocation and does nothing."""

    stubborn = True

    def destroy(self, name: str) -> None:
        if not self.stubborn:
            super().destroy(name)


async def test_a_backend_that_accepts_and_does_nothing_gets_its_lease_stuck_and_noticed(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    server = Stubborn(clock)
    async with opened(tmp_path, clock=clock, server=server) as world:
        issued = await ending(world, ttl_seconds=3600)
        for _ in range(40):
            await world.drain()
            clock.advance(seconds=60)
        lease = lease_of(world, issued)
        assert lease.state is LeaseState.REVOKE_PENDING
        assert lease.stuck
        assert lease.last_error == "still present after revocation"
        assert open_checks(world) == [moves.FINDING_STUCK]
        server.stubborn = False
        await world.services.leases.retry(lease.id, actor=OPERATOR)
        await world.drain()
        assert lease_of(world, issued).state is LeaseState.REVOKED
        assert open_checks(world) == []


async def test_a_backend_that_lost_its_fence_is_revoked_anew_and_not_asked_for_ever(world: World) -> None:
    """A restore from an older backup: the tombstone is gone, so verification cannot say anything."""
    issued = await ending(world)
    world.server.inject(Operation.VERIFY, Fault.FAIL_BEFORE)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.VERIFYING
    world.server.tombstones.clear()
    world.clock.advance(seconds=120)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED


async def test_a_lease_that_cannot_even_be_tried_is_counted_and_becomes_stuck(world: World) -> None:
    """What was sealed cannot be unsealed: the key file was exchanged."""
    issued = await ending(world, ttl_seconds=3600)
    await world.store.writer.run(
        lambda tx: tx.execute("UPDATE leases SET sealed = x'00' WHERE id = ?", (issued.lease.id,))
    )
    for _ in range(20):
        await world.drain()
        world.clock.advance(seconds=60)
    lease = lease_of(world, issued)
    assert (lease.stuck, lease.last_error) == (True, "ValueError")
    assert open_checks(world) == [moves.FINDING_STUCK]


# --- one does not hold up the other --------------------------------------------------------------


def second_backend(world: World) -> FakeServer:
    """Configure another backend beside the first, on a server of its own."""
    server = FakeServer(world.clock)
    adapter = FakeAdapter(name="other", instance=world.store.instance, server=server)
    backend = Backend(adapter, "fake", [{"scope": "read"}], world.clock, world.ctx.limits)
    world.ctx.backends._by_name[backend.name] = backend
    return server


async def orphan(world: World, server: FakeServer, lease_id: LeaseId) -> None:
    now_ms = world.clock.now_ms()
    name = backend_name(world.store.instance, lease_id)
    server.create(name, FakeLogin("p", "read", now_ms - 60_000, now_ms + 10**9))
    await world.services.reconcile.scan_all()


async def test_a_dead_backend_starves_no_other(tmp_path: Path) -> None:
    limits = Limits(require_owner=True, mint_deadline_seconds=20, end_concurrency=1)
    async with opened(tmp_path, limits=limits) as world:
        other = second_backend(world)
        task = await world.open_task()
        for _ in range(5):
            await world.ask(task)
        await world.end(task)
        world.server.down = True
        lost = LeaseId.new()
        await orphan(world, other, lost)
        await world.drain()
        assert lease_of(world, lost).state is LeaseState.REVOKED
        assert other.logins == {}
        assert len(world.server.logins) == 5


async def test_a_row_that_breaks_a_backends_sweep_holds_up_no_other_backend(world: World) -> None:
    other = second_backend(world)
    issued = await ending(world)
    await world.store.writer.run(
        lambda tx: tx.execute("UPDATE leases SET cause = 'unheard of' WHERE id = ?", (issued.lease.id,))
    )
    lost = LeaseId.new()
    await orphan(world, other, lost)
    await world.drain()
    assert lease_of(world, lost).state is LeaseState.REVOKED


async def test_the_sweeper_outlives_whatever_goes_wrong_in_it(world: World) -> None:
    issued = await ending(world)
    await world.store.writer.run(
        lambda tx: tx.execute("UPDATE tasks SET state = 'open', deadline_ms = 0, end_cause = 'unheard of'")
    )
    world.services.sweeper.start()
    world.ctx.sweep_due.set()
    await until(lambda: world.services.sweeper._last_ms is not None)
    await world.store.writer.run(
        lambda tx: tx.execute("UPDATE tasks SET state = 'ended', end_cause = 'caller'")
    )
    world.ctx.sweep_due.set()
    await world.ctx.watch.wait([issued.lease.id], seconds=20)
    assert lease_of(world, issued).state is LeaseState.REVOKED


async def test_the_most_urgent_goes_first(tmp_path: Path) -> None:
    limits = Limits(require_owner=True, mint_deadline_seconds=20, end_concurrency=1)
    async with opened(tmp_path, limits=limits) as world:
        long = await world.open_task()
        expiring = await world.ask(long, ttl_seconds=60)
        ended_task, killed_task = await world.open_task(), await world.open_task()
        ended, killed = await world.ask(ended_task), await world.ask(killed_task)
        world.clock.advance(seconds=61)
        await world.services.sweeper._end_due_leases(world.ctx.backends.of("orders-postgres"))
        await world.end(ended_task)
        order = KillOrder(scope=KillScope.TASK, value=killed_task.id, reason="theft", actor=OPERATOR)
        await world.services.kill.kill(order)
        urgencies = [lease_of(world, issued).urgency for issued in (expiring, ended, killed)]
        assert urgencies == [Urgency.EXPIRY, Urgency.TASK_END, Urgency.COMPROMISE]
        await world.drain()
        revoked = [name for operation, name in world.server.calls if operation is Operation.REVOKE]
        assert revoked == [issued.lease.backend_name for issued in (killed, ended, expiring)]


# --- claims --------------------------------------------------------------------------------------


async def test_a_claim_that_ran_out_is_taken_over_and_its_first_holder_changes_nothing(world: World) -> None:
    """I8, with two workers on one lease."""
    issued = await ending(world)
    world.server.inject(Operation.REVOKE, Fault.HANG_AFTER)
    sweeper = world.services.sweeper
    await sweeper.sweep_once()
    await world.server.until_hanging()
    world.clock.advance(seconds=world.ctx.limits.claim_visibility_seconds)
    await sweeper.sweep_once()
    await until(lambda: lease_of(world, issued).state is LeaseState.REVOKED)
    proven, written = lease_of(world, issued), moves_of(world, issued.lease)
    world.server.release()
    await world.drain()
    assert lease_of(world, issued) == proven
    assert moves_of(world, issued.lease) == written


async def test_a_claimed_lease_is_not_claimed_twice(world: World) -> None:
    await ending(world)
    world.server.inject(Operation.REVOKE, Fault.HANG_BEFORE)
    await world.services.sweeper.sweep_once()
    await world.server.until_hanging()
    await world.services.sweeper.sweep_once()
    assert [operation for operation, _ in world.server.calls].count(Operation.REVOKE) == 1
    world.server.release()
    await world.drain()


async def test_what_a_dead_process_had_claimed_is_due_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        issued = await ending(world)
        await world.store.writer.run(
            lambda tx: ledger.claim_due(
                tx,
                "orders-postgres",
                frozenset({LeaseState.REVOKE_PENDING}),
                now_ms=world.clock.now_ms(),
                visibility_ms=60_000,
                limit=10,
            )
        )
        clock, server = world.clock, world.server
    async with opened(tmp_path, clock=clock, server=server) as again:
        await again.drain()
        assert lease_of(again, issued).state is LeaseState.REVOKED


# --- the second look -----------------------------------------------------------------------------


async def maybe_minted(world: World, fault: Fault = Fault.LATE) -> LeaseId:
    world.server.inject(Operation.MINT, fault)
    with pytest.raises(MintFailed) as failed:
        await world.ask(await world.open_task())
    assert failed.value.lease_id is not None
    return failed.value.lease_id


async def test_an_operator_who_hurries_cannot_skip_the_second_look(unfenced: World) -> None:
    lease_id = await maybe_minted(unfenced)
    await unfenced.drain()
    assert lease_of(unfenced, lease_id).state is LeaseState.VERIFYING
    await unfenced.services.leases.retry(lease_id, actor=OPERATOR)
    await unfenced.drain()
    assert lease_of(unfenced, lease_id).state is LeaseState.VERIFYING
    unfenced.server.land()
    assert unfenced.server.logins
    for _ in range(3):
        unfenced.clock.advance(seconds=40)
        await unfenced.drain()
    assert unfenced.server.logins == {}
    assert lease_of(unfenced, lease_id).state is LeaseState.REVOKED


async def test_the_second_look_waits_for_mints_that_have_not_even_begun(unfenced: World) -> None:
    """Every slot is taken, the task ends, the revocation is accepted: the mint may still come."""
    task = await unfenced.open_task()
    backend = unfenced.ctx.backends.of("orders-postgres")
    for _ in range(unfenced.ctx.limits.mint_concurrency):
        await backend._mint_slots.acquire()
    asking = asyncio.create_task(unfenced.ask(task))
    await until(lambda: bool(ledger.of_task(unfenced.store.reader, task.id)))
    (intent,) = ledger.of_task(unfenced.store.reader, task.id)
    await unfenced.end(task)
    await unfenced.drain()
    unfenced.clock.advance(seconds=backend.capabilities.t_inflight_seconds + 1)
    await unfenced.drain()
    assert lease_of(unfenced, intent).state is LeaseState.VERIFYING

    for _ in range(unfenced.ctx.limits.mint_concurrency):
        backend._mint_slots.release()
    with pytest.raises(LeaseLost):
        await asking
    for _ in range(3):
        unfenced.clock.advance(seconds=40)
        await unfenced.drain()
    assert unfenced.server.logins == {}
    assert lease_of(unfenced, intent).state is LeaseState.REVOKED


async def test_no_mint_begins_after_its_leases_deadline(unfenced: World) -> None:
    """The commit of the intent took so long that the sweeper may be looking already."""
    writer = unfenced.store.writer
    run = writer.run

    async def slow(unit: object) -> object:
        result = await run(unit)  # type: ignore[arg-type]  # passed through
        unfenced.clock.advance(seconds=unfenced.ctx.limits.mint_deadline_seconds + 1)
        return result

    task = await unfenced.open_task()
    writer.run = slow  # type: ignore[method-assign,assignment]  # this instance only
    with pytest.raises(MintFailed):
        await unfenced.ask(task)
    assert Operation.MINT not in [operation for operation, _ in unfenced.server.calls]


async def test_a_lost_mint_is_undone_at_once(unfenced: World) -> None:
    """Rule 2: zero rows means drop the secret and revoke; the proof follows at the second look."""
    unfenced.server.inject(Operation.MINT, Fault.HANG_AFTER)
    task = await unfenced.open_task()
    asking = asyncio.create_task(unfenced.ask(task))
    await unfenced.server.until_hanging()
    await unfenced.end(task)
    unfenced.server.release()
    with pytest.raises(LeaseLost):
        await asking
    assert unfenced.server.logins == {}


async def test_an_acknowledged_mint_needs_no_second_look(unfenced: World) -> None:
    issued = await ending(unfenced)
    await unfenced.drain()
    assert lease_of(unfenced, issued).state is LeaseState.REVOKED


async def test_a_failed_two_step_mint_is_revoked_at_once_by_its_handle(tmp_path: Path) -> None:
    async with opened(tmp_path, two_step=True) as world:
        for fault in (Fault.FAIL_AFTER, Fault.REFUSE):
            lease_id = await maybe_minted(world, fault)
            lease = lease_of(world, lease_id)
            assert lease.state is LeaseState.REVOKE_PENDING, "a handle exists: nothing proves that it is bare"
            assert lease.handle is not None
            await world.drain()
            assert lease_of(world, lease_id).state is LeaseState.REVOKED
        assert world.server.logins == {}


# --- what overtakes a mint -----------------------------------------------------------------------


def mark_killed(tx: Transaction) -> None:
    """The first commit of a kill, of which the leases move only later, in pages."""
    kills.mark(tx, Kill(KillScope.IDENTITY, CHURN, "theft", OPERATOR, 1))


def mark_suspended(tx: Transaction) -> None:
    from broker.core.facts import Lifecycle  # noqa: PLC0415  only here

    known = identities.get(tx, CHURN)
    assert known is not None
    identities.set_lifecycle(tx, known, Lifecycle.SUSPENDED, at_ms=1, actor=OPERATOR, reason="leak")


@pytest.mark.parametrize(
    ("mark", "cause"), [(mark_killed, Cause.KILL), (mark_suspended, Cause.SUSPENDED)], ids=["kill", "suspend"]
)
async def test_a_mint_that_a_kill_overtakes_is_not_released(world: World, mark: object, cause: Cause) -> None:
    world.server.inject(Operation.MINT, Fault.HANG_AFTER)
    task = await world.open_task()
    asking = asyncio.create_task(world.ask(task))
    await world.server.until_hanging()
    await world.store.writer.run(mark)  # type: ignore[arg-type]  # a unit
    world.server.release()
    with pytest.raises(LeaseLost) as lost:
        await asking
    assert lost.value.lease_id is not None
    assert lease_of(world, lost.value.lease_id).cause is cause
    await world.drain()
    assert world.server.logins == {}


async def test_a_mint_that_its_own_expiry_overtakes_is_not_released(world: World) -> None:
    world.server.inject(Operation.MINT, Fault.HANG_AFTER)
    task = await world.open_task()
    asking = asyncio.create_task(world.ask(task, ttl_seconds=60))
    await world.server.until_hanging()
    world.clock.advance(seconds=60)
    world.server.release()
    with pytest.raises(LeaseLost):
        await asking
    await world.drain()
    assert world.server.logins == {}


@pytest.mark.parametrize("mark", [mark_killed, mark_suspended], ids=["kill", "suspend"])
async def test_a_kill_that_a_crash_cut_short_is_finished_at_the_next_start(
    tmp_path: Path, mark: object
) -> None:
    async with opened(tmp_path) as world:
        task = await world.open_task()
        issued = await world.ask(task)
        await world.store.writer.run(mark)  # type: ignore[arg-type]  # a unit
        clock, server = world.clock, world.server
    async with opened(tmp_path, clock=clock, server=server) as again:
        assert works(again, issued)
        await again.drain()
        assert not works(again, issued)
        assert again.services.tasks.get(caller(CHURN), task.id).state == "ended"


async def test_a_lease_never_outlives_its_tasks_deadline(world: World) -> None:
    task = await world.open_task(deadline_seconds=60)
    world.clock.advance(ms=59_500)
    with pytest.raises(TaskClosed, match="within a second"):
        await world.ask(task)


# --- breakers ------------------------------------------------------------------------------------


def open_breaker(clock: ManualClock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES_MAX):
        assert not breaker.is_open
        breaker.failed()
    assert breaker.is_open
    return breaker


def test_an_open_breaker_admits_one_trial_per_period() -> None:
    clock = ManualClock()
    breaker = open_breaker(clock)
    for _ in range(3):
        assert not breaker.admits()
        clock.advance(ms=OPEN_MS - 1)
        assert not breaker.admits()
        clock.advance(ms=1)
        assert breaker.admits()
        assert not breaker.admits()
        breaker.failed()
    breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker(ManualClock())
    for _ in range(3 * FAILURES_MAX):
        for _ in range(FAILURES_MAX - 1):
            breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open


@pytest.mark.parametrize("seconds", [-JUMP_SECONDS, JUMP_SECONDS])
def test_an_open_breaker_waits_for_no_clock_to_catch_up(seconds: int) -> None:
    clock = ManualClock()
    breaker = open_breaker(clock)
    clock.advance(seconds=seconds)
    assert breaker.admits()
    assert not breaker.admits()
    clock.advance(ms=OPEN_MS)
    assert breaker.admits()


async def test_leases_that_are_lost_do_not_count_against_the_backend(tmp_path: Path) -> None:
    """In two steps the ledger speaks up between the backend's calls: that is no failure of the backend."""
    async with opened(tmp_path, two_step=True) as world:
        backend = world.ctx.backends.of("orders-postgres")
        assert isinstance(backend.adapter, FakeAdapter)
        prepare = backend.adapter.prepare

        async def overtaken(request: object) -> str | None:
            handle = await prepare(request)  # type: ignore[arg-type]  # passed through
            await world.end(tasks[-1])
            return handle

        backend.adapter.prepare = overtaken  # type: ignore[method-assign,assignment]  # this instance only
        tasks: list[Task] = []
        for _ in range(FAILURES_MAX + 1):
            tasks.append(await world.open_task())
            with pytest.raises(LeaseLost):
                await world.ask(tasks[-1])
        assert not backend.breaker.is_open


async def test_a_backend_that_only_hangs_counts_as_down(world: World) -> None:
    backend = world.ctx.backends.of("orders-postgres")
    assert isinstance(backend.adapter, FakeAdapter)
    backend.adapter._call_seconds = 0.01
    task = await world.open_task()
    for _ in range(FAILURES_MAX):
        world.server.inject(Operation.MINT, Fault.HANG_BEFORE)
        with pytest.raises(MintFailed):
            await world.ask(task)
    with pytest.raises(BackendUnavailable):
        await world.ask(task)


# --- clocks that jump ----------------------------------------------------------------------------


async def test_a_retry_waits_for_no_clock_that_jumped_back(world: World) -> None:
    issued = await ending(world)
    world.server.inject(Operation.REVOKE, Fault.FAIL_BEFORE)
    await world.drain()
    assert lease_of(world, issued).attempts == 1
    world.clock.advance(seconds=-JUMP_SECONDS)
    await world.drain()
    world.clock.advance(seconds=2)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED
    assert not works(world, issued)


async def test_nor_for_one_that_jumped_while_the_broker_was_down(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        issued = await ending(world)
        world.clock.advance(seconds=10 * 365 * 86_400)
        world.server.inject(Operation.REVOKE, Fault.FAIL_BEFORE)
        await world.drain()
        clock, server = world.clock, world.server
    clock.advance(seconds=-10 * 365 * 86_400)
    async with opened(tmp_path, clock=clock, server=server) as again:
        await again.drain()
        assert lease_of(again, issued).state is LeaseState.REVOKED


async def test_a_clock_that_jumps_forward_ends_leases_early_and_nothing_else(world: World) -> None:
    issued = await world.ask(await world.open_task(), ttl_seconds=300)
    world.clock.advance(seconds=JUMP_SECONDS)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED
    again = await world.ask(await world.open_task(), ttl_seconds=300)
    assert works(world, again)


async def test_a_clock_that_jumps_back_keeps_what_has_ended_ended(world: World) -> None:
    task = await world.open_task(deadline_seconds=300)
    issued = await world.ask(task, ttl_seconds=300)
    world.clock.advance(seconds=301)
    await world.drain()
    world.clock.advance(seconds=-JUMP_SECONDS)
    await world.drain()
    assert lease_of(world, issued).state is LeaseState.REVOKED
    assert not works(world, issued)
    with pytest.raises(TaskClosed):
        await world.ask(task)


async def test_the_scan_finds_what_a_jump_let_through_without_a_fence(unfenced: World) -> None:
    """The one case the second look cannot see: the clock jumped past it while a mint was in flight."""
    lease_id = await maybe_minted(unfenced)
    await unfenced.drain()
    unfenced.clock.advance(seconds=JUMP_SECONDS)
    await unfenced.drain()
    assert lease_of(unfenced, lease_id).state is LeaseState.REVOKED
    unfenced.server.land()
    assert unfenced.server.logins
    unfenced.clock.advance(seconds=JUMP_SECONDS)
    await unfenced.services.reconcile.scan_all()
    await unfenced.drain()
    assert unfenced.server.logins == {}


async def test_a_job_runs_once_per_period_and_waits_for_no_clock_that_jumped_back(world: World) -> None:
    async def claim() -> bool:
        now_ms = world.clock.now_ms()
        return await world.store.writer.run(
            lambda tx: meta.claim_job(tx, "scan", now_ms=now_ms, every_ms=3_600_000)
        )

    assert await claim()
    assert not await claim()
    world.clock.advance(seconds=3599)
    assert not await claim()
    world.clock.advance(seconds=1)
    assert await claim()
    world.clock.advance(seconds=-JUMP_SECONDS)
    assert await claim()
    assert not await claim()


async def test_a_counter_hands_out_no_number_twice(world: World) -> None:
    blocks = [
        await world.store.writer.run(lambda tx: meta.reserve_block(tx, "numbers", 10)) for _ in range(3)
    ]
    assert blocks == [0, 10, 20]


# --- what only time ends -------------------------------------------------------------------------


async def test_an_orphan_nobody_knows_is_not_declared_expired_while_it_may_live(world: World) -> None:
    lost = LeaseId.new()
    world.server.inject(Operation.REVOKE, *[Fault.FAIL_BEFORE] * 50)
    await orphan(world, world.server, lost)
    lease = lease_of(world, lost)
    longest_ms = world.ctx.backends.of(lease.adapter).capabilities.ttl_seconds_max * 1000
    assert lease.not_after_ms >= lease.created_ms + longest_ms
