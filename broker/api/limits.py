"""How much one identity, and all of them together, may ask of this process.

In memory and per process on purpose: exact budgets are counted in the ledger, this only
keeps noisy neighbours off each other (DESIGN 15). About a microsecond per request.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.core.errors import Overloaded, RateLimited

if TYPE_CHECKING:
    from collections.abc import Callable

_CONCURRENCY_RETRY_SECONDS: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """The bounds.

    Attributes:
        requests_per_second: refill of an identity's bucket.
        burst: size of the bucket.
        concurrent_per_identity: requests of one identity at the same time.
        concurrent_total: requests at the same time, of all identities and of callers not yet known.
        identities_remembered: buckets kept; the one unused for longest goes first.

    """

    requests_per_second: float = 500.0
    burst: int = 1_000
    concurrent_per_identity: int = 64
    concurrent_total: int = 512
    identities_remembered: int = 10_000

    def __post_init__(self) -> None:
        if (
            min(self.requests_per_second, self.burst, self.concurrent_per_identity, self.concurrent_total)
            <= 0
        ):
            raise ValueError("every limit must be above zero")
        if self.identities_remembered <= self.concurrent_total:
            raise ValueError("more identities must be remembered than may be served at the same time")


class _Bucket:
    __slots__ = ("at", "running", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.running = 0


class _Place:
    """One running request of an identity, as a context. A class: a generator would cost a microsecond."""

    __slots__ = ("_bucket",)

    def __init__(self, bucket: _Bucket) -> None:
        self._bucket = bucket

    def __enter__(self) -> None:
        self._bucket.running += 1

    def __exit__(self, *_exc: object) -> None:
        self._bucket.running -= 1


class RequestLimiter:
    """Token buckets and concurrency caps. Used from one event loop.

    Args:
        settings: the bounds.
        monotonic: seconds of a clock that is never set; `time.monotonic` unless a test says otherwise.

    """

    def __init__(self, settings: LimitSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._monotonic = monotonic
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._running = 0

    @property
    def running(self) -> int:
        """Requests being served."""
        return self._running

    @property
    def identities(self) -> int:
        """Identities remembered."""
        return len(self._buckets)

    def enter(self) -> None:
        """Count one request in, before anybody knows whose it is; `leave` must follow.

        Raises:
            Overloaded: the process serves as many as it may.

        """
        if self._running >= self._settings.concurrent_total:
            raise Overloaded(
                "The broker is serving as many requests as it may.",
                retry_after_seconds=_CONCURRENCY_RETRY_SECONDS,
            )
        self._running += 1

    def leave(self) -> None:
        """Count a request out that `enter` let in."""
        self._running -= 1

    def identity(self, identity: str) -> _Place:
        """Take one token and one place of `identity`; the place is held while the block runs.

        Raises:
            RateLimited: its bucket is empty, or it has as many requests running as it may.

        """
        return _Place(self._admit(identity))

    def _admit(self, identity: str) -> _Bucket:
        settings, now = self._settings, self._monotonic()
        bucket = self._buckets.get(identity)
        if bucket is None:
            bucket = self._buckets[identity] = _Bucket(settings.burst, now)
            self._forget_one()
        else:
            self._buckets.move_to_end(identity)
            elapsed = max(now - bucket.at, 0.0)
            bucket.tokens = min(bucket.tokens + elapsed * settings.requests_per_second, settings.burst)
            bucket.at = now
        if bucket.running >= settings.concurrent_per_identity:
            raise RateLimited(
                f"At most {settings.concurrent_per_identity} requests of one identity run at the same time.",
                retry_after_seconds=_CONCURRENCY_RETRY_SECONDS,
            )
        if bucket.tokens < 1:
            wait = (1 - bucket.tokens) / settings.requests_per_second
            raise RateLimited(
                f"One identity may send {settings.requests_per_second:g} requests a second.",
                retry_after_seconds=max(math.ceil(wait), 1),
            )
        bucket.tokens -= 1
        return bucket

    def _forget_one(self) -> None:
        """Keep the memory bounded: drop the idle identity unused for longest.

        One that is being served keeps its count; more are remembered than can be served, so
        an idle one is always found.
        """
        if len(self._buckets) <= self._settings.identities_remembered:
            return
        for identity, bucket in self._buckets.items():
            if not bucket.running:
                del self._buckets[identity]
                return
