"""Running migrations in-process; imported only when the schema is behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

from inventory.store.connections import LedgerSchemaError, schema_revision

if TYPE_CHECKING:
    from sqlalchemy import Connection

_HERE = Path(__file__).parent


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE))
    return config


def known_revisions() -> set[str]:
    """Return every revision this version can migrate from."""
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def upgrade(path: Path) -> None:
    """Bring a ledger file to the newest schema, in one transaction per migration.

    Raises:
        LedgerSchemaError: the file is at a revision this version does not know.

    """
    current = schema_revision(path)
    if current is not None and current not in known_revisions():
        message = (
            f"The ledger is at schema {current}, which this version does not know. "
            "Start it with the broker version that wrote it, or restore a backup from before that."
        )
        raise LedgerSchemaError(message)
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    # The driver would commit before each DDL statement; an interrupted migration must leave nothing.
    event.listen(engine, "connect", lambda raw, _record: setattr(raw, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.begin() as connection:
        _upgrade(connection)
    engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
