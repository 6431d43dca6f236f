"""What can go wrong, as one tree.

::

    NhiError
    ├── ConfigurationError       a setting is missing or wrong: nothing was sent
    │   └── MissingExtra         an optional dependency is not installed
    ├── SvidError                no SVID, or no trust bundle, could be had
    ├── TransportError           the broker was not reached, or what answered made no sense
    └── ProblemError             the broker answered with a problem
        ├── Unauthenticated      our SVID was refused
        ├── Denied               policy, or the identity's own record, says no
        ├── NotFound             no such object for this caller
        ├── InvalidRequest       the request itself is wrong; `errors` names the fields
        ├── Conflict             it collides with what already happened
        │   ├── TaskClosed       the task has ended
        │   └── BudgetExhausted  the task's bound on leases is reached
        ├── RateLimited          too much from this identity; see `retry_after_seconds`
        └── Unavailable          try again later; see `retry_after_seconds`

No message and no ``repr`` of these holds a secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class NhiError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigurationError(NhiError):
    """A setting is missing or wrong; the message names it and says how to set it."""


class MissingExtra(ConfigurationError):
    """An optional dependency is needed for this and is not installed."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'nhi-sdk[{extra}]'")
        self.extra = extra


class SvidError(NhiError):
    """This workload's SVID, or the bundle to trust the broker by, could not be had."""


class TransportError(NhiError):
    """The broker was not reached, or the answer could not be understood.

    Attributes:
        ambiguous: whether the broker may have acted on the request all the same.

    """

    def __init__(self, message: str, *, ambiguous: bool = False) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous


@dataclass(frozen=True, slots=True)
class FieldError:
    """One refused field of a request."""

    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem document (RFC 9457) as the broker sends it.

    Attributes:
        code: stable word for what happened, the last part of the problem's type.
        detail: what was refused, why, and what to do.
        trace_id: finds the request in the broker's logs.
        retry_after_seconds: when the broker suggests another try, None where it does not.
        policy_ids: the policies that settled it, empty where none did.

    """

    status: int
    code: str
    title: str
    detail: str
    trace_id: str | None = None
    lease_id: str | None = None
    task_id: str | None = None
    decision_id: str | None = None
    policy_ids: tuple[str, ...] = ()
    policy_hash: str | None = None
    errors: tuple[FieldError, ...] = ()
    retry_after_seconds: float | None = None


class ProblemError(NhiError):
    """The broker answered with a problem.

    Attributes:
        problem: everything the broker said.

    """

    fallback: ClassVar[str] = "the broker refused the request"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail or problem.title or self.fallback)
        self.problem = problem

    @property
    def code(self) -> str:
        """Stable word for what happened."""
        return self.problem.code

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status

    @property
    def trace_id(self) -> str | None:
        """Finds the request in the broker's logs."""
        return self.problem.trace_id

    @property
    def lease_id(self) -> str | None:
        """The lease concerned, where there is one."""
        return self.problem.lease_id

    @property
    def task_id(self) -> str | None:
        """The task concerned, where there is one."""
        return self.problem.task_id

    @property
    def retry_after_seconds(self) -> float | None:
        """When another try may help."""
        return self.problem.retry_after_seconds


class Unauthenticated(ProblemError):
    """The broker did not accept our SVID: clock, audience, trust domain or expiry."""


class Denied(ProblemError):
    """Policy did not allow it, or the identity's own record bars it. Asking again will not help."""

    @property
    def reason(self) -> str:
        """One sentence a person can act on."""
        return str(self)

    @property
    def policy_ids(self) -> tuple[str, ...]:
        """The policies that settled it; empty when nothing allowed it."""
        return self.problem.policy_ids

    @property
    def decision_id(self) -> str | None:
        """Finds the recorded decision."""
        return self.problem.decision_id


class NotFound(ProblemError):
    """No such task or lease for this caller; another's looks the same as an unknown one."""


class InvalidRequest(ProblemError):
    """The request itself is wrong."""

    @property
    def errors(self) -> tuple[FieldError, ...]:
        """The fields that were refused, where the broker named them."""
        return self.problem.errors


class Conflict(ProblemError):
    """The request collides with what already happened."""


class TaskClosed(Conflict):
    """The task has ended; nothing more is issued under it."""


class BudgetExhausted(Conflict):
    """The task's bound on leases, or the identity's on open tasks, is reached."""


class RateLimited(ProblemError):
    """Too many requests from this identity. Not retried by the SDK."""


class Unavailable(ProblemError):
    """The broker, its ledger or a backend cannot serve this now."""


_BY_CODE: dict[str, type[ProblemError]] = {
    "unauthenticated": Unauthenticated,
    "denied": Denied,
    "identity-refused": Denied,
    "not-found": NotFound,
    "task-closed": TaskClosed,
    "budget-exhausted": BudgetExhausted,
}

_BY_STATUS: dict[int, type[ProblemError]] = {
    401: Unauthenticated,
    403: Denied,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def error_of(problem: Problem) -> ProblemError:
    """Return the error a problem stands for: by its code first, else by its status."""
    kind = _BY_CODE.get(problem.code) or _BY_STATUS.get(problem.status)
    if kind is None:
        kind = InvalidRequest if 400 <= problem.status < 500 else ProblemError  # noqa: PLR2004  RFC 9110 section 15
    return kind(problem)
