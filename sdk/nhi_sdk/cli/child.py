"""Running a child process so that whatever happens to it, or to us, is noticed and passed on.

The child stays in our process group: pipelines, job control and terminal programs such as
psql work as if we were not there. A terminal sends Ctrl-C to the whole group, so then the
child has had it already; what is sent to us alone, we forward.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType, TracebackType

_CAUGHT: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_FINAL: Final = frozenset({signal.SIGTERM, signal.SIGHUP})
_FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT})
_PIPE_BYTES: Final = 4096


class Interrupted(BaseException):
    """A signal arrived while no child was there to take it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for it."""
        return 128 + self.number


class Signals:
    """Catches signals: raised as `Interrupted` at first, kept to be passed on once `keeping`.

    Signals ignored at the start stay ignored, so that ``nohup nhi exec`` means what it says.
    """

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}
        self._kept: list[int] = []
        self.keeping = False

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _CAUGHT:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.keeping = True
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def take(self) -> list[int]:
        """Return the signals kept since the last time."""
        taken, self._kept = self._kept, []
        return taken

    def wait(self, seconds: float | None) -> None:
        """Return when a signal arrives, a child's change of state included, or the time is over."""
        select.select([self._read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, _PIPE_BYTES)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.keeping:
            raise Interrupted(number)
        self._kept.append(number)


def _notice(_number: int, _frame: FrameType | None) -> None:
    """Take SIGCHLD, so that it reaches the wake-up pipe."""


def run(
    command: Sequence[str], environment: Mapping[str, str], signals: Signals, grace_seconds: float
) -> int:
    """Run a program to its end and return its exit code, 128+n where signal n ended it.

    A child that has not ended `grace_seconds` after a SIGTERM or SIGHUP to us is killed:
    whoever sent it will not wait for ever, and the credential must be dead before.

    Raises:
        OSError: it cannot be started.

    """
    signals.keeping = True
    process = subprocess.Popen(command, env=dict(environment))  # noqa: S603  the user's own command
    kill_at: float | None = None
    while process.poll() is None:
        for number in signals.take():
            if not _terminal_sent_it(number):
                process.send_signal(number)
            if number in _FINAL and kill_at is None:
                kill_at = time.monotonic() + grace_seconds
        if kill_at is not None and time.monotonic() >= kill_at:
            process.kill()
            process.wait()
            break
        signals.wait(None if kill_at is None else max(0.0, kill_at - time.monotonic()))
    code = process.returncode
    return code if code >= 0 else 128 - code


def _terminal_sent_it(number: int) -> bool:
    """Say whether the child has had a signal, too: a terminal sends it to its whole foreground group."""
    if number not in _FROM_TERMINAL:
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
