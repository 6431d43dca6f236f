"""The operator listener: what people do to the broker from its own host, on a Unix socket.

It works while everything else is down, and each change names who ordered it.
"""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response

from broker.api import schemas
from broker.api.authenticate import OperatorGate
from broker.api.edge_errors import ClientGone
from broker.api.operations import Answer, Operation, listener_app
from broker.api.paging import cursor_of, key_of, page_of
from broker.api.responses import OK, json_response
from broker.api.strict_json import parse_query, read_model, read_optional_model
from broker.api.views import (
    finding_view,
    identity_view,
    kill_view,
    operator_lease_view,
    parse_time,
    proof_view,
    status_view,
)
from broker.core import errors as core
from broker.core.ids import LeaseId, MalformedIdError
from broker.core.lease import LeaseState
from broker.service.audit_export import ExportOrder
from broker.service.kill import KillOrder, KillScope

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from broker.api.readiness import Readiness
    from broker.service.audit_export import AuditExports
    from broker.service.services import Services

DISTRIBUTION: Final = "nhi-broker"
EXPORT_TYPE: Final = "application/jsonl"
SEND_SECONDS_MAX: Final = 60
"""How long a client may take for one chunk of an export."""

_LEASE: Final = {"lease": schemas.LEASE_ID}


# --- the contract -------------------------------------------------------------------------------


def _operation(
    method: str,
    path: str,
    id_: str,
    summary: str,
    answer: Answer,
    **more: Any,  # noqa: ANN401  the fields of Operation
) -> Operation:
    return Operation(
        method=method, path=path, id=id_, summary=summary, answers={200: answer}, security="operator", **more
    )


KILL: Final = _operation(
    "POST",
    "/kill",
    "kill",
    "Stop a task, an identity, an owner or a resource at once, and end what is live in it",
    Answer("Stopped; the sweeper proves the rest.", schemas.KillAnswer),
    body=schemas.KillRequest,
    refusals=(core.UnknownObject, core.InvalidRequest),
)
LIFT: Final = _operation(
    "POST",
    "/kill/lift",
    "liftKill",
    "Lift a kill; what it ended stays ended",
    Answer("Lifted.", schemas.LiftAnswer),
    body=schemas.KillRequest,
    refusals=(core.InvalidRequest,),
)
LIST_KILLS: Final = _operation(
    "GET",
    "/kills",
    "listKills",
    "What is killed",
    Answer("A page of killed scopes.", schemas.KillPage),
    query=schemas.Page,
)
LIST_LEASES: Final = _operation(
    "GET",
    "/leases",
    "listLeases",
    "Leases, in the order of their ids",
    Answer("A page of leases.", schemas.LeasePage),
    query=schemas.LeasesQuery,
)
READ_LEASE: Final = _operation(
    "GET",
    "/leases/{lease}",
    "readLeaseAsOperator",
    "One lease",
    Answer("The lease.", schemas.OperatorLease),
    path_patterns=_LEASE,
    refusals=(core.UnknownObject,),
)
RETRY_LEASE: Final = _operation(
    "POST",
    "/leases/{lease}/retry",
    "retryLease",
    "Try to revoke an ending lease now",
    Answer("Due now.", schemas.OperatorLease),
    path_patterns=_LEASE,
    body=schemas.NoBody,
    body_optional=True,
    refusals=(core.UnknownObject, core.InvalidRequest),
)
ABANDON_LEASE: Final = _operation(
    "POST",
    "/leases/{lease}/abandon",
    "abandonLease",
    "Stop trying to end a stuck lease: its credential may still work",
    Answer("Abandoned.", schemas.OperatorLease),
    path_patterns=_LEASE,
    body=schemas.RequiredReasonIn,
    refusals=(core.UnknownObject, core.InvalidRequest),
)
LIST_IDENTITIES: Final = _operation(
    "GET",
    "/identities",
    "listIdentities",
    "Identities, in the order of their SPIFFE IDs; `q` is a prefix of SPIFFE ID, owner or team",
    Answer("A page of the inventory.", schemas.IdentityPage),
    query=schemas.IdentitiesQuery,
)
READ_IDENTITY: Final = _operation(
    "GET",
    "/identity",
    "readIdentity",
    "One identity with its leases that have not ended",
    Answer("The record.", schemas.IdentityDetail),
    query=schemas.IdentityQuery,
    refusals=(core.UnknownObject,),
)
SET_OWNER: Final = _operation(
    "POST",
    "/identity/owner",
    "setOwner",
    "Give an identity an accountable owner",
    Answer("The record as it stands now.", schemas.IdentityView),
    body=schemas.OwnerRequest,
    refusals=(core.UnknownObject,),
)
SUSPEND: Final = _operation(
    "POST",
    "/identity/suspend",
    "suspendIdentity",
    "Suspend an identity: it gets nothing, and loses what it has",
    Answer("The record as it stands now.", schemas.IdentityView),
    body=schemas.LifecycleRequest,
    refusals=(core.UnknownObject, core.InvalidRequest),
)
RESUME: Final = _operation(
    "POST",
    "/identity/resume",
    "resumeIdentity",
    "Let a suspended identity ask again",
    Answer("The record as it stands now.", schemas.IdentityView),
    body=schemas.LifecycleRequest,
    refusals=(core.UnknownObject, core.InvalidRequest),
)
LIST_FINDINGS: Final = _operation(
    "GET",
    "/findings",
    "listFindings",
    "Open findings, oldest first",
    Answer("A page of findings.", schemas.FindingPage),
    query=schemas.Page,
)
READ_STATUS: Final = _operation(
    "GET", "/status", "readStatus", "The broker at a glance", Answer("Its state.", schemas.StatusView)
)
EXPORT_AUDIT: Final = _operation(
    "GET",
    "/audit/export",
    "exportAudit",
    "The audit log or a part of it, for offline verification; the export is itself audited",
    Answer("JSON lines. One that has no end line was cut off.", media_type=EXPORT_TYPE),
    query=schemas.AuditQuery,
)
READ_AUDIT_KEYS: Final = _operation(
    "GET",
    "/audit/keys",
    "readAuditKeys",
    "The public keys file that offline verification needs",
    Answer("The keys.", schemas.AuditKeys),
)
SCAN: Final = _operation(
    "POST",
    "/scan",
    "scan",
    "Compare every backend that can list its objects with the ledger, now",
    Answer("What was found.", schemas.ScanAnswer),
    body=schemas.NoBody,
    body_optional=True,
)
PROVE: Final = _operation(
    "POST",
    "/adapters/prove",
    "proveAdapter",
    "Mint one credential on a resource's own backend, use it, kill it, and use it again",
    Answer("What held and what did not.", schemas.ProveAnswer),
    body=schemas.ProveRequest,
    refusals=(core.InvalidRequest, core.BackendUnavailable, core.MintFailed),
)

OPERATIONS: Final = (
    KILL,
    LIFT,
    LIST_KILLS,
    LIST_LEASES,
    READ_LEASE,
    RETRY_LEASE,
    ABANDON_LEASE,
    LIST_IDENTITIES,
    READ_IDENTITY,
    SET_OWNER,
    SUSPEND,
    RESUME,
    LIST_FINDINGS,
    READ_STATUS,
    EXPORT_AUDIT,
    READ_AUDIT_KEYS,
    SCAN,
    PROVE,
)


def operator_app(services: Services, readiness: Readiness) -> ASGIApp:
    """Return the application of the operator listener."""
    gate = OperatorGate(own_uid=os.geteuid())
    kills, leases, identities = KillRoutes(services), LeaseRoutes(services), IdentityRoutes(services)
    broker = BrokerRoutes(services, readiness)
    return listener_app(
        [
            (KILL, gate.guard(kills.kill)),
            (LIFT, gate.guard(kills.lift)),
            (LIST_KILLS, gate.guard(kills.page)),
            (LIST_LEASES, gate.guard(leases.page)),
            (READ_LEASE, gate.guard(leases.read)),
            (RETRY_LEASE, gate.guard(leases.retry)),
            (ABANDON_LEASE, gate.guard(leases.abandon)),
            (LIST_IDENTITIES, gate.guard(identities.page)),
            (READ_IDENTITY, gate.guard(identities.read)),
            (SET_OWNER, gate.guard(identities.set_owner)),
            (SUSPEND, gate.guard(identities.suspend)),
            (RESUME, gate.guard(identities.resume)),
            (LIST_FINDINGS, gate.guard(broker.findings)),
            (READ_STATUS, gate.guard(broker.status)),
            (EXPORT_AUDIT, gate.guard(broker.export)),
            (READ_AUDIT_KEYS, gate.guard(broker.audit_keys)),
            (SCAN, gate.guard(broker.scan)),
            (PROVE, gate.guard(broker.prove)),
        ]
    )


# --- kills ----------------------------------------------------------------------------------------


def _kill_order(asked: schemas.KillRequest, actor: str) -> KillOrder:
    # The schema has seen to it that exactly one is there.
    for scope in KillScope:
        value = getattr(asked, scope.value)
        if value is not None:
            return KillOrder(scope=scope, value=value, reason=asked.reason, actor=actor)
    raise core.InvalidRequest(schemas.ONE_SCOPE)


class KillRoutes:
    """The kill switch."""

    def __init__(self, services: Services) -> None:
        self._kill = services.kill
        self._overview = services.overview

    async def kill(self, request: Request, actor: str) -> Response:
        """Serve `KILL`."""
        asked, _ = await read_model(request, schemas.KillRequest)
        result = await self._kill.kill(_kill_order(asked, actor))
        return json_response(
            {
                "scope": result.scope.value,
                "value": result.value,
                "tasks_ended": result.tasks_ended,
                "leases_moved": result.leases_moved,
            }
        )

    async def lift(self, request: Request, actor: str) -> Response:
        """Serve `LIFT`."""
        asked, _ = await read_model(request, schemas.KillRequest)
        order = _kill_order(asked, actor)
        if order.scope is KillScope.TASK:
            raise core.InvalidRequest(
                "A killed task has ended, and that cannot be lifted. Open another task."
            )
        if not await self._kill.lift(order):
            raise core.InvalidRequest(
                f"There is no kill of this {order.scope} to lift. `nhi status` lists what is killed."
            )
        return json_response({"scope": order.scope.value, "value": order.value})

    async def page(self, request: Request, _actor: str) -> Response:
        """Serve `LIST_KILLS`."""
        page = parse_query(request.scope, schemas.Page)
        after = ("", "") if page.cursor is None else key_of(page.cursor, str, str)
        found = self._overview.kills(after=after, limit=page.limit + 1)
        return json_response(
            page_of(found, page.limit, kill_view, lambda kill: cursor_of(kill.scope.value, kill.value))
        )


# --- leases ---------------------------------------------------------------------------------------


def _lease_id(request: Request) -> LeaseId:
    try:
        return LeaseId.parse(request.path_params["lease"])
    except MalformedIdError:
        raise core.UnknownObject from None


class LeaseRoutes:
    """The ledger as operators handle it."""

    def __init__(self, services: Services) -> None:
        self._leases = services.leases

    async def page(self, request: Request, _actor: str) -> Response:
        """Serve `LIST_LEASES`."""
        query = parse_query(request.scope, schemas.LeasesQuery)
        found = self._leases.page(
            after="" if query.cursor is None else key_of(query.cursor, str)[0],
            limit=query.limit + 1,
            state=None if query.state is None else LeaseState(query.state),
            stuck=query.stuck,
        )
        return json_response(
            page_of(found, query.limit, operator_lease_view, lambda lease: cursor_of(lease.id))
        )

    async def read(self, request: Request, _actor: str) -> Response:
        """Serve `READ_LEASE`."""
        return json_response(operator_lease_view(self._leases.get(_lease_id(request))))

    async def retry(self, request: Request, actor: str) -> Response:
        """Serve `RETRY_LEASE`."""
        await read_optional_model(request, schemas.NoBody)
        return json_response(operator_lease_view(await self._leases.retry(_lease_id(request), actor=actor)))

    async def abandon(self, request: Request, actor: str) -> Response:
        """Serve `ABANDON_LEASE`."""
        said, _ = await read_model(request, schemas.RequiredReasonIn)
        lease = await self._leases.abandon(_lease_id(request), reason=said.reason, actor=actor)
        return json_response(operator_lease_view(lease))


# --- identities -----------------------------------------------------------------------------------


class IdentityRoutes:
    """The inventory as operators handle it."""

    def __init__(self, services: Services) -> None:
        self._inventory = services.inventory

    async def page(self, request: Request, _actor: str) -> Response:
        """Serve `LIST_IDENTITIES`."""
        query = parse_query(request.scope, schemas.IdentitiesQuery)
        found = self._inventory.page(
            after="" if query.cursor is None else key_of(query.cursor, str)[0],
            limit=query.limit + 1,
            query=query.q or "",
        )
        return json_response(
            page_of(found, query.limit, identity_view, lambda identity: cursor_of(identity.spiffe_id))
        )

    async def read(self, request: Request, _actor: str) -> Response:
        """Serve `READ_IDENTITY`."""
        query = parse_query(request.scope, schemas.IdentityQuery)
        identity = self._inventory.get(query.spiffe_id)
        leases = self._inventory.live_leases(query.spiffe_id)
        return json_response(
            {**identity_view(identity), "leases": [operator_lease_view(lease) for lease in leases]}
        )

    async def set_owner(self, request: Request, actor: str) -> Response:
        """Serve `SET_OWNER`."""
        asked, _ = await read_model(request, schemas.OwnerRequest)
        identity = await self._inventory.set_owner(
            asked.spiffe_id, owner=asked.owner, team=asked.team, environment=asked.environment, actor=actor
        )
        return json_response(identity_view(identity))

    async def suspend(self, request: Request, actor: str) -> Response:
        """Serve `SUSPEND`."""
        asked, _ = await read_model(request, schemas.LifecycleRequest)
        identity = await self._inventory.suspend(asked.spiffe_id, reason=asked.reason, actor=actor)
        return json_response(identity_view(identity))

    async def resume(self, request: Request, actor: str) -> Response:
        """Serve `RESUME`."""
        asked, _ = await read_model(request, schemas.LifecycleRequest)
        identity = await self._inventory.resume(asked.spiffe_id, reason=asked.reason, actor=actor)
        return json_response(identity_view(identity))


# --- the broker itself ----------------------------------------------------------------------------


class BrokerRoutes:
    """State, findings, audit and scans."""

    def __init__(self, services: Services, readiness: Readiness) -> None:
        self._services = services
        self._readiness = readiness
        self._version = version(DISTRIBUTION)

    async def status(self, _request: Request, _actor: str) -> Response:
        """Serve `READ_STATUS`."""
        status = await self._services.overview.status()
        return json_response(status_view(status, version=self._version, problems=self._readiness.problems()))

    async def findings(self, request: Request, _actor: str) -> Response:
        """Serve `LIST_FINDINGS`."""
        page = parse_query(request.scope, schemas.Page)
        after = (0, "") if page.cursor is None else key_of(page.cursor, int, str)
        found = self._services.overview.findings(after=after, limit=page.limit + 1)
        return json_response(
            page_of(found, page.limit, finding_view, lambda each: cursor_of(each.opened_ms, each.id))
        )

    async def scan(self, request: Request, _actor: str) -> Response:
        """Serve `SCAN`."""
        await read_optional_model(request, schemas.NoBody)
        results = await self._services.reconcile.scan_all()
        scanned = {result.backend for result in results}
        backends = self._services.ctx.backends
        return json_response(
            {
                "scanned": [
                    {
                        "backend": result.backend,
                        "seen": result.seen,
                        "orphans": result.orphans,
                        "gone": result.gone,
                    }
                    for result in results
                ],
                "failed": [
                    backend.name
                    for backend in backends
                    if backend.capabilities.listable and backend.name not in scanned
                ],
            }
        )

    async def prove(self, request: Request, actor: str) -> Response:
        """Serve `PROVE`."""
        asked, _ = await read_model(request, schemas.ProveRequest)
        proof = await self._services.prove.run(asked.resource, asked.action, actor=actor)
        return json_response(proof_view(proof))

    async def audit_keys(self, _request: Request, _actor: str) -> Response:
        """Serve `READ_AUDIT_KEYS`."""
        return json_response(self._services.exports.public_keys())

    async def export(self, request: Request, actor: str) -> Response:
        """Serve `EXPORT_AUDIT`."""
        query = parse_query(request.scope, schemas.AuditQuery)
        order = ExportOrder(
            actor=actor,
            lease_id=query.lease,
            task_id=query.task,
            identity=query.identity,
            from_ms=None if query.from_ is None else parse_time(query.from_, "from"),
            to_ms=None if query.to is None else parse_time(query.to, "to"),
            texts=query.texts,
        )
        return _ExportResponse(self._services.exports, order)


class _ExportResponse(Response):
    """Streams an export at the client's pace, and stops when the client has left or stands still."""

    def __init__(self, exports: AuditExports, order: ExportOrder) -> None:
        self._exports = exports
        self._order = order

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with self._exports.open(self._order) as chunks:
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await send({"type": "http.response.start", "status": OK, "headers": _EXPORT_HEADERS})
                async for chunk in chunks:
                    async with asyncio.timeout(SEND_SECONDS_MAX):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    if gone.done():
                        raise ClientGone("The client hung up before its export was whole.")
            finally:
                gone.cancel()
        await send({"type": "http.response.body", "body": b""})


_EXPORT_HEADERS: Final = [
    (b"content-type", EXPORT_TYPE.encode("ascii")),
    (b"content-disposition", b'attachment; filename="audit.jsonl"'),
]


async def _gone(receive: Receive) -> None:
    """Return when the client has hung up; what it still sends is not read for anything."""
    while (await receive())["type"] != "http.disconnect":
        pass
