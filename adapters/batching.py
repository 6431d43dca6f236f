"""Runs concurrent calls together, so that a hundred revocations are a few round trips."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

Result = TypeVar("Result")


class Batcher(Generic[Result]):
    """Collects the keys submitted while earlier batches run, and runs them as one.

    A lone call waits for nothing. Submissions of the same key share one result. When a batch
    fails with an error that `isolates` says is of one item's making, its items are run one by
    one, so that a bad item fails alone.

    Attributes:
        size_max: keys in one batch.
        parallel: batches under way at once.

    """

    def __init__(
        self,
        run: Callable[[Sequence[str]], Awaitable[Mapping[str, Result]]],
        isolates: Callable[[Exception], bool],
        *,
        size_max: int,
        parallel: int,
    ) -> None:
        self._run = run
        self._isolates = isolates
        self._pending: dict[str, asyncio.Future[Result]] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self.size_max = size_max
        self.parallel = parallel

    async def submit(self, key: str) -> Result:
        """Return the result for `key`; raises what its batch, or its own run, raised."""
        future = self._pending.get(key)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(_mark_retrieved)
            self._pending[key] = future
        if len(self._workers) < self.parallel:
            worker = asyncio.create_task(self._drain())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        # Shielded: a caller that gives up must not take the result from one that shares it.
        return await asyncio.shield(future)

    async def close(self) -> None:
        """End the batches under way; their callers get a cancellation."""
        for worker in tuple(self._workers):
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    async def _drain(self) -> None:
        while self._pending:
            keys = list(self._pending)[: self.size_max]
            batch = {key: self._pending.pop(key) for key in keys}
            try:
                await self._settle(batch)
            finally:
                for future in batch.values():
                    if not future.done():
                        future.cancel()

    async def _settle(self, batch: Mapping[str, asyncio.Future[Result]]) -> None:
        try:
            results = await self._run(list(batch))
        except Exception as error:  # noqa: BLE001  whatever it is belongs to the callers
            if len(batch) == 1 or not self._isolates(error):
                for future in batch.values():
                    future.set_exception(error)
                return
        else:
            for key, future in batch.items():
                future.set_result(results[key])
            return
        for key, future in batch.items():
            await self._settle({key: future})


def _mark_retrieved(future: asyncio.Future[Result]) -> None:
    # Every caller may have been cancelled meanwhile; the error is then nobody's to read.
    if not future.cancelled():
        future.exception()
