"""Operator commands of `nhi`, found by the SDK through an entry point; heavy imports happen inside commands."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the server commands to the `nhi` command."""
