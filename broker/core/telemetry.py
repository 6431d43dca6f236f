"""What the service layer counts. Labels come only from closed sets: adapter, outcome, reason code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from broker.core.lease import Cause


class Telemetry(Protocol):
    """Receives counts and durations; implemented with Prometheus in ``broker.api.metrics``."""

    def issued(self, adapter: str, seconds: float) -> None:
        """Count one lease released to its caller, with the time it took inside the broker."""
        ...

    def refused(self, reason_code: str) -> None:
        """Count one request refused; `reason_code` is an error's `code`."""
        ...

    def mint_failed(self, adapter: str, outcome: str) -> None:
        """Count one mint that was refused (``refused``), ``ambiguous`` or ``lost``."""
        ...

    def ended(self, adapter: str, state: str, cause: Cause, lag_seconds: float) -> None:
        """Count one lease that reached a terminal state, and how long proof took after its end."""
        ...

    def live(self, adapter: str, change: int) -> None:
        """Raise or lower the number of leases that may be alive."""
        ...

    def stuck(self, adapter: str, change: int) -> None:
        """Raise or lower the number of stuck leases."""
        ...

    def authentication_refused(self, rule: str) -> None:
        """Count one SVID that our rules refused."""
        ...


class SilentTelemetry:
    """Counts nothing: for tests and tools."""

    def issued(self, adapter: str, seconds: float) -> None:
        """Ignore."""

    def refused(self, reason_code: str) -> None:
        """Ignore."""

    def mint_failed(self, adapter: str, outcome: str) -> None:
        """Ignore."""

    def ended(self, adapter: str, state: str, cause: Cause, lag_seconds: float) -> None:
        """Ignore."""

    def live(self, adapter: str, change: int) -> None:
        """Ignore."""

    def stuck(self, adapter: str, change: int) -> None:
        """Ignore."""

    def authentication_refused(self, rule: str) -> None:
        """Ignore."""
