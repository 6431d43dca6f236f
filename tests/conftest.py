"""Fixtures every test may use."""

from __future__ import annotations

from tests.support.parts import orders_database, postgres_server, short_dir, trust_domain

__all__ = ["orders_database", "postgres_server", "short_dir", "trust_domain"]
