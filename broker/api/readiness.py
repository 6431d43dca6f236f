"""What keeps the broker from being ready, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Readiness:
    """Named checks, each answering None or what is wrong, without doing any work of its own."""

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], str | None]] = {}
        self.draining = False

    def add(self, name: str, check: Callable[[], str | None]) -> None:
        """Add one check under a name that people read."""
        self._checks[name] = check

    def drain(self) -> None:
        """Say from now on that no new work is wanted."""
        self.draining = True

    def problems(self) -> dict[str, str]:
        """Return what is wrong, by name; empty when ready."""
        found = {} if not self.draining else {"drain": "the broker is stopping"}
        for name, check in self._checks.items():
            problem = check()
            if problem is not None:
                found[name] = problem
        return found
