"""What a verification found, what it counted, and what it could not see."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

FINDINGS_MAX: Final = 1000
"""Findings kept one by one; beyond it they are only counted, so that memory stays bounded."""


_LIMITS_MAX: Final = 100


class FindingKind(StrEnum):
    """One word per way in which a log can be wrong."""

    EDITED = "edited"
    COLUMN_DIFFERS = "column_differs"
    MALFORMED = "malformed"
    NOT_CANONICAL = "not_canonical"
    DUPLICATE_KEY = "duplicate_key"
    BROKEN_LINK = "broken_link"
    DELETED = "deleted"
    REORDERED = "reordered"
    INSERTED = "inserted"
    SWAPPED_SLOT = "swapped_slot"
    TRUNCATED = "truncated"
    REWRITTEN = "rewritten"
    TEXT_DIFFERS = "text_differs"
    STRAY_TEXT = "stray_text"
    FORGED_HEAD = "forged_head"
    UNKNOWN_KEY = "unknown_key"
    WRONG_ORIGIN = "wrong_origin"
    REPLAYED_HEAD = "replayed_head"
    FORKED_HEAD = "forked_head"
    MALFORMED_HEAD = "malformed_head"
    STALE_HEADS = "stale_heads"
    MALFORMED_EXPORT = "malformed_export"
    CUT_EXPORT = "cut_export"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """One thing that is wrong.

    Attributes:
        slot, seq: where, None where the place itself is unreadable.
        detail: a sentence; it repeats nothing from the log but numbers, key ids and our own words.

    """

    kind: FindingKind
    slot: int | None
    seq: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """The result of verifying one log or one export.

    Attributes:
        records: records read.
        records_anchored: of these, how many an unbroken chain ties to a signed head.
        slots: slots seen, ascending.
        heads_checked: heads whose signature held and whose record was there to compare.
        texts_checked: free texts compared with what their record committed to.
        texts_erased: free texts whose row is gone, as retention may do.
        complete: False for a filtered export: it has gaps by design.
        findings: what is wrong, the first `FINDINGS_MAX` of it.
        findings_omitted: how many more there were.
        limits: what this verification could not have noticed, each a sentence.

    """

    records: int
    records_anchored: int
    slots: tuple[int, ...]
    heads_checked: int
    texts_checked: int
    texts_erased: int
    complete: bool
    findings: tuple[AuditFinding, ...]
    findings_omitted: int
    limits: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Nothing was found. Read `limits` before concluding more than that."""
        return not self.findings


@dataclass(slots=True)
class Tally:
    """Collects a report while the log streams by."""

    records: int = 0
    records_anchored: int = 0
    heads_checked: int = 0
    texts_checked: int = 0
    texts_erased: int = 0
    findings: list[AuditFinding] = field(default_factory=list)
    findings_omitted: int = 0
    limits: list[str] = field(default_factory=list)

    def found(self, kind: FindingKind, slot: int | None, seq: int | None, detail: str) -> None:
        """Add a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(AuditFinding(kind, slot, seq, detail))
        else:
            self.findings_omitted += 1

    def limit(self, sentence: str) -> None:
        """Add something that this verification could not have noticed."""
        if len(self.limits) < _LIMITS_MAX:
            self.limits.append(sentence)

    def report(self, slots: tuple[int, ...], *, complete: bool) -> VerificationReport:
        """Return what was collected."""
        return VerificationReport(
            records=self.records,
            records_anchored=self.records_anchored,
            slots=slots,
            heads_checked=self.heads_checked,
            texts_checked=self.texts_checked,
            texts_erased=self.texts_erased,
            complete=complete,
            findings=tuple(self.findings),
            findings_omitted=self.findings_omitted,
            limits=tuple(self.limits),
        )
