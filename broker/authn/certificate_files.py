"""The broker's server certificate from files, where no Workload API gives it one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POLL_SECONDS: Final = 5.0

_log: Final = structlog.get_logger(__name__)


class CertificateFiles:
    """Watches a PEM chain and its key; a rotated pair is handed over without a restart."""

    def __init__(self, certificate: Path, key: Path, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._certificate = certificate
        self._key = key
        self._poll_seconds = poll_seconds
        self._seen: tuple[bytes, bytes] | None = None
        self._closed = asyncio.Event()

    async def run(self, take: Callable[[bytes, Secret[bytes]], None]) -> None:
        """Call `take(chain_pem, key_pem)` now and at every change, until `close`.

        A pair that cannot be read or used is reported, and the one in force stays.
        """
        while not self._closed.is_set():
            await self._refresh(take)
            try:
                await asyncio.wait_for(self._closed.wait(), self._poll_seconds)
            except TimeoutError:
                continue

    def close(self) -> None:
        """End `run`."""
        self._closed.set()

    async def _refresh(self, take: Callable[[bytes, Secret[bytes]], None]) -> None:
        try:
            pair = await asyncio.to_thread(self._read)
            if pair != self._seen:
                take(pair[0], Secret(pair[1]))
                self._seen = pair
        except (OSError, ValueError) as error:
            _log.warning("certificate_files_unusable", error=type(error).__name__)

    def _read(self) -> tuple[bytes, bytes]:
        return self._certificate.read_bytes(), self._key.read_bytes()
