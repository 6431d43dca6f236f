"""``nhi exec``: run a program with credentials that are dead when it is done."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nhi_sdk._exchange import RetryPolicy
from nhi_sdk.broker import Broker
from nhi_sdk.cli import child
from nhi_sdk.cli.commands import Purpose, Reason, Wanted, tool_name
from nhi_sdk.cli.output import ExitCode, cell, explain, fail, say
from nhi_sdk.errors import ConfigurationError, NhiError
from nhi_sdk.models import OtherSecret, PostgresLogin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nhi_sdk.broker import OpenTask
    from nhi_sdk.models import Credential, TaskEnd

_OVERRIDES: Final = ("PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGPASSFILE", "PGREQUIREAUTH")
"""libpq lets these win over, or stand beside, what we set: the password could go to another server."""

_NOT_A_NAME: Final = re.compile(r"[^A-Z0-9]+")
_RETRY: Final = RetryPolicy(deadline_seconds=15.0)


def register(app: typer.Typer) -> None:
    """Add the command."""
    # What follows the program's name belongs to the program, even without "--".
    app.command("exec", context_settings={"allow_interspersed_args": False})(execute)


def execute(
    command: Annotated[list[str], typer.Argument(metavar="[--] COMMAND…", help="The program to run.")],
    *,
    cred: Annotated[
        list[str], typer.Option("--cred", metavar="RESOURCE:ACTION", help="Repeat for more than one.")
    ],
    purpose: Purpose,
    reason: Reason,
    description: Annotated[
        str | None, typer.Option("--description", help="For readers of the audit.")
    ] = None,
    ttl: Annotated[int | None, typer.Option("--ttl", min=1, help="Seconds each should live.")] = None,
    deadline: Annotated[
        int | None, typer.Option("--deadline", min=1, help="Seconds until the broker ends it all by itself.")
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds the program has left after SIGTERM or SIGHUP.")
    ] = 5.0,
    wait: Annotated[int, typer.Option("--wait", min=0, max=30, help="Seconds to wait for proof.")] = 10,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only say what went wrong.")] = False,
) -> None:
    """Run a program with credentials in its environment; they are dead when it is done.

    PostgreSQL: PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD, PGSSLMODE. Tokens: NHI_TOKEN.
    Of several of a kind the first has these names; each has its own besides, with the
    resource's name: NHI_TOKEN_TOOL_API, ORDERS_DB_PGHOST.

    Exits with the program's code (128+n if signal n ended it), 125 if nhi itself failed,
    126 or 127 if the program cannot be run or found.
    """
    wanted = [Wanted.parse(one) for one in cred]
    names = [_variable(one.resource) for one in wanted]
    if len(set(names)) != len(names):
        fail("give each resource once: their variables would overwrite each other", ExitCode.USAGE)
    program = _found(command[0])
    job = _Job(
        command=(program, *command[1:]),
        wanted=tuple(wanted),
        purpose=purpose,
        description=description,
        tool=tool_name(PurePath(program).name),
        reason=reason,
        ttl_seconds=ttl,
        deadline_seconds=deadline,
        grace_seconds=grace,
        wait_seconds=wait,
        quiet=quiet,
    )
    with child.Signals() as signals:
        try:
            code = _run(job, signals)
        except child.Interrupted as interrupted:
            code = interrupted.exit_code
        except NhiError as error:
            explain(error)
            code = ExitCode.EXEC_FAILED
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The command line, understood."""

    command: tuple[str, ...]
    wanted: tuple[Wanted, ...]
    purpose: str
    description: str | None
    tool: str
    reason: str
    ttl_seconds: int | None
    deadline_seconds: int | None
    grace_seconds: float
    wait_seconds: int
    quiet: bool

    @property
    def program(self) -> str:
        return PurePath(self.command[0]).name


def _found(name: str) -> str:
    """Return the program's path before anything is minted for it."""
    path = shutil.which(name)
    if path is None:
        if os.path.sep in name and PurePath(name).name and os.path.exists(name):  # noqa: PTH110  no object needed
            fail(f"{name} is not executable", ExitCode.EXEC_NOT_EXECUTABLE)
        fail(f"{name} is not found", ExitCode.EXEC_NOT_FOUND)
    return path


def _run(job: _Job, signals: child.Signals) -> int:
    with Broker.from_env(retry=_RETRY) as broker:
        task = broker.open_task(
            job.purpose,
            description=job.description,
            resources=sorted({one.resource for one in job.wanted}),
            actions=sorted({one.action for one in job.wanted}),
            # A repeated request supersedes the lost one, which counts as well.
            budget_leases=len(job.wanted) * _RETRY.attempts_max,
            deadline_seconds=job.deadline_seconds,
        )
        code: int = ExitCode.EXEC_FAILED
        ended = False
        try:
            issued = [_issue(task, one, job) for one in job.wanted]
            code = child.run(job.command, _environment(issued, os.environ), signals, job.grace_seconds)
        except OSError as error:
            say(f"cannot run {job.program}: {error.strerror}")
            code = ExitCode.EXEC_NOT_EXECUTABLE
        finally:
            ended = _end(task, job, signals)
        return code or (ExitCode.OK if ended else ExitCode.EXEC_FAILED)


def _issue(task: OpenTask, wanted: Wanted, job: _Job) -> Credential:
    return task.request(
        wanted.resource, wanted.action, tool=job.tool, reason=job.reason, ttl_seconds=job.ttl_seconds
    )


def _variable(resource: str) -> str:
    """Return a resource's name as part of a variable's."""
    return _NOT_A_NAME.sub("_", resource.upper()).strip("_")


def _environment(issued: Sequence[Credential], base: Mapping[str, str]) -> dict[str, str]:
    """Return the program's environment; of several credentials of a kind the first gets the usual names."""
    environment = dict(base)
    usual: set[type[object]] = set()
    for credential in issued:
        secret, name = credential.secret, _variable(credential.resource)
        if isinstance(secret, OtherSecret):
            raise ConfigurationError(
                f"nhi exec cannot hand on the credential for {credential.resource} ({secret.kind}): "
                "a newer nhi-sdk may"
            )
        if isinstance(secret, PostgresLogin):
            for override in _OVERRIDES:
                environment.pop(override, None)
            environment.update({f"{name}_{key}": value for key, value in secret.env().items()})
        else:
            environment[f"NHI_TOKEN_{name}"] = secret.access_token
        if type(secret) not in usual:
            usual.add(type(secret))
            environment.update(secret.env())
    return environment


def _end(task: OpenTask, job: _Job, signals: child.Signals) -> bool:
    """End the task whatever happened, then wait for proof; say whether the broker took the end.

    The end is committed by a request of its own, which no signal interrupts; the wait for
    proof, which only reports, a signal may cut short.
    """
    signals.keeping = True
    began = time.monotonic()
    try:
        ended = task.end(reason=f"nhi exec: {job.tool} ended")
    except NhiError as error:
        explain(error)
        say(
            f"the broker could not be told: what was issued lives until {cell(task.view.deadline_at)} at most"
        )
        say(f"to end it now: nhi task end {task.task_id}")
        return False
    if not ended.proven and job.wait_seconds:
        signals.keeping = False
        try:
            ended = task.end(wait=job.wait_seconds)
        except child.Interrupted:
            say("not waiting for proof; the broker goes on")
        except NhiError as error:
            explain(error)
        finally:
            signals.keeping = True
    _report(ended, job, round((time.monotonic() - began) * 1000))
    return True


def _report(ended: TaskEnd, job: _Job, elapsed_ms: int) -> None:
    unproven = {one.lease_id for one in ended.unproven}
    for lease in ended.leases:
        what = f"{lease.resource}:{lease.action}"
        if lease.lease_id in unproven:
            say(f"{what} is NOT proven dead yet ({lease.state}); see: nhi task end {lease.task_id}")
        elif not job.quiet:
            say(f"{what} proven dead {elapsed_ms} ms after {job.program} ended ({lease.lease_id})")
