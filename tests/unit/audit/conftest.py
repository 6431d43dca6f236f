from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.core.ids import InstanceTag
from tests.support.audit_log import HEAD_EVERY, RECORDS_PER_SLOT, SLOTS, START_MS, Log, MemoryKeys, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
def make_log(tmp_path: Path, keys: MemoryKeys) -> Callable[..., Log]:
    def make(name: str = "log", *, store: MemoryKeys | None = None, origin: str | None = None) -> Log:
        root = tmp_path / name
        root.mkdir()
        return Log(root, store or keys, origin or InstanceTag.new())

    return make


@pytest.fixture
def log(make_log: Callable[..., Log]) -> Log:
    """Fifty records over two slots, every fifth with free text, a head copied after every fifth."""
    made = make_log()
    for number in range(1, RECORDS_PER_SLOT + 1):
        for slot in SLOTS:
            text = {"reason": f"weekly report {number}", "note": "für Łukasz\n"} if number % 5 == 0 else None
            made.append(slot, record(number, text=text))
            if number % HEAD_EVERY == 0:
                made.copy_head(slot, START_MS + number * 100)
    return made
