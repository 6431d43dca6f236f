"""Where a development PostgreSQL keeps its files, and the account it runs as.

PostgreSQL refuses to run as root. Started by root, the server runs as an existing
unprivileged account, which must be able to reach its data: an empty state directory is
opened for passing through (0711), but below ``/root`` or any other private directory that
does not help. Then the files go to a private directory in ``/var/tmp`` and the state
directory holds a link to it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_ACCOUNTS: Final = ("postgres", "nobody")
_ELSEWHERE: Final = "/var/tmp"  # noqa: S108  mkdtemp draws an unguessable private directory in it
_LINK: Final = "files"
_BINARIES: Final = "binaries"


class NoServerAccount(RuntimeError):
    """Root has no account to run the server as; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServerAccount:
    """The account the server runs as.

    Attributes:
        switch: whether that means dropping from root to it.

    """

    uid: int
    gid: int
    switch: bool

    def may_traverse(self, directory: Path) -> bool:
        """Say whether this account can reach what is in `directory`, by mode bits alone."""
        return all(self._may_enter(step) for step in (directory, *directory.parents))

    def may_run(self, program: Path) -> bool:
        """Say whether this account can execute `program`."""
        return self.may_traverse(program.parent) and self._may_enter(program)

    def _may_enter(self, path: Path) -> bool:
        status = path.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def server_account(run_as: str | None = None) -> ServerAccount:
    """Return the account to run the server as: the caller's own, unless that is root.

    Args:
        run_as: an account's name, for root only; otherwise ``postgres``, then ``nobody``.

    Raises:
        NoServerAccount: root found none of them.

    """
    if os.geteuid() != 0:
        return ServerAccount(os.geteuid(), os.getegid(), switch=False)
    for name in (run_as,) if run_as else _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return ServerAccount(entry.pw_uid, entry.pw_gid, switch=True)
    msg = (
        "PostgreSQL refuses to run as root and there is no account to run it as: create one, or run as a user"
    )
    raise NoServerAccount(msg)


@dataclass(frozen=True, slots=True)
class ServerHome:
    """The server's files; `path` belongs to the account, mode 0700."""

    path: Path
    account: ServerAccount

    @property
    def data(self) -> Path:
        """The data directory; it appears whole, by a rename."""
        return self.path / "data"

    @property
    def password_file(self) -> Path:
        """The superuser's password, 0600."""
        return self.path / "superuser.password"

    @property
    def log(self) -> Path:
        """What the server said, 0600."""
        return self.path / "server.log"

    @property
    def binaries(self) -> Path:
        """A copy of the programs, made only where the account cannot reach the original."""
        return self.path / _BINARIES

    def write_private(self, path: Path, content: str) -> None:
        """Write a 0600 file that the account owns, whole or not at all."""
        staging = path.with_name(f"{path.name}.new")
        staging.unlink(missing_ok=True)
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchown(file.fileno(), self.account.uid, self.account.gid)
            file.write(content)
        staging.replace(path)


def _claim(directory: Path, account: ServerAccount) -> None:
    if account.switch:
        os.chown(directory, account.uid, account.gid, follow_symlinks=False)
    directory.chmod(0o700)


def open_home(state_dir: Path, account: ServerAccount) -> ServerHome:
    """Return the server's home in `state_dir`, made where it does not exist."""
    state_dir = state_dir.resolve()
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = state_dir / _LINK
    if files.is_symlink() and not files.exists():
        files.unlink()  # /var/tmp was cleaned: begin anew
    if not files.exists():
        if not account.may_traverse(state_dir) and not any(state_dir.iterdir()):
            state_dir.chmod(0o711)  # it holds nothing yet, and what we put there is private itself
        if account.may_traverse(state_dir):
            files.mkdir(mode=0o700)
        else:
            files.symlink_to(tempfile.mkdtemp(prefix="nhi-postgres-", dir=_ELSEWHERE))
        _claim(files.resolve(), account)
    return ServerHome(files.resolve(), account)


def remove_home(state_dir: Path) -> None:
    """Delete the server's files, wherever they are. The server must be stopped."""
    files = state_dir.resolve() / _LINK
    shutil.rmtree(files.resolve(), ignore_errors=True)
    if files.is_symlink():
        files.unlink()
