"""Alembic's entry: always on a connection handed over by ``run.py``, never on one of its own."""

from __future__ import annotations

from alembic import context

from inventory.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
