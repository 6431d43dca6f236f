from __future__ import annotations

import re
import sqlite3
import stat
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from broker.core.facts import Lifecycle
from broker.core.lease import TERMINAL, LeaseState
from broker.core.task import TaskState
from inventory.migrations import run
from inventory.store import engine
from inventory.store.engine import LedgerSchemaError
from inventory.store.tables import METADATA

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger" / "ledger.db"
    engine.prepare(path)
    return path


def schema(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return "\n".join(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master") if sql)
    finally:
        connection.close()


def set_revision(path: Path, revision: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()


def test_the_migrated_schema_is_the_metadata(path: Path) -> None:
    database = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_every_check_of_the_metadata_is_in_the_database_word_for_word(path: Path) -> None:
    """Alembic compares no CHECKs, so this does."""
    database = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with database.connect() as connection:
        found = {
            check["name"]: check["sqltext"]
            for table in METADATA.tables
            for check in inspect(connection).get_check_constraints(table)
        }
    wanted = {
        constraint.name: str(constraint.sqltext)  # type: ignore[attr-defined]  # only CHECKs have a text
        for table in METADATA.tables.values()
        for constraint in table.constraints
        if constraint.__visit_name__ in {"check_constraint", "table_or_column_check_constraint"}
    }
    assert len(wanted) >= 5
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leases_state", set(LeaseState)),
        ("leases_due_until_terminal", set(TERMINAL)),
        ("tasks_state", set(TaskState)),
        ("identities_lifecycle", set(Lifecycle)),
    ],
)
def test_the_words_of_a_check_are_those_of_its_enum(path: Path, name: str, words: set[str]) -> None:
    """A state added to the table of moves without a migration stops here."""
    line = next(line for line in schema(path).splitlines() if f"CONSTRAINT {name} " in line)
    assert set(re.findall(r"'([a-z_]+)'", line)) == {str(word) for word in words}


def test_the_newest_revision_is_the_one_start_up_looks_for() -> None:
    from alembic.script import ScriptDirectory  # noqa: PLC0415  as the product does: only where it is needed

    assert ScriptDirectory.from_config(run._config()).get_heads() == [engine.SCHEMA_REVISION]


def test_a_newer_ledger_is_refused_and_left_alone(path: Path) -> None:
    set_revision(path, "9999")
    before = path.read_bytes()
    with pytest.raises(LedgerSchemaError) as refused:
        engine.prepare(path)
    assert "9999" in str(refused.value)
    assert "broker version that wrote it" in str(refused.value)
    assert path.read_bytes() == before


def test_preparing_again_changes_nothing(path: Path) -> None:
    before = schema(path)
    first = engine.prepare(path)
    assert engine.prepare(path) == first
    assert schema(path) == before


def test_a_ledger_is_its_owners_alone(path: Path) -> None:
    connection = engine.open_for_writing(path)
    connection.execute("INSERT INTO meta (key, value) VALUES ('k', 'v')")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    connection.close()


def test_an_interrupted_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half way through, after tables and indices were made, the power goes."""
    from alembic.operations import Operations  # noqa: PLC0415  as the product does: only where it is needed

    path = tmp_path / "ledger.db"
    made = 0
    create_index = Operations.create_index

    def fails_at_the_third(self: Operations, *arguments: object, **options: object) -> None:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        create_index(self, *arguments, **options)  # type: ignore[arg-type]  # passed through

    with monkeypatch.context() as patched:
        patched.setattr("alembic.op.create_index", lambda *a, **k: fails_at_the_third(_current_op(), *a, **k))
        with pytest.raises(KeyboardInterrupt):
            engine.prepare(path)
    assert made == 3
    assert schema(path) == ""
    assert engine.schema_revision(path) is None

    engine.prepare(path)
    assert engine.schema_revision(path) == engine.SCHEMA_REVISION


def _current_op() -> object:
    from alembic.op import _proxy  # type: ignore[attr-defined]  # noqa: PLC0415  Alembic's own, set while it runs

    return _proxy
