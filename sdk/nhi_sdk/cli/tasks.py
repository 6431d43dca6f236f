"""Client commands about tasks: open, show, end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nhi_sdk.broker import Broker
from nhi_sdk.cli.commands import Json, Purpose, Wait, print_leases
from nhi_sdk.cli.output import ExitCode, print_fields, print_json, say

if TYPE_CHECKING:
    from nhi_sdk.models import Task

TaskId = Annotated[str, typer.Argument(metavar="TASK", help="tsk_…")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Open, show and end tasks.")
    group.command("open")(open_)
    group.command("show")(show)
    group.command("end")(end)
    app.add_typer(group, name="task")


def open_(
    purpose: Purpose,
    *,
    description: Annotated[
        str | None, typer.Option("--description", help="For readers of the audit.")
    ] = None,
    resource: Annotated[
        list[str] | None, typer.Option("--resource", help="Only this resource; repeat for more.")
    ] = None,
    action: Annotated[
        list[str] | None, typer.Option("--action", help="Only this action; repeat for more.")
    ] = None,
    classification_max: Annotated[
        str | None, typer.Option("--classification-max", help="public, internal, confidential or restricted.")
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="Credentials at most.")] = None,
    deadline: Annotated[
        int | None, typer.Option("--deadline", min=1, help="Seconds until the broker ends it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Open a task and print its id, which ends with nhi task end or at its deadline."""
    with Broker.from_env() as broker:
        task = broker.open_task(
            purpose,
            description=description,
            resources=resource or None,
            actions=action or None,
            classification_max=classification_max,
            budget_leases=budget,
            deadline_seconds=deadline,
        )
    if as_json:
        print_json(task.view)
    else:
        sys.stdout.write(task.task_id + "\n")


def show(task: TaskId, *, as_json: Json = False) -> None:
    """Show a task."""
    with Broker.from_env() as broker:
        view = broker.read_task(task)
    if as_json:
        print_json(view)
    else:
        print_fields(_fields(view))


def _fields(view: Task) -> dict[str, object]:
    return {
        "task": view.task_id,
        "state": view.state if view.end_cause is None else f"{view.state} ({view.end_cause})",
        "purpose": view.purpose,
        "description": view.description,
        "resources": view.resources,
        "actions": view.actions,
        "classification": view.classification_max,
        "credentials": f"{view.leases_issued} of {view.budget_leases}",
        "opened": view.opened_at,
        "deadline": view.deadline_at,
        "ended": view.ended_at,
    }


def end(
    task: TaskId,
    *,
    reason: Annotated[str | None, typer.Option("--reason", help="Kept with the audit record.")] = None,
    wait: Wait = 5,
    as_json: Json = False,
) -> None:
    """End a task and wait for proof that each of its credentials is dead. Doing it again is harmless."""
    with Broker.from_env() as broker:
        ended = broker.end_task(task, reason=reason, wait=wait)
    if as_json:
        print_json({"task": ended.task, "leases": ended.leases, "proven": ended.proven})
    else:
        print_leases(ended.leases)
    if not ended.proven:
        say(f"{len(ended.unproven)} not proven dead yet; the broker goes on, ask again")
        raise typer.Exit(ExitCode.NOT_PROVEN)
