"""The `nhi` command (extra ``cli``); the server's distribution adds its own commands to it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `nhi`; says how to install what is missing where the extra is not there."""
    try:
        from nhi_sdk.cli.app import run  # noqa: PLC0415  the library must import without the extra
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.stderr.write("nhi: the command needs optional dependencies: pip install 'nhi-sdk[cli]'\n")
        raise SystemExit(2) from None
    run()
