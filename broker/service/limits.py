"""Bounds of the service layer, as one frozen value that the composition root fills from settings."""

from __future__ import annotations

from dataclasses import dataclass

from broker.core.clock import MS_PER_SECOND

STUCK_AFTER_SECONDS = 600
"""How long revocation may fail before the lease is stuck (DESIGN 4, rule 7)."""

STUCK_RETRY_SECONDS = 900
BACKOFF_SECONDS_MAX = 300
PLANNED_SECONDS_MAX = STUCK_RETRY_SECONDS + 300
"""Nothing but the wait for a native expiry is ever planned further ahead than this."""

NATIVE_EXPIRY_SKEW_SECONDS = 300
"""How far a backend's clock may lag before its own expiry counts as an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an operator may tune.

    Attributes:
        require_owner: whether ownerless identities get nothing.
        history_window_seconds: how far back policy sees what an identity was granted.
        mint_deadline_seconds: total time for preparing and minting one credential.
        open_tasks_max: open tasks per identity.
        claim_visibility_seconds: how long a claimed lease is left to its claimer.
        mint_concurrency, end_concurrency: calls in flight per backend, each way.
        sweep_tick_seconds: the backstop between wakes.

    """

    require_owner: bool = False
    history_window_seconds: int = 24 * 3600
    mint_deadline_seconds: int = 15
    open_tasks_max: int = 1000
    claim_visibility_seconds: int = 60
    mint_concurrency: int = 16
    end_concurrency: int = 128
    sweep_tick_seconds: float = 1.0

    def history_since_ms(self, now_ms: int) -> int:
        """Return from when on an identity's grants count for policy."""
        return now_ms - self.history_window_seconds * MS_PER_SECOND
