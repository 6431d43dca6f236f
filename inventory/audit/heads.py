"""Signed heads, and the second place they are copied to.

A head says: slot S of log O stands at record N with hash H. Signed by a key outside the
database and copied outside the ledger's directory, it fixes every record up to N: whoever
rewrites or cuts the log afterwards contradicts a copy they do not hold.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from inventory.audit.canonical import NotCanonicalError, canonical_bytes, parse_canonical
from inventory.audit.chain import HASH_BYTES, ChainHead
from inventory.audit.public_keys import is_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from broker.core.ports import KeyStore

HEAD_LINE_BYTES_MAX: Final = 4096
_PURPOSE: Final = "nhi-broker/audit-head/v1"
_SIGNATURE_BYTES: Final = 64
_MEMBERS: Final = frozenset({"at_ms", "hash", "key_id", "origin", "seq", "signature", "slot"})
_LINE_START: Final = b'{"at_ms":'
_FILE_NAME: Final = re.compile(r"heads-(\d{8})-(\d{6})\.jsonl")
_FILES_PER_DAY_MAX: Final = 999_999


class MalformedHeadError(ValueError):
    """The line is not a signed head in its canonical spelling."""


class HeadCopyError(OSError):
    """The second place cannot be read or written. Until it can, a cut tail would go unseen."""


@dataclass(frozen=True, slots=True)
class SignedHead:
    """Where one slot stood, signed.

    Attributes:
        hash: hash of record `seq`.
        at_ms: when it was signed.
        origin: instance tag of the log.
        key_id: which audit key signed.
        signature: Ed25519 over `head_payload`; empty where somebody left it out.

    """

    slot: int
    seq: int
    hash: bytes
    at_ms: int
    origin: str
    key_id: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class UnreadableHead:
    """A line of a heads file that is no head.

    Attributes:
        where: file name and line number.
        torn: a write cut short by a crash: the last line of its file, begun and not ended.
            It was never acknowledged, so nothing is lost with it.

    """

    where: str
    detail: str
    torn: bool = False


def head_payload(slot: int, seq: int, hash_: bytes, at_ms: int, origin: str) -> bytes:
    """Return the bytes that a head's signature covers; ``purpose`` keeps them apart from all others."""
    return canonical_bytes(
        {
            "at_ms": at_ms,
            "hash": hash_.hex(),
            "origin": origin,
            "purpose": _PURPOSE,
            "seq": seq,
            "slot": slot,
        }
    )


def encode_head(head: SignedHead) -> bytes:
    """Return the canonical JSON of a head, without a line end."""
    return canonical_bytes(
        {
            "at_ms": head.at_ms,
            "hash": head.hash.hex(),
            "key_id": head.key_id,
            "origin": head.origin,
            "seq": head.seq,
            "signature": base64.b64encode(head.signature).decode("ascii"),
            "slot": head.slot,
        }
    )


def decode_head(line: bytes) -> SignedHead:
    """Parse one line, without its line end. Checks form only; `verify` checks the signature.

    Raises:
        MalformedHeadError: it is not what `encode_head` writes, byte for byte.

    """
    try:
        value = parse_canonical(line)
    except NotCanonicalError as error:
        raise MalformedHeadError(f"the line is {error}") from error
    if value.keys() != _MEMBERS:
        raise MalformedHeadError("the members are not those of a head")
    head = SignedHead(
        slot=_count(value, "slot"),
        seq=_count(value, "seq"),
        hash=_bytes(bytes.fromhex, value, "hash", HASH_BYTES),
        at_ms=_count(value, "at_ms"),
        origin=_name(value, "origin"),
        key_id=_name(value, "key_id"),
        signature=_bytes(_base64, value, "signature", 0, _SIGNATURE_BYTES),
    )
    # Hex and base64 each have several spellings of the same bytes; only ours is a head.
    if encode_head(head) != line:
        raise MalformedHeadError("hash or signature is not in its canonical spelling")
    return head


class HeadSigner:
    """Signs heads of one log.

    Args:
        keys: holds the audit key.
        origin: the deployment's instance tag.

    """

    def __init__(self, keys: KeyStore, origin: str) -> None:
        if not is_name(origin):
            raise ValueError("the origin is not an instance tag")
        self._keys = keys
        self._origin = origin

    def sign(self, head: ChainHead, at_ms: int) -> SignedHead:
        """Sign `head`, as it stands after a durable commit."""
        payload = head_payload(head.slot, head.seq, head.hash, at_ms, self._origin)
        key_id, signature = self._keys.sign_audit_head(payload)
        return SignedHead(head.slot, head.seq, head.hash, at_ms, self._origin, key_id, signature)


class HeadCopy:
    """The second place: append-only files in a directory outside the ledger's.

    One file per day, named ``heads-<day>-<number>.jsonl``. What was written is never
    touched again: after a torn line, writing goes on in the next file, so a medium that
    allows appending only will do. One writing process per directory.

    Args:
        directory: created with mode 0700 where it does not exist; its parent must.

    Raises:
        HeadCopyError: from every method, when the place cannot be read or written.

    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None
        self._day = ""
        self._latest: dict[int, SignedHead] = {}
        self._unread: list[Path] | None = None

    def append(self, head: SignedHead) -> None:
        """Write one head and return once it is durable.

        Raises:
            HeadCopyError: it is not; the caller alarms and tries again with the next head.

        """
        line = encode_head(head) + b"\n"
        try:
            descriptor = self._open_for(head.at_ms)
            # One write: where the medium takes it whole, a crash leaves a whole line or none.
            if os.write(descriptor, line) != len(line):
                raise OSError("the medium took only part of a line")  # noqa: TRY301  same handling
            os.fsync(descriptor)
        except OSError as error:
            self.close()
            raise HeadCopyError(
                f"cannot copy the signed head to {self._directory}: {error.strerror or error}. Free space or "
                "mend the mount; until then a cut tail of the audit log would go undetected"
            ) from error
        self._latest[head.slot] = head

    def latest(self, slot: int) -> SignedHead | None:
        """Return the last head copied for `slot`, or None.

        Reads the newest files first and no further than needed: years of heads cost a restart nothing.
        """
        if self._unread is None:
            self._unread = self._files()
        while slot not in self._latest and self._unread:
            newest_left = self._unread.pop()
            in_file = {head.slot: head for head in read_heads(newest_left) if isinstance(head, SignedHead)}
            self._latest = in_file | self._latest
        return self._latest.get(slot)

    def read_all(self) -> Iterator[SignedHead | UnreadableHead]:
        """Yield every line ever copied, in the order of writing; lines that are no head too."""
        for path in self._files():
            yield from read_heads(path)

    def close(self) -> None:
        """Close the file that is open for writing. Idempotent."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):  # the data was synced by each append, or reported lost
                os.close(descriptor)

    def _open_for(self, at_ms: int) -> int:
        """Return the descriptor to append to; a new day and a torn file each start a new file."""
        # A clock set back must not make an older file the newest: order of files is order of writing.
        day = max(self._day, dt.datetime.fromtimestamp(at_ms // 1000, dt.UTC).strftime("%Y%m%d"))
        if self._descriptor is not None and day == self._day:
            return self._descriptor
        self.close()
        self._directory.mkdir(mode=0o700, exist_ok=True)
        name = self._next_name(day)
        self._day = name[6:14]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._directory / name, flags, 0o600)
        _sync_directory(self._directory)
        return self._descriptor

    def _next_name(self, day: str) -> str:
        files = self._files()
        match = _FILE_NAME.fullmatch(files[-1].name) if files else None
        if match is None or match[1] < day:
            return f"heads-{day}-000001.jsonl"
        if _ends_with_newline(files[-1]):
            return files[-1].name
        number = int(match[2]) + 1
        if number > _FILES_PER_DAY_MAX:
            raise OSError("too many torn files on one day")
        return f"heads-{match[1]}-{number:06d}.jsonl"

    def _files(self) -> list[Path]:
        try:
            names = [name for name in os.listdir(self._directory) if _FILE_NAME.fullmatch(name)]  # noqa: PTH208
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HeadCopyError(f"cannot list the copied heads: {error.strerror}") from error
        return [self._directory / name for name in sorted(names)]


def read_heads(path: Path) -> Iterator[SignedHead | UnreadableHead]:
    """Yield the heads of one file in order; memory is bounded by one line.

    Raises:
        HeadCopyError: the file cannot be read.

    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(HEAD_LINE_BYTES_MAX):
                number += 1
                yield _head_or_reason(line, f"{path.name}:{number}")
    except OSError as error:
        raise HeadCopyError(f"cannot read the copied heads: {error.strerror}") from error


def _head_or_reason(line: bytes, where: str) -> SignedHead | UnreadableHead:
    try:
        return decode_head(line.removesuffix(b"\n"))
    except MalformedHeadError as error:
        # A torn write is the beginning of a line and nothing else; anything more was edited.
        torn = (
            not line.endswith(b"\n")
            and line.startswith(_LINE_START[: len(line)])
            and b"}" not in line
            and len(line) < HEAD_LINE_BYTES_MAX
        )
        return UnreadableHead(where, str(error), torn)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)  # without it a power cut may forget the new file
    finally:
        os.close(descriptor)


def _count(value: dict[str, Any], name: str) -> int:
    number = value[name]
    if type(number) is not int or number < 0:
        raise MalformedHeadError(f"{name} is not a count")
    return number


def _name(value: dict[str, Any], name: str) -> str:
    text = value[name]
    if not is_name(text):
        raise MalformedHeadError(f"{name} is not a name")
    return str(text)


def _base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _bytes(decode: Callable[[str], bytes], value: dict[str, Any], name: str, *sizes: int) -> bytes:
    text = value[name]
    try:
        data = decode(text) if isinstance(text, str) else None
    except (binascii.Error, ValueError) as error:
        raise MalformedHeadError(f"{name} is not encoded as it should be") from error
    if data is None or len(data) not in sizes:
        raise MalformedHeadError(f"{name} has the wrong length")
    return data
