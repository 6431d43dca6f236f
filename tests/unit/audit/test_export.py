from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from inventory.audit.canonical import parse_canonical
from inventory.audit.chain import AuditRow, record_hash
from inventory.audit.entries import AuditSourceError
from inventory.audit.export import ExportFilter, export_lines
from inventory.audit.heads import SignedHead
from inventory.audit.public_keys import PublicKeys
from inventory.audit.report import FindingKind, VerificationReport
from inventory.audit.text import OpenedText, open_text
from inventory.audit.verify import EMBEDDED_KEYS, FILTERED, NO_COPY, verify_export
from tests.support.audit_log import RECORDS_PER_SLOT, START_MS, Log, MemoryKeys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LAST = RECORDS_PER_SLOT
FIRST_RECORD = 11  # after the header and ten heads


def heads_of(log: Log) -> list[SignedHead]:
    return [head for head in log.copy.read_all() if isinstance(head, SignedHead)]


def revealer(log: Log) -> Callable[[AuditRow], Mapping[str, OpenedText]]:
    def reveal(row: AuditRow) -> Mapping[str, OpenedText]:
        promises = parse_canonical(row.body)["event"].get("text", {})
        return {
            name: open_text(log.text(row.slot, row.seq, name), promise, log.keys)
            for name, promise in promises.items()
        }

    return reveal


def export(log: Log, *, only: ExportFilter | None = None, reveal: bool = False) -> list[bytes]:
    shown = revealer(log) if reveal else None
    return list(export_lines(log.rows(), heads_of(log), log.public, only=only, reveal=shown))


def verify(log: Log, lines: list[bytes], **options: Any) -> VerificationReport:
    path = log.root / "export.jsonl"
    path.write_bytes(b"".join(lines))
    return verify_export(path, log.public, **options)


def kinds(report: VerificationReport) -> set[FindingKind]:
    return {finding.kind for finding in report.findings}


def changed(line: bytes, **members: object) -> bytes:
    value = {**json.loads(line), **members}
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode() + b"\n"


def test_a_complete_export_is_intact_with_nothing_but_public_keys(log: Log) -> None:
    report = verify(log, export(log))
    assert report.findings == ()
    assert (report.records, report.records_anchored, report.heads_checked) == (2 * LAST, 2 * LAST, 10)
    assert report.complete
    assert (report.texts_checked, report.texts_erased) == (0, 0), "texts not exported are not called erased"
    assert report.limits == ()


def test_the_header_says_what_the_export_is(log: Log) -> None:
    header = json.loads(export(log)[0])
    assert header["format"] == "nhi-broker/audit-export/v1"
    assert header["complete"] is True
    assert header["filter"] == {}
    assert header["public"]["origin"] == log.origin


def test_a_record_line_holds_the_exact_bytes_that_were_hashed(log: Log) -> None:
    line = json.loads(export(log)[FIRST_RECORD])
    row = log.row(0, 1)
    assert line["body"].encode() == row.body
    assert bytes.fromhex(line["hash"]) == row.hash == record_hash(row.body)


def test_revealed_texts_are_checked_against_their_digest(log: Log) -> None:
    lines = export(log, reveal=True)
    report = verify(log, lines)
    assert report.intact
    assert report.texts_checked == 20
    assert any("für Łukasz".encode() in line for line in lines)


def test_erased_texts_of_a_revealing_export_are_counted(log: Log) -> None:
    log.execute("DELETE FROM audit_text WHERE slot=0 AND seq=5")

    def reveal(row: AuditRow) -> Mapping[str, OpenedText]:
        return {} if (row.slot, row.seq) == (0, 5) else revealer(log)(row)

    lines = list(export_lines(log.rows(), heads_of(log), log.public, reveal=reveal))
    report = verify(log, lines)
    assert report.intact
    assert report.texts_erased == 2


def with_text(log: Log, change: Callable[[str, bytes], tuple[str, bytes]]) -> list[bytes]:
    lines = export(log, reveal=True)
    index = next(i for i, line in enumerate(lines) if b'"texts":{' in line)
    texts = json.loads(lines[index])["texts"]
    text, salt = change(texts["reason"]["text"], base64.b64decode(texts["reason"]["salt"]))
    texts["reason"] = {"salt": base64.b64encode(salt).decode(), "text": text}
    lines[index] = changed(lines[index], texts=texts)
    return lines


def test_a_changed_revealed_text_is_detected(log: Log) -> None:
    assert kinds(verify(log, with_text(log, lambda t, s: (t + "!", s)))) == {FindingKind.TEXT_DIFFERS}


def test_bytes_cannot_move_between_salt_and_text(log: Log) -> None:
    moved = with_text(log, lambda t, s: (t[1:], s + t[0].encode()))
    assert kinds(verify(log, moved)) == {FindingKind.TEXT_DIFFERS}


def at(number: int, line: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[:number], line(lines[number]), *lines[number + 1 :]]


def move(lines: list[bytes], old: int, new: int) -> list[bytes]:
    rest = [*lines[:old], *lines[old + 1 :]]
    return [*rest[:new], lines[old], *rest[new:]]


R = FIRST_RECORD + 6  # the line of slot 0's record 7


def edit_body(line: bytes) -> bytes:
    body = json.loads(line)["body"].replace('"to":"active"', '"to":"failed"')
    return changed(line, body=body)


MUTATIONS: list[tuple[str, Callable[[list[bytes]], list[bytes]], FindingKind]] = [
    ("edited body", at(R, edit_body), FindingKind.EDITED),
    ("edited hash", at(R, lambda line: changed(line, hash="00" * 32)), FindingKind.EDITED),
    ("deleted line", lambda lines: [*lines[:R], *lines[R + 1 :]], FindingKind.DELETED),
    (
        "swapped lines",
        lambda lines: [*lines[:R], lines[R + 1], lines[R], *lines[R + 2 :]],
        FindingKind.REORDERED,
    ),
    (
        "moved line",
        lambda lines: [*lines[:R], *lines[R + 1 : R + 9], lines[R], *lines[R + 9 :]],
        FindingKind.REORDERED,
    ),
    ("repeated line", lambda lines: [*lines[:R], lines[R], *lines[R:]], FindingKind.INSERTED),
    ("another number", at(R, lambda line: changed(line, seq=99)), FindingKind.REORDERED),
    ("another slot", at(R, lambda line: changed(line, slot=1)), FindingKind.SWAPPED_SLOT),
    ("cut records", lambda lines: [*lines[:-6], changed(lines[-1], records=45)], FindingKind.TRUNCATED),
    ("cut file", lambda lines: lines[:-1], FindingKind.CUT_EXPORT),
    ("cut line", lambda lines: [*lines[:-1], lines[-1][:5]], FindingKind.CUT_EXPORT),
    ("wrong count", lambda lines: [*lines[:-1], changed(lines[-1], records=49)], FindingKind.CUT_EXPORT),
    ("no JSON", at(R, lambda _: b"?\n"), FindingKind.MALFORMED_EXPORT),
    ("duplicate key", at(R, lambda line: line.replace(b"{", b'{"seq":1,', 1)), FindingKind.MALFORMED_EXPORT),
    ("spaces", at(R, lambda line: line.replace(b"{", b"{ ", 1)), FindingKind.MALFORMED_EXPORT),
    ("extra member", at(R, lambda line: changed(line, x=1)), FindingKind.MALFORMED_EXPORT),
    ("hash in capitals", at(R, lambda line: changed(line, hash="AB" * 32)), FindingKind.MALFORMED_EXPORT),
    ("hash no text", at(R, lambda line: changed(line, hash=7)), FindingKind.MALFORMED_EXPORT),
    ("body no text", at(R, lambda line: changed(line, body={})), FindingKind.MALFORMED_EXPORT),
    ("texts no object", at(R, lambda line: changed(line, texts=[])), FindingKind.MALFORMED_EXPORT),
    ("text no object", at(R, lambda line: changed(line, texts={"a": 1})), FindingKind.MALFORMED_EXPORT),
    ("deep", at(R, lambda _: b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n"), FindingKind.MALFORMED_EXPORT),
    ("unknown type", at(R, lambda line: changed(line, type="x")), FindingKind.MALFORMED_EXPORT),
    ("head among records", lambda lines: [*lines[:R], lines[1], *lines[R:]], FindingKind.MALFORMED_EXPORT),
    ("record after the end", lambda lines: [*lines, lines[R]], FindingKind.MALFORMED_EXPORT),
    (
        "edited head",
        at(1, lambda line: line.replace(b'\\"seq\\":5', b'\\"seq\\":6')),
        FindingKind.FORGED_HEAD,
    ),
    ("garbled head", at(1, lambda line: changed(line, head="{}")), FindingKind.MALFORMED_HEAD),
    ("replayed head", lambda lines: [*lines[:11], lines[1], *lines[11:]], FindingKind.REPLAYED_HEAD),
]


@pytest.mark.parametrize(("tamper", "kind"), [pytest.param(t, k, id=name) for name, t, k in MUTATIONS])
def test_tampering_with_an_export_is_detected_and_named(
    log: Log, tamper: Callable[[list[bytes]], list[bytes]], kind: FindingKind
) -> None:
    honest = export(log)
    assert verify(log, honest).intact
    assert kind in kinds(verify(log, tamper(honest)))


def test_the_copy_reveals_a_tail_cut_from_log_and_export_alike(log: Log) -> None:
    whole = export(log)
    kept = [line for line in whole if b'"seq":25' not in line and b'\\"seq\\":25' not in line]
    cut = [*kept[:-1], changed(kept[-1], records=48)]
    assert verify(log, cut).intact
    report = verify(log, cut, heads=log.copy.read_all())
    assert kinds(report) == {FindingKind.TRUNCATED}


def test_an_export_without_heads_says_what_it_cannot_show(log: Log) -> None:
    report = verify(log, list(export_lines(log.rows(), [], log.public)))
    assert report.intact
    assert report.limits == (NO_COPY,)
    assert report.records_anchored == 0


def test_keys_taken_from_the_export_itself_are_called_that(log: Log) -> None:
    path = log.root / "export.jsonl"
    path.write_bytes(b"".join(export(log)))
    report = verify_export(path, None)
    assert report.intact
    assert EMBEDDED_KEYS in report.limits


def test_an_export_under_other_keys_is_not_accepted(log: Log) -> None:
    path = log.root / "export.jsonl"
    path.write_bytes(b"".join(export(log)))
    other = PublicKeys(log.origin, MemoryKeys().audit_keys())
    assert kinds(verify_export(path, other)) == {FindingKind.FORGED_HEAD}


# --- filtered


def test_a_filtered_export_is_verified_and_says_what_it_could_not_check(log: Log) -> None:
    only = ExportFilter(lease_id=log.row(0, 7).lease_id)
    lines = export(log, only=only)
    assert json.loads(lines[0])["complete"] is False
    assert json.loads(lines[0])["filter"] == {"lease_id": only.lease_id}
    report = verify(log, lines)
    assert report.intact
    assert not report.complete
    assert report.records == 1
    assert FILTERED in report.limits
    assert "1 of 1 records are tied to no signed head" in report.limits[1]


def test_a_period_is_tied_to_the_heads_inside_it(log: Log) -> None:
    only = ExportFilter(from_ms=START_MS + 700, to_ms=START_MS + 1200)
    report = verify(log, export(log, only=only))
    assert report.intact
    assert (report.records, report.records_anchored) == (10, 8)


def test_neighbours_in_a_filtered_export_must_be_linked(log: Log) -> None:
    lines = export(log, only=ExportFilter(from_ms=START_MS + 700, to_ms=START_MS + 900))
    index = FIRST_RECORD
    body = json.loads(lines[index])["body"].replace('"to":"active"', '"to":"failed"')
    lines[index] = changed(lines[index], body=body, hash=record_hash(body.encode()).hex())
    report = verify(log, lines)
    assert [(f.kind, f.slot, f.seq) for f in report.findings] == [(FindingKind.BROKEN_LINK, 0, 8)]


@pytest.mark.parametrize(
    ("tamper", "kind"),
    [
        (at(FIRST_RECORD, edit_body), FindingKind.EDITED),
        (lambda lines: [*lines[:11], lines[12], lines[11], *lines[13:]], FindingKind.REORDERED),
        (lambda lines: [*lines[:12], lines[11], *lines[12:]], FindingKind.INSERTED),
        (lambda lines: lines[:-1], FindingKind.CUT_EXPORT),
        (lambda lines: [*lines[:-2], lines[-1]], FindingKind.CUT_EXPORT),
    ],
    ids=["edited", "reordered", "repeated", "cut", "record left out"],
)
def test_tampering_with_a_filtered_export_is_detected(
    log: Log, tamper: Callable[[list[bytes]], list[bytes]], kind: FindingKind
) -> None:
    lines = export(log, only=ExportFilter(from_ms=START_MS + 700, to_ms=START_MS + 1200))
    assert kind in kinds(verify(log, tamper(lines)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("lease_id", "lse_x"), ("task_id", "tsk_x"), ("identity", "spiffe://a/b"), ("from_ms", 9), ("to_ms", 3)],
)
def test_each_filter_selects(field: str, value: Any) -> None:
    wanted = AuditRow(0, 1, 9, "k", "a", "lse_x", "tsk_x", "spiffe://a/b", None, b"", b"")
    rows = [wanted._replace(at_ms=2), wanted._replace(lease_id=None, task_id="t", identity=None), wanted]
    only = ExportFilter(**{field: value})
    assert not only.complete
    kept = [only.matches(row) for row in rows]
    assert True in kept
    assert False in kept


# --- not an export


@pytest.mark.parametrize(
    "change",
    [
        lambda line: changed(line, format="other/v1"),
        lambda line: changed(line, complete=False),
        lambda line: changed(line, filter={"task_id": "t"}),
        lambda line: changed(line, texts="yes"),
        lambda line: changed(line, public={}),
        lambda _: b"",
        lambda _: b"[]\n",
        lambda _: b"\xff\n",
    ],
    ids=["format", "complete", "filter", "texts", "keys", "empty", "array", "bytes"],
)
def test_a_file_that_does_not_begin_as_an_export_is_refused(
    log: Log, change: Callable[[bytes], bytes]
) -> None:
    lines = export(log)
    with pytest.raises(AuditSourceError):
        verify(log, [change(lines[0]), *lines[1:]])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AuditSourceError, match="cannot read"):
        verify_export(tmp_path / "missing", None)
