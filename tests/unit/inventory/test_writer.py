from __future__ import annotations

import asyncio
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.errors import LedgerUnavailable, Overloaded
from inventory.audit.canonical import NotCanonicalError
from inventory.store import engine
from inventory.store.writer import BATCH_MAX, Transaction
from tests.support.ledger import Opened, note

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Refused(Exception):
    """What a unit raises when it will not."""


def put(key: str, actor: str | None = None) -> Callable[[Transaction], str]:
    """A unit that writes a row and a record."""

    def unit(tx: Transaction) -> str:
        tx.execute("INSERT INTO meta (key, value) VALUES (?, 'x')", (key,))
        tx.audit(note(actor or key))
        return key

    return unit


def put_then_refuse(key: str) -> Callable[[Transaction], str]:
    def unit(tx: Transaction) -> str:
        put(key)(tx)
        raise Refused(key)

    return unit


def keys_of(ledger: Opened) -> list[str]:
    return [key for (key,) in ledger.rows("SELECT key FROM meta WHERE value = 'x' ORDER BY key")]


def assert_unbroken(ledger: Opened) -> None:
    report = ledger.verify()
    assert report.findings == ()
    seqs = [seq for (seq,) in ledger.rows("SELECT seq FROM audit ORDER BY seq")]
    assert seqs == list(range(1, len(seqs) + 1))
    assert ledger.writer.head.seq == len(seqs)


class Gate(sqlite3.Connection):
    """A ledger connection whose COMMIT waits, or fails, when told to."""

    fail_commits = 0
    entered: threading.Event | None = None
    go_on: threading.Event | None = None

    def commit(self) -> None:
        if self.entered is not None and self.go_on is not None:
            self.entered.set()
            assert self.go_on.wait(10)
        if self.fail_commits:
            self.fail_commits -= 1
            raise sqlite3.OperationalError("disk I/O error")
        super().commit()


@pytest.fixture
def gate(ledger_file: Path) -> Gate:
    connection = sqlite3.connect(ledger_file, isolation_level=None, check_same_thread=False, factory=Gate)
    connection.execute("PRAGMA journal_mode=WAL")
    return connection


# --- units that fail ---------------------------------------------------------------------------


async def test_a_failing_unit_is_undone_alone_with_its_record_and_its_place_in_the_chain(
    opened: Opened,
) -> None:
    results = await asyncio.gather(
        opened.writer.run(put("a")),
        opened.writer.run(put_then_refuse("b")),
        opened.writer.run(put("c")),
        return_exceptions=True,
    )
    assert (results[0], type(results[1]), results[2]) == ("a", Refused, "c")
    assert opened.writer.commits == 1
    assert opened.writer.units == 2
    assert keys_of(opened) == opened.actors() == ["a", "c"]
    assert_unbroken(opened)


async def test_a_unit_whose_second_record_is_refused_leaves_no_first_record(opened: Opened) -> None:
    def unit(tx: Transaction) -> None:
        put("a")(tx)
        tx.audit(note("surrogate \ud800"))

    with pytest.raises(NotCanonicalError):
        await opened.writer.run(unit)
    assert keys_of(opened) == opened.actors() == []
    assert opened.writer.head.seq == 0


async def test_a_unit_that_the_database_refuses_fails_alone(opened: Opened) -> None:
    results = await asyncio.gather(
        opened.writer.run(put("a")),
        opened.writer.run(put("a", "twin")),
        opened.writer.run(put("c")),
        return_exceptions=True,
    )
    assert (results[0], type(results[1]), results[2]) == ("a", sqlite3.IntegrityError, "c")
    assert keys_of(opened) == opened.actors() == ["a", "c"]
    assert_unbroken(opened)


async def test_nobody_is_refused_for_something_that_is_then_rolled_back(opened: Opened) -> None:
    """The first unit takes what the second wants, and is undone with the whole batch by the third."""
    tries = 0

    def takes_once(tx: Transaction) -> None:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise Refused
        put("slot")(tx)

    def wants(tx: Transaction) -> str:
        if tx.one("SELECT 1 FROM meta WHERE key = 'slot'") is not None:
            raise Refused
        return put("slot", "second")(tx)

    def breaks(tx: Transaction) -> None:
        tx.execute("INSERT INTO no_such_table VALUES (1)")

    first, second, third = await asyncio.gather(
        opened.writer.run(takes_once),
        opened.writer.run(wants),
        opened.writer.run(breaks),
        return_exceptions=True,
    )
    assert isinstance(first, Refused)
    assert second == "slot"
    assert isinstance(third, LedgerUnavailable)
    assert opened.actors() == ["second"]


async def test_a_unit_that_was_refused_is_never_committed_later(opened: Opened) -> None:
    """Its caller has moved on: a retry of the batch must not do what it was told was not done."""
    outcomes: list[str] = []

    def refuses_first(tx: Transaction) -> None:
        outcomes.append("ran")
        put("late")(tx)
        if len(outcomes) == 1:
            raise Refused

    def breaks(tx: Transaction) -> None:
        tx.execute("INSERT INTO no_such_table VALUES (1)")

    refused, _ = await asyncio.gather(
        opened.writer.run(refuses_first), opened.writer.run(breaks), return_exceptions=True
    )
    assert (keys_of(opened) == ["late"]) == (refused is None)


async def test_a_hook_that_raises_does_not_stop_the_writer(opened: Opened) -> None:
    def unit(tx: Transaction) -> str:
        def raises() -> None:
            raise RuntimeError("a hook's own defect")

        tx.after_commit(raises)
        return put("a")(tx)

    assert await opened.writer.run(unit) == "a"
    assert await opened.writer.run(put("b")) == "b"
    assert_unbroken(opened)


# --- order and grouping ------------------------------------------------------------------------


async def test_what_waits_is_committed_together_and_in_order(opened: Opened) -> None:
    names = [f"{number:03}" for number in range(BATCH_MAX + 40)]
    await asyncio.gather(*(opened.writer.run(put(name)) for name in names))
    assert opened.actors() == names
    assert opened.writer.commits == 2
    assert opened.writer.units == len(names)
    assert_unbroken(opened)


async def test_hooks_run_in_order_after_the_commit_and_before_the_answer(opened: Opened) -> None:
    seen: list[str] = []

    def unit(name: str) -> Callable[[Transaction], None]:
        def work(tx: Transaction) -> None:
            put(name)(tx)
            for number in (1, 2):
                tx.after_commit(lambda number=number: seen.append(f"{name}{number} {keys_of(opened)}"))

        return work

    async def ask(name: str) -> None:
        await opened.writer.run(unit(name))
        seen.append(f"{name} answered")

    await asyncio.gather(ask("a"), ask("b"))
    both = "['a', 'b']"
    assert seen == [f"a1 {both}", f"a2 {both}", f"b1 {both}", f"b2 {both}", "a answered", "b answered"]


async def test_a_units_hooks_do_not_run_when_it_is_undone(opened: Opened) -> None:
    ran: list[str] = []

    def unit(tx: Transaction) -> None:
        tx.after_commit(lambda: ran.append("hook"))
        raise Refused

    with pytest.raises(Refused):
        await opened.writer.run(unit)
    assert ran == []


# --- COMMIT fails ------------------------------------------------------------------------------


async def test_a_failed_commit_tells_everybody_who_waits_and_writes_nothing(
    ledger_file: Path, gate: Gate
) -> None:
    ledger = Opened.at(ledger_file, connection=gate)
    ledger.writer.start()
    await ledger.writer.run(put("before"))
    head = ledger.writer.head
    gate.fail_commits = 4  # the batch of three, then each alone
    hooks: list[str] = []

    def unit(tx: Transaction) -> None:
        put("hooked")(tx)
        tx.after_commit(lambda: hooks.append("ran"))

    results = await asyncio.gather(
        ledger.writer.run(put("a")),
        ledger.writer.run(unit),
        ledger.writer.run(put_then_refuse("c")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [LedgerUnavailable] * 3
    assert all(result.retry_after_seconds for result in results if isinstance(result, LedgerUnavailable))
    assert hooks == []
    assert ledger.writer.last_failure == "OperationalError"
    assert ledger.writer.head == head
    assert keys_of(ledger) == ["before"]

    assert await ledger.writer.run(put("after")) == "after"
    assert ledger.writer.last_failure is None
    assert keys_of(ledger) == ["after", "before"]
    assert_unbroken(ledger)
    await ledger.close()


async def test_a_full_disk_fails_closed_and_the_chain_goes_on_once_there_is_room(opened: Opened) -> None:
    await opened.writer.run(put("before"))
    connection = opened.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")

    def large(name: str) -> Callable[[Transaction], None]:
        def unit(tx: Transaction) -> None:
            put(name)(tx)
            tx.execute("UPDATE meta SET value = ? WHERE key = ?", ("y" * 100_000, name))

        return unit

    results = await asyncio.gather(
        *(opened.writer.run(large(f"large{number}")) for number in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [LedgerUnavailable] * 3
    assert opened.actors() == ["before"]

    connection.execute("PRAGMA max_page_count=1073741823")
    await opened.writer.run(put("after"))
    assert opened.actors() == ["before", "after"]
    assert_unbroken(opened)


async def test_what_does_not_fit_does_not_take_down_what_does(opened: Opened) -> None:
    connection = opened.connection
    await opened.writer.run(put("before"))
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages + 2}")

    def too_large(tx: Transaction) -> None:
        tx.execute("INSERT INTO meta (key, value) VALUES ('large', ?)", ("y" * 100_000,))

    results = await asyncio.gather(
        opened.writer.run(put("a")),
        opened.writer.run(too_large),
        opened.writer.run(put("b")),
        return_exceptions=True,
    )
    assert (results[0], type(results[1]), results[2]) == ("a", LedgerUnavailable, "b")
    assert_unbroken(opened)


# --- limits and leaving ------------------------------------------------------------------------


async def test_a_full_queue_is_overloaded_and_does_nothing(ledger_file: Path) -> None:
    ledger = Opened.at(ledger_file, queue_max=2)
    ledger.writer.start()
    results = await asyncio.gather(
        *(ledger.writer.run(put(str(number))) for number in range(4)), return_exceptions=True
    )
    assert [type(result).__name__ for result in results] == ["str", "str", "Overloaded", "Overloaded"]
    assert keys_of(ledger) == ["0", "1"]
    assert isinstance(results[3], Overloaded)
    assert results[3].retry_after_seconds is not None
    await ledger.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_callers_unit_is_done_or_not_but_never_half(
    ledger_file: Path, gate: Gate, *, fails: bool
) -> None:
    gate.entered, gate.go_on = threading.Event(), threading.Event()
    ledger = Opened.at(ledger_file, connection=gate)
    ledger.writer.start()
    asking = asyncio.create_task(ledger.writer.run(put("a")))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    gate.fail_commits = 1 if fails else 0
    gate.go_on.set()
    await ledger.writer.run(put("b"))
    expected = ["b"] if fails else ["a", "b"]
    assert keys_of(ledger) == ledger.actors() == expected
    assert_unbroken(ledger)
    await ledger.close()


async def test_a_unit_whose_caller_left_before_it_began_stays_whole(opened: Opened) -> None:
    asking = asyncio.create_task(opened.writer.run(put("a")))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await opened.writer.run(put("b"))
    assert keys_of(opened) == opened.actors() == ["a", "b"]


async def test_closing_commits_what_is_queued_and_refuses_what_comes_after(ledger_file: Path) -> None:
    ledger = Opened.at(ledger_file)
    ledger.writer.start()
    asking = [asyncio.create_task(ledger.writer.run(put(name))) for name in "abc"]
    await asyncio.sleep(0)
    await ledger.writer.close()
    assert [await task for task in asking] == ["a", "b", "c"]
    with pytest.raises(LedgerUnavailable):
        await ledger.writer.run(put("d"))
    await ledger.writer.close()
    assert keys_of(ledger) == ["a", "b", "c"]
    ledger.reader.close()


async def test_a_writer_torn_down_in_a_commit_leaves_nobody_waiting(ledger_file: Path, gate: Gate) -> None:
    gate.entered, gate.go_on = threading.Event(), threading.Event()
    ledger = Opened.at(ledger_file, connection=gate)
    ledger.writer.start()
    asking = [asyncio.create_task(ledger.writer.run(put("a")))]
    assert await asyncio.to_thread(gate.entered.wait, 10)
    asking.append(asyncio.create_task(ledger.writer.run(put("b"))))
    await asyncio.sleep(0)
    gate.go_on.set()
    drain: Any = ledger.writer._task
    drain.cancel()
    await asyncio.wait([drain])
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(result) for result in results] == [LedgerUnavailable] * 2
    with pytest.raises(LedgerUnavailable):
        await ledger.writer.run(put("c"))
    ledger.reader.close()
    gate.close()


async def test_a_restart_goes_on_with_the_chain_where_it_stood(ledger_file: Path) -> None:
    first = Opened.at(ledger_file)
    first.writer.start()
    await first.writer.run(put("a"))
    await first.writer.run(put("b"))
    head = first.writer.head
    await first.close()

    second = Opened.at(ledger_file, first.keys)
    assert second.writer.head == head
    second.writer.start()
    await second.writer.run(put("c"))
    assert second.actors() == ["a", "b", "c"]
    assert_unbroken(second)
    await second.close()


async def test_a_reader_sees_only_what_is_committed_and_cannot_write(ledger_file: Path, gate: Gate) -> None:
    gate.entered, gate.go_on = threading.Event(), threading.Event()
    ledger = Opened.at(ledger_file, connection=gate)
    ledger.writer.start()
    asking = asyncio.create_task(ledger.writer.run(put("a")))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    assert keys_of(ledger) == []
    gate.go_on.set()
    await asking
    assert keys_of(ledger) == ["a"]
    with pytest.raises(LedgerUnavailable) as refused:
        ledger.reader.execute("DELETE FROM meta")
    assert "readonly" in str(refused.value.__cause__)
    await ledger.close()


def test_the_ledger_waits_for_the_disk(ledger_file: Path) -> None:
    connection = engine.open_for_writing(ledger_file)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    connection.close()
