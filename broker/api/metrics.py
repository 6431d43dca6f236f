"""Prometheus metrics, on a registry of their own.

Labels come only from closed sets (DESIGN 10): configured backends, codes of the problem
table, words of our own enums. Whatever else arrives is counted as ``other``, so that no
caller can grow the series.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from broker.api.problems import TABLE
from broker.core.lease import Cause, LeaseState
from broker.core.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
OTHER: Final = "other"

_ISSUE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15)
_LAG_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 900, 3600)

_RULE: Final = re.compile(r"[A-Z]{1,4}-[0-9]{1,3}[a-z]?")
_RULES_MAX: Final = 128
_MINT_OUTCOMES: Final = frozenset({"refused", "ambiguous", "lost"})

TLS_REASONS: Final = frozenset(
    {
        "certificate_verify_failed",
        "peer_did_not_return_a_certificate",
        "unsupported_protocol",
        "no_shared_cipher",
        "http_request",
        "wrong_version_number",
        "tlsv1_alert_unknown_ca",
        "tlsv1_alert_protocol_version",
        "sslv3_alert_bad_certificate",
        "sslv3_alert_certificate_unknown",
        "sslv3_alert_certificate_expired",
        "timeout",
        "closed",
    }
)
"""OpenSSL's reasons in lower case, and two of ours."""


class EdgeTelemetry(Protocol):
    """What the listeners count."""

    def tls_failed(self, reason: str) -> None:
        """Count one TLS handshake that did not complete; see `TLS_REASONS`."""
        ...

    def connection_refused(self, listener: str) -> None:
        """Count one connection above the listener's cap."""
        ...

    def answered(self, listener: str, status: int, seconds: float) -> None:
        """Count one answer, with the time from the request's head to the answer's end."""
        ...

    def refused(self, reason_code: str) -> None:
        """Count one request answered with a problem; `reason_code` is the error's `code`."""
        ...


class SilentEdgeTelemetry:
    """Counts nothing: for tests and tools."""

    def tls_failed(self, reason: str) -> None:
        """Ignore."""

    def connection_refused(self, listener: str) -> None:
        """Ignore."""

    def answered(self, listener: str, status: int, seconds: float) -> None:
        """Ignore."""

    def refused(self, reason_code: str) -> None:
        """Ignore."""


class _Children:
    """Resolved series of one metric: prometheus_client takes a lock for each look-up."""

    __slots__ = ("_known", "_metric")

    def __init__(self, metric: Any) -> None:  # noqa: ANN401  Counter, Gauge or Histogram
        self._metric = metric
        self._known: dict[tuple[str, ...], Any] = {}

    def __getitem__(self, labels: tuple[str, ...]) -> Any:  # noqa: ANN401  the same kind of metric
        child = self._known.get(labels)
        if child is None:
            child = self._known[labels] = self._metric.labels(*labels)
        return child


class PrometheusTelemetry(Telemetry, EdgeTelemetry):
    """Counts what services and listeners report.

    Args:
        adapters: names of the configured backends.
        listeners: names of the listeners.

    """

    def __init__(self, adapters: Iterable[str], listeners: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._adapters = frozenset(adapters)
        self._listeners = frozenset(listeners)
        self._codes = frozenset(kind.code for kind in TABLE)
        self._rules: set[str] = set()
        self._issued = self._counter("nhi_leases_issued", "Leases released to their caller", "adapter")
        self._issue_seconds = self._histogram(
            "nhi_issue_seconds", "Time inside the broker of an issued lease", _ISSUE_BUCKETS, "adapter"
        )
        self._refused = self._counter("nhi_requests_refused", "Requests refused", "reason")
        self._mint_failed = self._counter("nhi_mints_failed", "Mints not acknowledged", "adapter", "outcome")
        self._ended = self._counter("nhi_leases_ended", "Leases that ended", "adapter", "state", "cause")
        self._lag_seconds = self._histogram(
            "nhi_revocation_lag_seconds", "From the end of a lease to its proof", _LAG_BUCKETS, "adapter"
        )
        self._live = self._gauge("nhi_leases_live", "Leases that may be alive", "adapter")
        self._stuck = self._gauge("nhi_leases_stuck", "Leases whose revocation keeps failing", "adapter")
        self._authentication = self._counter("nhi_authentication_refused", "SVIDs refused", "rule")
        self._tls = self._counter("nhi_tls_handshakes_failed", "TLS handshakes that failed", "reason")
        self._connections = self._counter(
            "nhi_connections_refused", "Connections above the listener's cap", "listener"
        )
        self._answers = self._counter("nhi_http_answers", "Answers sent", "listener", "status")
        self._answer_seconds = self._histogram(
            "nhi_http_answer_seconds", "Time to answer", _ISSUE_BUCKETS, "listener"
        )
        self._queue_depth = Gauge(
            "nhi_queue_depth", "Work waiting in a bounded queue", ["queue"], registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> _Children:
        return _Children(Counter(name, text, labels, registry=self.registry))

    def _gauge(self, name: str, text: str, *labels: str) -> _Children:
        return _Children(Gauge(name, text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> _Children:
        return _Children(Histogram(name, text, labels, buckets=buckets, registry=self.registry))

    def _adapter(self, name: str) -> str:
        return name if name in self._adapters else OTHER

    def _listener(self, name: str) -> str:
        return name if name in self._listeners else OTHER

    # --- what the service layer counts ---------------------------------------------------------

    def issued(self, adapter: str, seconds: float) -> None:
        """Count one lease released to its caller, with the time it took inside the broker."""
        labels = (self._adapter(adapter),)
        self._issued[labels].inc()
        self._issue_seconds[labels].observe(seconds)

    def refused(self, reason_code: str) -> None:
        """Count one request refused; `reason_code` is an error's `code`."""
        self._refused[(reason_code if reason_code in self._codes else OTHER,)].inc()

    def mint_failed(self, adapter: str, outcome: str) -> None:
        """Count one mint that was refused (``refused``), ``ambiguous`` or ``lost``."""
        self._mint_failed[self._adapter(adapter), outcome if outcome in _MINT_OUTCOMES else OTHER].inc()

    def ended(self, adapter: str, state: str, cause: Cause, lag_seconds: float) -> None:
        """Count one lease that reached a terminal state, and how long proof took after its end."""
        name = self._adapter(adapter)
        self._ended[name, LeaseState(state).value, Cause(cause).value].inc()
        self._lag_seconds[(name,)].observe(max(lag_seconds, 0.0))

    def live(self, adapter: str, change: int) -> None:
        """Raise or lower the number of leases that may be alive."""
        self._live[(self._adapter(adapter),)].inc(change)

    def stuck(self, adapter: str, change: int) -> None:
        """Raise or lower the number of stuck leases."""
        self._stuck[(self._adapter(adapter),)].inc(change)

    def authentication_refused(self, rule: str) -> None:
        """Count one SVID that our rules refused."""
        self._authentication[(self._known_rule(rule),)].inc()

    def _known_rule(self, rule: str) -> str:
        if rule not in self._rules:
            if len(self._rules) >= _RULES_MAX or not _RULE.fullmatch(rule):
                return OTHER
            self._rules.add(rule)
        return rule

    # --- what the edge counts ------------------------------------------------------------------

    def tls_failed(self, reason: str) -> None:
        """Count one TLS handshake that did not complete."""
        self._tls[(reason if reason in TLS_REASONS else OTHER,)].inc()

    def connection_refused(self, listener: str) -> None:
        """Count one connection above the listener's cap."""
        self._connections[(self._listener(listener),)].inc()

    def answered(self, listener: str, status: int, seconds: float) -> None:
        """Count one answer, with the time from the request's head to the answer's end."""
        name = self._listener(listener)
        self._answers[name, str(status)].inc()
        self._answer_seconds[(name,)].observe(seconds)

    # --- reading -------------------------------------------------------------------------------

    def watch_queue(self, queue: str, depth: Callable[[], int]) -> None:
        """Report `depth()` of a queue at each scrape. `queue` is a name in our code."""
        self._queue_depth.labels(queue).set_function(depth)

    def exposition(self) -> bytes:
        """Return the text format, to be sent with `CONTENT_TYPE`."""
        return generate_latest(self.registry)
