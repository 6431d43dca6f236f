from __future__ import annotations

import base64
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.status_list import (
    INVALID,
    SIZE,
    VALID,
    StatusIndexer,
    StatusListError,
    decode,
    encode,
    locate,
    status_list_claims,
    status_of,
)

KEY = bytes(range(32))


def test_the_one_bit_example_of_the_draft_encodes_and_decodes() -> None:
    statuses = [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1]
    lst = encode((at for at, status in enumerate(statuses) if status), size=len(statuses))
    assert lst == "eNrbuRgAAhcBXQ"
    packed = decode(lst)
    assert packed == b"\xb9\xa3"
    assert [status_of(packed, at) for at in range(16)] == statuses


def test_the_two_bit_example_of_the_draft_decodes() -> None:
    packed = decode("eNo76fITAAPfAgc")
    assert [status_of(packed, at, bits=2) for at in range(12)] == [1, 2, 0, 3, 0, 1, 0, 1, 1, 2, 3, 3]


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))),
)
def test_every_position_reads_back_as_it_was_written(bits: int, case: tuple[int, set[int]]) -> None:
    size, invalid = case
    packed = decode(encode(invalid, bits=bits, size=size))
    assert {at for at in range(size) if status_of(packed, at, bits=bits) == INVALID} == invalid
    assert all(status_of(packed, at, bits=bits) == VALID for at in range(size) if at not in invalid)


def test_a_full_list_with_few_revoked_stays_small() -> None:
    index_of = StatusIndexer(KEY).index_of
    lst = encode(index_of(counter) for counter in range(SIZE // 1000))
    assert len(lst) < 4096
    assert len(decode(lst)) == SIZE // 8


@pytest.mark.parametrize("position", [-1, 16, SIZE])
def test_a_position_outside_the_list_is_refused(position: int) -> None:
    with pytest.raises(StatusListError):
        encode([position], size=16)
    with pytest.raises(StatusListError):
        status_of(b"\x00\x00", position)


@pytest.mark.parametrize("bits", [0, 3, 16, -1])
def test_a_width_outside_the_draft_is_refused(bits: int) -> None:
    with pytest.raises(StatusListError):
        encode([], bits=bits, size=16)
    with pytest.raises(StatusListError):
        status_of(b"\x00", 0, bits=bits)
    with pytest.raises(StatusListError):
        status_list_claims(uri="u", issued_ms=0, ttl_seconds=1, expires_ms=1, lst="", bits=bits)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "lst",
    [
        "",
        "not base64!",
        "eNrbuRgAAhcBXQ\n",
        "\u00e9",
        _b64(b"not zlib"),
        _b64(zlib.compress(b"abcdef")[:-2]),
        _b64(zlib.compress(b"abcdef") + b"tail"),
        _b64(zlib.compress(bytes(SIZE + 1))),
    ],
    ids=["empty", "alphabet", "newline", "non-ascii", "not zlib", "cut short", "trailing bytes", "bomb"],
)
def test_a_hostile_list_is_refused_without_inflating_it(lst: str) -> None:
    with pytest.raises(StatusListError):
        decode(lst)


def test_a_bomb_is_left_packed() -> None:
    bomb = _b64(zlib.compress(bytes(64 * SIZE), 1))
    tracemalloc.start()
    try:
        with pytest.raises(StatusListError, match="larger"):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 * SIZE
    finally:
        tracemalloc.stop()


def test_the_bound_on_the_inflated_size_is_exact() -> None:
    assert len(decode(_b64(zlib.compress(bytes(100))), size_bytes_max=100)) == 100
    with pytest.raises(StatusListError):
        decode(_b64(zlib.compress(bytes(101))), size_bytes_max=100)


@pytest.mark.parametrize("number", [0, 1])
def test_the_indexer_is_a_permutation_of_the_whole_list(number: int) -> None:
    index_of = StatusIndexer(KEY).index_of
    seen = bytearray(SIZE)
    for counter in range(number * SIZE, (number + 1) * SIZE):
        found, position = locate(index_of(counter))
        assert found == number
        seen[position] += 1
    assert seen == bytearray(b"\x01" * SIZE)


def test_the_order_survives_a_restart_and_depends_on_key_and_list() -> None:
    def positions(key: bytes, number: int) -> list[int]:
        index_of = StatusIndexer(key).index_of
        return [locate(index_of(number * SIZE + counter))[1] for counter in range(64)]

    assert positions(KEY, 0) == positions(KEY, 0)
    assert positions(KEY, 0) != positions(KEY[::-1], 0)
    assert positions(KEY, 0) != positions(KEY, 1)


def test_neighbouring_tokens_are_not_neighbours_in_the_list() -> None:
    index_of = StatusIndexer(KEY).index_of
    steps = [abs(index_of(counter + 1) - index_of(counter)) for counter in range(2000)]
    assert sum(step < SIZE // 100 for step in steps) < 100


def test_an_order_is_the_same_however_many_lists_were_visited_between() -> None:
    indexer = StatusIndexer(KEY)
    before = indexer.index_of(7)
    for number in range(1, 12):
        indexer.index_of(number * SIZE)
    assert indexer.index_of(7) == before
    assert len(indexer._tables) <= 4


def test_the_key_shows_in_no_repr() -> None:
    key = b"k" * 32
    assert "kkkk" not in repr(StatusIndexer(key))


@pytest.mark.parametrize("key", [b"", b"short"])
def test_a_weak_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        StatusIndexer(key)


def test_a_negative_counter_or_index_is_refused() -> None:
    with pytest.raises(StatusListError):
        StatusIndexer(KEY).index_of(-1)
    with pytest.raises(StatusListError):
        locate(-1)


def test_locate_splits_an_index_into_list_and_position() -> None:
    assert locate(0) == (0, 0)
    assert locate(SIZE - 1) == (0, SIZE - 1)
    assert locate(SIZE) == (1, 0)


def test_the_claims_are_those_of_a_status_list_token() -> None:
    claims = status_list_claims(
        uri="https://broker.test/statuslists/3",
        issued_ms=1_700_000_000_999,
        ttl_seconds=60,
        expires_ms=1_700_000_300_999,
        lst="eNrbuRgAAhcBXQ",
    )
    assert claims == {
        "sub": "https://broker.test/statuslists/3",
        "iat": 1_700_000_000,
        "exp": 1_700_000_300,
        "ttl": 60,
        "status_list": {"bits": 1, "lst": "eNrbuRgAAhcBXQ"},
    }
