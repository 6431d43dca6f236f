"""What operators look at: the state of the broker, what is killed, what is found wrong."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inventory import findings, kills, ledger
from inventory.findings import Finding
from inventory.kills import Kill

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from broker.service.context import Context

__all__ = ["BackendStatus", "Finding", "Kill", "Overview", "Status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """One configured backend.

    Attributes:
        live: leases that have not reached their end.
        stuck: those of them whose revocation keeps failing.
        breaker_open: whether it counts as down.

    """

    name: str
    kind: str
    live: int
    stuck: int
    breaker_open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The broker at a glance.

    Attributes:
        audit_seq: number of the last durable audit record.
        ledger_waiting: units of work in the writer's queue.
        ledger_failure: why the last commit failed; None while commits succeed.

    """

    instance: str
    policy_hash: str
    backends: Sequence[BackendStatus]
    audit_seq: int
    ledger_waiting: int
    ledger_failure: str | None

    @property
    def live(self) -> int:
        """Leases that have not reached their end, of all backends."""
        return sum(backend.live for backend in self.backends)

    @property
    def stuck(self) -> int:
        """Stuck leases, of all backends."""
        return sum(backend.stuck for backend in self.backends)


class Overview:
    """Reads only."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    async def status(self) -> Status:
        """Return the broker's state; leases of backends no longer configured are listed too."""
        writer = self._ctx.store.writer
        counts = await asyncio.to_thread(self._count)
        return Status(
            instance=self._ctx.store.instance,
            policy_hash=self._ctx.policy.policy_hash,
            backends=[self._backend(name, counts) for name in self._names(counts)],
            audit_seq=writer.head.seq,
            ledger_waiting=writer.waiting,
            ledger_failure=writer.last_failure,
        )

    def kills(self, *, after: tuple[str, str] = ("", ""), limit: int = 100) -> Sequence[Kill]:
        """Return a page of killed scopes, in order of scope and value."""
        return kills.page(self._ctx.store.reader, after=after, limit=limit)

    def findings(self, *, after: tuple[int, str] = (0, ""), limit: int = 100) -> Sequence[Finding]:
        """Return a page of open findings, oldest first."""
        return findings.open_page(self._ctx.store.reader, after=after, limit=limit)

    def _count(self) -> Mapping[str, tuple[int, int]]:
        # A connection of its own: counting a large ledger must not hold up the event loop.
        with closing(self._ctx.store.open_reader()) as connection:
            return ledger.live_counts(connection)

    def _names(self, counts: Mapping[str, tuple[int, int]]) -> list[str]:
        return list(dict.fromkeys([*(backend.name for backend in self._ctx.backends), *sorted(counts)]))

    def _backend(self, name: str, counts: Mapping[str, tuple[int, int]]) -> BackendStatus:
        backend = self._ctx.backends.get(name)
        live, stuck = counts.get(name, (0, 0))
        return BackendStatus(
            name=name,
            kind="" if backend is None else backend.kind,
            live=live,
            stuck=stuck,
            breaker_open=backend is not None and backend.breaker.is_open,
        )
