"""`make bench`: every figure of the README, measured on this machine."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks.measure import Figure, cpu_seconds, percentile, report, resident_mib_max
from broker.dev.broker_child import BrokerChild
from broker.dev.environment import DevParts, write_settings
from broker.settings import Limits
from nhi_sdk import AsyncBroker

if TYPE_CHECKING:
    from broker.settings import Settings
    from nhi_sdk import Credential

AGENT = "spiffe://dev.nhi.internal/agent/churn-report"
CONNECTIONS = 16
SECONDS = 5
ROUNDS = 3
TASK_ENDS = 20
LEASES = 100
POSTGRES_ROUNDS = 4
NO_LIMITS = Limits(
    requests_per_second=1_000_000,
    request_burst=1_000_000,
    concurrent_per_identity=1000,
    concurrent_total=2000,
)
# A stored verifier is all the server sees of a password, so any well-formed one costs the same.
BARE_VERIFIER = f"SCRAM-SHA-256$4096:{'A' * 22}==${'A' * 43}=:{'A' * 43}="


@dataclass
class Bench:
    """The parts and the broker under measurement."""

    parts: DevParts
    child: BrokerChild
    settings: Settings
    figures: list[Figure]

    def add(
        self,
        name: str,
        figure: float,
        unit: str,
        goal: str,
        *,
        met: bool,
        peer: str = "",
        ratio: float | None = None,
    ) -> None:
        """Record one figure and print it as it comes."""
        self.figures.append(Figure(name, round(figure, 2), unit, goal, met, peer, ratio))
        print(f"  {name}: {figure:,.1f} {unit}", flush=True)


async def issue_tokens(bench: Bench) -> None:
    """Audited token issue end to end over HTTPS, JWT-SVID, closed loop."""
    svid = bench.parts.trust_domain.issue_jwt_svid(AGENT, bench.settings.identity.audience, 3000)
    body = {"resource": "reports-api", "action": "write", "intent": {"tool": "bench", "reason": "speed"}}
    rounds: list[dict[str, Any]] = []
    async with AsyncBroker.from_env(bench.parts.agent_environment(AGENT)) as broker:
        for round_ in range(ROUNDS + 1):
            tasks = [
                await broker.open_task("churn-report", budget_leases=1000) for _ in range(CONNECTIONS * 2)
            ]
            requests = [_request(bench, svid, {**body, "task": task.task_id}) for task in tasks]
            plan = {
                "port": bench.settings.workload.port,
                "seconds": 1 if round_ == 0 else SECONDS,
                "authorities": ssl.DER_cert_to_PEM_cert(bench.parts.trust_domain.x509_bundle()),
                "connections": [requests[n::CONNECTIONS] for n in range(CONNECTIONS)],
            }
            before = cpu_seconds(bench.child.pid)
            result = await _load(plan)
            result["cpu_us"] = (
                (cpu_seconds(bench.child.pid) - before) / max(1, len(result["latencies"])) * 1e6
            )
            for task in tasks:
                await task.end(wait=0)
            if round_:  # the first one only warms up
                rounds.append(result)
    # The median round: the best one would flatter, and nobody is served by the best one.
    median = sorted(rounds, key=lambda one: len(one["latencies"]))[len(rounds) // 2]
    if median["failures"]:
        print(f"  {median['failures']} answers were not 201: {median['first_failure']}")
    rate = len(median["latencies"]) / median["seconds"]
    p99_ms = percentile(median["latencies"], 0.99) * 1000
    bench.add(
        "token issue, 16 connections, median of 3 rounds", rate, "/s", "at least 3,000", met=rate >= 3000
    )
    bench.add("token issue p99", p99_ms, "ms", "at most 10", met=p99_ms <= 10)
    bench.add("token issue, broker CPU", median["cpu_us"], "us", "shown", met=True)
    memory = resident_mib_max(bench.child.pid)
    bench.add("broker memory, largest", memory, "MiB", "at most 160", met=memory <= 160)


def _request(bench: Bench, svid: str, body: dict[str, Any]) -> str:
    content = json.dumps(body)
    return (
        f"POST /credentials/request HTTP/1.1\r\nHost: localhost:{bench.settings.workload.port}\r\n"
        f"Authorization: Bearer {svid}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}"
    )


async def _load(plan: dict[str, Any]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate(json.dumps(plan).encode())
    result: dict[str, Any] = json.loads(output)
    return result


async def end_tasks(bench: Bench, resource: str, action: str, *, goal_ms: float, sessions: bool) -> None:
    """Task end to the proven death of the last of its 100 leases."""
    took: list[float] = []
    rounds = TASK_ENDS if not sessions else TASK_ENDS // 2
    cpu = 0.0
    async with AsyncBroker.from_env(bench.parts.agent_environment(AGENT)) as broker:
        for _ in range(rounds):
            task = await broker.open_task("churn-report", budget_leases=LEASES)
            issued = []
            for _ in range(LEASES // 10):
                issued += await asyncio.gather(
                    *(task.request(resource, action, tool="bench", reason="speed") for _ in range(10))
                )
            opened = []
            if sessions:
                opened = [await asyncpg.connect(**_login(one), ssl=False) for one in issued]
            before = cpu_seconds(bench.child.pid)
            started = time.perf_counter()
            end = await task.end(wait=20)
            took.append((time.perf_counter() - started) * 1000)
            cpu += cpu_seconds(bench.child.pid) - before
            if not end.proven:
                print(f"  not proven in time: {[lease.state for lease in end.unproven][:5]}")
            for connection in opened:
                connection.terminate()
    p99 = percentile(took, 0.99)
    kind = "PostgreSQL leases with live sessions" if sessions else "tokens"
    bench.add(f"task end to proof, 100 {kind}, p99", p99, "ms", f"at most {goal_ms:g}", met=p99 <= goal_ms)
    bench.add(f"task end, 100 {kind}, p50", percentile(took, 0.5), "ms", "shown", met=True)
    bench.add(
        f"task end, 100 {kind}, broker CPU per lease", cpu / rounds / LEASES * 1e6, "us", "shown", met=True
    )


def _login(issued: Credential) -> dict[str, Any]:
    login = issued.login
    return {
        "host": login.host, "port": login.port, "database": login.database,
        "user": login.username, "password": login.password,
    }  # fmt: skip


async def postgres_lease(bench: Bench) -> None:
    """A PostgreSQL lease over one kept-alive connection beside the bare mint transaction, in turns."""
    svid = bench.parts.trust_domain.issue_jwt_svid(AGENT, bench.settings.identity.audience, 3000)
    body = {"resource": "orders-db", "action": "read", "intent": {"tool": "bench", "reason": "speed"}}
    admin = await bench.parts.postgres.connect()
    bare: list[float] = []
    leased: list[float] = []
    cpu = 0.0
    async with AsyncBroker.from_env(bench.parts.agent_environment(AGENT)) as broker:
        for _ in range(POSTGRES_ROUNDS):
            task = await broker.open_task("churn-report", budget_leases=1000)
            bare += [await _bare_mint(admin, number) for number in range(len(bare), len(bare) + 50)]
            plan = {
                "port": bench.settings.workload.port,
                "seconds": 1,
                "authorities": ssl.DER_cert_to_PEM_cert(bench.parts.trust_domain.x509_bundle()),
                "connections": [[_request(bench, svid, {**body, "task": task.task_id})]],
            }
            before = cpu_seconds(bench.child.pid)
            result = await _load(plan)
            cpu += (cpu_seconds(bench.child.pid) - before) / max(1, len(result["latencies"])) * 1e6
            leased += [seconds * 1000 for seconds in result["latencies"]]
            await task.end(wait=20)
    for number in range(len(bare)):
        await admin.execute(f"DROP ROLE bare_{number}")
    await admin.close()
    p50, peer = percentile(leased, 0.5), percentile(bare, 0.5)
    ratio = p50 / peer
    bench.add(
        "PostgreSQL lease p50", p50, "ms", "at most 1.3 x the bare mint", met=ratio <= 1.3,
        peer=f"bare mint {peer:.1f} ms", ratio=round(ratio, 2),
    )  # fmt: skip
    bench.add("PostgreSQL lease, broker CPU", cpu / POSTGRES_ROUNDS, "us", "shown", met=True)


async def _bare_mint(admin: asyncpg.Connection[asyncpg.Record], number: int) -> float:
    started = time.perf_counter()
    async with admin.transaction():
        await admin.execute(
            f"CREATE ROLE bare_{number} LOGIN CONNECTION LIMIT 2 PASSWORD '{BARE_VERIFIER}' "
            "VALID UNTIL '2099-01-01' IN ROLE orders_reader"
        )
        await admin.execute(f"COMMENT ON ROLE bare_{number} IS 'lse_bare'")
    return (time.perf_counter() - started) * 1000


async def main() -> int:
    """Measure everything; exit 1 where a goal is missed."""
    async with DevParts(durable=True) as parts:
        settings = parts.settings.model_copy(update={"limits": NO_LIMITS})
        config = parts.directory / "bench.toml"
        write_settings(settings, config)
        child = BrokerChild(settings, config, parts.directory / "broker.log")
        await child.start()
        bench = Bench(parts, child, settings, [])
        try:
            await issue_tokens(bench)
            await end_tasks(bench, "reports-api", "write", goal_ms=50, sessions=False)
            await end_tasks(bench, "orders-db", "read", goal_ms=250, sessions=True)
            await postgres_lease(bench)
        finally:
            await child.stop()
    print()
    report(bench.figures)
    return 0 if all(figure.met for figure in bench.figures) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
