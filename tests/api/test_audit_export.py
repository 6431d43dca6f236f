from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from broker.api import operator as operator_module
from broker.api import schemas
from broker.api.protocol import UNIX_PEER
from broker.core.errors import Overloaded
from broker.service import audit_export
from broker.service.audit_export import EXPORTS_MAX, ExportOrder
from inventory.audit.public_keys import parse_public_keys
from inventory.audit.verify import verify_export
from tests.support.api import ROOT, Api
from tests.support.world import CHURN, SUPPORT

if TYPE_CHECKING:
    import sqlite3
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from inventory.audit.report import VerificationReport

ORDER = ExportOrder(actor="operator:uid=0")


async def some_history(api: Api) -> tuple[str, str]:
    """Two callers' tasks and leases; returns one task's id and one lease's."""
    task = await api.world.open_task(description="churn by plan")
    issued = await api.world.ask(task, "reports-api", "write", reason="weekly report")
    await api.world.open_task(SUPPORT, purpose="support-ticket", budget_leases=5)
    await api.world.end(task)
    return task.id, issued.lease.id


async def export(api: Api, **query: str) -> bytes:
    async with api.operator() as client:
        answer = await client.get("/audit/export", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/jsonl"
    return answer.content


async def verified(api: Api, exported: bytes, tmp_path: Path) -> VerificationReport:
    async with api.operator() as client:
        keys = (await client.get("/audit/keys")).content
    path = tmp_path / "export.jsonl"
    path.write_bytes(exported)
    return verify_export(path, parse_public_keys(orjson.loads(keys)))


def records(exported: bytes) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in exported.splitlines()]
    return [orjson.loads(line["body"])["event"] for line in lines if line["type"] == "record"]


@pytest.mark.parametrize("texts", ["false", "true"])
async def test_a_whole_export_verifies_with_public_keys_alone(api: Api, tmp_path: Path, texts: str) -> None:
    await some_history(api)
    exported = await export(api, texts=texts)
    report = await verified(api, exported, tmp_path)
    assert report.findings == ()
    assert report.complete
    assert report.records == report.records_anchored == len(records(exported)) > 5
    assert (b"weekly report" in exported) == (texts == "true")


async def test_an_export_is_audited_before_its_first_byte_and_holds_its_own_record(api: Api) -> None:
    exported = await export(api, texts="true")
    last = records(exported)[-1]
    assert (last["kind"], last["actor"]) == ("audit.exported", "operator:uid=0")
    assert last["fields"] == {"filter": {}, "texts": True}


async def test_what_cannot_be_audited_is_not_exported(api: Api) -> None:
    await api.world.store.writer.close()
    async with api.operator() as client:
        answer = await client.get("/audit/export")
    assert answer.status_code == 503
    assert schemas.Problem.model_validate_json(answer.content).type.endswith(":ledger-unavailable")
    assert api.world.services.exports.running == 0


async def test_filters_narrow_and_are_audited(api: Api, tmp_path: Path) -> None:
    task_id, lease_id = await some_history(api)
    by_task = await export(api, task=task_id)
    by_lease = await export(api, lease=lease_id)
    by_identity = await export(api, identity=SUPPORT)
    assert {event["task_id"] for event in records(by_task)} == {task_id}
    assert {event["lease_id"] for event in records(by_lease)} == {lease_id}
    assert {event["identity"] for event in records(by_identity)} == {SUPPORT}
    assert CHURN.encode() not in by_identity
    for exported in (by_task, by_lease, by_identity):
        assert (await verified(api, exported, tmp_path)).findings == ()
    filters = [event["fields"]["filter"] for event in api.audited("audit.exported")]
    assert filters == [{"task_id": task_id}, {"lease_id": lease_id}, {"identity": SUPPORT}]


async def test_a_period_begins_at_its_first_time_and_ends_before_its_second(api: Api) -> None:
    await some_history(api)
    api.world.clock.advance(seconds=60)
    await api.world.open_task()
    api.world.clock.advance(seconds=60)
    start = "2023-11-14T22:14:20.000Z"  # one minute into the manual clock's time
    end = "2023-11-14T22:15:20.000Z"
    only = records(await export(api, **{"from": start, "to": end}))
    assert {event["at_ms"] for event in only} == {1_700_000_060_000}
    assert records(await export(api, to="2023-11-14T22:13:20.000Z")) == []


async def test_the_log_is_read_in_pages_and_sent_in_chunks_of_whole_lines(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_history(api)
    monkeypatch.setattr(audit_export, "CHUNK_BYTES", 1)
    async with api.world.services.exports.open(ORDER) as chunks:
        taken = [chunk async for chunk in chunks]
    assert all(chunk.count(b"\n") == 1 and chunk.endswith(b"\n") for chunk in taken)
    assert orjson.loads(taken[-1]) == {"records": len(taken) - 3, "type": "end"}


async def test_what_is_written_meanwhile_is_not_part_of_the_export(
    api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(audit_export, "CHUNK_BYTES", 1)
    async with api.world.services.exports.open(ORDER) as chunks:
        taken = [await anext(chunks)]
        await some_history(api)
        taken += [chunk async for chunk in chunks]
    assert [event["kind"] for event in records(b"".join(taken))] == ["audit.exported"]
    assert (await verified(api, b"".join(taken), tmp_path)).findings == ()


async def test_a_reader_that_stands_still_holds_up_no_checkpoint(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_export, "CHUNK_BYTES", 1)
    await some_history(api)
    async with api.world.services.exports.open(ORDER) as chunks:
        for _ in range(4):
            await anext(chunks)
        await api.world.open_task()
        with_reader = api.world.store.open_reader()
        with_reader.execute("PRAGMA query_only=OFF")
        busy, log, done = with_reader.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        with_reader.close()
    assert (busy, log, done) == (0, 0, 0)


async def test_so_many_exports_run_at_once_and_no_more(api: Api) -> None:
    exports = api.world.services.exports
    running: list[AbstractAsyncContextManager[Any]] = [exports.open(ORDER) for _ in range(EXPORTS_MAX)]
    for each in running:
        await each.__aenter__()
    with pytest.raises(Overloaded):
        async with exports.open(ORDER):
            pass
    for each in running:
        await each.__aexit__(None, None, None)
    assert exports.running == 0
    async with exports.open(ORDER):
        assert exports.running == 1


class WatchedReader:
    """A reading connection that says when it was closed, and in which thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.closed = threading.Event()
        self.readers: set[str] = set()

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self.readers.add(threading.current_thread().name)
        return self._connection.execute(*arguments)

    def close(self) -> None:
        self.readers.add(threading.current_thread().name)
        self._connection.close()
        self.closed.set()


@pytest.mark.parametrize("whole", [True, False])
async def test_the_reading_connection_is_closed_by_the_one_thread_that_used_it(
    api: Api, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    await some_history(api)
    monkeypatch.setattr(audit_export, "CHUNK_BYTES", 1)
    reader = WatchedReader(api.world.store.open_reader())
    monkeypatch.setattr(api.world.store, "open_reader", lambda: reader)
    async with api.world.services.exports.open(ORDER) as chunks:
        for _ in range(5):
            await anext(chunks)
        if whole:
            assert [chunk async for chunk in chunks]
    assert await asyncio.to_thread(reader.closed.wait, 10)
    (name,) = reader.readers
    assert name.startswith("audit-export")


# --- clients that do not behave --------------------------------------------------------------------


class Connection:
    """An ASGI connection whose client reads as much as the test lets it."""

    def __init__(self, api: Api) -> None:
        self.app = api.asgi("operator", {UNIX_PEER: ROOT})
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.may_send = asyncio.Event()
        self.started = asyncio.Event()
        self._requested = False

    async def receive(self) -> dict[str, Any]:
        if not self._requested:
            self._requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.started.set()
            await self.may_send.wait()

    async def get(self) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/audit/export",
            "query_string": b"",
            "headers": [],
        }
        await self.app(scope, self.receive, self.send)  # type: ignore[arg-type]  # a plain scope

    @property
    def complete(self) -> bool:
        last = self.sent[-1]
        return last["type"] == "http.response.body" and not last.get("more_body", False)


async def test_a_client_that_leaves_ends_its_export(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await some_history(api)
    monkeypatch.setattr(audit_export, "CHUNK_BYTES", 1)
    connection = Connection(api)
    request = asyncio.create_task(connection.get())
    await connection.started.wait()
    assert api.world.services.exports.running == 1
    connection.left.set()
    connection.may_send.set()
    await request
    assert api.world.services.exports.running == 0
    assert not connection.complete, "half an export looks like a whole one"


async def test_a_client_that_stands_still_is_cut(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "SEND_SECONDS_MAX", 0.01)
    connection = Connection(api)
    await connection.get()
    assert api.world.services.exports.running == 0
    assert not connection.complete


async def test_an_export_that_is_cancelled_leaves_nothing_behind(api: Api) -> None:
    connection = Connection(api)
    request = asyncio.create_task(connection.get())
    await connection.started.wait()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert api.world.services.exports.running == 0
    assert not connection.complete
