"""The ports: interfaces with at least two implementations each (DESIGN 3).

`Adapter` is the one strangers implement; ``docs/adding-an-adapter.md`` walks through it
and ``adapters/conformance.py`` tests every word of these docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from broker.core.ids import LeaseId, TaskId
    from broker.core.secret import Secret
    from broker.core.spiffe_id import SpiffeId

NATIVE_EXPIRY_MARGIN_SECONDS: Final = 60
"""How much later than the broker the backend's own expiry strikes, as the backstop."""


class Naming(StrEnum):
    """Who names the backend's object."""

    DETERMINISTIC = "deterministic"
    TWO_STEP = "two_step"
    ASSIGNED = "assigned"


class Fence(StrEnum):
    """What stops a mint that is still in flight when the revocation runs.

    ``strong``: after `Adapter.revoke` no earlier mint call can produce a live object.
    ``none``: only waiting `Capabilities.t_inflight_seconds` and looking again does.
    """

    STRONG = "strong"
    NONE = "none"


class Effect(StrEnum):
    """How soon a revocation takes hold."""

    IMMEDIATE = "immediate"
    EVENTUAL = "eventual"
    EXPIRY_ONLY = "expiry_only"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Revocability:
    """Declared per adapter and recipe, usable in policy. `bound_seconds` only for EVENTUAL."""

    effect: Effect
    bound_seconds: int | None = None

    def __str__(self) -> str:
        return self.effect if self.bound_seconds is None else f"{self.effect}({self.bound_seconds}s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an adapter can do. The conformance suite exercises each declaration.

    Attributes:
        external_effect: whether `mint` changes anything outside the broker.
        naming: who names the object.
        fence: what stops a mint in flight.
        revocability: how soon revocation takes hold.
        cuts_sessions: whether revocation ends sessions opened before it.
        listable: whether `scan` can list what is alive.
        needs_secret_to_revoke: whether the secret must be kept, sealed, until the end.
        expiry_ends_sessions: whether native expiry alone ends everything.
        ttl_seconds_min, ttl_seconds_max: what the backend accepts.
        t_inflight_seconds: the longest a mint can still take effect after its call was given
            up: connect + statement + lock timeouts + margin.

    """

    external_effect: bool
    naming: Naming
    fence: Fence
    revocability: Revocability
    cuts_sessions: bool
    listable: bool
    needs_secret_to_revoke: bool
    expiry_ends_sessions: bool
    ttl_seconds_min: int
    ttl_seconds_max: int
    t_inflight_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MintRequest:
    """Everything an adapter may know of a mint.

    Attributes:
        backend_name: the object's name, derived from the lease id.
        recipe: the catalog's adapter-specific recipe, validated by the adapter at start.
        now_ms, expires_ms: the broker's times; `not_after_ms` is what the backend is told.
        status_index: position in the status lists, for adapters that issue tokens.

    """

    lease_id: LeaseId
    task_id: TaskId
    identity: SpiffeId
    backend_name: str
    resource: str
    action: str
    recipe: Mapping[str, object]
    now_ms: int
    expires_ms: int
    not_after_ms: int
    handle: str | None = None
    status_index: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What the caller gets; typed by `kind`.

    Attributes:
        kind: ``postgresql_login``, ``access_token``, …; the API's discriminator.
        public: fields that may be logged (host, port, user name).
        secret: fields that may not.

    """

    kind: str
    public: Mapping[str, str | int]
    secret: Mapping[str, Secret[str]]

    def reveal(self) -> dict[str, str | int]:
        """Return all fields with secrets in clear: only for the answer to its owner."""
        return {"kind": self.kind, **self.public, **{k: v.reveal() for k, v in self.secret.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Minted:
    """A mint the backend acknowledged.

    Attributes:
        handle: recorded with the lease and given back to revoke, verify.
        keep: the secret to seal, only where `Capabilities.needs_secret_to_revoke`.

    """

    credential: Credential
    handle: str | None = None
    keep: Secret[bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to revoke or verify: enough to act from the lease id alone."""

    lease_id: LeaseId
    backend_name: str
    recipe: Mapping[str, object]
    handle: str | None = None
    kept: Secret[bytes] | None = None


class Presence(StrEnum):
    """What verification saw. UNKNOWN is never success (DESIGN 4, rule 6)."""

    ABSENT = "absent"
    PRESENT = "present"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What the backend said when asked; `evidence` is kept with the lease and in the audit."""

    presence: Presence
    evidence: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One live object of ours that a scan saw. `created_ms` None where the backend does not say."""

    backend_name: str
    created_ms: int | None = None
    handle: str | None = None


class ErrorClass(StrEnum):
    """What an error of the backend means for the lease.

    ``retry``: ambiguous or passing: it may have taken effect.
    ``permanent``: refused; the adapter is certain that nothing was minted.
    ``gone``: the object is not there.
    """

    RETRY = "retry"
    PERMANENT = "permanent"
    GONE = "gone"


class Liveness(StrEnum):
    """What using a credential showed."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One start-up check of an adapter's own rights.

    Attributes:
        name: what was checked, as a person would say it.
        ok: whether it holds.
        remedy: what to do where it does not, with the statement to run.

    """

    name: str
    ok: bool
    remedy: str = ""


class Adapter(Protocol):
    """Mints, revokes, verifies and scans in one configured backend.

    One instance per configured backend, safe for concurrent use, never reads the ledger.
    Every call carries its own total deadline. `revoke` is idempotent: of an absent, an
    already revoked or a never minted object it succeeds, and with `Fence.STRONG` it
    leaves a fence behind even then.
    """

    @property
    def name(self) -> str:
        """The configured backend's name, as the catalog refers to it."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this adapter declares."""
        ...

    def validate_recipe(self, recipe: Mapping[str, object]) -> list[str]:
        """Return what is wrong with a catalog recipe, each a sentence; empty when nothing is."""
        ...

    async def prepare(self, request: MintRequest) -> str | None:
        """Create the handle that kills what `mint` makes; only `Naming.TWO_STEP` returns one."""
        ...

    async def mint(self, request: MintRequest) -> Minted:
        """Create the credential. Any exception is given to `classify`."""
        ...

    async def revoke(self, target: Target) -> None:
        """Fence, cut sessions, remove. Returns once the backend accepted it."""
        ...

    async def verify(self, target: Target) -> Verification:
        """Ask the backend whether anything of the lease is left."""
        ...

    def scan(self, recipes: Sequence[Mapping[str, object]]) -> AsyncIterator[Found]:
        """Yield every live object that carries our instance tag."""
        ...

    def classify(self, error: Exception) -> ErrorClass:
        """Say what an exception of `mint`, `revoke` or `verify` means. RETRY when in doubt."""
        ...

    async def check(self, recipes: Sequence[Mapping[str, object]]) -> list[Check]:
        """Check that our own rights suffice to mint and to revoke, and name what is missing."""
        ...

    async def probe(self, credential: Credential) -> Liveness:
        """Use the credential and say whether it works."""
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key others check tokens with.

    Attributes:
        jwk: public JWK members, `kid`, `alg` and `use` among them.

    """

    kid: str
    algorithm: str
    jwk: Mapping[str, str]


class KeyStore(Protocol):
    """Signing, digest and sealing keys: outlive restarts, shared by replicas, never in the database."""

    @property
    def jwks_cache_seconds(self) -> int:
        """How long verifiers may cache `token_keys`; rotation counts on it."""
        ...

    def sign_token(self, header: Mapping[str, object], payload: bytes, *, algorithm: str) -> str:
        """Return a JWS compact serialization; `header` gets the current key's `kid` and `alg`."""
        ...

    def token_keys(self) -> tuple[VerificationKey, ...]:
        """Return every public key that may verify a live token: next, current and retiring."""
        ...

    def rotate_token_keys(self, now_ms: int) -> bool:
        """Advance next -> current -> retiring where due; say whether anything changed."""
        ...

    def sign_audit_head(self, head: bytes) -> tuple[str, bytes]:
        """Return (key id, Ed25519 signature) over a canonical audit head."""
        ...

    def audit_keys(self) -> Mapping[str, bytes]:
        """Return every audit public key, raw 32 bytes by key id, retired ones included."""
        ...

    def digest(self, secret: bytes) -> str:
        """Return ``<key id>:<HMAC-SHA256 hex>``: finds a leaked secret's lease without storing it."""
        ...

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt with authenticated `context` (AES-256-GCM); the key id is part of the result."""
        ...

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt what `seal` made; raises ValueError where either input was changed."""
        ...

    def derive(self, label: str) -> bytes:
        """Return 32 stable bytes for one purpose (HKDF over the digest key)."""
        ...
