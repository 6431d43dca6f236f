"""Client commands about credentials: request, revoke, catalog, whoami."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from nhi_sdk.broker import Broker
from nhi_sdk.cli.output import ExitCode, cell, fail, plain, print_fields, print_json, print_rows
from nhi_sdk.environment import Environment
from nhi_sdk.errors import NhiError
from nhi_sdk.svid import unverified_claims

if TYPE_CHECKING:
    from nhi_sdk.models import Credential, Lease

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Purpose = Annotated[
    str, typer.Option("--purpose", help="What the task is for: a word the broker's catalog registers.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why it is needed; kept with the audit record.")]
Wait = Annotated[
    int, typer.Option("--wait", min=0, max=30, help="Seconds to wait for proof that the credential is dead.")
]

_NOT_A_WORD: Final = re.compile(r"[^A-Za-z0-9._:/-]+")


@dataclass(frozen=True, slots=True)
class Wanted:
    """RESOURCE:ACTION as given on the command line."""

    resource: str
    action: str

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Return what is asked for; leaves the process with a usage error where it cannot be read."""
        resource, _, action = text.rpartition(":")
        if not resource or not action:
            fail(f"{text!r} does not look like RESOURCE:ACTION, e.g. orders-db:read", ExitCode.USAGE)
        return cls(resource, action)


def tool_name(text: str) -> str:
    """Return a program's name as a word the broker takes for a tool."""
    return _NOT_A_WORD.sub("-", text).strip("-._:/")[:128] or "command"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("request")(request)
    app.command("revoke")(revoke)
    app.command("catalog")(catalog)
    app.command("whoami")(whoami)


def request(
    what: Annotated[str, typer.Argument(metavar="RESOURCE:ACTION", help="E.g. orders-db:read.")],
    *,
    reason: Reason,
    purpose: Annotated[
        str | None, typer.Option("--purpose", help="Open a task of its own with this purpose.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Ask under this open task.")] = None,
    tool: Annotated[str, typer.Option("--tool", help="The tool that will use it.")] = "nhi.request",
    ttl: Annotated[int | None, typer.Option("--ttl", min=1, help="Seconds it should live.")] = None,
    show_secret: Annotated[bool, typer.Option("--show-secret", help="Print the secret, too.")] = False,
    as_json: Json = False,
) -> None:
    """Get a credential. The secret is printed only with --show-secret or --json.

    It lives until its TTL is over or its task ends: nhi task end TASK.
    To use one without ever seeing it, prefer nhi exec.
    """
    wanted = Wanted.parse(what)
    if (purpose is None) == (task is None):
        fail("give either --purpose, for a task of its own, or --task with an open one", ExitCode.USAGE)
    with Broker.from_env() as broker:
        issued = broker.request(
            wanted.resource,
            wanted.action,
            task=task,
            purpose=purpose,
            tool=tool_name(tool),
            reason=reason,
            ttl_seconds=ttl,
        )
    if as_json:
        print_json(_as_sent(issued))
        return
    fields: dict[str, object] = {
        "lease": issued.lease_id,
        "task": issued.task_id,
        "for": f"{issued.resource}:{issued.action}",
        "expires": issued.expires_at,
        "revocability": issued.revocability,
        "allowed by": issued.decision.policy_ids,
        "decision": issued.decision.id,
    }
    if show_secret:
        fields.update(plain(issued.secret))
    print_fields(fields)


def _as_sent(issued: Credential) -> dict[str, Any]:
    document = plain(issued)
    document["credential"] = document.pop("secret")
    result: dict[str, Any] = document
    return result


def revoke(
    lease: Annotated[str, typer.Argument(metavar="LEASE", help="lse_…")],
    *,
    reason: Annotated[str | None, typer.Option("--reason", help="Kept with the audit record.")] = None,
    wait: Wait = 5,
    as_json: Json = False,
) -> None:
    """Revoke one credential and wait for proof that it is dead. Doing it again is harmless."""
    with Broker.from_env() as broker:
        view = broker.revoke(lease, reason=reason, wait=wait)
    if as_json:
        print_json(view)
    else:
        print_leases((view,))
    if not view.proven_dead:
        raise typer.Exit(ExitCode.NOT_PROVEN)


def print_leases(leases: tuple[Lease, ...]) -> None:
    """Print leases with what is known of their end."""
    columns = ("LEASE", "FOR", "STATE", "ENDED", "EVIDENCE")
    rows = [
        (
            one.lease_id,
            f"{one.resource}:{one.action}",
            f"{one.state} (stuck)" if one.stuck else one.state,
            one.ended_at,
            one.evidence,
        )
        for one in leases
    ]
    print_rows(columns, rows)


def catalog(*, as_json: Json = False) -> None:
    """List what you may ask for."""
    with Broker.from_env() as broker:
        items = broker.catalog()
    if as_json:
        print_json(items)
        return
    columns = ("ASK FOR", "TITLE", "CLASSIFICATION", "ENVIRONMENT", "OWNER", "TTL", "ENDS")
    rows = [
        (
            f"{one.resource}:{one.action}",
            one.title,
            one.classification,
            one.environment,
            one.owner,
            f"{cell(one.ttl_seconds_default)}/{cell(one.ttl_seconds_max)} s",
            one.revocability,
        )
        for one in items
    ]
    print_rows(columns, rows)


def whoami(*, as_json: Json = False) -> None:
    """Show which SVID this process would present, and whether the broker accepts it."""
    environment = Environment.read()
    sources = environment.sources()
    fields: dict[str, object] = {"broker": environment.broker_url}
    svid = sources["svid"]
    if svid is not None:
        claims = unverified_claims(svid.token(environment.audience or ""))
        fields["identity"] = str(claims.get("sub"))
        fields["audience"] = claims.get("aud")
        fields["token_expires_unix"] = claims.get("exp")
    fields["svid_from"] = environment.token_file or environment.socket
    fields["trust_from"] = environment.ca_file or environment.socket
    fields["mutual_tls"] = environment.mtls
    refused: NhiError | None = None
    with Broker(environment.broker_url, **sources) as broker:
        try:
            fields["may_ask_for"] = len(broker.catalog())
        except NhiError as error:
            refused = error
    fields["accepted"] = refused is None
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)
    if refused is not None:
        raise refused
