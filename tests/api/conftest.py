from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.api import Api, api_opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_opened(tmp_path) as built:
        yield built
