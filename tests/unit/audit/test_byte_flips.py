"""No byte of a body, a hash or a copied head can change unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.ids import InstanceTag
from inventory.audit.chain import AuditRow, ChainHead, append
from inventory.audit.entries import LogEntry, TextEvidence
from inventory.audit.heads import HeadSigner, encode_head, read_heads
from inventory.audit.public_keys import PublicKeys
from inventory.audit.verify import verify_entries
from tests.support.audit_log import SLOTS, START_MS, MemoryKeys, record

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from inventory.audit.report import VerificationReport
    from inventory.audit.text import SealedText

EACH = 25


@dataclass(frozen=True)
class Sample:
    public: PublicKeys
    rows: tuple[AuditRow, ...]
    texts: tuple[SealedText, ...]
    heads: bytes


def make_sample() -> Sample:
    keys, origin = MemoryKeys(), InstanceTag.new()
    rows: list[AuditRow] = []
    texts: list[SealedText] = []
    heads: list[bytes] = []
    signer = HeadSigner(keys, origin)
    for slot in SLOTS:
        head = ChainHead(slot)
        for number in range(1, EACH + 1):
            text = {"reason": "weekly report"} if number % 6 == 0 else None
            head, row, sealed = append(head, record(number, text=text), keys)
            rows.append(row)
            texts.extend(sealed)
            if number % 5 == 0:
                heads.append(encode_head(signer.sign(head, START_MS + number * 100)) + b"\n")
    return Sample(PublicKeys(origin, keys.audit_keys()), tuple(rows), tuple(texts), b"".join(heads))


SAMPLE = make_sample()


def entry(row: AuditRow, texts: Iterable[SealedText]) -> LogEntry:
    columns = {name: getattr(row, name) for name in AuditRow._fields[2:9]}
    evidence = tuple(TextEvidence(t.name, t.sealed) for t in texts if t[:2] == row[:2])
    return LogEntry(row.slot, row.seq, row.body, row.hash, columns, evidence)


def verify(sample: Sample, scratch: Path) -> VerificationReport:
    path = scratch / "heads.jsonl"
    path.write_bytes(sample.heads)
    entries = [entry(row, sample.texts) for row in sample.rows]
    return verify_entries(lambda: entries, sample.public, [read_heads(path)])


def flip(data: bytes, position: int, mask: int) -> bytes:
    index = position % len(data)
    return data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flips")


def test_the_sample_itself_is_intact(scratch: Path) -> None:
    report = verify(SAMPLE, scratch)
    assert report.intact
    assert report.records_anchored == len(SAMPLE.rows) == 50
    assert report.limits == ()


masks = st.integers(1, 255)
positions = st.integers(0, 10_000)
patient = settings(deadline=None, max_examples=200)


@patient
@given(which=st.integers(0, 49), column=st.sampled_from(["body", "hash"]), position=positions, mask=masks)
def test_any_flipped_byte_of_a_body_or_hash_is_detected(
    scratch: Path, which: int, column: str, position: int, mask: int
) -> None:
    row = SAMPLE.rows[which]
    changed = row._replace(**{column: flip(getattr(row, column), position, mask)})
    rows = (*SAMPLE.rows[:which], changed, *SAMPLE.rows[which + 1 :])
    report = verify(Sample(SAMPLE.public, rows, SAMPLE.texts, SAMPLE.heads), scratch)
    assert any((finding.slot, finding.seq) == (row.slot, row.seq) for finding in report.findings)


@patient
@given(position=positions, mask=masks)
def test_any_flipped_byte_of_a_copied_head_is_detected(scratch: Path, position: int, mask: int) -> None:
    report = verify(
        Sample(SAMPLE.public, SAMPLE.rows, SAMPLE.texts, flip(SAMPLE.heads, position, mask)), scratch
    )
    # The last line end alone may turn into a torn line, which is reported as such.
    assert not report.intact or report.limits


@patient
@given(which=st.integers(0, len(SAMPLE.texts) - 1), position=positions, mask=masks)
def test_any_flipped_byte_of_a_sealed_text_is_detected(
    scratch: Path, which: int, position: int, mask: int
) -> None:
    text = SAMPLE.texts[which]
    changed = text._replace(sealed=flip(text.sealed, position, mask))
    texts = (*SAMPLE.texts[:which], changed, *SAMPLE.texts[which + 1 :])
    assert not verify(Sample(SAMPLE.public, SAMPLE.rows, texts, SAMPLE.heads), scratch).intact
