"""A closed-loop HTTPS load client in a process of its own: raw bytes over keep-alive connections.

Reads a JSON plan on standard input, prints one JSON object with the latencies. It parses no
more of an answer than its length and status, so that the other core is left to the broker.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from functools import partial
from itertools import cycle
from typing import Any

import uvloop

HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length: "


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the answer before has arrived."""

    def __init__(self, requests: list[bytes], until: float, done: asyncio.Future[None]) -> None:
        self._requests = cycle(requests)
        self._until = until
        self._done = done
        self._buffer = b""
        self._sent = 0.0
        self.latencies: list[float] = []
        self.failures = 0
        self.first_failure = ""

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401  as asyncio hands it over
        """Send the first request."""
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take an answer apart once it is whole, and go on."""
        self._buffer += data
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(LENGTH)
        length = int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + len(HEAD_END) + length:
            return
        now = time.perf_counter()
        if self._buffer.startswith(b"HTTP/1.1 201"):
            self.latencies.append(now - self._sent)
        else:
            self.failures += 1
            self.first_failure = self.first_failure or self._buffer.decode("latin-1")[-300:]
        self._buffer = b""
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that this connection is through."""
        del exc
        if not self._done.done():
            self._done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))


def _same(connection: Connection) -> Connection:
    return connection


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run the plan: each connection cycles through its own requests for `seconds`."""
    context = ssl.create_default_context(cadata=plan["authorities"])
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    connections: list[Connection] = []
    endings = []
    for requests in plan["connections"]:
        done: asyncio.Future[None] = loop.create_future()
        raw = [request.encode("latin-1") for request in requests]
        connection = Connection(raw, started + plan["seconds"], done)
        await loop.create_connection(
            partial(_same, connection), "127.0.0.1", plan["port"], ssl=context, server_hostname="localhost"
        )
        connections.append(connection)
        endings.append(done)
    await asyncio.gather(*endings)
    return {
        "seconds": time.perf_counter() - started,
        "latencies": [value for connection in connections for value in connection.latencies],
        "failures": sum(connection.failures for connection in connections),
        "first_failure": next((c.first_failure for c in connections if c.first_failure), ""),
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
