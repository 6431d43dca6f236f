from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from adapters.batching import Batcher

if TYPE_CHECKING:
    from collections.abc import Sequence


class BadItemError(Exception):
    pass


class Backend:
    """Answers batches; waits at a gate while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.bad: set[str] = set()
        self.lost = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.running = 0
        self.running_max = 0

    async def run(self, keys: Sequence[str]) -> dict[str, str]:
        self.batches.append(list(keys))
        self.asked.set()
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        await asyncio.sleep(0)
        await self.gate.wait()
        self.running -= 1
        if self.lost:
            raise ConnectionResetError
        if self.bad & set(keys):
            raise BadItemError
        return {key: key.upper() for key in keys}


def batcher(backend: Backend, *, size_max: int = 10, parallel: int = 1) -> Batcher[str]:
    return Batcher(
        backend.run, lambda error: isinstance(error, BadItemError), size_max=size_max, parallel=parallel
    )


async def test_a_lone_call_runs_at_once() -> None:
    backend = Backend()
    assert await batcher(backend).submit("a") == "A"
    assert backend.batches == [["a"]]


async def test_calls_made_together_share_a_batch_of_bounded_size() -> None:
    backend = Backend()
    together = batcher(backend, size_max=3)
    assert await asyncio.gather(*(together.submit(key) for key in "abcdefg")) == list("ABCDEFG")
    assert backend.batches == [["a", "b", "c"], ["d", "e", "f"], ["g"]]


async def test_no_more_batches_run_at_once_than_allowed() -> None:
    backend = Backend()
    together = batcher(backend, size_max=1, parallel=2)
    await asyncio.gather(*(together.submit(key) for key in "abcdef"))
    assert backend.running_max == 2


async def test_calls_for_the_same_key_share_one_result() -> None:
    backend = Backend()
    together = batcher(backend)
    assert await asyncio.gather(together.submit("a"), together.submit("a")) == ["A", "A"]
    assert backend.batches == [["a"]]


async def test_a_call_made_while_its_key_is_under_way_is_not_given_the_older_answer() -> None:
    backend = Backend()
    together = batcher(backend)
    backend.gate.clear()
    first = asyncio.create_task(together.submit("a"))
    await backend.asked.wait()
    second = asyncio.create_task(together.submit("a"))
    await asyncio.sleep(0)
    backend.gate.set()
    assert [await first, await second] == ["A", "A"]
    assert backend.batches == [["a"], ["a"]]


async def test_a_bad_item_fails_alone() -> None:
    backend = Backend()
    backend.bad = {"b"}
    together = batcher(backend)
    results = await asyncio.gather(*(together.submit(key) for key in "abc"), return_exceptions=True)
    assert [results[0], results[2]] == ["A", "C"]
    assert isinstance(results[1], BadItemError)


async def test_a_lost_backend_is_not_asked_again_for_each_item() -> None:
    backend = Backend()
    backend.lost = True
    together = batcher(backend)
    results = await asyncio.gather(*(together.submit(key) for key in "abc"), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionResetError] * 3
    assert backend.batches == [["a", "b", "c"]]


async def test_a_caller_that_gives_up_takes_nothing_from_the_one_that_shares_its_result() -> None:
    backend = Backend()
    together = batcher(backend)
    backend.gate.clear()
    impatient = asyncio.create_task(together.submit("a"))
    patient = asyncio.create_task(together.submit("a"))
    await backend.asked.wait()
    impatient.cancel()
    backend.gate.set()
    assert await patient == "A"
    assert impatient.cancelled()


async def test_close_ends_what_runs_and_what_waits() -> None:
    backend = Backend()
    backend.gate.clear()
    together = batcher(backend, size_max=1)
    calls = [asyncio.create_task(together.submit(key)) for key in "ab"]
    await backend.asked.wait()
    await together.close()
    for call in calls:
        with pytest.raises(asyncio.CancelledError):
            await call
