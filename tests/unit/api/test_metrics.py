from __future__ import annotations

from broker.api.metrics import PrometheusTelemetry
from broker.core.lease import Cause, LeaseState


def sample(telemetry: PrometheusTelemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(name, labels)


def test_what_services_report_is_counted() -> None:
    telemetry = PrometheusTelemetry(["orders"])
    telemetry.issued("orders", 0.002)
    telemetry.mint_failed("orders", "ambiguous")
    telemetry.ended("orders", LeaseState.REVOKED, Cause.EXPIRY, 0.04)
    telemetry.live("orders", 3)
    telemetry.live("orders", -1)
    telemetry.stuck("orders", 1)
    telemetry.authentication_refused("J-7")
    telemetry.refused("denied")
    assert sample(telemetry, "nhi_leases_issued_total", adapter="orders") == 1
    assert sample(telemetry, "nhi_mints_failed_total", adapter="orders", outcome="ambiguous") == 1
    ended = {"adapter": "orders", "state": "revoked", "cause": "expiry"}
    assert sample(telemetry, "nhi_leases_ended_total", **ended) == 1
    assert sample(telemetry, "nhi_revocation_lag_seconds_count", adapter="orders") == 1
    assert sample(telemetry, "nhi_leases_live", adapter="orders") == 2
    assert sample(telemetry, "nhi_leases_stuck", adapter="orders") == 1
    assert sample(telemetry, "nhi_authentication_refused_total", rule="J-7") == 1
    assert sample(telemetry, "nhi_requests_refused_total", reason="denied") == 1


def test_unknown_labels_are_counted_as_other() -> None:
    telemetry = PrometheusTelemetry(["orders"], ["workload"])
    for number in range(50):
        telemetry.issued(f"made-up-{number}", 0.1)
        telemetry.refused(f"made-up-{number}")
        telemetry.authentication_refused(f"made-up-{number}")
        telemetry.tls_failed(f"made-up-{number}")
        telemetry.answered(f"made-up-{number}", 200, 0.1)
    assert b"made-up" not in telemetry.exposition()
    assert sample(telemetry, "nhi_leases_issued_total", adapter="other") == 50


def test_rule_ids_are_bounded_in_number() -> None:
    telemetry = PrometheusTelemetry([])
    for number in range(999):
        telemetry.authentication_refused(f"Z-{number}")
    assert telemetry.exposition().count(b"nhi_authentication_refused_total{") == 129


def test_queue_depths_are_read_when_scraped() -> None:
    telemetry = PrometheusTelemetry([])
    waiting: list[int] = []
    telemetry.watch_queue("writer", lambda: len(waiting))
    waiting += [1, 2]
    assert sample(telemetry, "nhi_queue_depth", queue="writer") == 2
    assert b"process_cpu_seconds_total" in telemetry.exposition()


def test_two_registries_do_not_meet() -> None:
    one, two = PrometheusTelemetry(["orders"]), PrometheusTelemetry(["orders"])
    one.issued("orders", 0.1)
    assert sample(two, "nhi_leases_issued_total", adapter="orders") is None
