from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from broker.core.audit import AuditKind, AuditRecord
from broker.core.clock import ManualClock
from broker.keys.file_store import FileKeyStore
from inventory.audit.heads import HeadCopy, HeadSigner
from inventory.store import engine
from inventory.store.store import Store

if TYPE_CHECKING:
    from pathlib import Path


async def record_and_copy(store: Store, keys: FileKeyStore, copy: HeadCopy, count: int) -> None:
    for number in range(count):
        event = AuditRecord(kind=AuditKind.KILL, at_ms=number, actor="test")
        await store.writer.run(lambda tx, event=event: tx.audit(event))  # type: ignore[misc]  # a default's type
    copy.append(HeadSigner(keys, store.instance).sign(store.writer.head, 1_700_000_000_000))


async def test_a_restart_goes_on_in_the_same_chain(tmp_path: Path) -> None:
    keys, path = FileKeyStore(tmp_path / "keys.json", ManualClock()), tmp_path / "ledger" / "l.db"
    copy = HeadCopy(tmp_path / "copy")
    store = Store.open(path, keys, copy)
    await record_and_copy(store, keys, copy, 3)
    await store.close()
    again = Store.open(path, keys, HeadCopy(tmp_path / "copy"))
    assert (again.writer.head.slot, again.writer.head.seq, again.slots_behind) == (0, 3, ())
    await again.close()


async def test_a_restored_ledger_begins_a_new_chain_and_says_which_one_is_behind(tmp_path: Path) -> None:
    keys, path = FileKeyStore(tmp_path / "keys.json", ManualClock()), tmp_path / "ledger" / "l.db"
    copy = HeadCopy(tmp_path / "copy")
    store = Store.open(path, keys, copy)
    await record_and_copy(store, keys, copy, 2)
    await store.close()
    shutil.copy(path, tmp_path / "backup.db")
    store = Store.open(path, keys, copy)
    await record_and_copy(store, keys, copy, 2)
    await store.close()
    for leftover in path.parent.iterdir():
        leftover.unlink()
    shutil.copy(tmp_path / "backup.db", path)

    restored = Store.open(path, keys, HeadCopy(tmp_path / "copy"))
    assert restored.slots_behind == (0,)
    assert (restored.writer.head.slot, restored.writer.head.seq) == (1, 0)
    await restored.close()


def test_a_ledger_serves_one_process(tmp_path: Path) -> None:
    release = engine.claim(tmp_path / "l.db")
    with pytest.raises(engine.LedgerInUseError, match="Another broker"):
        engine.claim(tmp_path / "l.db")
    release()
    engine.claim(tmp_path / "l.db")()
