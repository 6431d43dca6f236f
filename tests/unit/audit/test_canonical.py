from __future__ import annotations

import datetime as dt
import enum
import uuid
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import orjson
import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.core.audit import AuditKind
from broker.core.ids import LeaseId
from inventory.audit.canonical import (
    BYTES_MAX,
    DEPTH_MAX,
    DuplicateKeyError,
    NotCanonicalError,
    canonical_bytes,
    parse_canonical,
)

SAFE = 2**53 - 1
ASCII_KEYS = st.text(st.characters(max_codepoint=127), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-SAFE, SAFE) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(ASCII_KEYS, inner, max_size=4)
    ),
    max_leaves=12,  # depth stays under DEPTH_MAX
)
SUBSET = st.dictionaries(ASCII_KEYS, VALUES, max_size=6)
# The first draw of text loads Unicode's tables, which on a busy machine looks like slow generation.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(SUBSET)
def test_equals_rfc8785_on_the_subset(mapping: dict[str, Any]) -> None:
    assert canonical_bytes(mapping) == rfc8785.dumps(mapping)


@patient
@given(SUBSET)
def test_parse_gives_back_what_was_written(mapping: dict[str, Any]) -> None:
    encoded = canonical_bytes(mapping)
    assert canonical_bytes(parse_canonical(encoded)) == encoded


def nest(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


class Ratio(float, enum.Enum):
    HALF = 0.5


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(1.0, id="float"),
        pytest.param(float("nan"), id="nan"),
        pytest.param(2**53, id="integer of 2^53"),
        pytest.param(-(2**53), id="integer of -2^53"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param("a\udfffb", id="lone low surrogate"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param({1, 2}, id="set"),
        pytest.param(uuid.uuid4(), id="uuid, which orjson would write"),
        pytest.param(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), id="datetime, which orjson would write"),
        pytest.param(Ratio.HALF, id="enum of floats, which orjson would write"),
        pytest.param(orjson.Fragment(b"1.5"), id="fragment, which orjson would write"),
        pytest.param(Decimal(1), id="decimal"),
        pytest.param([1, [2.0]], id="float in a nested list"),
        pytest.param({"a": {"b": (1, 2.5)}}, id="float in a nested tuple"),
        pytest.param({"ü": 1}, id="nested key outside ASCII"),
        pytest.param({"a": {1: 2}}, id="nested key that is no string"),
        pytest.param("x" * BYTES_MAX, id="too big"),
    ],
)
def test_refuses_what_is_outside_the_subset(value: Any) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_bytes({"k": value})


@pytest.mark.parametrize("key", ["é", "\u2028", "\ud800", 1, None, b"a", 1.5, (1,)])
def test_refuses_keys_that_are_not_ascii_strings(key: Any) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_bytes({key: 1})


def test_refuses_deep_nesting_at_the_bound_and_not_below() -> None:
    assert canonical_bytes(nest(DEPTH_MAX))
    with pytest.raises(NotCanonicalError):
        canonical_bytes(nest(DEPTH_MAX + 1))
    deep_list: list[Any] = []
    for _ in range(100_000):
        deep_list = [deep_list]
    with pytest.raises(NotCanonicalError):
        canonical_bytes({"a": deep_list})


def test_the_message_never_repeats_the_value() -> None:
    with pytest.raises(NotCanonicalError) as caught:
        canonical_bytes({"k": Decimal(42424242)})
    assert "42424242" not in str(caught.value)


def test_ids_enums_and_readonly_mappings_are_written_as_their_plain_value() -> None:
    lease = LeaseId.new()
    record = {"lease": lease, "kind": AuditKind.KILL, "fields": MappingProxyType({"b": 1, "a": (lease,)})}
    plain = {"lease": str(lease), "kind": "kill.ordered", "fields": {"a": [str(lease)], "b": 1}}
    assert canonical_bytes(record) == rfc8785.dumps(plain)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b'{"a":1,"a":2}', DuplicateKeyError, id="duplicate key"),
        pytest.param(b'{"a":1,"\\u0061":2}', DuplicateKeyError, id="duplicate key under an escape"),
        pytest.param(b'{"b":{"a":1,"a":1}}', DuplicateKeyError, id="nested duplicate key"),
        pytest.param(b'{"b":1,"a":2}', NotCanonicalError, id="unsorted"),
        pytest.param(b'{"a": 1}', NotCanonicalError, id="space"),
        pytest.param(b'{"a":1}\n', NotCanonicalError, id="trailing newline"),
        pytest.param(b'{"a":"\\u0041"}', NotCanonicalError, id="needless escape"),
        pytest.param(b'{"a":1.0}', NotCanonicalError, id="float"),
        pytest.param(b'{"a":1e2}', NotCanonicalError, id="exponent"),
        pytest.param(b'{"a":-0}', NotCanonicalError, id="negative zero"),
        pytest.param(b'{"a":9007199254740992}', NotCanonicalError, id="integer too large"),
        pytest.param(b"[1]", NotCanonicalError, id="not an object"),
        pytest.param(b"{", NotCanonicalError, id="not JSON"),
        pytest.param(b'{"a":"\xff"}', NotCanonicalError, id="not UTF-8"),
        pytest.param(b"\xef\xbb\xbf{}", NotCanonicalError, id="byte order mark"),
        pytest.param(b'{"a":' * 5000 + b"1" + b"}" * 5000, NotCanonicalError, id="deep"),
        pytest.param(b" " * (BYTES_MAX + 1), NotCanonicalError, id="too big"),
    ],
)
def test_parse_refuses_other_spellings(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        parse_canonical(data)
    assert type(caught.value) is error
