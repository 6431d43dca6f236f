from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import rfc8785
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from broker.core.audit import AuditKind, AuditRecord
from inventory.audit import text
from inventory.audit.canonical import BYTES_MAX, DEPTH_MAX, NotCanonicalError, parse_canonical
from inventory.audit.chain import EVENT_BYTES_MAX, GENESIS, ChainHead, append, encode, link, record_hash
from inventory.audit.text import (
    TEXT_BYTES_MAX,
    SealedText,
    TextUnreadableError,
    open_text,
    sealed_digest,
    text_digest,
)
from tests.support.audit_log import MemoryKeys, record


def test_the_body_is_canonical_and_holds_every_column(keys: MemoryKeys) -> None:
    head, row, texts = append(ChainHead(3, 41, b"\x07" * 32), record(1), keys)
    body = parse_canonical(row.body)
    assert row.body == rfc8785.dumps(body)
    assert (body["slot"], body["seq"], body["prev"], body["v"]) == (3, 42, "07" * 32, 1)
    event = body["event"]
    for name in ("at_ms", "kind", "actor", "task_id", "identity", "decision_id", "lease_id"):
        assert event[name] == getattr(row, name)
    assert head == (3, 42, row.hash)
    assert texts == ()
    assert "text" not in event


def test_the_hash_is_the_leaf_hash_of_rfc_6962(keys: MemoryKeys) -> None:
    _, row, _ = append(ChainHead(0), record(1), keys)
    assert row.hash == hashlib.sha256(b"\x00" + row.body).digest() == record_hash(row.body)


def test_each_record_names_the_hash_before_it_and_the_first_names_genesis(keys: MemoryKeys) -> None:
    head, first, _ = append(ChainHead(0), record(1), keys)
    _, second, _ = append(head, record(2), keys)
    assert parse_canonical(first.body)["prev"] == GENESIS.hex()
    assert parse_canonical(second.body)["prev"] == first.hash.hex()
    assert (first.seq, second.seq) == (1, 2)


def test_append_is_encode_and_link(keys: MemoryKeys) -> None:
    head = ChainHead(0, 7, b"\x01" * 32)
    assert append(head, record_ := record(1), keys) == link(head, encode(record_, keys))


def test_absent_ids_are_absent_from_the_body(keys: MemoryKeys) -> None:
    bare = AuditRecord(kind=AuditKind.BROKER_STARTED, at_ms=1, actor="broker")
    _, row, _ = append(ChainHead(0), bare, keys)
    assert set(parse_canonical(row.body)["event"]) == {"actor", "at_ms", "fields", "kind"}
    assert (row.lease_id, row.task_id, row.identity, row.decision_id) == (None,) * 4


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def test_a_record_that_cannot_be_written_is_refused_and_the_head_stays(keys: MemoryKeys) -> None:
    head = ChainHead(0)
    for fields in ({"ttl": 1.5}, {"n": 2**53}, {"ü": 1}, {"s": "\ud800"}, {"big": "x" * EVENT_BYTES_MAX}):
        with pytest.raises(NotCanonicalError):
            append(head, replace(record(1), fields=fields), keys)
    assert head == (0, 0, GENESIS)


def test_whatever_is_accepted_parses_again(keys: MemoryKeys) -> None:
    deepest = replace(record(1), fields=nested(DEPTH_MAX - 3))
    _, row, _ = append(ChainHead(0), deepest, keys)
    assert parse_canonical(row.body)
    with pytest.raises(NotCanonicalError):
        append(ChainHead(0), replace(record(1), fields=nested(DEPTH_MAX - 2)), keys)
    overhead = len(append(ChainHead(2**31, 2**53 - 2), record(2), keys)[1].body)
    largest = replace(record(2), fields={"pad": "x" * (EVENT_BYTES_MAX - overhead)})
    _, row, _ = append(ChainHead(2**31, 2**53 - 2), largest, keys)
    assert len(row.body) <= BYTES_MAX
    assert parse_canonical(row.body)


def test_a_slot_ends_before_its_numbers_leave_the_canonical_range(keys: MemoryKeys) -> None:
    assert parse_canonical(append(ChainHead(0, 2**53 - 2), record(1), keys)[1].body)
    with pytest.raises(NotCanonicalError):
        append(ChainHead(0, 2**53 - 1), record(1), keys)


def test_free_text_reaches_neither_body_nor_stored_row(keys: MemoryKeys) -> None:
    spoken = "the customer is Jane Roe"
    _, row, (stored,) = append(ChainHead(0), record(1, text={"reason": spoken}), keys)
    for data in (row.body, stored.salt, stored.sealed):
        assert b"Jane" not in data
    promise = parse_canonical(row.body)["event"]["text"]["reason"]
    assert promise["sealed"] == sealed_digest(stored.sealed)
    opened = open_text(stored, promise, keys)
    assert opened.text == spoken
    assert text_digest(opened.salt, opened.text) == promise["digest"]


def test_the_stored_row_gives_nobody_the_salt_to_guess_a_short_text_with(keys: MemoryKeys) -> None:
    _, row, (stored,) = append(ChainHead(0), record(1, text={"reason": "yes"}), keys)
    promise = parse_canonical(row.body)["event"]["text"]["reason"]
    opened = open_text(stored, promise, keys)
    assert opened.salt not in stored.salt + stored.sealed + row.body


def test_equal_texts_have_unequal_digests(keys: MemoryKeys) -> None:
    same = record(1, text={"a": "yes", "b": "yes"})
    _, row, _ = append(ChainHead(0), same, keys)
    promises = parse_canonical(row.body)["event"]["text"]
    assert promises["a"]["digest"] != promises["b"]["digest"]


@pytest.mark.parametrize("column", ["salt", "sealed"])
def test_a_changed_text_row_does_not_open(keys: MemoryKeys, column: str) -> None:
    _, row, (stored,) = append(ChainHead(0), record(1, text={"reason": "yes"}), keys)
    promise = parse_canonical(row.body)["event"]["text"]["reason"]
    for index in range(len(getattr(stored, column))):
        data = bytearray(getattr(stored, column))
        data[index] ^= 1
        with pytest.raises(TextUnreadableError):
            open_text(stored._replace(**{column: bytes(data)}), promise, keys)


def test_even_a_key_holder_cannot_show_another_text_as_the_recorded_one(keys: MemoryKeys) -> None:
    _, row, (stored,) = append(ChainHead(0), record(1, text={"reason": "yes"}), keys)
    promise = parse_canonical(row.body)["event"]["text"]["reason"]
    context = text._context("reason", promise["digest"])
    key = text._key(keys.unseal(stored.salt, context))
    sealed = bytes(12) + AESGCM(key).encrypt(bytes(12), b"no", context)
    with pytest.raises(TextUnreadableError, match="not the one"):
        open_text(stored._replace(sealed=sealed), promise, keys)


def test_a_text_row_moved_to_another_record_or_key_store_does_not_open(keys: MemoryKeys) -> None:
    _, _, (stored,) = append(ChainHead(0), record(1, text={"reason": "yes"}), keys)
    _, other, _ = append(ChainHead(0), record(1, text={"reason": "yes"}), keys)
    with pytest.raises(TextUnreadableError):
        open_text(stored, parse_canonical(other.body)["event"]["text"]["reason"], keys)
    with pytest.raises(TextUnreadableError):
        open_text(SealedText(0, 1, "reason", b"", b""), {"digest": "", "sealed": ""}, MemoryKeys())


@pytest.mark.parametrize("spoken", ["x" * (TEXT_BYTES_MAX + 1), "\udc80"], ids=["too long", "lone surrogate"])
def test_a_text_that_cannot_be_kept_is_refused(keys: MemoryKeys, spoken: str) -> None:
    with pytest.raises(NotCanonicalError):
        append(ChainHead(0), record(1, text={"reason": spoken}), keys)


def test_a_text_name_outside_ascii_is_refused(keys: MemoryKeys) -> None:
    with pytest.raises(NotCanonicalError):
        append(ChainHead(0), record(1, text={"gründe": "yes"}), keys)
