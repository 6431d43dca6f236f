"""What every source of a log hands to the verifier, be it a database or an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from inventory.audit.report import FindingKind
    from inventory.audit.text import OpenedText


class AuditSourceError(Exception):
    """The log cannot be read at all. Says what was tried and what to do."""


@dataclass(frozen=True, slots=True)
class TextEvidence:
    """A free text as its source shows it: the stored ciphertext, or the revealed text with its salt."""

    name: str
    sealed: bytes | None = None
    opened: OpenedText | None = None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record where it was found. Nothing of it is trusted.

    Attributes:
        slot, seq: the place it was found at.
        columns: the other index columns, None where the source has none.
        texts: its free texts.
        texts_expected: whether the source shows every text that still exists.

    """

    slot: int
    seq: int
    body: bytes
    hash: bytes
    columns: Mapping[str, object] | None = None
    texts: tuple[TextEvidence, ...] = ()
    texts_expected: bool = True


@dataclass(frozen=True, slots=True)
class LogFault:
    """Something that stands in the log and is no record."""

    kind: FindingKind
    slot: int | None
    seq: int | None
    detail: str
