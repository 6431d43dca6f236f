"""When to send again and when to give up: the core both clients share, without any input or output.

An exchange is a generator. It yields what it wants done, `Send` or `Pause`, and is sent
back what came of it; the driver around it does the waiting, with threads or with asyncio.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from nhi_sdk._wire import Answer, problem_of
from nhi_sdk.errors import ProblemError, TransportError, error_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from nhi_sdk._calls import Call

T = TypeVar("T")

_STATUS_UNAVAILABLE: Final = 503
_STILL_MINTING: Final = "still-minting"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds on the SDK's own retries.

    Attributes:
        attempts_max: requests sent at most, the first one included.
        deadline_seconds: all attempts and pauses together.
        attempt_seconds: one attempt, beyond what the broker was asked to wait.
        pause_seconds_base, pause_seconds_max: full jitter is drawn below
            ``min(max, base * 2**n)``.

    """

    attempts_max: int = 5
    deadline_seconds: float = 30.0
    attempt_seconds: float = 10.0
    pause_seconds_base: float = 0.1
    pause_seconds_max: float = 5.0


@dataclass(frozen=True, slots=True)
class Send:
    """Send the call; answer with an `Answer` or a `Failure`."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long; answer with None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt without an answer.

    Attributes:
        passing: whether another attempt may fare better.

    """

    error: TransportError
    passing: bool


Step: TypeAlias = Send | Pause
Outcome: TypeAlias = Answer | Failure | None
Exchange: TypeAlias = Generator[Step, Outcome, T]


@dataclass(slots=True)
class _Budget:
    """What is left of a policy's bounds."""

    policy: RetryPolicy
    now: Callable[[], float]
    until: float
    sent: int = 0

    def left_seconds(self) -> float:
        return self.until - self.now()

    def pause(self, at_least: float) -> float | None:
        """Return how long to pause before the next attempt, or None where there is none."""
        if self.sent >= self.policy.attempts_max:
            return None
        ceiling = min(self.policy.pause_seconds_max, self.policy.pause_seconds_base * 2.0 ** (self.sent - 1))
        pause = at_least + random.uniform(0.0, ceiling)  # noqa: S311  jitter, not a secret
        return pause if pause < self.left_seconds() else None


def exchange(call: Call[T], policy: RetryPolicy, now: Callable[[], float]) -> Exchange[T]:
    """Send `call` until it is answered for good.

    Tried again: nothing listening, a connection lost before the answer, 503 with
    Retry-After, and 409 still-minting, which only a repeated Idempotency-Key meets.
    Every other answer is final.

    Raises:
        ProblemError: the broker's last word.
        TransportError: there was none.

    """
    budget = _Budget(policy, now, now() + policy.deadline_seconds + call.wait_seconds)
    while True:
        budget.sent += 1
        timeout = max(0.001, min(policy.attempt_seconds + call.wait_seconds, budget.left_seconds()))
        outcome = yield Send(timeout)
        error: ProblemError | TransportError
        if isinstance(outcome, Answer):
            if outcome.ok:
                return call.parse(outcome)
            error, pause = _refusal(outcome, budget)
        elif isinstance(outcome, Failure):
            error, pause = outcome.error, budget.pause(0.0) if outcome.passing else None
        else:
            raise TypeError("a Send is answered with an Answer or a Failure")
        if pause is None:
            raise error
        yield Pause(pause)


def _refusal(answer: Answer, budget: _Budget) -> tuple[ProblemError | TransportError, float | None]:
    if 300 <= answer.status < 400:  # noqa: PLR2004  RFC 9110 section 15.4
        # A redirect would take the SVID to somewhere nobody configured.
        message = f"the broker answered with a redirect (HTTP status {answer.status}): check NHI_BROKER_URL"
        return TransportError(message), None
    problem = problem_of(answer)
    error = error_of(problem)
    asked_back = problem.status == _STATUS_UNAVAILABLE or problem.code == _STILL_MINTING
    if problem.retry_after_seconds is None or not asked_back:
        return error, None
    return error, budget.pause(problem.retry_after_seconds)
