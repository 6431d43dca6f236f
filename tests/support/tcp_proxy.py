"""A TCP proxy on the loopback interface that can be told to misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Mode(StrEnum):
    """What the proxy does with bytes and connections."""

    FORWARD = "forward"
    DOWN = "down"
    SILENT = "silent"
    ANSWER_LOST = "answer_lost"


class TcpProxy:
    """Forwards to one server; a change of mode holds for connections already open, too.

    ``DOWN`` breaks connections off and refuses new ones at once. ``SILENT`` swallows what
    either side sends. ``ANSWER_LOST`` swallows the server's bytes on connections that were
    open when it was set, and everything on new ones.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.mode = Mode.FORWARD
        self.host = "127.0.0.1"
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[TcpProxy]:
        self._server = await asyncio.start_server(self._accept, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self._server.close()
            self._break_off()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def misbehaving(self, mode: Mode) -> AsyncIterator[None]:
        self.mode = mode
        if mode is Mode.DOWN:
            self._break_off()
        try:
            yield
        finally:
            self.mode = Mode.FORWARD
            self._break_off()

    def _break_off(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        upstream = None
        try:
            if self.mode is Mode.DOWN:
                return
            answer_reader, upstream = await asyncio.open_connection(*self._upstream)
            self._writers.add(upstream)
            both = {
                asyncio.create_task(self._pump(reader, upstream, {Mode.FORWARD, Mode.ANSWER_LOST})),
                asyncio.create_task(self._pump(answer_reader, writer, {Mode.FORWARD})),
            }
            _, rest = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in rest:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        except OSError:
            pass  # the server is down: so is its proxy
        finally:
            for side in (writer, upstream):
                if side is not None:
                    side.close()
                    self._writers.discard(side)
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: set[Mode]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.mode in passing:
                    writer.write(data)
                    await writer.drain()
