"""Answers of the broker, parsed once; no input or output happens here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from nhi_sdk.errors import FieldError, Problem, TransportError
from nhi_sdk.models import (
    AccessToken,
    CatalogItem,
    Credential,
    Decision,
    Lease,
    OtherSecret,
    PostgresLogin,
    Secret,
    Task,
    TaskEnd,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STATUS_SETTLED: Final = 200
_PROBLEM_PREFIX: Final = "urn:nhi-broker:problem:"
_RETRY_AFTER_SECONDS_MAX: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, its body read to the end. `headers` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the request succeeded."""
        return 200 <= self.status < 300  # noqa: PLR2004  RFC 9110 section 15.3

    def __repr__(self) -> str:
        return f"Answer(status={self.status})"  # a body may hold a secret


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`; raises ValueError for anything else."""
    value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def understood(parse: Callable[[Answer], Any]) -> Callable[[Answer], Any]:
    """Turn a parser's surprise into one `TransportError` that shows nothing of the body."""

    def parse_or_refuse(answer: Answer) -> Any:  # noqa: ANN401  typed by `Call.parse`
        try:
            return parse(answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            message = (
                "the broker's answer could not be understood: is NHI_BROKER_URL a broker's workload listener?"
            )
            raise TransportError(message, ambiguous=True) from None

    return parse_or_refuse


def problem_of(answer: Answer) -> Problem:
    """Return what a failed answer says; one that is no problem document says its status only."""
    try:
        document = json_object(answer.body)
    except (TypeError, ValueError):
        document = {}
    kind = _text(document, "type") or ""
    decision = document.get("decision")
    decision = decision if isinstance(decision, dict) else {}
    return Problem(
        status=answer.status,
        code=kind.removeprefix(_PROBLEM_PREFIX) if kind.startswith(_PROBLEM_PREFIX) else "",
        title=_text(document, "title") or f"HTTP status {answer.status}",
        detail=_text(document, "detail") or "",
        trace_id=_text(document, "trace_id"),
        lease_id=_text(document, "lease_id"),
        task_id=_text(document, "task_id"),
        decision_id=_text(decision, "id"),
        policy_ids=tuple(str(one) for one in _items(decision, "policy_ids")),
        policy_hash=_text(decision, "policy_hash"),
        errors=tuple(
            FieldError(str(one.get("field", "")), str(one.get("message", "")))
            for one in _items(document, "errors")
            if isinstance(one, dict)
        ),
        retry_after_seconds=_retry_after(answer.headers.get("retry-after")),
    )


def _text(document: Mapping[str, Any], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) else None


def _items(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    return value if isinstance(value, list) else []


def _retry_after(header: str | None) -> float | None:
    """Read the delay-seconds form of RFC 9110 section 10.2.3; the broker sends no dates."""
    if header is None or not header.isascii() or not header.isdigit():
        return None
    return min(float(header), _RETRY_AFTER_SECONDS_MAX)


def _moment(value: object) -> datetime:
    if not isinstance(value, str):
        raise TypeError("not a time")
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("a time without an offset")
    return moment


def _moment_or_none(value: object) -> datetime | None:
    return None if value is None else _moment(value)


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("not an integer")
    return value


def _int_or_none(value: object) -> int | None:
    return None if value is None else _int(value)


def _str_or_none(value: object) -> str | None:
    return None if value is None else _str(value)


def _strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TypeError("not a list")
    return tuple(_str(one) for one in value)


def _secret(document: Mapping[str, Any]) -> Secret:
    kind = _str(document["kind"])
    if kind == "postgresql_login":
        return PostgresLogin(
            host=_str(document["host"]),
            port=_int(document["port"]),
            database=_str(document["database"]),
            username=_str(document["username"]),
            password=_str(document["password"]),
            sslmode=_str(document["sslmode"]),
        )
    if kind == "access_token":
        return AccessToken(
            access_token=_str(document["access_token"]),
            token_type=_str(document["token_type"]),
            issuer=_str(document["issuer"]),
            audience=_str(document["audience"]),
            expires_in=_int(document["expires_in"]),
        )
    return OtherSecret(kind=kind, fields={name: value for name, value in document.items() if name != "kind"})


def credential_parser(resource: str, action: str) -> Callable[[Answer], Credential]:
    """Return a parser for the answer to a credential request."""

    def parse(answer: Answer) -> Credential:
        document = json_object(answer.body)
        decision = document["decision"]
        return Credential(
            lease_id=_str(document["lease_id"]),
            task_id=_str(document["task_id"]),
            resource=resource,
            action=action,
            state=_str(document["state"]),
            secret=_secret(document["credential"]),
            issued_at=_moment(document["issued_at"]),
            expires_at=_moment(document["expires_at"]),
            renewable=bool(document["renewable"]),
            revocability=_str(document["revocability"]),
            decision=Decision(
                id=_str(decision["id"]),
                policy_ids=_strings(decision["policy_ids"]),
                policy_hash=_str(decision["policy_hash"]),
            ),
        )

    return parse


def _lease(document: Mapping[str, Any]) -> Lease:
    return Lease(
        lease_id=_str(document["lease_id"]),
        task_id=_str(document["task_id"]),
        resource=_str(document["resource"]),
        action=_str(document["action"]),
        adapter=_str(document["adapter"]),
        state=_str(document["state"]),
        cause=_str_or_none(document.get("cause")),
        issued_at=_moment_or_none(document.get("issued_at")),
        expires_at=_moment_or_none(document.get("expires_at")),
        ended_at=_moment_or_none(document.get("ended_at")),
        revocability=_str(document["revocability"]),
        stuck=bool(document.get("stuck")),
        evidence=document.get("evidence"),
    )


def lease(answer: Answer) -> Lease:
    """Parse a lease view."""
    return _lease(json_object(answer.body))


def _task(document: Mapping[str, Any]) -> Task:
    return Task(
        task_id=_str(document["task_id"]),
        state=_str(document["state"]),
        purpose=_str(document["purpose"]),
        description=_str_or_none(document.get("description")) or "",
        resources=_strings(document.get("resources")),
        actions=_strings(document.get("actions")),
        classification_max=_str_or_none(document.get("classification_max")),
        budget_leases=_int_or_none(document.get("budget_leases")),
        leases_issued=_int(document.get("leases_issued", 0)),
        inline=bool(document.get("inline")),
        opened_at=_moment(document["opened_at"]),
        deadline_at=_moment(document["deadline_at"]),
        ended_at=_moment_or_none(document.get("ended_at")),
        end_cause=_str_or_none(document.get("end_cause")),
    )


def task(answer: Answer) -> Task:
    """Parse a task view."""
    return _task(json_object(answer.body))


def task_end(answer: Answer) -> TaskEnd:
    """Parse the answer to a task's end: 200 when nothing is left to do, 202 before that."""
    document = json_object(answer.body)
    return TaskEnd(
        task=_task(document["task"]),
        leases=tuple(_lease(one) for one in document["leases"]),
        settled=answer.status == STATUS_SETTLED,
    )


def _catalog_item(document: Mapping[str, Any]) -> CatalogItem:
    return CatalogItem(
        resource=_str(document["resource"]),
        action=_str(document["action"]),
        title=_str_or_none(document.get("title")) or "",
        effect=_str_or_none(document.get("effect")) or "",
        classification=_str_or_none(document.get("classification")) or "",
        environment=_str_or_none(document.get("environment")) or "",
        owner=_str_or_none(document.get("owner")) or "",
        kind=_str_or_none(document.get("kind")) or "",
        ttl_seconds_default=_int_or_none(document.get("ttl_seconds_default")),
        ttl_seconds_max=_int_or_none(document.get("ttl_seconds_max")),
        revocability=_str_or_none(document.get("revocability")) or "",
    )


@dataclass(frozen=True, slots=True)
class CatalogPage:
    """One page of the catalog; `next` is the cursor of the following one."""

    items: tuple[CatalogItem, ...]
    next: str | None


def catalog_page(answer: Answer) -> CatalogPage:
    """Parse one page of the catalog."""
    document = json_object(answer.body)
    return CatalogPage(
        items=tuple(_catalog_item(one) for one in document["items"]),
        next=_str_or_none(document.get("next")),
    )
