"""Alembic migrations of the ledger: expand, migrate, contract."""
