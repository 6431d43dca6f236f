"""The key file itself: who may read it, how it is replaced, who may replace it.

It holds every secret the broker has, so it is opened only where nobody but our own user
could have read or written it, and it is replaced whole: a crash leaves the old file or
the new one. A lock file beside it lets one process at a time create or change it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_BYTES_MAX: Final = 1 << 20
_MODE: Final = 0o600
_LOCK_WAIT_SECONDS: Final = 10.0
_LOCK_POLL_SECONDS: Final = 0.01


class KeyStoreError(RuntimeError):
    """The keys cannot be used as they are. Says which file, why and what to do; never its content."""


Fingerprint: TypeAlias = tuple[int, int, int]
"""(inode, time changed in ns, size): tells one version of the file from another unread."""


def fingerprint(path: str) -> Fingerprint:
    """Return the fingerprint of what lies at `path` now, following no symbolic link.

    Raises:
        KeyStoreError: nothing is there.

    """
    try:
        status = os.lstat(path)
    except OSError:
        raise KeyStoreError(f"the key file {path} is gone: restore it from its backup") from None
    return _fingerprint_of(status)


def _fingerprint_of(status: os.stat_result) -> Fingerprint:
    return status.st_ino, status.st_mtime_ns, status.st_size


def read(path: Path) -> tuple[bytes, Fingerprint]:
    """Return content and fingerprint of the key file.

    Raises:
        KeyStoreError: it cannot be opened, or somebody else could read or write it.

    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise KeyStoreError(
            f"the key file {path} cannot be opened ({error.strerror}): it must be a regular file of "
            "this user, not a symbolic link"
        ) from None
    try:
        status = os.fstat(descriptor)
        _refuse_exposed(path, status)
        content = os.read(descriptor, FILE_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    if len(content) > FILE_BYTES_MAX:
        raise KeyStoreError(f"the key file {path} is larger than 1 MiB: it is not a key file")
    return content, _fingerprint_of(status)


def replace(path: Path, content: bytes) -> None:
    """Put `content` in the key file's place, durably and all at once. Call it holding `locked`.

    Raises:
        KeyStoreError: the directory cannot be written.

    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)  # what a crash left behind; the lock makes it ours to remove
        descriptor = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE
        )
        with open(descriptor, "wb") as file:  # noqa: PTH123  a descriptor, not a path
            os.fchmod(file.fileno(), _MODE)  # whatever the umask took away
            file.write(content)
            file.flush()
            _date_after(path, file.fileno())
            os.fsync(file.fileno())
        fresh.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # without it a power cut may forget the rename
        finally:
            os.close(directory)
    except OSError as error:
        raise KeyStoreError(
            f"the key file {path} cannot be written ({error.strerror}): check that its directory exists, "
            "belongs to this user and has room"
        ) from None


def _date_after(path: Path, descriptor: int) -> None:
    """Date the new version after the old one.

    The kernel's file times stand still for milliseconds and inodes are used again: two
    changes in a row could otherwise leave a file that looks like the one before them.
    """
    now_ns = time.time_ns()
    with contextlib.suppress(FileNotFoundError):  # the first version has nothing to come after
        now_ns = max(now_ns, os.lstat(path).st_mtime_ns + 1)
    os.utime(descriptor, ns=(now_ns, now_ns))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to create or change the key file, across processes and threads.

    Raises:
        KeyStoreError: another process held it for ten seconds, or the lock file cannot be opened.

    """
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise KeyStoreError(
            f"the lock file {lock} cannot be opened ({error.strerror}): check that its directory exists "
            "and belongs to this user"
        ) from None
    try:
        _wait_for(descriptor, lock)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, removing it would split the lock in two


def _wait_for(descriptor: int, lock: Path) -> None:
    give_up = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise KeyStoreError(
                    f"another process holds {lock}: is a broker stuck while rotating its keys?"
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return


def _refuse_exposed(path: Path, status: os.stat_result) -> None:
    """Refuse a file that someone else wrote, or that others may read or write."""
    if not stat.S_ISREG(status.st_mode):
        raise KeyStoreError(f"the key file {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise KeyStoreError(
            f"the key file {path} belongs to user {status.st_uid}, the broker runs as {os.geteuid()}: "
            "whoever owns it knows the keys"
        )
    if stat.S_IMODE(status.st_mode) & ~_MODE:
        raise KeyStoreError(
            f"the key file {path} has mode {stat.S_IMODE(status.st_mode):04o}: others may know the keys. "
            f"Run chmod 600 {path}, and rotate the keys if anyone could have read it"
        )
