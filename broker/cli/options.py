"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

SOCKET_VARIABLE: Final = "NHI_OPERATOR_SOCKET"
CONFIG_VARIABLE: Final = "NHI_CONFIG"

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept with the audit record.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Config = Annotated[
    Path, typer.Option("--config", envvar=CONFIG_VARIABLE, help="The broker's settings file (TOML).")
]
MaybeConfig = Annotated[
    Path | None,
    typer.Option("--config", envvar=CONFIG_VARIABLE, help="The broker's settings file (TOML)."),
]
Socket = Annotated[
    Path | None,
    typer.Option("--socket", envvar=SOCKET_VARIABLE, help="The broker's operator socket."),
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=100_000, help="Rows at most.")]
