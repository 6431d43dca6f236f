"""A small HTTPS server that keeps the broker's HTTP contract, with faults to switch on.

It stores tasks and leases for real, so that a test asks *it* what is still alive. It
speaks raw HTTP over asyncio in a thread of its own: only so can it cut a connection
after having committed, which is the fault that matters most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import ssl
import string
import threading
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.sdk.pki import Leaf

NOW = "2026-11-20T12:00:00.000Z"
LATER = "2026-11-20T12:05:00.000Z"
ENDED = frozenset({"revoked", "failed", "expired", "handed_out", "abandoned"})


class Kind(Enum):
    DROP_BEFORE = auto()  # the connection is cut before the request is acted on
    DROP_AFTER = auto()  # the request is acted on, then the connection is cut before the answer
    HALF_ANSWER = auto()  # acted on, cut in the middle of the answer's body
    ANSWER = auto()  # a given status, headers and body instead of acting
    HOLD = auto()  # acted on; the answer waits until the test releases it


@dataclass
class Fault:
    kind: Kind
    route: str = ""
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


def problem(status: int, code: str, detail: str, **extensions: Any) -> tuple[int, dict[str, str], bytes]:
    document = {
        "type": f"urn:nhi-broker:problem:{code}",
        "title": code.replace("-", " "),
        "status": status,
        "detail": detail,
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        **extensions,
    }
    return status, {"content-type": "application/problem+json"}, json.dumps(document).encode()


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    peer: tuple[str, ...]


class ContractServer:
    """Start with `running`; all state may be read by the test at any time."""

    def __init__(self, certificate: Path, *, client_ca: str | None = None) -> None:
        self.tokens: set[str] = set()
        self.peers: set[str] = set()
        self.tasks: dict[str, dict[str, Any]] = {}
        self.leases: dict[str, dict[str, Any]] = {}
        self.passwords: list[str] = []
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.settle = True
        self.evidence: dict[str, Any] = {"rolname_rows": 0, "sessions": 0}
        self.postgres: dict[str, Any] = {"host": "db.example.test", "port": 5432, "database": "orders"}
        self.login: dict[str, Any] | None = None
        self.catalog: list[dict[str, Any]] = [catalog_item("orders-db", "read")]
        self.connections = 0
        self.on_request: Callable[[Seen], None] = lambda _seen: None
        self._keys: dict[str, tuple[str, str]] = {}
        self._certificate = certificate
        self._client_ca = client_ca
        self._loop = asyncio.new_event_loop()
        self._handlers: set[asyncio.Task[None]] = set()
        self.port = 0

    # --- what a test asks ----------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def alive(self) -> list[str]:
        return [one["lease_id"] for one in self.leases.values() if one["state"] == "active"]

    def open_tasks(self) -> list[str]:
        return [one["task_id"] for one in self.tasks.values() if one["state"] == "open"]

    def calls(self, method: str, suffix: str) -> list[Seen]:
        return [one for one in self.seen if one.method == method and one.path.endswith(suffix)]

    def fault(self, kind: Kind, route: str = "", **options: Any) -> Fault:
        fault = Fault(kind, route, **options)
        self.faults.append(fault)
        return fault

    def refuse(
        self, status: int, code: str, detail: str, *, route: str = "", times: int = 1, **more: Any
    ) -> None:
        headers = more.pop("headers", {})
        status, defaults, body = problem(status, code, detail, **more)
        self.fault(Kind.ANSWER, route, status=status, headers={**defaults, **headers}, body=body, times=times)

    # --- life ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[ContractServer]:
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,), name="contract-server")
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            for fault in self.faults:
                fault.release.set()
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(10)
            assert not thread.is_alive()

    def use_certificate(self, leaf: Leaf, path: Path) -> None:
        """Serve new connections with another certificate."""
        self._context.load_cert_chain(leaf.write(path, secrets.token_hex(4)))

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(started))
        finally:
            self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(self._certificate)
        if self._client_ca is not None:
            self._context.load_verify_locations(cadata=self._client_ca)
            self._context.verify_mode = ssl.CERT_OPTIONAL
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for handler in tuple(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._handlers.discard(handler)
            writer.transport.abort()

    # --- HTTP ----------------------------------------------------------------------------------

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        raw = await reader.readexactly(int(headers.get("content-length", "0") or "0"))
        peer = writer.get_extra_info("ssl_object").getpeercert() or {}
        uris = tuple(value for kind, value in peer.get("subjectAltName", ()) if kind == "URI")
        seen = Seen(method, path, headers, json.loads(raw) if raw else None, uris)
        self.seen.append(seen)
        self.on_request(seen)
        fault = self._take(path)
        if fault is not None and fault.kind is Kind.DROP_BEFORE:
            return False
        if fault is not None and fault.kind is Kind.ANSWER:
            status, extra, body = fault.status, fault.headers, fault.body
        else:
            status, extra, body = self._answer(seen)
        if fault is not None and fault.kind is Kind.HOLD:
            fault.held.set()
            await asyncio.to_thread(fault.release.wait, 30)
        if fault is not None and fault.kind is Kind.DROP_AFTER:
            return False
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in extra.items()]
        whole = "\r\n".join([*lines, "", ""]).encode() + body
        if fault is not None and fault.kind is Kind.HALF_ANSWER:
            writer.write(whole[:-5])
            await writer.drain()
            return False
        writer.write(whole)
        await writer.drain()
        return True

    def _take(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and path.endswith(fault.route):
                fault.times -= 1
                return fault
        return None

    def _answer(self, seen: Seen) -> tuple[int, dict[str, str], bytes]:  # noqa: PLR0911  a route table
        bearer = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if bearer not in self.tokens and not self.peers & set(seen.peer):
            return problem(401, "unauthenticated", "No valid SVID was presented.")
        parts = seen.path.partition("?")[0].strip("/").split("/")
        match seen.method, parts:
            case "GET", ["catalog"]:
                return _json(200, {"items": self.catalog, "next": None})
            case "POST", ["tasks"]:
                return _json(201, self._open(seen))
            case "GET", ["tasks", one] if one in self.tasks:
                return _json(200, self.tasks[one])
            case "POST", ["tasks", one, "end"] if one in self.tasks:
                return self._end(one)
            case "POST", ["credentials", "request"]:
                return self._issue(seen)
            case "GET", ["credentials", one] if one in self.leases:
                return _json(200, self.leases[one])
            case "POST", ["credentials", one, "revoke"] if one in self.leases:
                return self._revoke(one)
            case _:
                return problem(404, "not-found", "There is no such object for this caller.")

    # --- the store -----------------------------------------------------------------------------

    def _open(self, seen: Seen, *, inline: bool = False, purpose: str | None = None) -> dict[str, Any]:
        body = seen.body
        key = seen.headers.get("idempotency-key")
        if not inline and key is not None and key in self._keys:
            return self.tasks[self._keys[key][1]]
        task_id = _id("tsk_")
        self.tasks[task_id] = {
            "task_id": task_id,
            "state": "open",
            "purpose": purpose or body["purpose"],
            "description": body.get("description", ""),
            "resources": body.get("resources", []) if not inline else [],
            "actions": body.get("actions", []) if not inline else [],
            "classification_max": body.get("classification_max"),
            "budget_leases": body.get("budget_leases", 100),
            "leases_issued": 0,
            "inline": inline,
            "opened_at": NOW,
            "deadline_at": LATER,
            "ended_at": None,
            "end_cause": None,
        }
        if not inline and key is not None:
            self._keys[key] = ("", task_id)
        return self.tasks[task_id]

    def _issue(self, seen: Seen) -> tuple[int, dict[str, str], bytes]:
        body, key = seen.body, seen.headers.get("idempotency-key")
        if body["resource"] == "payroll-db":
            decision = {
                "id": "dec_aaaaaaaaaaaaaaaa",
                "policy_ids": ["team-owns-resource"],
                "policy_hash": "ab" * 32,
            }
            return problem(403, "denied", "payroll-db belongs to another team.", decision=decision)
        if key is not None and key in self._keys:
            # Same key and body: the first credential was never released, so it is superseded.
            self.leases[self._keys[key][1]].update(state="revoked", cause="superseded", ended_at=NOW)
        if isinstance(body["task"], str):
            if body["task"] not in self.tasks:
                return problem(404, "not-found", "There is no such object for this caller.")
            task = self.tasks[body["task"]]
        else:
            task = self._open(seen, inline=True, purpose=body["task"]["purpose"])
        if task["state"] != "open":
            return problem(409, "task-closed", "The task has ended.", task_id=task["task_id"])
        lease_id = _id("lse_")
        self.leases[lease_id] = {
            "lease_id": lease_id,
            "task_id": task["task_id"],
            "resource": body["resource"],
            "action": body["action"],
            "adapter": "fake",
            "state": "active",
            "cause": "minted",
            "issued_at": NOW,
            "expires_at": LATER,
            "ended_at": None,
            "revocability": "immediate",
            "stuck": False,
            "evidence": None,
        }
        task["leases_issued"] += 1
        if key is not None:
            self._keys[key] = ("", lease_id)
        answer = {
            "lease_id": lease_id,
            "task_id": task["task_id"],
            "state": "active",
            "credential": self._secret(body["resource"], lease_id),
            "issued_at": NOW,
            "expires_at": LATER,
            "renewable": False,
            "revocability": "immediate",
            "decision": {
                "id": "dec_bbbbbbbbbbbbbbbb",
                "policy_ids": ["team-reads"],
                "policy_hash": "cd" * 32,
            },
        }
        return _json(201, answer)

    def _secret(self, resource: str, lease_id: str) -> dict[str, Any]:
        password = secrets.token_urlsafe(18) + "'\\ x"  # a quote, a backslash and a space: libpq quoting
        self.passwords.append(password)
        if resource.endswith("-db"):
            if self.login is not None:
                return {"kind": "postgresql_login", **self.login}
            login = {"username": f"nhi_{lease_id[4:]}", "password": password, "sslmode": "prefer"}
            return {"kind": "postgresql_login", **self.postgres, **login}
        if resource.endswith("-cloud"):
            return {"kind": "cloud_session", "session": password}
        token = secrets.token_urlsafe(24)
        self.passwords.append(token)
        return {
            "kind": "access_token",
            "access_token": token,
            "token_type": "Bearer",
            "issuer": self.url,
            "audience": resource,
            "expires_in": 300,
        }

    def _kill(self, lease: dict[str, Any], cause: str) -> None:
        if lease["state"] in ENDED:
            return
        if self.settle:
            lease.update(state="revoked", cause=cause, ended_at=NOW, evidence=self.evidence)
        else:
            lease.update(state="revoke_pending", cause=cause, ended_at=NOW)

    def _revoke(self, lease_id: str) -> tuple[int, dict[str, str], bytes]:
        lease = self.leases[lease_id]
        self._kill(lease, "released")
        task = self.tasks[lease["task_id"]]
        if task["inline"]:
            task.update(state="ended", ended_at=NOW, end_cause="inline")
        return _json(200 if lease["state"] in ENDED else 202, lease)

    def _end(self, task_id: str) -> tuple[int, dict[str, str], bytes]:
        task = self.tasks[task_id]
        if task["state"] == "open":
            task.update(state="ended", ended_at=NOW, end_cause="caller")
        own = [one for one in self.leases.values() if one["task_id"] == task_id]
        for lease in own:
            self._kill(lease, "task_end")
        settled = all(one["state"] in ENDED for one in own)
        return _json(200 if settled else 202, {"task": task, "leases": own})


def catalog_item(resource: str, action: str, **changes: Any) -> dict[str, Any]:
    return {
        "resource": resource,
        "title": "Orders",
        "action": action,
        "effect": "read",
        "classification": "confidential",
        "environment": "dev",
        "owner": "team-orders",
        "kind": "postgresql_login",
        "ttl_seconds_default": 300,
        "ttl_seconds_max": 900,
        "revocability": "immediate",
        **changes,
    }


def _json(status: int, document: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return status, {"content-type": "application/json"}, json.dumps(document).encode()


def _id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(string.ascii_lowercase + "234567") for _ in range(16))
