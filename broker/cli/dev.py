"""``nhi dev``: everything on one machine, kept running, with what an agent needs printed."""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import ssl
import sys
from pathlib import Path  # noqa: TC003  Typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated, Final, Self

import typer

from nhi_sdk.cli.output import ExitCode, fail, say

if TYPE_CHECKING:
    from broker.dev.environment import DevEnvironment

AGENT_DEFAULT: Final = "spiffe://dev.nhi.internal/agent/churn-report"
PORT_DEFAULT: Final = 8443
REFRESH_SECONDS: Final = 60.0
"""A development JWT-SVID lives five minutes: the one in the header file is never older than one."""

_TRY: Final = {
    "task": {"purpose": "churn-report"},
    "resource": "orders-db",
    "action": "read",
    "intent": {"tool": "curl", "reason": "trying it out"},
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("dev")(dev)


def dev(
    *,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", help="Where ledger, keys and data live [default: ~/.local/state/nhi-broker]."
        ),
    ] = None,
    temporary: Annotated[
        bool, typer.Option("--temporary", help="Use a new directory and delete it at the end.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where agents connect; 0 takes a free one.")
    ] = PORT_DEFAULT,
    as_: Annotated[
        str, typer.Option("--as", metavar="SPIFFE_ID", help="The agent to print variables for.")
    ] = AGENT_DEFAULT,
) -> None:
    """Start a broker with an embedded trust domain and a PostgreSQL target, and keep them running.

    Ctrl-C stops everything; what was issued is revoked when it starts again, or dies with its database.
    """
    if temporary and state is not None:
        fail("--temporary and --state exclude each other", ExitCode.USAGE)
    from broker.cli.development import PartsFailedError, parts_explained  # noqa: PLC0415  heavy: see the package

    try:
        with parts_explained():
            from broker.dev.environment import default_state_directory  # noqa: PLC0415  heavy: see the package

            directory = None if temporary else (state or default_state_directory())
            asyncio.run(_dev(directory, port, as_))
    except PartsFailedError as error:
        fail(str(error), ExitCode.FAILED)


async def _dev(directory: Path | None, port: int, agent: str) -> None:
    from broker.cli.interruptible import until_signalled  # noqa: PLC0415  heavy: see the package

    signalled = asyncio.ensure_future(until_signalled())
    running = asyncio.ensure_future(_stay(directory, port, agent))
    try:
        await asyncio.wait({signalled, running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if signalled.done():
            say("stopping")
        signalled.cancel()
        running.cancel()
        await asyncio.wait({running})
    if not running.cancelled():
        running.result()


async def _stay(directory: Path | None, port: int, agent: str) -> None:
    from broker.api.logs import configure_logging  # noqa: PLC0415  heavy: see the package
    from broker.dev.environment import DevEnvironment  # noqa: PLC0415  same

    _check_known(agent)
    say("starting a trust domain, a PostgreSQL server and a broker ...")
    access_log = configure_logging(level="WARNING")
    async with DevEnvironment(directory, workload_port=port, access_log=access_log) as environment:
        with AgentFiles(environment, agent) as files:
            sys.stdout.write(_instructions(environment, agent, files))
            sys.stdout.flush()
            while True:  # ends when it is cancelled
                await asyncio.sleep(REFRESH_SECONDS)
                files.refresh()


def _check_known(agent: str) -> None:
    """Leave with the identities there are, where the one asked for is none of them."""
    from broker.dev.environment import POLICIES  # noqa: PLC0415  heavy: see the package
    from broker.dev.trust_domain import TRUST_DOMAIN_DEFAULT  # noqa: PLC0415  same
    from broker.policy.registrations import Registrations  # noqa: PLC0415  same

    known = [one.spiffe_id for one in Registrations.load(POLICIES / "identities.yaml")]
    ours = sorted(one for one in known if one.trust_domain == TRUST_DOMAIN_DEFAULT)
    if agent not in ours:
        fail(f"--as {agent}: there is no such identity here; there are: {', '.join(ours)}", ExitCode.USAGE)


class AgentFiles:
    """What a plain ``curl`` needs in place of the SDK: a header with a fresh SVID, and the authorities.

    The header is in a file and not on the command line, where every user of the machine could read it.
    """

    def __init__(self, environment: DevEnvironment, agent: str) -> None:
        self._environment = environment
        self._agent = agent
        self._directory = environment.directory / "agent"
        self.header = self._directory / "authorization.header"
        self.authorities = self._directory / "ca.pem"

    def __enter__(self) -> Self:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.header.unlink(missing_ok=True)
        self.authorities.unlink(missing_ok=True)

    def refresh(self) -> None:
        """Write both anew; a reader sees the old or the new, never half of one."""
        domain = self._environment.trust_domain
        token = domain.issue_jwt_svid(self._agent, self._environment.settings.identity.audience)
        _replace(self.header, f"Authorization: Bearer {token}\n")
        _replace(self.authorities, _pem(domain.bundle_json()))


def _pem(bundle: bytes) -> str:
    """Return the X.509 authorities of a SPIFFE bundle document as PEM."""
    keys = json.loads(bundle)["keys"]
    chains = [key["x5c"] for key in keys if key["use"] == "x509-svid"]
    return "".join(ssl.DER_cert_to_PEM_cert(base64.b64decode(chain[0])) for chain in chains)


def _replace(path: Path, content: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.touch(mode=0o600)
    fresh.write_text(content, encoding="ascii")
    fresh.replace(path)


def _instructions(environment: DevEnvironment, agent: str, files: AgentFiles) -> str:
    variables = environment.agent_environment(agent)
    curl = f"curl --cacert {_quoted(files.authorities)} --header {_quoted(f'@{files.header}')}"
    url = environment.broker_url
    body = shlex.quote(json.dumps(_TRY))
    lines = [
        f"# Ready. State: {environment.directory}. Ctrl-C stops everything.",
        f"# In another terminal, to be the agent {agent}:",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "# For the operator's commands (nhi status, nhi leases list, nhi kill ...):",
        f"export NHI_OPERATOR_SOCKET={_quoted(environment.operator_socket)}",
        "# Then: nhi whoami; nhi catalog; nhi doctor. What this agent may ask for, without the SDK:",
        f"{curl} {url}/catalog",
    ]
    if agent == AGENT_DEFAULT:
        lines += [
            "# A real credential, under a task of its own:",
            f"{curl} --header 'Content-Type: application/json' --data {body} {url}/credentials/request",
        ]
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    return shlex.quote(str(value))
