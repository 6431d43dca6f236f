"""`nhi demo`: one credential's whole life, told so that a newcomer can follow, with real parts.

What the agent held is kept on purpose, as a thief would, and tried again after the end.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import httpx
import psycopg

from broker.dev.demo_agent import agent
from broker.dev.environment import BROKER_ID, DevEnvironment
from broker.dev.reports_api import ReportsApi
from inventory.audit.heads import HeadCopy
from inventory.audit.public_keys import PublicKeys
from inventory.audit.verify import verify_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from inventory.audit.report import VerificationReport
    from nhi_sdk import Credential, Denied, OpenTask, TaskEnd

AGENT_ID: Final = "spiffe://dev.nhi.internal/agent/churn-report"
MS: Final = 1000


class DemoFailed(Exception):
    """A step of the story did not hold; the message says which."""


@dataclass(slots=True)
class Run:
    """What happened, as ``nhi demo --json`` prints it."""

    lease_ids: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)
    refused: dict[str, Any] = field(default_factory=dict)
    after_the_end: dict[str, bool] = field(default_factory=dict)
    evidence: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every step held."""
        return (
            bool(self.after_the_end) and all(self.after_the_end.values()) and self.audit.get("intact") is True
        )

    def as_json(self) -> dict[str, Any]:
        """Return the object printed."""
        return {
            "ok": self.ok,
            "lease_ids": self.lease_ids,
            "milliseconds": {name: round(value, 1) for name, value in self.milliseconds.items()},
            "rows": self.rows,
            "refused": self.refused,
            "after_the_end": self.after_the_end,
            "evidence": self.evidence,
            "audit": self.audit,
        }


class Narrator:
    """Tells the story line by line; a silent one tells nothing."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        self._write = write

    def chapter(self, title: str) -> None:
        """Begin a part of the story."""
        self._say(f"\n[bold]{title}[/bold]")

    def step(self, text: str, took_ms: float | None = None) -> None:
        """Tell one step, with the time it took."""
        timing = "" if took_ms is None else f" [dim]({took_ms:,.0f} ms)[/dim]"
        self._say(f"  [green]✓[/green] {text}{timing}")

    def note(self, text: str) -> None:
        """Add what a reader should know."""
        self._say(f"    [dim]{text}[/dim]")

    def _say(self, line: str) -> None:
        if self._write is not None:
            self._write(line)


class _Stopwatch:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        now = time.perf_counter()
        took, self._last = (now - self._last) * MS, now
        return took


async def run_demo(narrator: Narrator) -> Run:
    """Run the story once, from nothing to nothing.

    Raises:
        DemoFailed: a step that must hold did not.

    """
    run, watch = Run(), _Stopwatch()
    narrator.chapter("Starting real parts on this machine")
    async with DevEnvironment() as environment, ReportsApi(environment) as reports:
        run.milliseconds["start"] = watch.lap_ms()
        narrator.step(
            "a PostgreSQL server, a SPIFFE trust domain with Workload API sockets, a broker on SQLite, "
            "an internal tool",
            run.milliseconds["start"],
        )
        authorities = environment.trust_domain.x509_bundle()
        context = ssl.create_default_context(cadata=authorities)
        environ = environment.agent_environment(AGENT_ID)
        with httpx.Client(base_url=reports.url, verify=context) as client:
            story = _Story(run, narrator, client)
            await asyncio.to_thread(story.live_through, agent(environ, client))
            await asyncio.to_thread(story.try_everything_again)
        await environment.broker.stop()
        report = await asyncio.to_thread(_verify_audit, environment)
        run.audit = {
            "intact": report.intact,
            "records": report.records,
            "heads_checked": report.heads_checked,
            "findings": [str(finding) for finding in report.findings],
        }
        narrator.chapter("The record")
        narrator.step(
            f"{report.records} audit records, {report.heads_checked} signed heads: the chain is unbroken"
        )
    if not run.ok:
        raise DemoFailed(f"not every step held: {run.after_the_end}, audit {run.audit}")
    return run


class _Story:
    """The agent's run, then the thief's."""

    def __init__(self, run: Run, narrator: Narrator, client: httpx.Client) -> None:
        self._run = run
        self._narrator = narrator
        self._client = client
        self._login: Credential
        self._token: Credential
        self._session: psycopg.Connection[Any]

    def live_through(self, steps: Iterator[tuple[str, Any]]) -> None:
        """Follow the agent step by step."""
        self._narrator.chapter(f"An agent works: {AGENT_ID}")
        watch = _Stopwatch()
        for name, brought in steps:
            took_ms = watch.lap_ms()
            tell = getattr(self, f"_on_{name}")
            tell(brought, took_ms)
            watch.lap_ms()

    def _on_task(self, task: OpenTask, took_ms: float) -> None:
        self._narrator.step(
            f"proved who it is with its SVID and opened task {task.task_id} for churn-report", took_ms
        )

    def _on_credential(self, orders: Credential, took_ms: float) -> None:
        self._login = orders
        self._run.lease_ids.append(orders.lease_id)
        self._run.milliseconds["request"] = took_ms
        self._narrator.step(f"asked to read orders-db and got login {orders.login.username}", took_ms)
        self._narrator.note(f"allowed by {', '.join(orders.decision.policy_ids)}")

    def _on_rows(
        self, brought: tuple[psycopg.Connection[Any], list[tuple[Any, ...]]], took_ms: float
    ) -> None:
        self._session, rows = brought
        self._run.rows = [list(row) for row in rows]
        self._run.milliseconds["first_use"] = took_ms
        figures = ", ".join(f"{plan}: {churned} of {all_} left" for plan, churned, all_ in rows)
        self._narrator.step(f"queried real rows with it: {figures}", took_ms)

    def _on_token(self, token: Credential, took_ms: float) -> None:
        self._token = token
        self._run.lease_ids.append(token.lease_id)
        self._run.milliseconds["token_request"] = took_ms
        self._narrator.step("got a token for the reports tool", took_ms)

    def _on_published(self, answer: httpx.Response, took_ms: float) -> None:
        if answer.status_code != httpx.codes.CREATED:
            raise DemoFailed(f"the reports tool refused a live token: {answer.status_code}")
        self._narrator.step(
            "published the report; the tool asked the broker, which vouched for the token", took_ms
        )

    def _on_refused(self, refused: Denied, _took_ms: float) -> None:
        self._run.refused = {"detail": refused.reason, "policy_ids": list(refused.policy_ids)}
        self._narrator.step("was talked into copying the data to a drop box outside, and was refused:")
        self._narrator.note(refused.reason)

    def _on_ended(self, end: TaskEnd, took_ms: float) -> None:
        self._run.milliseconds["task_end_to_proven_dead"] = took_ms
        self._run.evidence = [
            {"lease_id": lease.lease_id, "state": lease.state, "evidence": dict(lease.evidence or {})}
            for lease in end.leases
        ]
        self._run.after_the_end["every_lease_proven_dead"] = end.proven
        self._narrator.chapter("The task ends, and everything issued under it")
        self._narrator.step(f"{len(end.leases)} credentials revoked and proven dead", took_ms)
        for lease in end.leases:
            shown = ", ".join(f"{key}={value}" for key, value in (lease.evidence or {}).items())
            self._narrator.note(f"{lease.resource}: {lease.state}; {shown}")

    def try_everything_again(self) -> None:
        """Use each thing the agent held, as a thief would who copied it."""
        self._narrator.chapter("A thief copied everything the agent held. What still works?")
        outcomes = {
            "the database login": ("login_refused", self._login_is_refused()),
            "the session opened before the end": ("session_cut", self._session_is_cut()),
            "the token": ("token_refused", self._token_is_refused()),
        }
        for what, (name, dead) in outcomes.items():
            self._run.after_the_end[name] = dead
            if not dead:
                raise DemoFailed(f"{what} still works after the task ended")
            self._narrator.step(f"{what}: dead")

    def _login_is_refused(self) -> bool:
        try:
            psycopg.connect(self._login.conninfo(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return True
        return False

    def _session_is_cut(self) -> bool:
        try:
            self._session.execute("SELECT 1")
        except psycopg.Error:
            return True
        return False

    def _token_is_refused(self) -> bool:
        answer = self._client.post("/reports", json={"title": "again"}, auth=self._token.httpx_auth())
        return answer.status_code == httpx.codes.UNAUTHORIZED


def _verify_audit(environment: DevEnvironment) -> VerificationReport:
    services = environment.broker.services
    if services is None:
        raise DemoFailed("the broker did not start")
    ctx = services.ctx
    public = PublicKeys(str(ctx.store.instance), dict(ctx.keys.audit_keys()))
    copy = HeadCopy(environment.settings.audit.copy_directory)
    return verify_database(environment.settings.ledger.path, public, copy.read_all())


__all__ = ["AGENT_ID", "BROKER_ID", "DemoFailed", "Narrator", "Run", "run_demo"]
