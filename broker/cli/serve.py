"""``nhi serve``: the production entry."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from broker.cli.options import Config  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import ExitCode, fail, printable, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from broker.app import BrokerProcess
    from broker.settings import Settings

_GC_THRESHOLDS: Final = (10_000, 20, 50)
"""Ten times rarer than Python's own: p99 5 ms instead of 12 ms under load (DESIGN 13)."""

_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    config: Config,
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Say everything that is wrong, and start nothing.")
    ] = False,
    log_level: Annotated[str, typer.Option("--log-level", help=", ".join(_LEVELS))] = "INFO",
    log_format: Annotated[str, typer.Option("--log-format", help="json, text or auto.")] = "auto",
) -> None:
    """Run the broker until SIGTERM or SIGINT.

    With --check nothing is started: exits 0 when it would start, 1 with a line for each thing that is wrong.
    """
    if log_level.upper() not in _LEVELS or log_format not in {"json", "text", "auto"}:
        fail(
            f"--log-level is one of {', '.join(_LEVELS)}; --log-format is json, text or auto", ExitCode.USAGE
        )
    if check:
        _check(config)
        return
    settings = load_settings(config)
    _run(settings, log_level, log_format)


def load_settings(config: Path) -> Settings:
    """Return the settings, or leave with a line for each thing that is wrong with them."""
    from broker.settings import Settings, SettingsError  # noqa: PLC0415  heavy: see the package

    try:
        return Settings.load(config)
    except SettingsError as error:
        _refuse(error.problems, config)


def _refuse(problems: Sequence[str], config: Path) -> NoReturn:
    for problem in problems:
        say(problem)
    say(f"{len(problems)} to mend in {config}; look again with: nhi serve --check --config {config}")
    raise typer.Exit(ExitCode.FAILED)


# --- checking ------------------------------------------------------------------------------------


def _check(config: Path) -> None:
    from broker.cli import settings_check  # noqa: PLC0415  heavy: see the package

    report = asyncio.run(settings_check.check(config))
    for done in report.passed:
        sys.stdout.write(f"ok    {printable(done)}\n")
    for problem in report.problems:
        sys.stdout.write(f"WRONG {printable(problem)}\n")
    if report.problems:
        say(f"{len(report.problems)} to mend; nothing was started")
        raise typer.Exit(ExitCode.FAILED)
    sys.stdout.write("nhi serve would start\n")


# --- running -------------------------------------------------------------------------------------


def _run(settings: Settings, log_level: str, log_format: str) -> None:
    import uvloop  # noqa: PLC0415  heavy: see the package

    from broker.cli.start_errors import problems_of  # noqa: PLC0415  same

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, log_level, log_format))
    except Exception as error:
        problems = problems_of(error)
        if problems is None:
            raise  # a defect of ours: its traceback is what helps
        for problem in problems:
            say(problem)
        raise typer.Exit(ExitCode.FAILED) from None


async def _serve(settings: Settings, log_level: str, log_format: str) -> None:
    from broker.api.logs import configure_logging  # noqa: PLC0415  heavy: see the package
    from broker.app import BrokerProcess  # noqa: PLC0415  same
    from broker.cli.interruptible import until_signalled  # noqa: PLC0415  same

    access_log = configure_logging(level=log_level, log_format=log_format)  # type: ignore[arg-type]  # checked above
    broker = BrokerProcess(settings, access_log=access_log)
    signalled = asyncio.ensure_future(until_signalled())
    starting = asyncio.ensure_future(broker.start())
    await asyncio.wait({signalled, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()  # told to stop before it had started: `start` stops what it began
        await asyncio.wait({starting})
        return
    try:
        await starting
        _settle_memory()
        sys.stdout.write(f"nhi serve: ready: {addresses(broker)}\n")
        sys.stdout.flush()
        await signalled
    finally:
        signalled.cancel()
        await broker.stop()


def addresses(broker: BrokerProcess) -> str:
    """Return where a started broker listens, as one line."""
    settings = broker.settings
    assert broker.workload is not None  # noqa: S101  started
    assert broker.ops is not None  # noqa: S101  same
    return (
        f"workload https://{_host(settings.workload.host)}:{broker.workload.port}, "
        f"operator unix:{settings.operator.socket}, "
        f"ops http://{_host(settings.ops.host)}:{broker.ops.port}"
    )


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _settle_memory() -> None:
    """Keep what start-up made out of every later garbage collection."""
    import gc  # noqa: PLC0415  only here

    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
