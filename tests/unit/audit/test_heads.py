from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from inventory.audit.chain import ChainHead
from inventory.audit.heads import (
    HEAD_LINE_BYTES_MAX,
    HeadCopy,
    HeadCopyError,
    HeadSigner,
    MalformedHeadError,
    SignedHead,
    UnreadableHead,
    decode_head,
    encode_head,
    head_payload,
)
from tests.support.audit_log import START_MS, MemoryKeys

if TYPE_CHECKING:
    from pathlib import Path

DAY_MS = 24 * 3600 * 1000
STORE = MemoryKeys()


def signed(seq: int = 7, *, slot: int = 0, at_ms: int = START_MS) -> SignedHead:
    return HeadSigner(STORE, "abc234").sign(ChainHead(slot, seq, bytes([seq % 256]) * 32), at_ms)


def test_the_signature_covers_place_hash_time_origin_and_purpose() -> None:
    head = signed()
    payload = head_payload(head.slot, head.seq, head.hash, head.at_ms, head.origin)
    assert json.loads(payload) == {
        "at_ms": START_MS,
        "hash": "07" * 32,
        "origin": "abc234",
        "purpose": "nhi-broker/audit-head/v1",
        "seq": 7,
        "slot": 0,
    }
    Ed25519PublicKey.from_public_bytes(STORE.audit_keys()[head.key_id]).verify(head.signature, payload)


def test_a_head_survives_its_line() -> None:
    head = signed()
    assert decode_head(encode_head(head)) == head


def test_an_origin_that_is_no_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="instance tag"):
        HeadSigner(STORE, "two\nlines")


@given(index=st.integers(0, len(encode_head(signed())) - 1), flip=st.integers(1, 255))
def test_no_changed_byte_of_a_line_leaves_the_same_head(index: int, flip: int) -> None:
    line = bytearray(encode_head(signed()))
    line[index] ^= flip
    with contextlib.suppress(MalformedHeadError):
        assert decode_head(bytes(line)) != decode_head(encode_head(signed()))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda v: v.pop("seq"), id="member missing"),
        pytest.param(lambda v: v.update(extra=1), id="member too many"),
        pytest.param(lambda v: v.update(seq="7"), id="number as string"),
        pytest.param(lambda v: v.update(seq=True), id="number as boolean"),
        pytest.param(lambda v: v.update(seq=-1), id="negative number"),
        pytest.param(lambda v: v.update(hash="00"), id="short hash"),
        pytest.param(lambda v: v.update(hash=v["hash"].replace("07", "0a").upper()), id="hash in capitals"),
        pytest.param(lambda v: v.update(hash=None), id="no hash"),
        pytest.param(lambda v: v.update(signature="!"), id="signature not base64"),
        pytest.param(lambda v: v.update(signature="AAAA"), id="short signature"),
        pytest.param(lambda v: v.update(origin="a b"), id="origin with a space"),
        pytest.param(lambda v: v.update(key_id="\x1b[31m"), id="key id that drives a terminal"),
        pytest.param(lambda v: v.update(key_id="k" * 129), id="key id too long"),
    ],
)
def test_a_line_of_another_shape_is_refused(change) -> None:  # noqa: ANN001  one of the lambdas above
    value = json.loads(encode_head(signed()))
    change(value)
    with pytest.raises(MalformedHeadError):
        decode_head(json.dumps(value, separators=(",", ":"), sort_keys=True).encode())


def test_the_copy_gives_back_what_it_took_in_order(tmp_path: Path) -> None:
    heads = [signed(seq, slot=seq % 2) for seq in range(1, 9)]
    copy = HeadCopy(tmp_path / "copy")
    assert copy.latest(0) is None
    for head in heads:
        copy.append(head)
    assert list(copy.read_all()) == heads
    assert (copy.latest(0), copy.latest(1), copy.latest(2)) == (heads[-1], heads[-2], None)
    again = HeadCopy(tmp_path / "copy")
    assert again.latest(1) == heads[-2]
    again.append(signed(9))
    assert list(again.read_all()) == [*heads, signed(9)]
    copy.close()
    again.close()


def test_only_our_user_can_read_the_copy(tmp_path: Path) -> None:
    copy = HeadCopy(tmp_path / "copy")
    copy.append(signed())
    copy.close()
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
    (file,) = (tmp_path / "copy").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_each_day_has_its_file_and_a_clock_set_back_changes_no_order(tmp_path: Path) -> None:
    copy = HeadCopy(tmp_path)
    heads = [signed(1), signed(2, at_ms=START_MS + DAY_MS), signed(3, at_ms=START_MS)]
    for head in heads:
        copy.append(head)
    copy.close()
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "heads-20231114-000001.jsonl",
        "heads-20231115-000001.jsonl",
    ]
    assert list(copy.read_all()) == heads
    restarted = HeadCopy(tmp_path)
    restarted.append(signed(4, at_ms=START_MS))
    restarted.close()
    assert list(restarted.read_all()) == [*heads, signed(4)]


@pytest.mark.parametrize("kept", [1, 5, 9, 60, 200])
def test_a_torn_last_line_is_reported_and_never_touched(tmp_path: Path, kept: int) -> None:
    copy = HeadCopy(tmp_path)
    copy.append(signed(1))
    copy.close()
    (file,) = tmp_path.iterdir()
    torn = file.read_bytes() + encode_head(signed(2))[:kept]
    file.write_bytes(torn)

    first, second = HeadCopy(tmp_path).read_all()
    assert first == signed(1)
    assert isinstance(second, UnreadableHead)
    assert second.torn

    restarted = HeadCopy(tmp_path)
    restarted.append(signed(3))
    restarted.append(signed(4))
    restarted.close()
    assert file.read_bytes() == torn
    assert [h for h in restarted.read_all() if isinstance(h, SignedHead)] == [signed(1), signed(3), signed(4)]
    assert restarted.latest(0) == signed(4)


def test_a_line_that_lost_only_its_end_is_a_head(tmp_path: Path) -> None:
    file = tmp_path / "heads-20231114-000001.jsonl"
    file.write_bytes(encode_head(signed(1)))
    copy = HeadCopy(tmp_path)
    copy.append(signed(2))
    copy.close()
    assert list(copy.read_all()) == [signed(1), signed(2)]


@pytest.mark.parametrize(
    "tail",
    [
        b"x",
        encode_head(signed(2)) + b"x",
        encode_head(signed(2))[:-1] + b"\n",
        b"y" * (HEAD_LINE_BYTES_MAX + 5),
    ],
    ids=["no beginning of a head", "more than a head", "ended too early", "longer than any head"],
)
def test_what_no_crash_can_have_left_is_not_called_torn(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "heads-20231114-000001.jsonl").write_bytes(encode_head(signed(1)) + b"\n" + tail)
    _, *rest = HeadCopy(tmp_path).read_all()
    assert rest
    assert not any(isinstance(head, UnreadableHead) and head.torn for head in rest)


def test_a_full_second_place_raises_and_the_copy_recovers(tmp_path: Path) -> None:
    """``/dev/full`` is the kernel's own full disk."""
    day = tmp_path / "heads-20231114-000001.jsonl"
    copy = HeadCopy(tmp_path)
    copy.append(signed(1))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, copy._descriptor or -1)
    os.close(full)
    with pytest.raises(HeadCopyError, match="No space left"):
        copy.append(signed(2))
    assert copy.latest(0) == signed(1)
    copy.append(signed(3))
    copy.close()
    assert day.read_bytes().count(b"\n") == 2
    assert copy.latest(0) == signed(3)


def test_a_missing_or_unusable_second_place_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "missing" / "copy", tmp_path / "file"):
        with pytest.raises(HeadCopyError, match="cut tail"):
            HeadCopy(directory).append(signed())
    with pytest.raises(HeadCopyError):
        list(HeadCopy(tmp_path / "file").read_all())


def test_a_symbolic_link_planted_as_the_day_file_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "heads-20231114-000001.jsonl").symlink_to(target)
    with pytest.raises(HeadCopyError):
        HeadCopy(tmp_path / "copy").append(signed())
    assert target.read_bytes() == b""


def test_other_files_in_the_second_place_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("not a head")
    copy = HeadCopy(tmp_path)
    copy.append(replace(signed(1)))
    copy.close()
    assert list(copy.read_all()) == [signed(1)]
    assert (tmp_path / "README").read_text() == "not a head"
