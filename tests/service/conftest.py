from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.world import World, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as built:
        yield built
