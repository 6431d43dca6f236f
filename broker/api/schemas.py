"""The HTTP contract as strict, frozen models: what may come in, and what goes out.

Requests are validated with them (`strict_json.read_model`). Answers of hot routes are
rendered from plain dicts (`broker.api.views`); their models feed the OpenAPI document,
and tests hold the dicts to them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from broker.core.ids import DecisionId, LeaseId, TaskId
from broker.core.task import LEASES_PER_TASK_MAX

DEADLINE_SECONDS_MAX: Final = 7 * 86_400
TTL_SECONDS_MAX: Final = 7 * 86_400
LIST_LENGTH_MAX: Final = 64
PAGE_LENGTH_MAX: Final = 500

# No control characters, line or paragraph separators, or marks that reorder what a person
# reads: free text ends up on terminals and in tables.
PLAIN_TEXT: Final = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*$"
WORD: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
SPIFFE_ID: Final = r"^spiffe://[A-Za-z0-9._/-]+$"
LEASE_ID: Final = rf"^{LeaseId.prefix}[a-z2-7]{{16}}$"
TASK_ID: Final = rf"^{TaskId.prefix}[a-z2-7]{{16}}$"
DECISION_ID: Final = rf"^{DecisionId.prefix}[a-z2-7]{{16}}$"
TIME: Final = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"
HASH: Final = r"^[0-9a-f]{64}$"

FORM_MESSAGES: Final = {
    PLAIN_TEXT: "must be plain text without control characters, line breaks or direction marks",
    WORD: "must start with a letter or digit and hold only letters, digits and . _ : / -",
    SPIFFE_ID: "must be a SPIFFE ID: spiffe://<trust domain>/<path>",
    LEASE_ID: "must be a lease id: lse_ and 16 characters",
    TASK_ID: "must be a task id: tsk_ and 16 characters",
}
"""What is said where a text breaks its pattern."""

Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=PLAIN_TEXT)]
ShortText: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=PLAIN_TEXT)]
Word: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=WORD)]
SpiffeIdText: TypeAlias = Annotated[str, StringConstraints(max_length=2048, pattern=SPIFFE_ID)]
LeaseIdText: TypeAlias = Annotated[str, StringConstraints(pattern=LEASE_ID)]
TaskIdText: TypeAlias = Annotated[str, StringConstraints(pattern=TASK_ID)]
DecisionIdText: TypeAlias = Annotated[str, StringConstraints(pattern=DECISION_ID)]
Time: TypeAlias = Annotated[
    str, StringConstraints(pattern=TIME), Field(examples=["2026-11-20T12:00:00.000Z"])
]
Hash: TypeAlias = Annotated[str, StringConstraints(pattern=HASH)]
Words: TypeAlias = Annotated[tuple[Word, ...], Field(max_length=LIST_LENGTH_MAX)]
TtlSeconds: TypeAlias = Annotated[int, Field(ge=1, le=TTL_SECONDS_MAX)]
DeadlineSeconds: TypeAlias = Annotated[int, Field(ge=1, le=DEADLINE_SECONDS_MAX)]
Classification: TypeAlias = Literal["public", "internal", "confidential", "restricted"]
Scalar: TypeAlias = str | int | bool


class Strict(BaseModel):
    """Unknown fields refused, no coercion, immutable."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )


# --- workload listener: what comes in -----------------------------------------------------------


class IntentIn(Strict):
    """What the caller says it is about to do."""

    tool: Word
    reason: Text


class InlineTaskIn(Strict):
    """A task that is opened by the credential request and ends with its only lease."""

    purpose: Word
    description: Text | None = None
    deadline_seconds: DeadlineSeconds | None = None


_BY_ID: Final = "(id)"
_INLINE: Final = "(inline)"


def _task_form(value: Any) -> str:  # noqa: ANN401  pydantic hands over whatever came in
    return _INLINE if isinstance(value, dict | InlineTaskIn) else _BY_ID


class CredentialRequest(Strict):
    """Body of ``POST /credentials/request``."""

    task: Annotated[
        Annotated[TaskIdText, Tag(_BY_ID)] | Annotated[InlineTaskIn, Tag(_INLINE)],
        Discriminator(_task_form),
    ]
    resource: Word
    action: Word
    intent: IntentIn
    ttl_seconds: TtlSeconds | None = None


class ReasonIn(Strict):
    """Body of ``…/revoke`` and ``…/end``; may be absent altogether."""

    reason: Text | None = None


class TaskRequest(Strict):
    """Body of ``POST /tasks``. Empty bounds mean no bound beyond policy."""

    purpose: Word
    description: Text | None = None
    resources: Words = ()
    actions: Words = ()
    classification_max: Classification | None = None
    budget_leases: Annotated[int, Field(ge=1, le=LEASES_PER_TASK_MAX)] | None = None
    deadline_seconds: DeadlineSeconds | None = None


class IntrospectionForm(Strict):
    """Form of ``POST /oauth2/introspect`` (RFC 7662 section 2.1)."""

    token: Annotated[str, StringConstraints(min_length=1, max_length=16_384, pattern=r"^[\x21-\x7e]+$")]
    token_type_hint: ShortText | None = None


# --- operator listener: what comes in -----------------------------------------------------------


ONE_SCOPE: Final = "name exactly one of task, identity, owner, resource"


class KillRequest(Strict):
    """Body of ``POST /kill``: exactly one scope, and why."""

    task: TaskIdText | None = None
    identity: SpiffeIdText | None = None
    owner: ShortText | None = None
    resource: Word | None = None
    reason: Text

    @model_validator(mode="after")
    def _one_scope(self) -> KillRequest:
        if sum(scope is not None for scope in (self.task, self.identity, self.owner, self.resource)) != 1:
            raise ValueError(ONE_SCOPE)
        return self


class RequiredReasonIn(Strict):
    """Body of ``POST /leases/{id}/abandon``."""

    reason: Text


class OwnerRequest(Strict):
    """Body of ``POST /identity/owner``."""

    spiffe_id: SpiffeIdText
    owner: ShortText
    team: ShortText | None = None
    environment: ShortText | None = None


class LifecycleRequest(Strict):
    """Body of ``POST /identity/suspend`` and ``/identity/resume``."""

    spiffe_id: SpiffeIdText
    reason: Text


class Page(Strict):
    """Query parameters of every list."""

    cursor: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.=-]+$")] | (
        None
    ) = None
    limit: Annotated[int, Field(ge=1, le=PAGE_LENGTH_MAX)] = 100


class LeasesQuery(Page):
    """Query of ``GET /leases``."""

    stuck: bool | None = None
    state: (
        Literal[
            "intent",
            "prepared",
            "active",
            "revoke_pending",
            "verifying",
            "revoked",
            "failed",
            "expired",
            "handed_out",
            "abandoned",
        ]
        | None
    ) = None


class IdentitiesQuery(Page):
    """Query of ``GET /identities``."""

    q: ShortText | None = None


class IdentityQuery(Strict):
    """Query of ``GET /identity``."""

    spiffe_id: SpiffeIdText


class AuditQuery(Strict):
    """Query of ``GET /audit/export``: every filter narrows; none exports all."""

    lease: LeaseIdText | None = None
    task: TaskIdText | None = None
    identity: SpiffeIdText | None = None
    since: Time | None = None
    until: Time | None = None


# --- what goes out ------------------------------------------------------------------------------


class DecisionOut(Strict):
    """Which policies settled it."""

    id: DecisionIdText
    policy_ids: tuple[str, ...]
    policy_hash: Hash


class PostgresqlLogin(Strict):
    """A login that works until it is revoked."""

    kind: Literal["postgresql_login"]
    host: str
    port: int
    database: str
    username: str
    password: str
    sslmode: str


class AccessToken(Strict):
    """A bearer token of our own issuer."""

    kind: Literal["access_token"]
    access_token: str
    token_type: Literal["Bearer"]
    issuer: str
    audience: str
    expires_in: int


class CredentialAnswer(Strict):
    """Answer of ``POST /credentials/request``."""

    lease_id: LeaseIdText
    task_id: TaskIdText
    state: str
    credential: Annotated[PostgresqlLogin | AccessToken, Field(discriminator="kind")]
    issued_at: Time
    expires_at: Time
    renewable: bool
    revocability: str
    decision: DecisionOut


class LeaseView(Strict):
    """One lease, without its secret."""

    lease_id: LeaseIdText
    task_id: TaskIdText
    resource: str
    action: str
    adapter: str
    state: str
    cause: str
    issued_at: Time | None
    expires_at: Time
    ended_at: Time | None
    revocability: str
    stuck: bool
    evidence: dict[str, Scalar] | None


class TaskView(Strict):
    """One task."""

    task_id: TaskIdText
    state: Literal["open", "ended"]
    purpose: str
    description: str
    resources: tuple[str, ...]
    actions: tuple[str, ...]
    classification_max: str | None
    budget_leases: int
    leases_issued: int
    inline: bool
    opened_at: Time
    deadline_at: Time
    ended_at: Time | None
    end_cause: str | None


class TaskEnded(Strict):
    """Answer of ``POST /tasks/{id}/end``."""

    task: TaskView
    leases: tuple[LeaseView, ...]


class CatalogItem(Strict):
    """One thing this caller could be allowed to ask for."""

    resource: str
    title: str
    action: str
    effect: str
    classification: str
    environment: str
    owner: str
    kind: str
    ttl_seconds_default: int
    ttl_seconds_max: int
    revocability: str


class CatalogPage(Strict):
    """Answer of ``GET /catalog``."""

    items: tuple[CatalogItem, ...]
    next: str | None


class FieldProblem(Strict):
    """One wrong field of an ``invalid-input`` problem."""

    field: str
    message: str


class Problem(Strict):
    """Every error (RFC 9457)."""

    type: Annotated[str, StringConstraints(pattern=r"^urn:nhi-broker:problem:[a-z-]+$")]
    title: str
    status: int
    detail: str
    trace_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    lease_id: LeaseIdText | None = None
    task_id: TaskIdText | None = None
    decision: DecisionOut | None = None
    errors: tuple[FieldProblem, ...] | None = None
