"""The three listeners on loopback sockets, in a thread with a loop of its own, for clients that block."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.api.listeners import Listener
from broker.api.metrics import SilentEdgeTelemetry
from broker.api.protocol import UNIX_PEER
from tests.support.api import ROOT, Api, api_opened
from tests.support.edge import LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Iterator


class ServedApi:
    """Base URLs by listener; ``operator`` is spoken to as root, ``operator-nobody`` as nobody known."""

    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self.token = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[ServedApi]:
        thread = threading.Thread(target=self._run, name="served-api")
        thread.start()
        assert self._ready.wait(30)
        try:
            if self._failure is not None:
                raise self._failure
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(30)
            assert not thread.is_alive()
            self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001  told to the thread that waits
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        with tempfile.TemporaryDirectory(prefix="nhi-api-") as directory:
            async with api_opened(Path(directory)) as api:
                listeners = [self._listener(api, name) for name in ("workload", "ops", "operator-nobody")]
                listeners.append(self._listener(api, "operator", {UNIX_PEER: ROOT}))
                for listener in listeners:
                    await listener.start()
                    self.urls[listener.name] = f"http://127.0.0.1:{listener.port}"
                self.token = api.token()
                self._ready.set()
                await self._stop.wait()
                for listener in listeners:
                    await listener.stop(1)

    @staticmethod
    def _listener(api: Api, name: str, state: dict[str, Any] | None = None) -> Listener:
        app = api.asgi(name.partition("-")[0], state or {})
        return Listener(name, app, LOOPBACK, telemetry=SilentEdgeTelemetry())
