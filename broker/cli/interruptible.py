"""Running a command's coroutine so that a signal ends it in good order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from nhi_sdk.cli.output import say

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

STOPPING: Final = (signal.SIGINT, signal.SIGTERM)
_SIGNALLED: Final = 128


def _nothing() -> None:
    return None


def run_until_signalled(main: Coroutine[Any, Any, T], *, before_leaving: Callable[[], None] = _nothing) -> T:
    """Run a coroutine to its end; SIGINT or SIGTERM cancels it, waits, and exits with 128 + n.

    A second signal is only acknowledged: what was started must be stopped, or it stays behind.
    """
    received: list[int] = []
    with asyncio.Runner() as runner:
        try:
            return runner.run(_cancelled_by_signals(main, received))
        except BaseException:
            if received:  # whatever it raised, it was on its way out because it was told to
                before_leaving()
                _leave_now(_SIGNALLED + received[0])
            raise


async def _cancelled_by_signals(main: Coroutine[Any, Any, T], received: list[int]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        else:
            say("still stopping")

    for number in STOPPING:
        loop.add_signal_handler(number, stop, number)
    return await task


def _leave_now(code: int) -> NoReturn:
    # Everything was stopped by the cancelled coroutine. A thread may still sit out the retries
    # of a call to what is gone; nobody who pressed Ctrl-C wants to wait for that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def until_signalled() -> int:
    """Wait for SIGINT or SIGTERM and return its number; for a command whose proper end that is."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if arrived.done():
            say("still stopping")
        else:
            arrived.set_result(number)

    for number in STOPPING:
        loop.add_signal_handler(number, stop, number)
    return await arrived
