"""One run of PostgreSQL's programs, as children that cannot outlive this process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from broker.dev import child_guard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from broker.dev.postgres_home import ServerHome

_READY: Final = b"database system is ready to accept connections"
_PORT_TAKEN: Final = b"Address already in use"
_LOG_BYTES_MAX: Final = 8_000_000
_LOG_TAIL_LINES: Final = 12
_KEEP_ACCOUNT: Final = "-1"
_PAUSE_SECONDS_MAX: Final = 5
_PAUSE_POLL_SECONDS: Final = 0.001
_RUNNING: Final = frozenset("RSDI")
_MS: Final = 1000


class PostgresFailed(RuntimeError):
    """The server did not start or stop; the message holds the end of what it said."""


def _spawn(
    program: Sequence[str | Path], home: ServerHome, death_signal: signal.Signals
) -> subprocess.Popen[bytes]:
    """Start `program` so that it dies with the calling thread (see ``child_guard``)."""
    account = home.account
    ids = [str(account.uid), str(account.gid)] if account.switch else [_KEEP_ACCOUNT, _KEEP_ACCOUNT]
    guard = [sys.executable, "-I", "-S", child_guard.__file__, str(os.getpid()), str(int(death_signal)), *ids]
    return subprocess.Popen(  # noqa: S603  every word is ours, no shell
        [*guard, *(str(word) for word in program)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=home.path,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "HOME": str(home.path)},
    )


def run_to_end(program: Sequence[str | Path], home: ServerHome, *, timeout_seconds: int) -> None:
    """Run one program to its end.

    Raises:
        PostgresFailed: it failed, or took longer than `timeout_seconds`.

    """
    with _spawn(program, home, signal.SIGKILL) as process:
        try:
            said, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    if process.returncode != 0:
        lines = said.splitlines(keepends=True)[-_LOG_TAIL_LINES:]
        msg = f"{Path(program[0]).name} failed ({process.returncode}):\n{_printable(lines)}"
        raise PostgresFailed(msg)


def _printable(lines: Sequence[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "backslashreplace").rstrip()


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Return a process's one-letter state and its parent; ("", 0) where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return "", 0
    # The command's name stands in parentheses and may hold anything, parentheses too.
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _children(pid: int) -> set[int]:
    """Return the process ids whose parent is `pid`."""
    everyone = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {other for other in everyone if _state_and_parent(other)[1] == pid}


def _wait_until_stopped(pids: set[int]) -> None:
    """Return once none of `pids` runs: SIGSTOP takes a moment to reach another processor."""
    deadline = time.monotonic() + _PAUSE_SECONDS_MAX
    while any(_state_and_parent(pid)[0] in _RUNNING for pid in pids) and time.monotonic() < deadline:
        time.sleep(_PAUSE_POLL_SECONDS)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for_foreign_exit(pid: int, *, timeout_seconds: int) -> bool:
    """Wait for a process that is not our child to end; say whether it did."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout_seconds * _MS))
    finally:
        os.close(descriptor)


class Postmaster:
    """One run of the server.

    The thread that starts it also reads what it says until the end, and so lives exactly as
    long as the server: the condition under which the death signal means that we died.
    """

    def __init__(self, program: Sequence[str | Path], home: ServerHome) -> None:
        self._program = program
        self._home = home
        self._spawned = threading.Event()
        self._settled = threading.Event()
        self._exited = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._tail: deque[bytes] = deque(maxlen=_LOG_TAIL_LINES)
        self._ready = False
        self._paused = False
        threading.Thread(target=self._run, name="postgres-log", daemon=True).start()
        self._spawned.wait()
        self._raise_if_not_spawned()

    def _raise_if_not_spawned(self) -> None:
        if self._error is not None:
            msg = f"the server could not be started: {self._error}"
            raise PostgresFailed(msg) from self._error

    def _run(self) -> None:
        try:
            with self._open_log() as log, _spawn(self._program, self._home, signal.SIGQUIT) as process:
                self._process = process
                self._spawned.set()
                for line in process.stdout or ():
                    self._listen(line, log)
        except OSError as error:
            self._error = error
        finally:
            self._exited.set()
            self._settled.set()
            self._spawned.set()

    def _listen(self, line: bytes, log: BinaryIO) -> None:
        self._tail.append(line)
        if _READY in line:
            self._ready = True
            self._settled.set()
        # A full disk must not stop us from reading: the server would block on its own log.
        with contextlib.suppress(OSError):
            log.write(line)

    def _open_log(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        log = os.fdopen(os.open(self._home.log, flags, 0o600), "wb", buffering=0)
        if log.seek(0, os.SEEK_END) > _LOG_BYTES_MAX:
            log.truncate(0)
        return log

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        if self._process is None:
            msg = "the server is not running"
            raise PostgresFailed(msg)
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether any of its processes may be left."""
        return not self._exited.is_set()

    @property
    def port_was_taken(self) -> bool:
        """Whether it ended because another process listens on its port."""
        return any(_PORT_TAKEN in line for line in self._tail)

    def wait_until_ready(self, *, timeout_seconds: int) -> None:
        """Wait until it accepts connections.

        Raises:
            PostgresFailed: it ended instead, or took longer than `timeout_seconds`.

        """
        self._settled.wait(timeout_seconds)
        if not self._ready or not self.running:
            why = f"did not start within {timeout_seconds} s" if self.running else "ended at once"
            msg = f"the PostgreSQL server {why}; see {self._home.log}:\n{_printable(tuple(self._tail))}"
            raise PostgresFailed(msg)

    def end(self, number: signal.Signals, *, timeout_seconds: int) -> bool:
        """Ask for a shutdown (SIGINT fast, SIGQUIT immediate) and say whether it ended in time."""
        self.resume()
        if self.running:
            _signal({self.pid}, number)
        return self._exited.wait(timeout_seconds)

    def kill(self, *, timeout_seconds: int) -> bool:
        """Kill every process of the server; say whether all ended in time."""
        if self.running:
            self.pause()  # the postmaster first, so that it starts no more
            _signal(_children(self.pid) | {self.pid}, signal.SIGKILL)
        self._paused = False
        return self._exited.wait(timeout_seconds)

    def pause(self) -> None:
        """Stop every process of the server where it stands. Idempotent.

        Connections are still accepted, by the kernel, and never answered. PostgreSQL gives
        each session a process group of its own, so the processes are stopped one by one, the
        postmaster first: it then starts no more.
        """
        if self._paused or not self.running:
            return
        self._paused = True
        _signal({self.pid}, signal.SIGSTOP)
        _wait_until_stopped({self.pid})
        children = _children(self.pid)
        _signal(children, signal.SIGSTOP)
        _wait_until_stopped(children)

    def resume(self) -> None:
        """Let every stopped process go on. Idempotent."""
        if self._paused and self.running:
            _signal(_children(self.pid), signal.SIGCONT)
            _signal({self.pid}, signal.SIGCONT)
        self._paused = False
