"""Offline verification with public keys only (DESIGN 9): what changed, where, and what stays unseen.

The log streams by once, in order of slot and number; memory holds a few values per slot
and 40 bytes per copied head. Heads are read before the log, so that a running broker,
which copies a head only after its commit, is never ahead of what is read here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from broker.core.clock import MS_PER_SECOND
from inventory.audit.canonical import DuplicateKeyError, NotCanonicalError, parse_canonical
from inventory.audit.chain import BODY_VERSION, GENESIS, HASH_BYTES, record_hash
from inventory.audit.database import read_database
from inventory.audit.entries import LogEntry, LogFault
from inventory.audit.export import open_export
from inventory.audit.head_index import HeadIndex, SlotHeads
from inventory.audit.report import FindingKind, Tally, VerificationReport
from inventory.audit.text import SALT_BYTES, sealed_digest, text_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from inventory.audit.entries import TextEvidence
    from inventory.audit.heads import SignedHead, UnreadableHead
    from inventory.audit.public_keys import PublicKeys

    Heads = Iterable[SignedHead | UnreadableHead]
    Progress = Callable[[int], None]

HEAD_LAG_MS_MAX: Final = 60_000
"""Records may flow this long without a copied head; heads are signed every second."""

_GAPS_MAX: Final = 1000
_PROGRESS_EVERY: Final = 1000
_COLUMNS: Final = ("at_ms", "kind", "actor", "lease_id", "task_id", "identity", "decision_id")
_ENVELOPE: Final = frozenset({"event", "prev", "seq", "slot", "v"})

NO_COPY: Final = (
    "no copied heads were given: a cut tail of the log, or a rewrite of it from any record on, would go "
    "undetected; verify again with the directory the heads are copied to"
)
FILTERED: Final = (
    "the export is filtered: records left out, and links between records that are not neighbours, "
    "could not be checked"
)
EMBEDDED_KEYS: Final = (
    "the public keys were taken from the export itself: whoever made the export chose them; "
    "give the public keys file, obtained another way"
)


def verify_database(
    path: Path, public: PublicKeys, heads: Heads | None, *, progress: Progress | None = None
) -> VerificationReport:
    """Verify the audit log in a SQLite ledger, opened read-only.

    Args:
        path: the ledger's database file; the broker may be running.
        public: the log's origin and public keys.
        heads: the copied heads, `HeadCopy.read_all`; None where there is no copy.
        progress: called with the number of records read, now and then.

    Raises:
        AuditSourceError: the database cannot be read at all.
        HeadCopyError: the copied heads cannot be read.

    """
    return verify_entries(lambda: read_database(path), public, [heads], progress=progress)


def verify_export(
    path: Path, public: PublicKeys | None, heads: Heads | None = None, *, progress: Progress | None = None
) -> VerificationReport:
    """Verify an exported JSON-lines file, complete or filtered.

    Args:
        path: the export.
        public: the keys to trust; None takes those in the export, and the report says so.
        heads: copied heads besides those in the export.
        progress: called with the number of records read, now and then.

    Raises:
        AuditSourceError: the file is not an export.

    """
    export = open_export(path)
    return verify_entries(
        export.entries,
        public or export.public,
        [export.heads() if export.has_heads else None, heads],
        complete=export.complete,
        progress=progress,
        limits=() if public else (EMBEDDED_KEYS,),
    )


def verify_entries(
    entries: Callable[[], Iterable[LogEntry | LogFault]],
    public: PublicKeys,
    head_sources: Iterable[Heads | None],
    *,
    complete: bool = True,
    progress: Progress | None = None,
    limits: tuple[str, ...] = (),
) -> VerificationReport:
    """Verify a log from any source.

    Args:
        entries: opens the log; called after the heads were read.
        public: the log's origin and public keys.
        head_sources: copies of heads, each in the order of writing.
        complete: whether the log should be gapless.
        progress: called with the number of records read, now and then.
        limits: what the source already knows it cannot show.

    """
    tally = Tally(limits=list(limits))
    index = HeadIndex(public, tally)
    started = time.monotonic()
    for heads in head_sources:
        if heads is not None:
            index.add_source(heads)
    # A running broker wrote on while its heads were being checked: that is no lag of its copy.
    lag_ms_max = HEAD_LAG_MS_MAX + int((time.monotonic() - started) * MS_PER_SECOND)
    log = _Log(index, tally, complete=complete, lag_ms_max=lag_ms_max)
    for entry in entries():
        if isinstance(entry, LogFault):
            tally.found(entry.kind, entry.slot, entry.seq, entry.detail)
            continue
        log.check(entry)
        if progress is not None and tally.records % _PROGRESS_EVERY == 0:
            progress(tally.records)
    log.finish()
    return tally.report(log.slots, complete=complete)


@dataclass(slots=True)
class _Slot:
    """Where the verification stands in one slot.

    Attributes:
        last_seq: highest number seen.
        last_hash: stored hash of that record; None where the next link cannot be judged.
        gaps: ranges of numbers not seen yet; what is left at the end was deleted.
        next_head: index of the first head not yet passed.
        pending: linked records since the last one that a head confirmed.
        pending_since_ms, last_ms: time of the first of these and of the last record.

    """

    slot: int
    heads: SlotHeads
    last_seq: int = 0
    last_hash: bytes | None = GENESIS
    gaps: list[tuple[int, int]] = field(default_factory=list)
    next_head: int = 0
    confirmed_seq: int = 0
    contradicted: bool = False
    pending: int = 0
    pending_since_ms: int | None = None
    last_ms: int = 0


class _Log:
    """Checks entries one after the other."""

    def __init__(self, index: HeadIndex, tally: Tally, *, complete: bool, lag_ms_max: int) -> None:
        self._lag_ms_max = lag_ms_max
        self._index = index
        self._tally = tally
        self._complete = complete
        self._slots: dict[int, _Slot] = {}

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    def check(self, entry: LogEntry) -> None:
        self._tally.records += 1
        digest = record_hash(entry.body)
        edited = digest != entry.hash
        if edited:
            self._found(FindingKind.EDITED, entry, "the body does not have the hash stored with it")
        body = self._parse(entry)
        if body is not None:
            self._compare_columns(entry, body)
            self._check_texts(entry, body)
        state = self._slots.get(entry.slot)
        if state is None:
            state = self._slots[entry.slot] = _Slot(entry.slot, self._index.of(entry.slot))
            if not self._complete:
                state.last_hash = None
        if not self._take_place(state, entry):
            return
        linked = self._check_link(state, entry, body)
        if edited or body is None or not linked:
            state.pending = 0
        if not edited and body is not None:
            state.pending += 1
            self._note_time(state, body["event"]["at_ms"])
        self._check_head(state, entry, digest)
        state.last_seq = entry.seq
        state.last_hash = entry.hash

    def finish(self) -> None:
        """Report what only the end of the log shows."""
        for state in self._slots.values():
            for first, last in state.gaps:
                self._report_gap(state.slot, first, last)
            if self._complete:
                self._check_tail(state)
        if self._complete:
            for slot in sorted(self._index.slots - self._slots.keys()):
                self._report_truncation(slot, 0, self._index.of(slot).last)
        else:
            self._tally.limits.append(FILTERED)
        self._state_limits()

    # --- one record by itself

    def _parse(self, entry: LogEntry) -> dict[str, Any] | None:
        try:
            body = parse_canonical(entry.body)
        except DuplicateKeyError as error:
            self._found(FindingKind.DUPLICATE_KEY, entry, str(error))
            return None
        except NotCanonicalError as error:
            self._found(FindingKind.NOT_CANONICAL, entry, f"the body is {error}")
            return None
        fault = _shape_fault(body)
        if fault:
            self._found(FindingKind.MALFORMED, entry, fault)
            return None
        return body

    def _compare_columns(self, entry: LogEntry, body: Mapping[str, Any]) -> None:
        if body["slot"] != entry.slot:
            self._found(FindingKind.SWAPPED_SLOT, entry, f"the record was written as slot {body['slot']}'s")
        if body["seq"] != entry.seq:
            self._found(FindingKind.REORDERED, entry, f"the record was written as number {body['seq']}")
        if entry.columns is None:
            return
        event = body["event"]
        wrong = [name for name in _COLUMNS if not _same(entry.columns.get(name), event.get(name))]
        if wrong:
            self._found(
                FindingKind.COLUMN_DIFFERS, entry, f"columns differ from the body: {', '.join(wrong)}"
            )

    def _check_texts(self, entry: LogEntry, body: Mapping[str, Any]) -> None:
        committed = body["event"].get("text", {})
        for text in entry.texts:
            self._tally.texts_checked += 1
            promise = committed.get(text.name)
            if promise is None:
                self._found(FindingKind.STRAY_TEXT, entry, "a text is stored that the record does not name")
            elif not _keeps(promise, text):
                self._found(FindingKind.TEXT_DIFFERS, entry, "a text is not the one that was recorded")
        if entry.texts_expected:
            self._tally.texts_erased += len(committed.keys() - {text.name for text in entry.texts})

    # --- its place in the chain

    def _take_place(self, state: _Slot, entry: LogEntry) -> bool:
        """Say whether the record comes next, with or without a gap before it."""
        if entry.seq > state.last_seq:
            if self._complete and entry.seq > state.last_seq + 1:
                self._open_gap(state, state.last_seq + 1, entry.seq - 1)
            if entry.seq != state.last_seq + 1:
                state.last_hash = None
            return True
        if entry.seq != state.last_seq and (not self._complete or _close_gap(state.gaps, entry.seq)):
            self._found(FindingKind.REORDERED, entry, f"the record stands after record {state.last_seq}")
        else:
            self._found(FindingKind.INSERTED, entry, "a second record stands under this number")
        return False

    def _open_gap(self, state: _Slot, first: int, last: int) -> None:
        if len(state.gaps) < _GAPS_MAX:
            state.gaps.append((first, last))
        else:
            self._report_gap(state.slot, first, last)

    def _check_link(self, state: _Slot, entry: LogEntry, body: Mapping[str, Any] | None) -> bool:
        """Say whether the record is tied to the one before it."""
        if body is None:
            return False
        previous = GENESIS if entry.seq == 1 else state.last_hash
        if previous is None:
            return False
        if body["prev"] == previous.hex():
            return True
        self._found(
            FindingKind.BROKEN_LINK,
            entry,
            "the record does not follow from the one before it: "
            "that one was rewritten together with its hash, or this one does not belong here",
        )
        return False

    def _note_time(self, state: _Slot, at_ms: int) -> None:
        if state.pending_since_ms is None:
            state.pending_since_ms = at_ms
        state.last_ms = at_ms

    def _check_head(self, state: _Slot, entry: LogEntry, digest: bytes) -> None:
        seqs = state.heads.seqs
        while state.next_head < len(seqs) and seqs[state.next_head] < entry.seq:
            state.next_head += 1  # its record is missing, which is reported as such
        if state.next_head == len(seqs) or seqs[state.next_head] != entry.seq:
            return
        signed = state.heads.hash_at(state.next_head)
        self._tally.heads_checked += 1
        if digest == signed:
            self._tally.records_anchored += state.pending
            state.pending, state.pending_since_ms = 0, None
            state.confirmed_seq = entry.seq
        elif entry.hash != signed and not state.contradicted:
            # One rewrite contradicts every later head too: say it once per slot.
            state.contradicted = True
            self._found(
                FindingKind.REWRITTEN,
                entry,
                f"a signed head gives this record another hash: a record from {state.confirmed_seq + 1} "
                f"to {entry.seq} was rewritten after it had been signed and copied",
            )

    # --- the end

    def _check_tail(self, state: _Slot) -> None:
        if state.heads.last > state.last_seq:
            self._report_truncation(state.slot, state.last_seq, state.heads.last)
        elif state.pending_since_ms is not None and not state.contradicted and self._index.sources:
            lag = state.last_ms - state.pending_since_ms
            if lag > self._lag_ms_max:
                self._tally.found(
                    FindingKind.STALE_HEADS,
                    state.slot,
                    state.last_seq,
                    f"the records of the last {lag // MS_PER_SECOND} seconds are covered by no copied head: "
                    "copying failed, or old heads were put in place of newer ones",
                )

    def _report_gap(self, slot: int, first: int, last: int) -> None:
        what = f"record {first} is" if first == last else f"records {first} to {last} are"
        self._tally.found(FindingKind.DELETED, slot, first, f"{what} missing")

    def _report_truncation(self, slot: int, last: int, signed: int) -> None:
        if signed > last:
            self._tally.found(
                FindingKind.TRUNCATED,
                slot,
                last + 1,
                f"the log ends at record {last}, but a signed head says it had {signed}",
            )

    def _state_limits(self) -> None:
        tally = self._tally
        if not self._index.sources:
            tally.limits.append(NO_COPY)
            return
        loose = tally.records - tally.records_anchored
        if loose:
            tally.limits.append(
                f"{loose} of {tally.records} records are tied to no signed head: "
                "of those only their own hash and their links to neighbours were checked"
            )

    def _found(self, kind: FindingKind, entry: LogEntry, detail: str) -> None:
        self._tally.found(kind, entry.slot, entry.seq, detail)


def _close_gap(gaps: list[tuple[int, int]], seq: int) -> bool:
    """Take `seq` out of the gaps; say whether it was in one."""
    for index, (first, last) in enumerate(gaps):
        if first <= seq <= last:
            gaps[index : index + 1] = [(a, b) for a, b in ((first, seq - 1), (seq + 1, last)) if a <= b]
            return True
    return False


def _shape_fault(body: Mapping[str, Any]) -> str:
    """Return what a canonical body lacks to be a record, or nothing."""
    if body.keys() != _ENVELOPE:
        return "the body does not have the members of a record"
    if body["v"] != BODY_VERSION:
        return "the body is of an unknown version"
    if type(body["slot"]) is not int or type(body["seq"]) is not int:
        return "slot or number in the body is not an integer"
    if not isinstance(body["prev"], str) or len(body["prev"]) != 2 * HASH_BYTES:
        return "the body names no hash of the record before"
    return _event_fault(body["event"])


def _event_fault(event: object) -> str:
    if not isinstance(event, dict) or type(event.get("at_ms")) is not int:
        return "the event has no time"
    texts = event.get("text", {})
    if not isinstance(texts, dict) or not all(_is_promise(promise) for promise in texts.values()):
        return "the digests of the texts are not readable"
    return ""


def _is_promise(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("digest", "sealed"))


def _same(column: object, member: object) -> bool:
    return isinstance(column, type(member)) and column == member


def _keeps(promise: Mapping[str, str], text: TextEvidence) -> bool:
    if text.opened is not None:
        # With a salt of free length, bytes could be moved between salt and text unnoticed.
        return (
            len(text.opened.salt) == SALT_BYTES
            and text_digest(text.opened.salt, text.opened.text) == promise["digest"]
        )
    return text.sealed is not None and sealed_digest(text.sealed) == promise["sealed"]
