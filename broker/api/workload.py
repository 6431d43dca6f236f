"""The workload listener: tasks, credentials and the catalog, for callers who proved who they are.

An id in a path is never a capability: the services check the caller against what it
names, and one that does not even parse is answered like one that nobody has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from broker.api import oauth, schemas
from broker.api.authenticate import Gate
from broker.api.operations import IDEMPOTENCY_KEY, PREFER, Answer, Operation, listener_app
from broker.api.paging import cursor_of, key_of, page_of
from broker.api.request_headers import idempotency_key, prefer_wait_seconds
from broker.api.responses import ACCEPTED, CREATED, OK, json_response
from broker.api.strict_json import parse_query, read_model, read_optional_model
from broker.api.views import catalog_item, credential_view, lease_view, task_ended_view, task_view
from broker.core import errors as core
from broker.core.facts import Intent
from broker.core.ids import DecisionId, LeaseId, MalformedIdError, TaskId
from broker.core.lease import TERMINAL
from broker.service import idempotency, issue, tasks
from broker.service.issue import CredentialRequest
from broker.service.tasks import TaskSpec

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from broker.api.authenticate import Admitted
    from broker.api.limits import RequestLimiter
    from broker.authn.authenticator import Authenticator
    from broker.service.issue import Issued
    from broker.service.offers import Offer
    from broker.service.services import Services

AnyId = TypeVar("AnyId", LeaseId, TaskId)

_PATTERNS: Final = {"lease": schemas.LEASE_ID, "task": schemas.TASK_ID}


# --- the contract -------------------------------------------------------------------------------

REQUEST_CREDENTIAL: Final = Operation(
    method="POST",
    path="/credentials/request",
    id="requestCredential",
    summary="Ask for a credential for one task",
    security="svid",
    body=schemas.CredentialRequest,
    headers=(IDEMPOTENCY_KEY,),
    answers={
        200: Answer("The key was used before and its lease has ended: the lease.", schemas.LeaseView),
        201: Answer("Minted. The secret is shown once, here.", schemas.CredentialAnswer),
    },
    refusals=(
        core.PolicyDenied,
        core.UnknownObject,
        core.InvalidRequest,
        core.TaskClosed,
        core.BudgetExhausted,
        core.IdempotencyMismatch,
        core.StillMinting,
        core.LeaseLost,
        core.MintFailed,
        core.BackendUnavailable,
    ),
)
READ_LEASE: Final = Operation(
    method="GET",
    path="/credentials/{lease}",
    id="readLease",
    summary="Look at a lease of one's own",
    security="svid",
    path_patterns=_PATTERNS,
    answers={200: Answer("The lease, without its secret.", schemas.LeaseView)},
    refusals=(core.UnknownObject,),
)
REVOKE_LEASE: Final = Operation(
    method="POST",
    path="/credentials/{lease}/revoke",
    id="revokeLease",
    summary="Give a credential back before its time",
    security="svid",
    path_patterns=_PATTERNS,
    body=schemas.ReasonIn,
    body_optional=True,
    headers=(PREFER,),
    answers={
        200: Answer("Proven dead; the evidence is in the lease.", schemas.LeaseView),
        202: Answer("Being revoked: the broker goes on until it is proven.", schemas.LeaseView),
    },
    refusals=(core.UnknownObject,),
)
READ_CATALOG: Final = Operation(
    method="GET",
    path="/catalog",
    id="readCatalog",
    summary="What this caller could be allowed to ask for",
    security="svid",
    query=schemas.Page,
    answers={200: Answer("A page of the catalog.", schemas.CatalogPage)},
)
OPEN_TASK: Final = Operation(
    method="POST",
    path="/tasks",
    id="openTask",
    summary="Open a task",
    security="svid",
    body=schemas.TaskRequest,
    headers=(IDEMPOTENCY_KEY,),
    answers={201: Answer("Open. Everything issued under it dies with it.", schemas.TaskView)},
    refusals=(core.PolicyDenied, core.BudgetExhausted, core.IdempotencyMismatch),
)
READ_TASK: Final = Operation(
    method="GET",
    path="/tasks/{task}",
    id="readTask",
    summary="Look at a task of one's own",
    security="svid",
    path_patterns=_PATTERNS,
    answers={200: Answer("The task.", schemas.TaskView)},
    refusals=(core.UnknownObject,),
)
END_TASK: Final = Operation(
    method="POST",
    path="/tasks/{task}/end",
    id="endTask",
    summary="End a task and everything issued under it; harmless when repeated",
    security="svid",
    path_patterns=_PATTERNS,
    body=schemas.ReasonIn,
    body_optional=True,
    headers=(PREFER,),
    answers={
        200: Answer("Ended, and every lease is proven dead.", schemas.TaskEnded),
        202: Answer("Ended; the broker goes on until every lease is proven dead.", schemas.TaskEnded),
    },
    refusals=(core.UnknownObject,),
)

OPERATIONS: Final = (
    REQUEST_CREDENTIAL,
    READ_LEASE,
    REVOKE_LEASE,
    READ_CATALOG,
    OPEN_TASK,
    READ_TASK,
    END_TASK,
    *oauth.OPERATIONS,
)


def workload_app(services: Services, authenticator: Authenticator, limiter: RequestLimiter) -> ASGIApp:
    """Return the application of the workload listener."""
    gate = Gate(authenticator, limiter, services.admission, services.refusals)
    credentials, tasks_ = CredentialRoutes(services), TaskRoutes(services)
    return listener_app(
        [
            (REQUEST_CREDENTIAL, gate.guard(credentials.request)),
            (OPEN_TASK, gate.guard(tasks_.open)),
            (READ_CATALOG, gate.guard(CatalogRoutes(services).read)),
            (REVOKE_LEASE, gate.guard(credentials.revoke)),
            (END_TASK, gate.guard(tasks_.end)),
            (READ_LEASE, gate.guard(credentials.read)),
            (READ_TASK, gate.guard(tasks_.read)),
            *oauth.bound(services, gate),
        ]
    )


# --- the routes ---------------------------------------------------------------------------------


def _id_in_path(request: Request, name: str, kind: type[AnyId]) -> AnyId:
    """Return the id; one that does not parse is answered like an unknown one."""
    try:
        return kind.parse(request.path_params[name])
    except MalformedIdError:
        raise core.UnknownObject from None


class CredentialRoutes:
    """Ask for a credential, look at its lease, give it back."""

    def __init__(self, services: Services) -> None:
        self._issue = services.issue
        self._tasks = services.tasks
        self._revoke = services.revoke

    async def request(self, request: Request, who: Admitted) -> Response:
        """Serve `REQUEST_CREDENTIAL`."""
        asked, body = await read_model(request, schemas.CredentialRequest)
        key = idempotency_key(request.scope)
        issued = await self._issue.request(
            who.caller,
            who.facts,
            self._credential_request(asked),
            idempotency.presented(who.caller, issue.ROUTE, key, body),
        )
        return _issued_response(issued)

    def _credential_request(self, asked: schemas.CredentialRequest) -> CredentialRequest:
        task: TaskId | TaskSpec
        if isinstance(asked.task, str):
            task = TaskId(asked.task)  # the schema has checked its form
        else:
            deadline_seconds, _ = self._tasks.defaults(asked.task.purpose)
            task = TaskSpec(
                purpose=asked.task.purpose,
                description=asked.task.description or "",
                deadline_seconds=asked.task.deadline_seconds or deadline_seconds,
                inline=True,
            )
        return CredentialRequest(
            task=task,
            resource=asked.resource,
            action=asked.action,
            intent=Intent(tool=asked.intent.tool, reason=asked.intent.reason),
            ttl_seconds=asked.ttl_seconds,
        )

    async def read(self, request: Request, who: Admitted) -> Response:
        """Serve `READ_LEASE`."""
        return json_response(lease_view(self._revoke.get(who.caller, _id_in_path(request, "lease", LeaseId))))

    async def revoke(self, request: Request, who: Admitted) -> Response:
        """Serve `REVOKE_LEASE`."""
        said, _ = await read_optional_model(request, schemas.ReasonIn)
        lease = await self._revoke.release(
            who.caller,
            _id_in_path(request, "lease", LeaseId),
            reason=said.reason or "",
            wait_seconds=prefer_wait_seconds(request.scope),
        )
        return json_response(lease_view(lease), OK if lease.state in TERMINAL else ACCEPTED)


def _issued_response(issued: Issued) -> Response:
    """Return the credential; the lease alone where a repeated request finds it ended."""
    if issued.credential is None or issued.basis is None:
        return json_response(lease_view(issued.lease), OK)
    view = credential_view(
        issued.lease,
        issued.credential,
        issued.basis,
        DecisionId(issued.lease.decision_id or ""),
        renewable=False,
    )
    return json_response(view, CREATED)


class TaskRoutes:
    """Open a task, look at it, end it."""

    def __init__(self, services: Services) -> None:
        self._tasks = services.tasks

    async def open(self, request: Request, who: Admitted) -> Response:
        """Serve `OPEN_TASK`."""
        asked, body = await read_model(request, schemas.TaskRequest)
        deadline_seconds, budget_leases = self._tasks.defaults(asked.purpose)
        spec = TaskSpec(
            purpose=asked.purpose,
            description=asked.description or "",
            resources=asked.resources,
            actions=asked.actions,
            classification_max=asked.classification_max,
            budget_leases=asked.budget_leases or budget_leases,
            deadline_seconds=asked.deadline_seconds or deadline_seconds,
        )
        key = idempotency.presented(who.caller, tasks.ROUTE, idempotency_key(request.scope), body)
        task = await self._tasks.open(who.caller, who.facts, spec, key)
        return json_response(task_view(task), CREATED)

    async def read(self, request: Request, who: Admitted) -> Response:
        """Serve `READ_TASK`."""
        return json_response(task_view(self._tasks.get(who.caller, _id_in_path(request, "task", TaskId))))

    async def end(self, request: Request, who: Admitted) -> Response:
        """Serve `END_TASK`."""
        said, _ = await read_optional_model(request, schemas.ReasonIn)
        ended = await self._tasks.end(
            who.caller,
            _id_in_path(request, "task", TaskId),
            reason=said.reason or "",
            wait_seconds=prefer_wait_seconds(request.scope),
        )
        return json_response(task_ended_view(ended.task, ended.leases), OK if ended.all_proven else ACCEPTED)


class CatalogRoutes:
    """What a caller may ask for."""

    def __init__(self, services: Services) -> None:
        self._offers = services.offers

    async def read(self, request: Request, who: Admitted) -> Response:
        """Serve `READ_CATALOG`; the cursor is a place in the order of resource and action."""
        page = parse_query(request.scope, schemas.Page)
        after = ("", "") if page.cursor is None else key_of(page.cursor, str, str)
        offers = sorted(self._offers.for_identity(who.facts), key=_offer_key)
        found = [offer for offer in offers if _offer_key(offer) > after][: page.limit + 1]
        return json_response(
            page_of(found, page.limit, catalog_item, lambda offer: cursor_of(*_offer_key(offer)))
        )


def _offer_key(offer: Offer) -> tuple[str, str]:
    return offer.granted.resource.id, offer.granted.name
