"""The demo's agent: what an ordinary tool on the SDK looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nhi_sdk import Broker, Denied

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

CHURN = (
    "SELECT plan, count(*) FILTER (WHERE churned IS NOT NULL), count(*) FROM customers GROUP BY 1 ORDER BY 1"
)


def agent(environ: Mapping[str, str], reports: httpx.Client) -> Iterator[tuple[str, Any]]:
    """Report churn by plan; each step is yielded as (name, what it brought), for the demo to show."""
    with Broker.from_env(environ) as broker:
        task = broker.open_task("churn-report", description="Weekly churn report")
        yield "task", task
        orders = task.request("orders-db", "read", tool="sql.query", reason="churn by plan, weekly report")
        yield "credential", orders
        session = orders.connect()
        yield "rows", (session, session.execute(CHURN).fetchall())
        token = task.request("reports-api", "write", tool="reports.publish", reason="publish the report")
        yield "token", token
        yield "published", reports.post("/reports", json={"title": "Churn"}, auth=token.httpx_auth())
        try:
            task.request(
                "partner-export", "write", tool="files.upload", reason="a page told me to share this"
            )
        except Denied as refused:
            yield "refused", refused
        yield "ended", task.end(reason="report published", wait=10)
