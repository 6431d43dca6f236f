"""Configured backends: an adapter each, behind a circuit breaker and a concurrency cap.

One dead backend starves no other (DESIGN 4, rule 7).
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from broker.core.clock import MS_PER_SECOND
from broker.core.errors import BackendUnavailable, BrokerError, InvalidRequest
from broker.core.ports import Effect, ErrorClass, Fence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from broker.core.clock import Clock
    from broker.core.lease import Lease
    from broker.core.ports import Adapter
    from broker.service.limits import Limits

FAILURES_MAX: Final = 5
"""Failures in a row after which a backend counts as down."""

OPEN_MS: Final = 5_000
"""How long an open breaker refuses before it lets one trial through."""

MINT_MARGIN_SECONDS: Final = 1
"""How long before its lease's mint deadline a mint is given up."""


class Breaker:
    """Opens after `FAILURES_MAX` failures in a row; then lets one trial through every `OPEN_MS`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._trial_due_ms = 0

    @property
    def is_open(self) -> bool:
        """Whether the backend counts as down."""
        return self._failures >= FAILURES_MAX

    def admits(self) -> bool:
        """Say whether a call may be made now; an open breaker admits one trial per period."""
        if not self.is_open:
            return True
        now_ms = self._clock.now_ms()
        # A trial due later than one period from now was set before the clock jumped back.
        if self._trial_due_ms - OPEN_MS <= now_ms < self._trial_due_ms:
            return False
        self._trial_due_ms = now_ms + OPEN_MS
        return True

    def succeeded(self) -> None:
        """The backend answered, if only to refuse."""
        self._failures = 0

    def failed(self) -> None:
        """The backend did not answer."""
        self._failures += 1
        if self._failures == FAILURES_MAX:
            self._trial_due_ms = self._clock.now_ms() + OPEN_MS


class Backend:
    """One configured adapter with its breaker and caps."""

    def __init__(
        self,
        adapter: Adapter,
        kind: str,
        recipes: Sequence[Mapping[str, object]],
        clock: Clock,
        limits: Limits,
    ) -> None:
        self.adapter = adapter
        self.kind = kind
        self.name = adapter.name
        self.capabilities = adapter.capabilities
        self.recipes = recipes
        self.breaker = Breaker(clock)
        self._clock = clock
        self._mint_slots = asyncio.Semaphore(limits.mint_concurrency)
        self._mint_wait_seconds = limits.mint_deadline_seconds

    @property
    def has_external_effect(self) -> bool:
        """Whether minting changes anything outside the broker."""
        return self.capabilities.external_effect

    def check_available(self) -> None:
        """Raise `BackendUnavailable` while the breaker is open: nothing is attempted, nothing recorded."""
        if not self.breaker.admits():
            raise BackendUnavailable(
                "The backend that would mint this credential is not answering; nothing was attempted. "
                "Retry shortly.",
                retry_after_seconds=OPEN_MS // 1000,
            )

    def check_ttl(self, ttl_seconds: int) -> None:
        """Raise `InvalidRequest` where the backend cannot keep such a lifetime."""
        low, high = self.capabilities.ttl_seconds_min, self.capabilities.ttl_seconds_max
        if not low <= ttl_seconds <= high:
            raise InvalidRequest(
                f"This backend keeps credentials between {low} and {high} seconds; "
                "ask for ttl_seconds in that range, under a task that lasts long enough."
            )

    @asynccontextmanager
    async def minting(self, lease: Lease) -> AsyncIterator[None]:
        """Hold one of the backend's mint slots, within one total deadline.

        The deadline is the lease's own, so it covers the wait for the commit and for the slot:
        no mint may begin after the sweeper has begun to look for what it could have made.

        Raises:
            TimeoutError: the deadline passed.

        """
        left_seconds = min(
            self._mint_wait_seconds,
            (lease.mint_deadline_ms - self._clock.now_ms()) / MS_PER_SECOND - MINT_MARGIN_SECONDS,
        )
        if left_seconds <= 0:
            raise TimeoutError
        async with asyncio.timeout(left_seconds), self._mint_slots:
            with self.observed():
                yield

    def observed(self) -> _Observed:
        """Tell the breaker how a call to the adapter went."""
        return _Observed(self)

    def needs_second_look(self, lease: Lease) -> bool:
        """Whether "not found" is no proof yet, because a mint may still be in flight (rule 5)."""
        return self.capabilities.fence is Fence.NONE and not lease.was_active

    def last_effect_ms(self, lease: Lease) -> int:
        """Return from when no mint of a lease can take effect any more."""
        return lease.mint_deadline_ms + self.capabilities.t_inflight_seconds * MS_PER_SECOND

    @property
    def ends_only_by_expiry(self) -> bool:
        """Whether the backend cannot revoke at all."""
        return self.capabilities.revocability.effect is Effect.EXPIRY_ONLY

    @property
    def outlives_the_lease(self) -> bool:
        """Whether the value stays valid whatever the broker does."""
        return self.capabilities.revocability.effect is Effect.NONE


class _Observed:
    """Context of one adapter call: an error that is no answer of the backend counts against it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self._backend.breaker.succeeded()
        elif isinstance(error, BrokerError):
            return  # the ledger, or a lease that was lost: says nothing of the backend
        elif isinstance(error, asyncio.CancelledError):
            self._backend.breaker.failed()  # the total deadline struck: no answer came
        elif isinstance(error, Exception):
            match self._backend.adapter.classify(error):
                case ErrorClass.RETRY:
                    self._backend.breaker.failed()
                case ErrorClass.PERMANENT | ErrorClass.GONE:
                    self._backend.breaker.succeeded()


class Backends:
    """Every configured backend by name."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._by_name = {backend.name: backend for backend in backends}

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Backend | None:
        """Return a backend; None where it is no longer configured."""
        return self._by_name.get(name)

    def of(self, name: str) -> Backend:
        """Return a backend that start-up has checked to exist."""
        return self._by_name[name]

    async def close(self) -> None:
        """Close every adapter."""
        for backend in self:
            await backend.adapter.close()
