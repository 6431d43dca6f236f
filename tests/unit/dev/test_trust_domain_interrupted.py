"""A start that is interrupted leaves no socket and no claim behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from broker.dev.trust_domain import EmbeddedTrustDomain

if TYPE_CHECKING:
    from pathlib import Path


def sockets(directory: Path) -> list[Path]:
    return list(directory.rglob("*.sock"))


async def test_an_interrupted_start_is_undone(short_dir: Path) -> None:
    domain = EmbeddedTrustDomain(short_dir / "td")
    domain.register("spiffe://dev.nhi.internal/agent")
    starting = asyncio.ensure_future(domain.start())
    await asyncio.sleep(0)  # the thread is on its way
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert sockets(short_dir) == []
    async with EmbeddedTrustDomain(short_dir / "td"):
        pass  # nobody holds the directory
