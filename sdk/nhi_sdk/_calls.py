"""Requests to the broker, built once for both clients; no input or output happens here."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

from nhi_sdk import _wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nhi_sdk.models import Credential, Lease, Task, TaskEnd

T = TypeVar("T")

WAIT_SECONDS_MAX: Final = 30
"""The longest the broker holds an answer back for proof (``Prefer: wait``)."""

CATALOG_PAGES_MAX: Final = 100
STATUS_UNAUTHENTICATED: Final = 401


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request and how to read its answer.

    Every call may be sent again: reads, ends and revocations are idempotent, and what
    opens or issues carries an Idempotency-Key that stays the same on each attempt.

    Attributes:
        wait_seconds: how long the broker may hold the answer back.

    """

    method: str
    path: str
    parse: Callable[[_wire.Answer], T]
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str]
    wait_seconds: int = 0

    def content(self) -> bytes | None:
        """Return the body's bytes."""
        return None if self.body is None else json.dumps(self.body).encode()


def _headers(*, body: bool, key: str | None = None, wait: int = 0) -> dict[str, str]:
    # No compressed answers: a bound on bytes read is then a bound on memory.
    headers = {"Accept": "application/json, application/problem+json", "Accept-Encoding": "identity"}
    if body:
        headers["Content-Type"] = "application/json"
    if key is not None:
        headers["Idempotency-Key"] = key
    if wait:
        headers["Prefer"] = f"wait={wait}"
    return headers


def new_idempotency_key() -> str:
    """Draw a key (128 bits); one request keeps it over all its attempts."""
    return secrets.token_hex(16)


def _present(**fields: Any) -> dict[str, Any]:  # noqa: ANN401  JSON values
    return {name: value for name, value in fields.items() if value is not None}


def _segment(text: str) -> str:
    """Escape an id for a path, so that a stray one cannot reach another route."""
    escaped = quote(text, safe="")
    if not escaped or escaped.strip(".") == "":
        raise ValueError("an id cannot be empty or made of dots")
    return escaped


def _bounded_wait(wait: int | None) -> int:
    return 0 if wait is None else max(0, min(int(wait), WAIT_SECONDS_MAX))


def open_task(
    purpose: str,
    *,
    description: str | None = None,
    resources: Sequence[str] | None = None,
    actions: Sequence[str] | None = None,
    classification_max: str | None = None,
    budget_leases: int | None = None,
    deadline_seconds: int | None = None,
    idempotency_key: str | None = None,
) -> Call[Task]:
    """``POST /tasks``."""
    body = _present(
        purpose=purpose,
        description=description,
        resources=None if resources is None else list(resources),
        actions=None if actions is None else list(actions),
        classification_max=classification_max,
        budget_leases=budget_leases,
        deadline_seconds=deadline_seconds,
    )
    key = idempotency_key or new_idempotency_key()
    return Call(
        method="POST",
        path="/tasks",
        body=body,
        headers=_headers(body=True, key=key),
        parse=_wire.understood(_wire.task),
    )


def read_task(task_id: str) -> Call[Task]:
    """``GET /tasks/{id}``."""
    return Call(
        method="GET",
        path=f"/tasks/{_segment(task_id)}",
        headers=_headers(body=False),
        parse=_wire.understood(_wire.task),
    )


def end_task(task_id: str, *, reason: str | None = None, wait: int | None = None) -> Call[TaskEnd]:
    """``POST /tasks/{id}/end``."""
    bounded = _bounded_wait(wait)
    return Call(
        method="POST",
        path=f"/tasks/{_segment(task_id)}/end",
        body=_present(reason=reason),
        headers=_headers(body=True, wait=bounded),
        parse=_wire.understood(_wire.task_end),
        wait_seconds=bounded,
    )


def request_credential(
    resource: str,
    action: str,
    *,
    task: str | Mapping[str, Any],
    tool: str,
    reason: str,
    ttl_seconds: int | None = None,
    idempotency_key: str | None = None,
) -> Call[Credential]:
    """``POST /credentials/request``; `task` is an id, or an inline task."""
    body = _present(
        task=task,
        resource=resource,
        action=action,
        intent={"tool": tool, "reason": reason},
        ttl_seconds=ttl_seconds,
    )
    key = idempotency_key or new_idempotency_key()
    return Call(
        method="POST",
        path="/credentials/request",
        body=body,
        headers=_headers(body=True, key=key),
        parse=_wire.understood(_wire.credential_parser(resource, action)),
    )


def task_or_inline(task: str | None, purpose: str | None) -> str | dict[str, str]:
    """Return a task's id, or a task that the request opens and that ends with its only lease.

    Raises:
        TypeError: both or neither were given.

    """
    if task is not None and purpose is None:
        return task
    if purpose is not None and task is None:
        return {"purpose": purpose}
    raise TypeError("give either the id of a task, or the purpose of one opened for this credential alone")


def read_lease(lease_id: str) -> Call[Lease]:
    """``GET /credentials/{lease}``."""
    return Call(
        method="GET",
        path=f"/credentials/{_segment(lease_id)}",
        headers=_headers(body=False),
        parse=_wire.understood(_wire.lease),
    )


def revoke_lease(lease_id: str, *, reason: str | None = None, wait: int | None = None) -> Call[Lease]:
    """``POST /credentials/{lease}/revoke``."""
    bounded = _bounded_wait(wait)
    return Call(
        method="POST",
        path=f"/credentials/{_segment(lease_id)}/revoke",
        body=_present(reason=reason),
        headers=_headers(body=True, wait=bounded),
        parse=_wire.understood(_wire.lease),
        wait_seconds=bounded,
    )


def catalog(cursor: str | None = None) -> Call[_wire.CatalogPage]:
    """``GET /catalog``."""
    query = "" if cursor is None else "?" + urlencode({"cursor": cursor})
    return Call(
        method="GET",
        path=f"/catalog{query}",
        headers=_headers(body=False),
        parse=_wire.understood(_wire.catalog_page),
    )
