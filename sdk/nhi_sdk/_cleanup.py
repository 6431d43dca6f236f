"""Finishing a clean-up although the asyncio task that does it is being cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


async def shielded(work: Awaitable[T], seconds: float) -> T:
    """Finish `work` even if cancelled meanwhile; a cancellation is delivered once it is done.

    Args:
        work: the clean-up.
        seconds: the bound on it; then it is cancelled itself.

    Raises:
        TimeoutError: the bound struck.
        asyncio.CancelledError: a cancellation arrived meanwhile.

    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    inner = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not inner.done() and loop.time() < until:
        try:
            await asyncio.wait({inner}, timeout=until - loop.time())
        except asyncio.CancelledError as error:
            cancelled = error
    in_time = inner.done()
    if not in_time:
        inner.cancel()
    if cancelled is not None:
        inner.add_done_callback(_seen)
        raise cancelled
    if not in_time:
        inner.add_done_callback(_seen)
        raise TimeoutError(f"not finished within {seconds:g} seconds")
    return inner.result()


def _seen(future: asyncio.Future[T]) -> None:
    """Take note of a result nobody waits for, so that asyncio does not complain of it."""
    if not future.cancelled():
        future.exception()


async def acquired(work: Awaitable[T], undo: Callable[[T], Awaitable[object]], seconds: float) -> T:
    """Do `work`; if cancelled before its result arrives, await the result and undo it.

    Without this, a credential whose request was cancelled half-way would live on unseen.

    Args:
        work: what acquires.
        undo: what releases its result.
        seconds: the bound on both together once cancelled.

    """
    inner = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(inner)
    except asyncio.CancelledError:
        if not inner.cancelled():
            with contextlib.suppress(Exception):  # the cancellation is what the caller waits for
                await shielded(_undone(inner, undo), seconds)
        raise


async def _undone(inner: asyncio.Future[T], undo: Callable[[T], Awaitable[object]]) -> None:
    await undo(await inner)
