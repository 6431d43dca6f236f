"""The one table that gives each error its HTTP form (RFC 9457).

Core errors know no status; this table does. `docs/errors.md` carries `markdown_table`
verbatim, and a test holds both to the classes that exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from broker.api import edge_errors as edge
from broker.core import errors as core
from broker.core.decision import NeedsApproval

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPE_PREFIX: Final = "urn:nhi-broker:problem:"
CONTENT_TYPE: Final = b"application/problem+json"

_INTERNAL_DETAIL: Final = (
    "The broker failed in a way it did not expect. Nothing more is said here; "
    "an operator finds the cause in the log under this trace_id."
)
_RETRY_AFTER_SECONDS: Final[Mapping[int, int]] = {429: 1, 503: 1}
"""What is said where the error itself names no time: retrying may help with these."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        status: HTTP status.
        title: stable short name of the problem, the same for each occurrence.
        remedy: what the caller can do, for the documentation.

    """

    status: int
    title: str
    remedy: str


TABLE: Final[Mapping[type[core.BrokerError], Row]] = {
    core.BrokerError: Row(500, "Internal error", "Report the trace_id to the operator."),
    core.Unauthenticated: Row(
        401, "No valid SVID", "Present a current SVID of a trusted domain, for this broker's audience."
    ),
    core.IdentityRefused: Row(
        403, "Identity barred", "Ask the owner of the identity, or the inventory's operator, to restore it."
    ),
    core.PolicyDenied: Row(
        403, "Denied by policy", "Read the detail; the decision id finds the record of what was weighed."
    ),
    core.UnknownObject: Row(
        404, "Not found", "Check the id; what belongs to another caller answers the same."
    ),
    core.InvalidRequest: Row(422, "Request cannot be served", "Change the request as the detail says."),
    core.TaskClosed: Row(409, "Task has ended", "Open a new task."),
    core.BudgetExhausted: Row(409, "Budget exhausted", "End what is no longer needed, or open a new task."),
    core.IdempotencyMismatch: Row(
        409, "Idempotency key reused", "Send the first body again, or use a fresh Idempotency-Key."
    ),
    core.StillMinting: Row(
        409, "First request still running", "Repeat the same request after Retry-After seconds."
    ),
    core.LeaseLost: Row(
        503, "Lease ended while minting", "The secret was dropped; ask again if the task is still open."
    ),
    core.MintFailed: Row(
        503, "Backend did not mint", "Ask again after Retry-After seconds; the failed lease is ended for you."
    ),
    core.RateLimited: Row(429, "Too many requests", "Slow down; Retry-After says when to come back."),
    core.Overloaded: Row(503, "Broker overloaded", "Ask again after Retry-After seconds."),
    core.BackendUnavailable: Row(
        503, "Backend unavailable", "Nothing was attempted; ask again after Retry-After seconds."
    ),
    core.LedgerUnavailable: Row(
        503, "Ledger unavailable", "Nothing is minted without it; ask again after Retry-After seconds."
    ),
    edge.EdgeError: Row(400, "Bad request", "Change the request as the detail says."),
    edge.MalformedHttp: Row(400, "Malformed request", "Send a well-formed HTTP/1.1 request."),
    edge.HeadTooLarge: Row(431, "Headers too large", "Send fewer or shorter headers."),
    edge.WrongHost: Row(421, "Wrong host", "Use the host name this listener is configured for."),
    edge.NoSuchPath: Row(404, "No such path", "Check the path, and that it belongs to this listener."),
    edge.MethodNotAllowed: Row(405, "Method not allowed", "Use a method of the Allow header."),
    edge.UnsupportedMediaType: Row(
        415, "Unsupported media type", "Send the Content-Type that the detail names."
    ),
    edge.BodyTooLarge: Row(413, "Body too large", "Send a smaller body."),
    edge.BodyTooSlow: Row(408, "Request too slow", "Send the whole request without pausing."),
    edge.ClientGone: Row(400, "Client gone", "Keep the connection open until the answer is read."),
    edge.MalformedJson: Row(400, "Malformed JSON", "Send one JSON object in UTF-8 without repeated keys."),
    edge.InvalidInput: Row(422, "Invalid input", "Correct the fields listed under errors."),
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A problem ready to be sent. `headers` are raw ASGI pairs, lengths included."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def row_of(error: BaseException) -> Row:
    """Return the table's row: the nearest class that has one, the opaque 500 for what is not ours."""
    for kind in type(error).__mro__:
        row = TABLE.get(kind)
        if row is not None:
            return row
    return TABLE[core.BrokerError]


def code_of(error: BaseException) -> str:
    """Return the last part of the problem's type; ``internal`` for what is not ours."""
    return error.code if isinstance(error, core.BrokerError) else core.BrokerError.code


def problem(error: BaseException, trace_id: str) -> dict[str, Any]:
    """Return the problem's JSON members; anything but a known `BrokerError` is the opaque 500."""
    row, code = row_of(error), code_of(error)
    members: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": row.title,
        "status": row.status,
        "detail": _INTERNAL_DETAIL,
        "trace_id": trace_id,
    }
    if isinstance(error, core.BrokerError) and code != core.BrokerError.code:
        members["detail"] = _detail(error)
        members.update(_extensions(error))
    return members


def _detail(error: core.BrokerError) -> str:
    """Return the public sentence; of a request that only an approval could let through, whose."""
    if isinstance(error, core.PolicyDenied) and isinstance(error.decision, NeedsApproval):
        return (
            f"{error.detail} It would take an approval of {error.decision.group}, and approvals are not "
            "available yet: until they are, the answer is no."
        )
    return error.detail


def _extensions(error: core.BrokerError) -> dict[str, Any]:
    members: dict[str, Any] = {}
    if error.lease_id is not None:
        members["lease_id"] = error.lease_id
    if error.task_id is not None:
        members["task_id"] = error.task_id
    if isinstance(error, core.PolicyDenied):
        basis = error.decision.basis
        members["decision"] = {
            "id": error.decision_id,
            "policy_ids": list(basis.policy_ids),
            "policy_hash": basis.policy_hash,
        }
    if isinstance(error, edge.InvalidInput):
        members["errors"] = [{"field": each.field, "message": each.message} for each in error.errors]
    return members


def _headers(error: BaseException, status: int) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    retry_after = error.retry_after_seconds if isinstance(error, core.BrokerError) else None
    if retry_after is None:
        retry_after = _RETRY_AFTER_SECONDS.get(status)
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(retry_after, 0)))
    if status == 401:  # noqa: PLR2004  RFC 9110 section 11.6.1: a 401 names its scheme
        headers.append((b"www-authenticate", b'Bearer realm="nhi-broker"'))
    if isinstance(error, edge.MethodNotAllowed):
        headers.append((b"allow", error.allow.encode("ascii", "ignore")))
    return headers


def render(error: BaseException, trace_id: str) -> Rendered:
    """Return status, headers and body of the problem that `error` is."""
    members = problem(error, trace_id)
    body = orjson.dumps(members)
    headers = [
        (b"content-type", CONTENT_TYPE),
        (b"content-length", b"%d" % len(body)),
        *_headers(error, members["status"]),
    ]
    return Rendered(members["status"], headers, body)


def markdown_table() -> str:
    """Return the table as it stands in ``docs/errors.md``, ordered by status, then by code."""
    lines = [
        "| status | type (after `urn:nhi-broker:problem:`) | title | what to do |",
        "| --- | --- | --- | --- |",
    ]
    rows = sorted(
        ((row.status, kind.code, row) for kind, row in TABLE.items() if kind not in _ABSTRACT),
        key=lambda each: each[:2],
    )
    lines += [f"| {status} | `{code}` | {row.title} | {row.remedy} |" for status, code, row in rows]
    return "\n".join(lines) + "\n"


_ABSTRACT: Final = frozenset({edge.EdgeError})
"""Has a row so that a new subclass is never a 500 by accident, and no occurrence of its own."""
