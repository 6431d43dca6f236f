"""PostgreSQL connections opened for a credential, so that its end can close them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nhi_sdk.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    import psycopg


def _driver() -> ModuleType:
    try:
        import psycopg as driver  # noqa: PLC0415  an extra: loaded only when used
    except ImportError:
        raise MissingExtra("psycopg", "connect()") from None
    return driver


class Connections:
    """Keeps hold of what was opened; a closed connection is let go at the next opening."""

    __slots__ = ("_asynchronous", "_synchronous")

    def __init__(self) -> None:
        self._synchronous: list[psycopg.Connection[Any]] = []
        self._asynchronous: list[psycopg.AsyncConnection[Any]] = []

    def open(self, parameters: Mapping[str, str], options: Mapping[str, Any]) -> psycopg.Connection[Any]:
        """Open and remember one connection."""
        connection: psycopg.Connection[Any] = _driver().connect(**{**parameters, **options})
        self._synchronous = [kept for kept in self._synchronous if not kept.closed]
        self._synchronous.append(connection)
        return connection

    async def aopen(
        self, parameters: Mapping[str, str], options: Mapping[str, Any]
    ) -> psycopg.AsyncConnection[Any]:
        """Open and remember one asyncio connection."""
        connection: psycopg.AsyncConnection[Any] = await _driver().AsyncConnection.connect(
            **{**parameters, **options}
        )
        self._asynchronous = [kept for kept in self._asynchronous if not kept.closed]
        self._asynchronous.append(connection)
        return connection

    def close(self) -> None:
        """Close what `open` opened. Idempotent."""
        for connection in self._synchronous:
            connection.close()
        self._synchronous.clear()

    async def aclose(self) -> None:
        """Close everything. Idempotent."""
        self.close()
        for connection in self._asynchronous:
            await connection.close()
        self._asynchronous.clear()
