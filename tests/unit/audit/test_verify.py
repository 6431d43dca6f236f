"""Every way of tampering with a real log of fifty records over two slots, each detected and named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from inventory.audit.chain import GENESIS, AuditRow, ChainHead, record_hash
from inventory.audit.entries import AuditSourceError, LogEntry
from inventory.audit.heads import HeadCopy, HeadSigner, SignedHead, encode_head
from inventory.audit.public_keys import PublicKeys
from inventory.audit.report import FINDINGS_MAX, FindingKind, VerificationReport
from inventory.audit.verify import NO_COPY, verify_database, verify_entries
from tests.support.audit_log import RECORDS_PER_SLOT, SLOTS, START_MS, Log, MemoryKeys, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
from types import SimpleNamespace

LAST = RECORDS_PER_SLOT
Finding = tuple[FindingKind, int | None, int | None]


def named(report: VerificationReport) -> set[Finding]:
    return {(finding.kind, finding.slot, finding.seq) for finding in report.findings}


def set_body(log: Log, slot: int, seq: int, body: bytes, *, rehash: bool = False) -> None:
    log.execute("UPDATE audit SET body=? WHERE slot=? AND seq=?", body, slot, seq)
    if rehash:
        log.execute("UPDATE audit SET hash=? WHERE slot=? AND seq=?", record_hash(body), slot, seq)


def delete(log: Log, slot: int, first: int, last: int) -> None:
    for table in ("audit", "audit_text"):
        log.execute(f"DELETE FROM {table} WHERE slot=? AND seq BETWEEN ? AND ?", slot, first, last)  # noqa: S608  two names of ours


def rewrite(log: Log, slot: int, seq: int, old: bytes, new: bytes) -> None:
    """Change one record and make the chain after it consistent again, as only a forger would."""
    previous = log.row(slot, seq - 1).hash if seq > 1 else GENESIS
    for number in range(seq, LAST + 1):
        body = log.row(slot, number).body
        value = json.loads(body)
        body = body.replace(value["prev"].encode(), previous.hex().encode())
        if number == seq:
            assert old in body
            body = body.replace(old, new)
        set_body(log, slot, number, body, rehash=True)
        previous = record_hash(body)


def copied_lines(log: Log) -> list[bytes]:
    (file,) = sorted((log.root / "second-place").iterdir())
    return file.read_bytes().splitlines(keepends=True)


def set_copied_lines(log: Log, lines: list[bytes]) -> None:
    (file,) = sorted((log.root / "second-place").iterdir())
    file.write_bytes(b"".join(lines))


# --- an honest log


def test_an_untouched_log_is_intact(log: Log) -> None:
    report = log.verify()
    assert report.findings == ()
    assert report.intact
    assert (report.records, report.records_anchored) == (2 * LAST, 2 * LAST)
    assert report.slots == SLOTS
    assert report.heads_checked == 10
    assert (report.texts_checked, report.texts_erased) == (20, 0)
    assert report.complete
    assert report.limits == ()


def test_an_empty_log_is_intact(make_log: Callable[..., Log]) -> None:
    report = make_log().verify()
    assert report.intact
    assert report.records == 0


def test_records_after_the_last_head_are_counted_as_tied_to_none(log: Log) -> None:
    log.append(0, record(LAST + 1))
    report = log.verify()
    assert report.intact
    assert report.records - report.records_anchored == 1
    assert "1 of 51 records are tied to no signed head" in report.limits[0]


def test_a_chain_resumed_after_a_restart_goes_on(log: Log) -> None:
    last = log.row(0, LAST)
    log.heads[0] = ChainHead(last.slot, last.seq, last.hash)
    log.append(0, record(LAST + 1))
    log.copy.close()
    log.copy = HeadCopy(log.root / "second-place")
    log.copy_head(0, START_MS + 10_000)
    log.copy_head(0, START_MS + 11_000)  # signed again without a new record
    assert log.verify().intact


def test_erased_text_is_counted_and_no_finding(log: Log) -> None:
    log.execute("DELETE FROM audit_text WHERE slot=0 AND seq=5")
    report = log.verify()
    assert report.intact
    assert report.texts_erased == 2


def test_a_torn_line_in_the_copy_is_said_and_no_finding(log: Log) -> None:
    lines = copied_lines(log)
    set_copied_lines(log, [*lines, lines[-1][:50]])
    report = log.verify()
    assert report.intact
    assert "never acknowledged" in report.limits[0]


def test_progress_is_told(log: Log) -> None:
    entries = [LogEntry(0, 1, b"", b"")] * 3000
    seen: list[int] = []
    verify_entries(lambda: entries, log.public, [], progress=seen.append)
    assert seen == [1000, 2000, 3000]


# --- rows


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def edit_fact(log: Log) -> set[Finding]:
    body = log.row(0, 7).body
    set_body(log, 0, 7, body.replace(b'"to":"active"', b'"to":"failed"'))
    return {(FindingKind.EDITED, 0, 7)}


def edit_stored_hash(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET hash=? WHERE slot=0 AND seq=7", flipped(log.row(0, 7).hash, 0))
    return {(FindingKind.EDITED, 0, 7), (FindingKind.BROKEN_LINK, 0, 8)}


def edit_with_its_hash(log: Log) -> set[Finding]:
    body = log.row(0, 7).body
    set_body(log, 0, 7, body.replace(b'"to":"active"', b'"to":"failed"'), rehash=True)
    return {(FindingKind.BROKEN_LINK, 0, 8)}


def edit_last_with_its_hash(log: Log) -> set[Finding]:
    body = log.row(0, LAST).body
    set_body(log, 0, LAST, body.replace(b'"to":"active"', b'"to":"failed"'), rehash=True)
    return {(FindingKind.REWRITTEN, 0, LAST)}


def edit_column(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET lease_id='lse_aaaaaaaaaaaaaaaa' WHERE slot=0 AND seq=7")
    return {(FindingKind.COLUMN_DIFFERS, 0, 7)}


def clear_column(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET task_id=NULL WHERE slot=0 AND seq=7")
    return {(FindingKind.COLUMN_DIFFERS, 0, 7)}


def retime_column(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET at_ms=at_ms+1 WHERE slot=1 AND seq=3")
    return {(FindingKind.COLUMN_DIFFERS, 1, 3)}


def delete_one(log: Log) -> set[Finding]:
    delete(log, 0, 7, 7)
    return {(FindingKind.DELETED, 0, 7)}


def delete_range_and_first(log: Log) -> set[Finding]:
    delete(log, 0, 1, 1)
    delete(log, 0, 10, 12)
    return {(FindingKind.DELETED, 0, 1), (FindingKind.DELETED, 0, 10)}


def delete_and_close_the_gap(log: Log) -> set[Finding]:
    delete(log, 0, 7, 7)
    log.execute("UPDATE audit SET seq=seq-1 WHERE slot=0 AND seq>7")
    log.execute("UPDATE audit_text SET seq=seq-1 WHERE slot=0 AND seq>7")
    shifted: set[Finding] = {(FindingKind.REORDERED, 0, seq) for seq in range(7, LAST)}
    return {*shifted, (FindingKind.TRUNCATED, 0, LAST), (FindingKind.BROKEN_LINK, 0, 7)}


def swap_two_numbers(log: Log) -> set[Finding]:
    for old, new in ((7, -1), (8, 7), (-1, 8)):
        log.execute("UPDATE audit SET seq=? WHERE slot=0 AND seq=?", new, old)
    return {(FindingKind.REORDERED, 0, 7), (FindingKind.REORDERED, 0, 8)}


def insert_duplicate(log: Log) -> set[Finding]:
    log.insert(log.row(0, 7))
    return {(FindingKind.INSERTED, 0, 7)}


def insert_another_under_the_same_number(log: Log) -> set[Finding]:
    row = log.row(0, 7)
    body = row.body.replace(b'"to":"active"', b'"to":"failed"')
    log.insert(row._replace(body=body, hash=record_hash(body)))
    return {(FindingKind.INSERTED, 0, 7)}


def insert_forged_at_the_end(log: Log) -> set[Finding]:
    row = log.row(0, LAST)
    body = row.body.replace(b'"seq":%d,' % LAST, b'"seq":%d,' % (LAST + 1))
    log.insert(row._replace(seq=LAST + 1, body=body, hash=record_hash(body)))
    return {(FindingKind.BROKEN_LINK, 0, LAST + 1)}


def cut_the_tail(log: Log) -> set[Finding]:
    delete(log, 1, 21, LAST)
    return {(FindingKind.TRUNCATED, 1, 21)}


def cut_a_whole_slot(log: Log) -> set[Finding]:
    delete(log, 1, 1, LAST)
    return {(FindingKind.TRUNCATED, 1, 1)}


def rewrite_from_the_middle(log: Log) -> set[Finding]:
    rewrite(log, 0, 7, b'"to":"active"', b'"to":"failed"')
    return {(FindingKind.REWRITTEN, 0, 10)}


def rewrite_all(log: Log) -> set[Finding]:
    rewrite(log, 0, 1, b'"to":"active"', b'"to":"failed"')
    return {(FindingKind.REWRITTEN, 0, 5)}


def begin_from_a_chain_of_its_own(log: Log) -> set[Finding]:
    body = log.row(0, 1).body.replace(GENESIS.hex().encode(), b"07" * 32)
    set_body(log, 0, 1, body, rehash=True)
    return {(FindingKind.BROKEN_LINK, 0, 1), (FindingKind.BROKEN_LINK, 0, 2)}


def spell_otherwise(log: Log) -> set[Finding]:
    body = log.row(0, LAST).body
    set_body(log, 0, LAST, body.replace(b'"v":1', b'"v": 1'), rehash=True)
    return {(FindingKind.NOT_CANONICAL, 0, LAST), (FindingKind.REWRITTEN, 0, LAST)}


def duplicate_key(log: Log) -> set[Finding]:
    body = log.row(0, LAST).body
    set_body(log, 0, LAST, body.replace(b'"v":1', b'"v":1,"v":1'), rehash=True)
    return {(FindingKind.DUPLICATE_KEY, 0, LAST), (FindingKind.REWRITTEN, 0, LAST)}


def drop_a_member(log: Log) -> set[Finding]:
    body = log.row(0, LAST).body
    set_body(log, 0, LAST, body.replace(b',"v":1', b""), rehash=True)
    return {(FindingKind.MALFORMED, 0, LAST), (FindingKind.REWRITTEN, 0, LAST)}


def claim_another_version(log: Log) -> set[Finding]:
    body = log.row(0, LAST).body
    set_body(log, 0, LAST, body.replace(b'"v":1', b'"v":2'), rehash=True)
    return {(FindingKind.MALFORMED, 0, LAST), (FindingKind.REWRITTEN, 0, LAST)}


def empty_the_body(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET body=NULL WHERE slot=0 AND seq=7")
    return {(FindingKind.MALFORMED, 0, 7), (FindingKind.DELETED, 0, 7)}


def body_that_is_not_text(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET body=CAST(X'ff7b' AS TEXT) WHERE slot=0 AND seq=7")
    return {(FindingKind.EDITED, 0, 7), (FindingKind.NOT_CANONICAL, 0, 7)}


def place_that_is_no_number(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET seq='seven' WHERE slot=0 AND seq=7")
    return {(FindingKind.MALFORMED, None, None), (FindingKind.DELETED, 0, 7)}


def swap_slots(log: Log) -> set[Finding]:
    log.execute("UPDATE audit SET slot=1-slot")
    log.execute("UPDATE audit_text SET slot=1-slot")
    everywhere: set[Finding] = {
        (FindingKind.SWAPPED_SLOT, slot, seq) for slot in SLOTS for seq in range(1, LAST + 1)
    }
    return {*everywhere, (FindingKind.REWRITTEN, 0, 5), (FindingKind.REWRITTEN, 1, 5)}


def move_one_row_to_the_other_slot(log: Log) -> set[Finding]:
    log.execute("DELETE FROM audit WHERE slot=1 AND seq=7")
    log.execute("UPDATE audit SET slot=1 WHERE slot=0 AND seq=7")
    return {
        (FindingKind.SWAPPED_SLOT, 1, 7),
        (FindingKind.BROKEN_LINK, 1, 7),
        (FindingKind.BROKEN_LINK, 1, 8),
        (FindingKind.DELETED, 0, 7),
    }


def edit_stored_text(log: Log) -> set[Finding]:
    sealed = log.text(0, 5, "reason").sealed
    log.execute("UPDATE audit_text SET sealed=? WHERE slot=0 AND seq=5 AND name='reason'", flipped(sealed, 3))
    return {(FindingKind.TEXT_DIFFERS, 0, 5)}


def swap_stored_texts(log: Log) -> set[Finding]:
    for seq, other in ((5, 10), (10, 5)):
        text = log.text(1, other, "reason")
        log.execute(
            "UPDATE audit_text SET sealed=? WHERE slot=0 AND seq=? AND name='reason'", text.sealed, seq
        )
    return {(FindingKind.TEXT_DIFFERS, 0, 5), (FindingKind.TEXT_DIFFERS, 0, 10)}


def add_a_text(log: Log) -> set[Finding]:
    log.execute("UPDATE audit_text SET name='other' WHERE slot=0 AND seq=5 AND name='reason'")
    return {(FindingKind.STRAY_TEXT, 0, 5)}


def texts_without_a_record(log: Log) -> set[Finding]:
    for place in ((-1, 1), (0, 999), (9, 9)):
        log.execute("INSERT INTO audit_text VALUES (?,?,'reason',x'00',x'00')", *place)
    log.execute("INSERT INTO audit_text VALUES ('x',NULL,'reason',NULL,NULL)")
    return {
        (FindingKind.STRAY_TEXT, -1, 1),
        (FindingKind.STRAY_TEXT, 0, 999),
        (FindingKind.STRAY_TEXT, 9, 9),
        (FindingKind.STRAY_TEXT, None, None),
    }


ROW_MUTATIONS = [
    edit_fact,
    edit_stored_hash,
    edit_with_its_hash,
    edit_last_with_its_hash,
    edit_column,
    clear_column,
    retime_column,
    delete_one,
    delete_range_and_first,
    delete_and_close_the_gap,
    swap_two_numbers,
    insert_duplicate,
    insert_another_under_the_same_number,
    insert_forged_at_the_end,
    cut_the_tail,
    cut_a_whole_slot,
    rewrite_from_the_middle,
    rewrite_all,
    begin_from_a_chain_of_its_own,
    spell_otherwise,
    duplicate_key,
    drop_a_member,
    claim_another_version,
    empty_the_body,
    body_that_is_not_text,
    place_that_is_no_number,
    swap_slots,
    move_one_row_to_the_other_slot,
    edit_stored_text,
    swap_stored_texts,
    add_a_text,
    texts_without_a_record,
]


@pytest.mark.parametrize("tamper", ROW_MUTATIONS, ids=lambda tamper: tamper.__name__)
def test_tampering_with_rows_is_detected_and_named(log: Log, tamper: Callable[[Log], set[Finding]]) -> None:
    expected = tamper(log)
    found = named(log.verify())
    assert expected <= found
    unexpected = {finding[0] for finding in found - expected}
    assert unexpected <= {FindingKind.BROKEN_LINK, FindingKind.REWRITTEN}, "a second name for the same deed"


def test_one_rewrite_is_told_once_however_many_heads_it_contradicts(log: Log) -> None:
    rewrite_all(log)
    assert [finding.kind for finding in log.verify().findings] == [FindingKind.REWRITTEN]


def test_an_edited_record_and_those_only_it_ties_to_a_head_are_not_anchored(log: Log) -> None:
    edit_fact(log)  # record 7: heads confirm 5 and 10, so 6 hangs on the edited record
    assert log.verify().records_anchored == 2 * LAST - 2


def test_any_number_of_gaps_is_counted(log: Log) -> None:
    entries = [LogEntry(0, seq, b"{}", record_hash(b"{}")) for seq in range(2, 6000, 2)]
    report = verify_entries(lambda: entries, log.public, [])
    malformed = len(entries)
    assert len(report.findings) + report.findings_omitted == malformed + len(entries)


# --- heads


def forge(log: Log) -> set[Finding]:
    lines = copied_lines(log)
    head = json.loads(lines[-1])
    body = log.row(1, LAST).body.replace(b'"to":"active"', b'"to":"failed"')
    set_body(log, 1, LAST, body, rehash=True)
    head["hash"] = record_hash(body).hex()
    line = json.dumps(head, separators=(",", ":"), sort_keys=True).encode() + b"\n"
    set_copied_lines(log, [*lines[:-1], line])
    return {(FindingKind.FORGED_HEAD, 1, LAST)}


def sign_with_another_key_of_the_same_name(log: Log) -> set[Finding]:
    other = HeadSigner(MemoryKeys(), log.origin).sign(log.heads[0], START_MS + 9000)
    set_copied_lines(log, [*copied_lines(log), encode_head(other) + b"\n"])
    return {(FindingKind.FORGED_HEAD, 0, LAST)}


def sign_with_an_unknown_key(log: Log) -> set[Finding]:
    other = HeadSigner(MemoryKeys("audit-9"), log.origin).sign(log.heads[0], START_MS + 9000)
    set_copied_lines(log, [*copied_lines(log), encode_head(other) + b"\n"])
    return {(FindingKind.UNKNOWN_KEY, 0, LAST)}


def leave_out_the_signature(log: Log) -> set[Finding]:
    head = HeadSigner(log.keys, log.origin).sign(log.heads[0], START_MS + 9000)
    set_copied_lines(log, [*copied_lines(log), encode_head(replace(head, signature=b"")) + b"\n"])
    return {(FindingKind.FORGED_HEAD, 0, LAST)}


def head_of_another_log(log: Log) -> set[Finding]:
    other = HeadSigner(log.keys, "zzzzzz").sign(log.heads[0], START_MS + 9000)
    set_copied_lines(log, [*copied_lines(log), encode_head(other) + b"\n"])
    return {(FindingKind.WRONG_ORIGIN, 0, LAST)}


def replay_an_old_head(log: Log) -> set[Finding]:
    lines = copied_lines(log)
    set_copied_lines(log, [*lines, lines[0]])
    return {(FindingKind.REPLAYED_HEAD, 0, 5)}


def sign_the_same_record_twice_differently(log: Log) -> set[Finding]:
    other = HeadSigner(log.keys, log.origin).sign(ChainHead(0, LAST, b"\x01" * 32), START_MS + 9000)
    set_copied_lines(log, [*copied_lines(log), encode_head(other) + b"\n"])
    return {(FindingKind.FORKED_HEAD, 0, LAST)}


def garble_a_line(log: Log) -> set[Finding]:
    lines = copied_lines(log)
    set_copied_lines(log, [*lines[:3], b"{}\n", *lines[3:]])
    return {(FindingKind.MALFORMED_HEAD, None, None)}


HEAD_MUTATIONS = [
    forge,
    sign_with_another_key_of_the_same_name,
    sign_with_an_unknown_key,
    leave_out_the_signature,
    head_of_another_log,
    replay_an_old_head,
    sign_the_same_record_twice_differently,
    garble_a_line,
]


@pytest.mark.parametrize("tamper", HEAD_MUTATIONS, ids=lambda tamper: tamper.__name__)
def test_tampering_with_heads_is_detected_and_named(log: Log, tamper: Callable[[Log], set[Finding]]) -> None:
    expected = tamper(log)
    assert named(log.verify()) == expected


def test_old_heads_in_place_of_newer_ones_show_as_a_stale_copy(make_log: Callable[..., Log]) -> None:
    log = make_log()
    for number in range(1, 11):
        log.append(0, record(number, at_ms=START_MS + number * 30_000))
        log.copy_head(0, START_MS + number * 30_000)
    assert log.verify().intact
    set_copied_lines(log, copied_lines(log)[:5])
    report = log.verify()
    assert named(report) == {(FindingKind.STALE_HEADS, 0, 10)}
    assert report.records_anchored == 5


def test_an_emptied_copy_shows_as_stale(make_log: Callable[..., Log]) -> None:
    log = make_log()
    for number in range(1, 11):
        log.append(0, record(number, at_ms=START_MS + number * 30_000))
    report = log.verify()
    assert named(report) == {(FindingKind.STALE_HEADS, 0, 10)}
    assert report.records_anchored == 0


def test_a_crash_before_the_next_head_is_no_finding_however_long_the_idle_time_before(
    make_log: Callable[..., Log],
) -> None:
    log = make_log()
    log.append(0, record(1))
    log.copy_head(0, START_MS + 1000)
    log.append(0, record(2, at_ms=START_MS + 3_600_000))
    assert log.verify().intact


def test_time_spent_checking_heads_is_not_held_against_the_copy(
    make_log: Callable[..., Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_log()
    for number in range(1, 11):
        log.append(0, record(number, at_ms=START_MS + number * 30_000))
    readings = iter([0.0, 300.0])
    stopwatch = SimpleNamespace(monotonic=lambda: next(readings))
    monkeypatch.setattr("inventory.audit.verify.time", stopwatch)
    assert log.verify().intact


def test_heads_from_two_copies_are_compared_with_each_other(log: Log) -> None:
    heads = list(log.copy.read_all())
    fork = HeadSigner(log.keys, log.origin).sign(ChainHead(0, 10, b"\x01" * 32), START_MS + 1000)
    report = verify_entries(
        list, log.public, [heads, [fork, *(h for h in heads if isinstance(h, SignedHead) and h.seq > 10)]]
    )
    assert (FindingKind.FORKED_HEAD, 0, 10) in named(report)


# --- what stays unseen is said


def test_without_the_copy_a_cut_tail_goes_undetected_and_the_report_says_so(log: Log) -> None:
    delete(log, 0, 20, LAST)
    report = log.verify(copy=False)
    assert report.intact
    assert report.limits == (NO_COPY,)
    assert "cut tail" in NO_COPY
    assert named(log.verify()) == {(FindingKind.TRUNCATED, 0, 20)}


def test_without_the_copy_a_consistent_rewrite_goes_undetected_and_the_report_says_so(log: Log) -> None:
    rewrite(log, 0, 1, b'"to":"active"', b'"to":"failed"')
    report = log.verify(copy=False)
    assert report.intact
    assert "rewrite" in report.limits[0]


def test_two_logs_swapped_whole_are_told_apart_by_their_heads(make_log: Callable[..., Log]) -> None:
    keys = MemoryKeys()
    mine, theirs = make_log("mine", store=keys), make_log("theirs", store=keys)
    for log in (mine, theirs):
        for number in range(1, 6):
            log.append(0, record(number))
        log.copy_head(0, START_MS + 1000)
    swapped_rows = verify_database(theirs.path, mine.public, mine.copy.read_all())
    assert named(swapped_rows) == {(FindingKind.REWRITTEN, 0, 5)}
    swapped_both = verify_database(theirs.path, mine.public, theirs.copy.read_all())
    assert named(swapped_both) == {(FindingKind.WRONG_ORIGIN, 0, 5)}


def test_findings_are_bounded_and_the_rest_counted(log: Log) -> None:
    entries = [LogEntry(0, seq, b"", b"") for seq in range(1, FINDINGS_MAX + 500)]
    report = verify_entries(lambda: entries, log.public, [])
    assert len(report.findings) == FINDINGS_MAX
    assert report.findings_omitted == 2 * len(entries) - FINDINGS_MAX


def test_findings_repeat_nothing_a_forger_wrote(log: Log) -> None:
    planted = b'{"event":{"\x1b[2J":1},"slot":0}'
    set_body(log, 0, 7, planted)
    log.execute("UPDATE audit_text SET name=char(27) || '[2J' WHERE slot=0 AND seq=5")
    text = repr([finding.detail for finding in log.verify().findings])
    assert "[2J" not in text


# --- sources that cannot be read


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    public = PublicKeys("abc234", {})
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 20)
    for path in (tmp_path / "missing", tmp_path / "text"):
        with pytest.raises(AuditSourceError, match="cannot read the audit log"):
            verify_database(path, public, None)
    assert not (tmp_path / "missing").exists()


def test_the_database_is_opened_read_only(log: Log) -> None:
    before = log.path.read_bytes()
    log.path.chmod(0o400)
    log.verify()
    assert log.path.read_bytes() == before


def test_a_planted_giant_does_not_exhaust_memory(log: Log) -> None:
    log.execute("UPDATE audit SET body=zeroblob(8000000) WHERE slot=0 AND seq=7")
    with pytest.raises(AuditSourceError, match="too big"):
        log.verify()


def test_the_reader_sees_one_snapshot_while_the_writer_writes_on(log: Log) -> None:
    log.execute("PRAGMA journal_mode=WAL")
    heads = list(log.copy.read_all())

    def entries_with_a_writer_behind():  # noqa: ANN202  a generator of entries
        from inventory.audit.database import read_database  # noqa: PLC0415  only this test reads raw

        for number, entry in enumerate(read_database(log.path)):
            if number == 3:
                log.append(0, record(LAST + 1, text={"reason": "meanwhile"}))
            yield entry

    report = verify_entries(entries_with_a_writer_behind, log.public, [heads])
    assert report.intact
    assert report.records == 2 * LAST


def test_columns_of_the_row_are_those_of_the_table(log: Log) -> None:
    names = [name for _, name, *_ in log.execute("PRAGMA table_info(audit)")]
    assert tuple(names) == AuditRow._fields
