"""Time as the broker reads it: whole milliseconds since the Unix epoch, from one port."""

from __future__ import annotations

import time
from typing import Final, Protocol

MS_PER_SECOND: Final = 1000


class Clock(Protocol):
    """Where decisions about lifetimes take their time from (DESIGN 4, rule 10)."""

    def now_ms(self) -> int:
        """Return milliseconds since the Unix epoch, UTC."""
        ...


class SystemClock:
    """The host's clock: what the SQLite ledger uses."""

    def now_ms(self) -> int:
        """Return the host's time in milliseconds since the Unix epoch."""
        return time.time_ns() // 1_000_000


class ManualClock:
    """A clock that moves only when told to: for tests, what-if and replay."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        """Return the time last set."""
        return self._now_ms

    def advance(self, *, seconds: float = 0, ms: int = 0) -> None:
        """Move the clock, backwards too: clock jumps are part of what is tested."""
        self._now_ms += int(seconds * MS_PER_SECOND) + ms


def seconds_to_ms(seconds: float) -> int:
    """Convert seconds to whole milliseconds."""
    return int(seconds * MS_PER_SECOND)
