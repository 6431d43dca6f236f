"""Exports: JSON lines that can be verified offline, the whole log or a part of it.

A header line, then signed heads, then records, then an end line. A record's line holds
the exact canonical body as a string, so that nothing is lost between log and export::

    {"complete":true,"filter":{},"format":"nhi-broker/audit-export/v1","public":{…},"texts":false,"type":"header"}
    {"head":"<canonical head>","type":"head"}
    {"body":"<canonical body>","hash":"<hex>","seq":1,"slot":0,"type":"record"}
    {"records":1,"type":"end"}

A filtered export has gaps by design. It says so, and verification then checks each record's
own hash and the links between neighbours, and names what it could not check.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from inventory.audit.entries import AuditSourceError, LogEntry, LogFault, TextEvidence
from inventory.audit.heads import MalformedHeadError, SignedHead, UnreadableHead, decode_head, encode_head
from inventory.audit.public_keys import PublicKeys, PublicKeysError, parse_public_keys, public_keys_json
from inventory.audit.report import FindingKind
from inventory.audit.text import OpenedText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from inventory.audit.chain import AuditRow

FORMAT: Final = "nhi-broker/audit-export/v1"
LINE_BYTES_MAX: Final = 4 * 1024 * 1024
_RECORD: Final = frozenset({"body", "hash", "seq", "slot", "type"})
_NOT_AN_EXPORT: Final = "is not an audit export of this format: its first line is not the header"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFilter:
    """Which records an export holds; all of them where every field is None.

    Attributes:
        from_ms: records at or after.
        to_ms: records before.

    """

    lease_id: str | None = None
    task_id: str | None = None
    identity: str | None = None
    from_ms: int | None = None
    to_ms: int | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is filtered out."""
        return not self.as_json()

    def as_json(self) -> dict[str, str | int]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def matches(self, row: AuditRow) -> bool:
        """Say whether the export holds `row`."""
        return (
            self.lease_id in {None, row.lease_id}
            and self.task_id in {None, row.task_id}
            and self.identity in {None, row.identity}
            and (self.from_ms is None or row.at_ms >= self.from_ms)
            and (self.to_ms is None or row.at_ms < self.to_ms)
        )


def export_lines(
    rows: Iterable[AuditRow],
    heads: Iterable[SignedHead],
    public: PublicKeys,
    *,
    only: ExportFilter | None = None,
    reveal: Callable[[AuditRow], Mapping[str, OpenedText]] | None = None,
) -> Iterator[bytes]:
    """Yield the lines of an export, each with its line end.

    Args:
        rows: the log in order of slot and number; those that `only` leaves out are dropped here too.
        heads: signed heads of the slots exported, in the order of signing; read before `rows`.
        public: origin and public keys, repeated in the header.
        only: what to export; None for everything.
        reveal: returns a record's free texts in clear; None leaves them out.

    """
    only = only or ExportFilter()
    yield _line(
        {
            "complete": only.complete,
            "filter": only.as_json(),
            "format": FORMAT,
            "public": public_keys_json(public),
            "texts": reveal is not None,
            "type": "header",
        }
    )
    for head in heads:
        yield _line({"head": encode_head(head).decode("ascii"), "type": "head"})
    count = 0
    for row in rows:
        if not only.matches(row):
            continue
        count += 1
        texts = reveal(row) if reveal is not None else {}
        yield _record_line(row, texts)
    yield _line({"records": count, "type": "end"})


@dataclass(frozen=True, slots=True)
class Export:
    """An export opened for verification. Memory is bounded by one line.

    Attributes:
        public: origin and keys as the export itself states them.
        complete: whether it claims to be the whole log.
        texts: whether it shows free texts.

    """

    path: Path
    public: PublicKeys
    complete: bool
    texts: bool
    has_heads: bool

    def heads(self) -> Iterator[SignedHead | UnreadableHead]:
        """Yield the heads, which stand before the records."""
        for number, line in _lines(self.path, first=2):
            value = _parse(line)
            if value is None or value.get("type") != "head":
                return
            yield _head(value, f"line {number}")

    def entries(self) -> Iterator[LogEntry | LogFault]:
        """Yield the records, and a fault for every line that is none."""
        records, ended, in_heads = 0, False, True
        for number, line in _lines(self.path, first=2):
            value = _parse(line)
            kind = value.get("type") if value is not None else None
            if kind == "head" and in_heads:
                continue
            in_heads = False
            if value is None or ended or kind not in {"record", "end"}:
                yield _fault(number, "the line is not one that an export has here")
            elif kind == "record":
                records += 1
                yield self._entry(value, number)
            else:
                ended = True
                if value != {"records": records, "type": "end"}:
                    yield LogFault(FindingKind.CUT_EXPORT, None, None, "the export announces other records")
        if not ended:
            yield LogFault(FindingKind.CUT_EXPORT, None, None, "the export has no end line: it was cut off")

    def _entry(self, value: dict[str, Any], number: int) -> LogEntry | LogFault:
        if value.keys() - {"texts"} != _RECORD:
            return _fault(number, "the members are not those of a record")
        slot, seq, body, hash_ = value["slot"], value["seq"], value["body"], value["hash"]
        if type(slot) is not int or type(seq) is not int or not isinstance(body, str):
            return _fault(number, "slot, number or body is of the wrong type")
        try:
            digest = bytes.fromhex(hash_)
            texts = tuple(_evidence(name, text) for name, text in value.get("texts", {}).items())
        except (ValueError, TypeError, AttributeError, KeyError, binascii.Error):
            return _fault(number, "hash or texts are not encoded as they should be")
        if digest.hex() != hash_:
            return _fault(number, "the hash is not in its canonical spelling")
        return LogEntry(slot, seq, body.encode("utf-8"), digest, None, texts, self.texts)


def open_export(path: Path) -> Export:
    """Read an export's header.

    Raises:
        AuditSourceError: the file cannot be read, or does not begin as an export does.

    """
    first = next(_lines(path, first=1), (1, b""))[1]
    header = _parse(first)
    if header is None or header.get("format") != FORMAT or header.get("type") != "header":
        raise AuditSourceError(f"{path} {_NOT_AN_EXPORT}")
    complete, texts = header.get("complete"), header.get("texts")
    if type(complete) is not bool or type(texts) is not bool or complete is not (header.get("filter") == {}):
        raise AuditSourceError(f"{path}: the header contradicts itself about what the export holds")
    try:
        public = parse_public_keys(header.get("public"))
    except PublicKeysError as error:
        raise AuditSourceError(f"{path}: the header's public keys are unreadable: {error}") from error
    second = _parse(next(_lines(path, first=2), (2, b""))[1])
    has_heads = second is not None and second.get("type") == "head"
    return Export(path, public, complete, texts, has_heads)


def _record_line(row: AuditRow, texts: Mapping[str, OpenedText]) -> bytes:
    record: dict[str, Any] = {
        "body": row.body.decode("utf-8"),
        "hash": row.hash.hex(),
        "seq": row.seq,
        "slot": row.slot,
        "type": "record",
    }
    if texts:
        record["texts"] = {
            name: {"salt": base64.b64encode(text.salt).decode("ascii"), "text": text.text}
            for name, text in texts.items()
        }
    return _line(record)


def _evidence(name: str, value: dict[str, str]) -> TextEvidence:
    salt = base64.b64decode(value["salt"], validate=True)
    return TextEvidence(name, opened=OpenedText(value["text"] + "", salt))


def _head(value: dict[str, Any], where: str) -> SignedHead | UnreadableHead:
    text = value.get("head")
    if not isinstance(text, str) or value.keys() != {"head", "type"}:
        return UnreadableHead(where, "the members are not those of a head's line")
    try:
        return decode_head(text.encode("utf-8"))
    except MalformedHeadError as error:
        return UnreadableHead(where, str(error))


def _line(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's object, or None where it is not spelled as `_line` spells it (RFC 8785)."""
    try:
        value = orjson.loads(line)
        return value if isinstance(value, dict) and _line(value) == line else None
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # not JSON, or nested deeper than orjson writes
        return None


def _fault(number: int, detail: str) -> LogFault:
    return LogFault(FindingKind.MALFORMED_EXPORT, None, None, f"line {number}: {detail}")


def _lines(path: Path, *, first: int) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines from number `first`; a longer one than any of ours comes in pieces."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX):
                number += 1
                if number >= first:
                    yield number, line
    except OSError as error:
        raise AuditSourceError(f"cannot read {path}: {error.strerror}") from error
