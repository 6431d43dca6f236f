from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.ledger import Opened, migrated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def ledger_file(tmp_path: Path) -> Path:
    return migrated(tmp_path / "ledger" / "ledger.db")


@pytest.fixture
async def opened(ledger_file: Path) -> AsyncIterator[Opened]:
    ledger = Opened.at(ledger_file)
    ledger.writer.start()
    try:
        yield ledger
    finally:
        await ledger.close()
