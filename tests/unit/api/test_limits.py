from __future__ import annotations

import pytest

from broker.api.limits import LimitSettings, RequestLimiter
from broker.core.errors import Overloaded, RateLimited


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(seconds: Seconds, **changes: float) -> RequestLimiter:
    values = {
        "requests_per_second": 2.0,
        "burst": 3,
        "concurrent_per_identity": 2,
        "concurrent_total": 4,
        "identities_remembered": 5,
        **changes,
    }
    return RequestLimiter(LimitSettings(**values), seconds)  # type: ignore[arg-type]  # one dict of int and float


def spend(limits: RequestLimiter, identity: str, times: int) -> None:
    for _ in range(times):
        with limits.identity(identity):
            pass


def test_a_burst_is_served_then_the_identity_waits_and_others_do_not() -> None:
    seconds = Seconds()
    limits = limiter(seconds)
    spend(limits, "a", 3)
    with pytest.raises(RateLimited) as caught:
        spend(limits, "a", 1)
    assert caught.value.retry_after_seconds == 1
    spend(limits, "b", 3)
    seconds.now += 0.5
    spend(limits, "a", 1)
    with pytest.raises(RateLimited):
        spend(limits, "a", 1)


def test_retry_after_is_long_enough_for_a_slow_bucket() -> None:
    seconds = Seconds()
    limits = limiter(seconds, requests_per_second=0.1, burst=1)
    spend(limits, "a", 1)
    with pytest.raises(RateLimited) as caught:
        spend(limits, "a", 1)
    seconds.now += caught.value.retry_after_seconds or 0
    spend(limits, "a", 1)


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    seconds = Seconds()
    limits = limiter(seconds)
    spend(limits, "a", 1)
    seconds.now += 3600
    spend(limits, "a", 3)
    with pytest.raises(RateLimited):
        spend(limits, "a", 1)


def test_a_clock_that_steps_back_gives_and_takes_nothing() -> None:
    seconds = Seconds()
    limits = limiter(seconds)
    spend(limits, "a", 2)
    seconds.now -= 100
    spend(limits, "a", 1)
    with pytest.raises(RateLimited):
        spend(limits, "a", 1)


def test_one_identity_cannot_hold_every_place() -> None:
    limits = limiter(Seconds())
    with limits.identity("a"), limits.identity("a"):
        with pytest.raises(RateLimited), limits.identity("a"):
            pass
        with limits.identity("b"):
            pass


def test_a_place_is_given_back_when_the_request_fails() -> None:
    limits = limiter(Seconds(), burst=100)
    for _ in range(5):
        with pytest.raises(RuntimeError), limits.identity("a"):
            raise RuntimeError
    with limits.identity("a"), limits.identity("a"):
        pass


def test_the_process_serves_no_more_than_its_bound() -> None:
    limits = limiter(Seconds())
    for _ in range(4):
        limits.enter()
    with pytest.raises(Overloaded) as caught:
        limits.enter()
    assert caught.value.retry_after_seconds == 1
    limits.leave()
    limits.enter()
    assert limits.running == 4


def test_memory_is_bounded_and_the_busy_are_not_forgotten() -> None:
    limits = limiter(Seconds())
    with limits.identity("busy"), limits.identity("busy"):
        for number in range(100):
            spend(limits, f"id-{number}", 1)
        assert limits.identities == 5
        with pytest.raises(RateLimited), limits.identity("busy"):
            pass


@pytest.mark.parametrize(
    "changes", [{"burst": 0}, {"requests_per_second": -1.0}, {"identities_remembered": 4}]
)
def test_senseless_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        limiter(Seconds(), **changes)
