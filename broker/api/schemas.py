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

    # Parameters that we do not know are ignored, as RFC 6749 section 3.2 asks.
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

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

    cursor: Annotated[str, StringConstraints(min_length=1, max_length=3072, pattern=r"^[A-Za-z0-9_-]+$")] | (
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
    from_: Annotated[Time | None, Field(alias="from", description="Records at or after this time.")] = None
    to: Annotated[Time | None, Field(description="Records before this time.")] = None
    texts: Annotated[bool, Field(description="Whether free texts are shown in clear.")] = False


class ProveRequest(Strict):
    """Body of ``POST /adapters/prove``; without an action the resource's first is taken."""

    resource: Word
    action: Word | None = None


class NoBody(Strict):
    """Body of what needs none: nothing, or the empty object."""


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
    task_id: TaskIdText | None
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
    """Answer of ``GET /catalog``; `next` is the cursor of the page after this one."""

    items: tuple[CatalogItem, ...]
    next: str | None


# --- tokens that others check ---------------------------------------------------------------------


class Jwk(BaseModel):
    """One public key (RFC 7517); members beyond these depend on its type."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="allow")

    kty: str
    kid: str
    alg: str
    use: Literal["sig"]


class Jwks(Strict):
    """Answer of ``GET /oauth2/jwks``."""

    keys: tuple[Jwk, ...]


class Introspection(Strict):
    """Answer of ``POST /oauth2/introspect``: of an inactive token, `active` alone."""

    active: bool
    token_type: str | None = None
    iss: str | None = None
    sub: str | None = None
    client_id: str | None = None
    aud: str | None = None
    scope: str | None = None
    jti: str | None = None
    iat: int | None = None
    exp: int | None = None
    task: str | None = None


class ServerMetadata(Strict):
    """Answer of ``GET /.well-known/oauth-authorization-server`` (RFC 8414)."""

    issuer: str
    jwks_uri: str
    introspection_endpoint: str
    introspection_endpoint_auth_methods_supported: tuple[str, ...]
    response_types_supported: tuple[str, ...]
    grant_types_supported: tuple[str, ...]


# --- operator listener: what goes out -------------------------------------------------------------


class OperatorLease(LeaseView):
    """One lease as operators see it."""

    identity: str | None
    backend_name: str
    created_at: Time
    next_try_at: Time | None
    attempts: int
    first_failed_at: Time | None
    last_error: str | None


class LeasePage(Strict):
    """Answer of ``GET /leases``."""

    items: tuple[OperatorLease, ...]
    next: str | None


class IdentityView(Strict):
    """One inventory record. Empty texts stand for what nobody has said."""

    spiffe_id: SpiffeIdText
    kind: str
    lifecycle: str
    owner: str
    backup_owner: str
    team: str
    environment: str
    purpose: str
    criticality: str
    source: str
    owner_source: str
    orphan: bool
    first_seen_at: Time | None
    last_used_at: Time | None
    created_at: Time


class IdentityDetail(IdentityView):
    """Answer of ``GET /identity``: the record, and leases that have not ended (a page of them)."""

    leases: tuple[OperatorLease, ...]


class IdentityPage(Strict):
    """Answer of ``GET /identities``."""

    items: tuple[IdentityView, ...]
    next: str | None


Scope: TypeAlias = Literal["task", "identity", "owner", "resource"]


class KillView(Strict):
    """One killed scope."""

    scope: Scope
    value: str
    reason: str
    actor: str
    at: Time


class KillPage(Strict):
    """Answer of ``GET /kills``."""

    items: tuple[KillView, ...]
    next: str | None


class KillAnswer(Strict):
    """Answer of ``POST /kill``: what was moved at once; the sweeper proves the rest."""

    scope: Scope
    value: str
    tasks_ended: int
    leases_moved: int


class LiftAnswer(Strict):
    """Answer of ``POST /kill/lift``."""

    scope: Scope
    value: str


class FindingView(Strict):
    """One failed check that is still open."""

    check: str
    subject: str
    evidence: dict[str, Any]
    opened_at: Time


class FindingPage(Strict):
    """Answer of ``GET /findings``."""

    items: tuple[FindingView, ...]
    next: str | None


class BackendView(Strict):
    """One backend; `kind` is null where leases remain of one that is no longer configured."""

    name: str
    kind: str | None
    live: int
    stuck: int
    breaker: Literal["closed", "open"]


class LedgerView(Strict):
    """The ledger's writer."""

    waiting: int
    failure: str | None
    audit_seq: int


class ReadinessView(Strict):
    """Answer of ``/readyz``: each thing that is not ready, by name."""

    ready: bool
    problems: dict[str, str]


class StatusView(Strict):
    """Answer of ``GET /status``."""

    instance: str
    version: str
    policy_hash: Hash
    live: int
    stuck: int
    backends: tuple[BackendView, ...]
    ledger: LedgerView
    readiness: ReadinessView


class ScanView(Strict):
    """What the scan of one backend found."""

    backend: str
    seen: int
    orphans: int
    gone: int


class ScanAnswer(Strict):
    """Answer of ``POST /scan``; backends that could not be scanned are under `failed`."""

    scanned: tuple[ScanView, ...]
    failed: tuple[str, ...]


class CheckView(Strict):
    """What an adapter says of one of the broker's rights in its backend."""

    name: str
    ok: bool
    remedy: str


class ProveStep(Strict):
    """One thing that was tried on the operator's own backend."""

    name: str
    ok: bool
    milliseconds: int
    detail: dict[str, Any]


class ProveAnswer(Strict):
    """Answer of ``POST /adapters/prove``; where a right is missing nothing was minted."""

    backend: str
    resource: str
    action: str
    proven: bool
    lease_id: LeaseIdText | None
    checks: tuple[CheckView, ...]
    steps: tuple[ProveStep, ...]


class AuditKeys(Strict):
    """Answer of ``GET /audit/keys``: Ed25519 public keys in base64, by key id."""

    keys: dict[str, str]
    origin: str


# --- ops listener ---------------------------------------------------------------------------------


class Health(Strict):
    """Answer of ``/healthz``."""

    status: Literal["ok"]


# --- errors ---------------------------------------------------------------------------------------


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
