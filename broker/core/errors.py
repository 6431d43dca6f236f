"""What can go wrong, in one vocabulary.

::

    BrokerError
    ├── Unauthenticated        no Caller: our rules refused the SVID
    ├── IdentityRefused        a Caller whose inventory record bars it
    ├── PolicyDenied           the decision was Deny or NeedsApproval
    ├── UnknownObject          unknown, or another's: the same answer for both
    ├── InvalidRequest         well-formed, but not something the broker can do
    ├── TaskClosed             the task ended before or during the request
    ├── BudgetExhausted        the task's bound on leases is reached
    ├── IdempotencyMismatch    the key was used with another body
    ├── StillMinting           the first request with this key has not finished
    ├── LeaseLost              the lease was ended while its secret was being minted
    ├── MintFailed             the backend did not acknowledge; the lease is being ended
    ├── RateLimited            too many requests of one identity
    ├── Overloaded             the broker's own queues are full
    ├── BackendUnavailable     the circuit breaker of a backend is open
    └── LedgerUnavailable      nothing durable can be written: fail closed

Errors are constructed silently; the edge logs once. Core knows no HTTP status: one
table in ``broker/api/problems.py`` does. `detail` is public: it helps the caller and
holds no internal, no secret and nothing the caller sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from broker.core.decision import Deny, NeedsApproval
    from broker.core.ids import DecisionId, LeaseId, TaskId


class BrokerError(Exception):
    """Root of every error the service layer raises on purpose.

    Attributes:
        code: stable slug, the last part of the problem type.
        detail: public sentence: what was refused, why, what to do.
        retry_after_seconds: when a retry may help, None where it cannot.
        lease_id: the lease concerned, so that a caller can follow it.

    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        detail: str,
        *,
        retry_after_seconds: int | None = None,
        lease_id: LeaseId | None = None,
        task_id: TaskId | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.lease_id = lease_id
        self.task_id = task_id


class Unauthenticated(BrokerError):
    """Our rules refused the SVID.

    The caller gets one general text; `rule` and `explanation` go to log and audit only.
    """

    code = "unauthenticated"
    PUBLIC_DETAIL: ClassVar[str] = (
        "No valid SVID was presented. Send a JWT-SVID for this broker's audience as a bearer token, "
        "or connect with an X.509-SVID, and check clock, audience and trust domain."
    )

    def __init__(self, rule: str, explanation: str) -> None:
        super().__init__(self.PUBLIC_DETAIL)
        self.rule = rule
        self.explanation = explanation

    def __str__(self) -> str:
        return f"{self.rule}: {self.explanation}"


class IdentityRefused(BrokerError):
    """The identity is authenticated, but its inventory record bars it."""

    code = "identity-refused"


class PolicyDenied(BrokerError):
    """Policy did not allow it; `decision` holds the reasons, `decision_id` finds the record."""

    code = "denied"

    def __init__(self, decision: Deny | NeedsApproval, decision_id: DecisionId) -> None:
        super().__init__(decision.reason)
        self.decision = decision
        self.decision_id = decision_id


class UnknownObject(BrokerError):
    """No such task or lease for this caller: unknown and another's answer alike (DESIGN 6)."""

    code = "not-found"

    def __init__(self) -> None:
        super().__init__("There is no such object for this caller.")


class InvalidRequest(BrokerError):
    """The request is well-formed but asks for something that cannot be."""

    code = "invalid-request"


class TaskClosed(BrokerError):
    """The task has ended; nothing more is issued under it."""

    code = "task-closed"


class BudgetExhausted(BrokerError):
    """The task's bound on leases, or the identity's on open tasks, is reached."""

    code = "budget-exhausted"


class IdempotencyMismatch(BrokerError):
    """The Idempotency-Key was used before with another body."""

    code = "idempotency-mismatch"


class StillMinting(BrokerError):
    """The first request with this Idempotency-Key is still being served."""

    code = "still-minting"


class LeaseLost(BrokerError):
    """The lease was ended while its secret was being minted; the secret was dropped."""

    code = "lease-lost"


class MintFailed(BrokerError):
    """The backend refused or did not answer; the lease is failed or being ended."""

    code = "mint-failed"


class RateLimited(BrokerError):
    """Too many requests, or too many at once, from one identity."""

    code = "rate-limited"


class Overloaded(BrokerError):
    """The broker's own queues are full."""

    code = "overloaded"


class BackendUnavailable(BrokerError):
    """The circuit breaker of a backend is open: nothing was attempted."""

    code = "backend-unavailable"


class LedgerUnavailable(BrokerError):
    """The ledger cannot be written; without it nothing is minted."""

    code = "ledger-unavailable"
