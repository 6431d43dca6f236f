"""DESIGN 4, rule 3: whatever the order of two connections, no INTENT survives its task's end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from broker.core.errors import BudgetExhausted, TaskClosed
from broker.core.lease import Cause, Lease, LeaseState
from broker.core.task import Task, TaskEndCause, TaskState
from inventory import ledger, tasks
from tests.support.ledger import NOW_MS, Immediate, a_lease, a_task

if TYPE_CHECKING:
    from pathlib import Path

RACES = 60


def opened(path: Path, **changes: object) -> Task:
    task = a_task(**changes)
    with Immediate(path) as tx:
        tasks.insert(tx, task, actor="test", decision_id="dec_x")
    return task


def record_intent(path: Path, task: Task) -> Lease:
    """What issue does in its first transaction."""
    lease = a_lease(task_id=task.id)
    with Immediate(path) as tx:
        tasks.take_from_budget(tx, task.id, NOW_MS)
        ledger.insert(tx, lease, actor="issue")
    return lease


def end(path: Path, task: Task) -> None:
    """What every end of a task does."""
    with Immediate(path) as tx:
        if tasks.end(tx, task, TaskEndCause.CALLER, at_ms=NOW_MS, actor="end", reason="") is not None:
            for lease in ledger.live_of_task(tx, task.id):
                moved = ledger.move(
                    tx, lease, LeaseState.REVOKE_PENDING, Cause.TASK_END, at_ms=NOW_MS, actor="end"
                )
                assert moved is not None


def of_task(path: Path, task: Task) -> tuple[Task, list[Lease]]:
    with Immediate(path) as tx:
        known = tasks.get(tx, task.id)
        assert known is not None
        return known, ledger.of_task(tx, task.id)


def test_an_intent_before_the_end_is_moved_by_it(ledger_file: Path) -> None:
    task = opened(ledger_file)
    record_intent(ledger_file, task)
    end(ledger_file, task)
    known, leases = of_task(ledger_file, task)
    assert known.state is TaskState.ENDED
    assert [lease.state for lease in leases] == [LeaseState.REVOKE_PENDING]


def test_an_intent_after_the_end_is_refused_and_leaves_nothing(ledger_file: Path) -> None:
    task = opened(ledger_file)
    end(ledger_file, task)
    with pytest.raises(TaskClosed):
        record_intent(ledger_file, task)
    known, leases = of_task(ledger_file, task)
    assert leases == []
    assert known.leases_issued == 0


def test_no_intent_survives_an_end_that_races_it(ledger_file: Path) -> None:
    """Two connections in two threads; the guard in `take_from_budget` is what makes this hold."""
    races = [opened(ledger_file) for _ in range(RACES)]
    refused = recorded = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for task in races:
            together = threading.Barrier(2)

            def issues(task: Task = task, together: threading.Barrier = together) -> bool:
                together.wait(10)
                try:
                    record_intent(ledger_file, task)
                except TaskClosed:
                    return False
                return True

            def ends(task: Task = task, together: threading.Barrier = together) -> None:
                together.wait(10)
                end(ledger_file, task)

            issuing, ending = pool.submit(issues), pool.submit(ends)
            ending.result(30)
            if issuing.result(30):
                recorded += 1
            else:
                refused += 1
    assert recorded + refused == RACES
    for task in races:
        known, leases = of_task(ledger_file, task)
        assert known.state is TaskState.ENDED
        assert known.leases_issued == len(leases)
        assert all(lease.state is LeaseState.REVOKE_PENDING for lease in leases)


def test_two_ends_that_race_are_one_end(ledger_file: Path) -> None:
    task = opened(ledger_file)
    record_intent(ledger_file, task)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for ending in [pool.submit(end, ledger_file, task) for _ in range(2)]:
            ending.result(30)
    with Immediate(ledger_file) as tx:
        assert tx.one("SELECT count(*) FROM audit WHERE kind = 'task.ended'") == (1,)


def test_the_budget_is_exact_whoever_counts(ledger_file: Path) -> None:
    task = opened(ledger_file, budget_leases=3)

    def issues(_number: int) -> bool:
        try:
            record_intent(ledger_file, task)
        except BudgetExhausted:
            return False
        return True

    with ThreadPoolExecutor(max_workers=4) as pool:
        assert sum(pool.map(issues, range(8))) == 3
    known, leases = of_task(ledger_file, task)
    assert known.leases_issued == len(leases) == 3


@pytest.mark.parametrize("late_ms", [0, 1])
def test_a_task_at_its_deadline_takes_no_lease(ledger_file: Path, late_ms: int) -> None:
    task = opened(ledger_file, deadline_ms=NOW_MS - late_ms)
    with pytest.raises(TaskClosed):
        record_intent(ledger_file, task)


def test_a_task_that_never_was_takes_no_lease(ledger_file: Path) -> None:
    with pytest.raises(TaskClosed):
        record_intent(ledger_file, a_task())
