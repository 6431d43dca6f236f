"""The sweeper's queue as the ledger keeps it, and the cost of the queries every request or sweep makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from broker.core.lease import ENDING, Lease, LeaseState, Urgency
from inventory import identities, kills, ledger, tasks
from tests.support.ledger import AGENT, NOW_MS, Immediate, Opened, a_lease

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


BEGINNING = frozenset({LeaseState.INTENT, LeaseState.PREPARED, LeaseState.ACTIVE})


def put(path: Path, *leases: Lease) -> None:
    with Immediate(path) as tx:
        for lease in leases:
            tx.execute(ledger._INSERT, ledger._to_row(lease))


def pending(urgency: Urgency = Urgency.EXPIRY, due_ms: int = NOW_MS, **changes: Any) -> Lease:
    return a_lease(
        changes.pop("state", LeaseState.REVOKE_PENDING), urgency=urgency, next_action_ms=due_ms, **changes
    )


def claim(path: Path, *, now_ms: int = NOW_MS, limit: int = 1000, adapter: str = "orders") -> list[Lease]:
    with Immediate(path) as tx:
        return ledger.claim_due(tx, adapter, ENDING, now_ms=now_ms, visibility_ms=60_000, limit=limit)


def test_the_most_urgent_is_claimed_first_and_then_what_was_due_longest(ledger_file: Path) -> None:
    wanted = [
        pending(Urgency.COMPROMISE, NOW_MS),
        pending(Urgency.TASK_END, NOW_MS - 10),
        pending(Urgency.TASK_END, NOW_MS - 5),
        pending(Urgency.EXPIRY, NOW_MS - 99_999),
    ]
    put(ledger_file, *reversed(wanted))
    assert [lease.id for lease in claim(ledger_file)] == [lease.id for lease in wanted]


def test_only_what_is_due_ending_and_of_this_backend_is_claimed(ledger_file: Path) -> None:
    due, verifying = pending(), pending(state=LeaseState.VERIFYING)
    put(
        ledger_file,
        due,
        verifying,
        pending(due_ms=NOW_MS + 1),
        pending(adapter="other"),
        pending(state=LeaseState.ACTIVE),
        a_lease(LeaseState.REVOKED),
    )
    assert {lease.id for lease in claim(ledger_file)} == {due.id, verifying.id}


def test_a_claim_raises_the_epoch_and_hides_the_lease_until_it_runs_out(ledger_file: Path) -> None:
    put(ledger_file, pending(epoch=4))
    (first,) = claim(ledger_file)
    assert (first.epoch, first.next_action_ms) == (5, NOW_MS + 60_000)
    assert claim(ledger_file, now_ms=NOW_MS + 59_999) == []
    (second,) = claim(ledger_file, now_ms=NOW_MS + 60_000)
    assert second.epoch == 6
    with Immediate(ledger_file) as tx:
        assert ledger.postpone(tx, first, attempts=1) is None
        assert ledger.postpone(tx, second, attempts=1) is not None


@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_a_claim_is_bounded(ledger_file: Path, limit: int) -> None:
    put(ledger_file, *(pending(Urgency(number % 3)) for number in range(ledger.CLAIM_MAX + 20)))
    assert len(claim(ledger_file, limit=limit)) == min(limit, ledger.CLAIM_MAX)


def test_whether_anything_is_due_is_known_without_a_write(opened: Opened, ledger_file: Path) -> None:
    for urgency in Urgency:
        put(ledger_file, pending(urgency, NOW_MS + 1 + urgency, adapter=f"a{urgency}"))
        name = f"a{urgency}"
        assert not ledger.has_due(opened.reader, name, ENDING, now_ms=NOW_MS + urgency)
        assert ledger.has_due(opened.reader, name, ENDING, now_ms=NOW_MS + 1 + urgency)
        assert not ledger.has_due(opened.reader, name, BEGINNING, now_ms=NOW_MS + 99)


def test_a_clock_that_went_back_takes_only_what_is_ending_along(ledger_file: Path) -> None:
    ending, active, ended = (
        pending(due_ms=NOW_MS + 900),
        a_lease(LeaseState.ACTIVE),
        a_lease(LeaseState.REVOKED),
    )
    put(ledger_file, ending, active, ended)
    with Immediate(ledger_file) as tx:
        ledger.pull_back(tx, 600)
        assert ledger.get(tx, active.id) == active
        assert ledger.get(tx, ended.id) == ended
        moved = ledger.get(tx, ending.id)
        assert moved is not None
        assert moved.next_action_ms == NOW_MS + 300


def test_a_start_brings_forward_claims_and_what_no_plan_reaches_but_no_second_look(ledger_file: Path) -> None:
    claimed = pending(due_ms=NOW_MS + 60_000)
    second_look = pending(due_ms=NOW_MS + 30_000, state=LeaseState.VERIFYING)
    beyond = pending(due_ms=NOW_MS + 10**12, state=LeaseState.VERIFYING)
    active = a_lease(LeaseState.ACTIVE)
    put(ledger_file, claimed, second_look, beyond, active)
    with Immediate(ledger_file) as tx:
        ledger.bring_forward(tx, NOW_MS + 1_000_000, NOW_MS)
        due = {
            lease.id: lease.next_action_ms
            for lease in (ledger.get(tx, one.id) for one in (claimed, second_look, beyond, active))
            if lease
        }
    assert due == {
        claimed.id: NOW_MS,
        second_look.id: NOW_MS + 30_000,
        beyond.id: NOW_MS,
        active.id: active.next_action_ms,
    }


def test_lists_are_paged_to_the_end_without_gap_or_repeat(opened: Opened, ledger_file: Path) -> None:
    put(ledger_file, *(pending(stuck=number % 2 == 0) for number in range(25)))
    seen: list[str] = []
    while page := ledger.page(opened.reader, after=seen[-1] if seen else "", limit=10):
        assert len(page) <= 10
        seen += [lease.id for lease in page]
    assert len(seen) == len(set(seen)) == 25
    assert len(ledger.page(opened.reader, stuck=True, limit=100)) == 13
    assert len(ledger.page(opened.reader, state=LeaseState.ACTIVE, limit=100)) == 0
    assert len(ledger.page(opened.reader, limit=10**9)) == 25


def test_the_bits_of_a_status_list_are_those_of_leases_that_ended_before_their_time(
    opened: Opened, ledger_file: Path
) -> None:
    put(
        ledger_file,
        a_lease(LeaseState.ACTIVE, status_index=1),
        a_lease(LeaseState.REVOKED, status_index=2),
        a_lease(LeaseState.REVOKED, status_index=3, expires_ms=NOW_MS),
        a_lease(LeaseState.REVOKE_PENDING, status_index=4),
        a_lease(LeaseState.REVOKED, status_index=1 << 20),
        a_lease(LeaseState.REVOKED),
    )
    assert sorted(ledger.revoked_status_indices(opened.reader, 0, 1 << 20, NOW_MS)) == [2, 4]


QUERIES: dict[str, Callable[[Any], object]] = {
    "due": lambda on: ledger.due(on, "a", ENDING, now_ms=1, limit=5),
    "has due": lambda on: ledger.has_due(on, "a", BEGINNING, now_ms=1),
    "leases of a task": lambda on: ledger.of_task(on, "tsk_x"),  # type: ignore[arg-type]  # any text
    "live leases of a task": lambda on: ledger.live_of_task(on, "tsk_x"),  # type: ignore[arg-type]  # any text
    "live leases of an identity": lambda on: ledger.live_of_identity(on, "x"),
    "live leases of a resource": lambda on: ledger.live_of_resource(on, "x"),
    "a backend's object": lambda on: ledger.of_backend_object(on, "a", "n", "lse_x"),  # type: ignore[arg-type]  # any text
    "bits of a list": lambda on: ledger.revoked_status_indices(on, 0, 9, 1),
    "live counts": ledger.live_counts,
    "pull back": lambda on: ledger.pull_back(on, 1),
    "bring forward": lambda on: ledger.bring_forward(on, 2, 1),
    "overdue tasks": lambda on: tasks.overdue(on, 1),
    "open tasks": lambda on: tasks.open_of_identity(on, "x"),
    "count of open tasks": lambda on: tasks.count_open(on, "x"),
    "facts": lambda on: identities.facts(on, AGENT),
    "kill": lambda on: kills.find(on, identity="a", owner="b", resource="c"),
}


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_no_frequent_query_reads_a_whole_table(ledger_file: Path, name: str) -> None:
    plans: list[str] = []
    with Immediate(ledger_file) as tx:

        class Explains:
            """Asks SQLite how it would run each statement, and then runs it."""

            def execute(self, sql: str, parameters: Any = ()) -> Any:
                plans.extend(row[3] for row in tx.execute(f"EXPLAIN QUERY PLAN {sql}", parameters))
                return tx.execute(sql, parameters)

        QUERIES[name](Explains())
    assert plans
    # A partial index holds only what is live, so reading all of it is bounded by that.
    whole = [plan for plan in plans if plan.startswith("SCAN") and " USING " not in plan]
    assert whole == []
