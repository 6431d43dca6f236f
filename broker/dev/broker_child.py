"""A broker in a process of its own, to be killed: for chaos runs and benchmarks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

import httpx

if TYPE_CHECKING:
    from pathlib import Path

    from broker.settings import Settings

READY_SECONDS_MAX: Final = 60
POLL_SECONDS: Final = 0.02
STOP_SECONDS_MAX: Final = 60


class BrokerChild:
    """Runs ``nhi serve`` on a settings file."""

    def __init__(self, settings: Settings, config: Path, log: Path) -> None:
        self._settings = settings
        self._config = config
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        if self._process is None:
            raise RuntimeError("the broker is not running")
        return self._process.pid

    async def start(self) -> None:
        """Start the process and wait until it says it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; the log file says why.

        """
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nhi_sdk", "serve", "--config", str(self._config),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        await self._wait_ready()

    async def kill(self) -> None:
        """End the process as a power cut would, and wait until it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """End the process in good order and return its exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, with_signal: signal.Signals) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if process.returncode is None:
            os.kill(process.pid, with_signal)
        async with asyncio.timeout(STOP_SECONDS_MAX):
            return await process.wait()

    async def _wait_ready(self) -> None:
        ops = self._settings.ops
        async with httpx.AsyncClient() as client:
            for _ in range(int(READY_SECONDS_MAX / POLL_SECONDS)):
                if self._process is None or self._process.returncode is not None:
                    break
                try:
                    answer = await client.get(f"http://{ops.host}:{ops.port}/readyz")
                    if answer.status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(POLL_SECONDS)
        raise RuntimeError(f"the broker did not become ready; see {self._log}")
