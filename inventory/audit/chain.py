"""The hash chain of one writer slot: pure functions, called inside a group commit.

A record's stored ``body`` is canonical JSON::

    {"event":{…},"prev":"<hash of the record before>","seq":7,"slot":0,"v":1}

and its ``hash`` is SHA-256(0x00 || body), the leaf hash of RFC 6962 §2.1: the later Merkle
log takes these very hashes as leaves, and no inner node can pass for a record. What
depends on the place in the chain stands outside ``event``, so `encode` can refuse a record
before any transaction is open, and `link` only joins bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from inventory.audit.canonical import BYTES_MAX, NotCanonicalError, canonical_bytes
from inventory.audit.text import SealedText, seal_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.audit import AuditRecord
    from broker.core.ports import KeyStore

BODY_VERSION: Final = 1
HASH_BYTES: Final = 32
GENESIS: Final = bytes(HASH_BYTES)
"""What the first record of a slot names as the hash before it."""

EVENT_BYTES_MAX: Final = BYTES_MAX - 1024
"""Longest event; the rest of `BYTES_MAX` is for the envelope around it."""

_LEAF: Final = b"\x00"
_IDS: Final = ("lease_id", "task_id", "identity", "decision_id")
_SEQ_MAX: Final = 2**53 - 1


class ChainHead(NamedTuple):
    """Where a slot's chain stands. A tuple, because one is made per record.

    Attributes:
        seq: number of the last record; 0 before the first.
        hash: that record's hash; `GENESIS` before the first.

    """

    slot: int
    seq: int = 0
    hash: bytes = GENESIS


class AuditRow(NamedTuple):
    """One row of table ``audit``. A tuple, in column order, so that it is the statement's parameters.

    The columns between `seq` and `body` repeat the body as indices; verification compares them.
    """

    slot: int
    seq: int
    at_ms: int
    kind: str
    actor: str
    lease_id: str | None
    task_id: str | None
    identity: str | None
    decision_id: str | None
    body: bytes
    hash: bytes


class EncodedText(NamedTuple):
    """A sealed text that has no place in the chain yet."""

    name: str
    salt: bytes
    sealed: bytes


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A record ready to be linked: checked, canonical, its texts sealed.

    Attributes:
        record: what was encoded.
        event: canonical bytes of the body's ``event``.
        texts: sealed texts, empty for most records.

    """

    record: AuditRecord
    event: bytes
    texts: tuple[EncodedText, ...] = ()


def record_hash(body: bytes) -> bytes:
    """Return the hash of a record's canonical body."""
    return sha256(_LEAF + body).digest()


def encode(record: AuditRecord, keys: KeyStore) -> EncodedRecord:
    """Check a record and write its part of the body.

    Raises:
        NotCanonicalError: a fact lies outside the canonical subset, or a text is too long.

    """
    event: dict[str, Any] = {
        "actor": record.actor,
        "at_ms": record.at_ms,
        "fields": record.fields,
        "kind": record.kind,
    }
    for name in _IDS:
        value = getattr(record, name)
        if value is not None:
            event[name] = value
    texts: tuple[EncodedText, ...] = ()
    if record.text:
        event["text"], texts = _seal_texts(record.text, keys)
    # Level and bound leave room for the envelope, so that every body written parses again.
    return EncodedRecord(record, canonical_bytes(event, level=2, bytes_max=EVENT_BYTES_MAX), texts)


def link(head: ChainHead, encoded: EncodedRecord) -> tuple[ChainHead, AuditRow, tuple[SealedText, ...]]:
    """Give an encoded record its place after `head`.

    Returns:
        The new head, the row to insert into ``audit``, the rows to insert into ``audit_text``.

    """
    slot, seq, previous = head
    seq += 1
    if seq > _SEQ_MAX:
        raise NotCanonicalError("the slot has no sequence numbers left")
    # The keys are in canonical order: event < prev < seq < slot < v.
    body = b'{"event":%b,"prev":"%b","seq":%d,"slot":%d,"v":%d}' % (
        encoded.event,
        previous.hex().encode("ascii"),
        seq,
        slot,
        BODY_VERSION,
    )
    digest = record_hash(body)
    r = encoded.record
    row = AuditRow(
        slot,
        seq,
        r.at_ms,
        r.kind.value,
        r.actor,
        r.lease_id,
        r.task_id,
        r.identity,
        r.decision_id,
        body,
        digest,
    )
    texts = tuple(SealedText(slot, seq, *text) for text in encoded.texts) if encoded.texts else ()
    return ChainHead(slot, seq, digest), row, texts


def append(
    head: ChainHead, record: AuditRecord, keys: KeyStore
) -> tuple[ChainHead, AuditRow, tuple[SealedText, ...]]:
    """Encode `record` and link it after `head`; see `encode` and `link`.

    Raises:
        NotCanonicalError: the record lies outside the canonical subset; the head has not moved.

    """
    return link(head, encode(record, keys))


def _seal_texts(
    texts: Mapping[str, str], keys: KeyStore
) -> tuple[dict[str, dict[str, str]], tuple[EncodedText, ...]]:
    committed: dict[str, dict[str, str]] = {}
    rows: list[EncodedText] = []
    for name, text in texts.items():
        if not name.isascii():
            raise NotCanonicalError("the name of a text is not ASCII")
        committed[name], salt, sealed = seal_text(name, text, keys)
        rows.append(EncodedText(name, salt, sealed))
    return committed, tuple(rows)
