"""Operator commands of `nhi`, found by the SDK through an entry point.

Every module here imports next to nothing: what a command needs is imported inside it, so
that `nhi --help` and the client commands stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.cli import adapter, audit, demo, dev, doctor, fsck, inventory, kill, leases, policy, serve, status

if TYPE_CHECKING:
    import typer


def register(app: typer.Typer) -> None:
    """Add the server commands to the `nhi` command."""
    for module in (serve, dev, demo, doctor, status, kill, leases, inventory, audit, policy, adapter, fsck):
        module.register(app)
