"""Tokens that others can check: introspection, keys and status lists.

The ledger is the truth about own tokens: introspection answers inactive from the commit
that ended the lease. A resource server that checks the signature alone sees only expiry.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import orjson

from broker.core.clock import MS_PER_SECOND
from broker.core.errors import UnknownObject
from broker.core.lease import LeaseState
from broker.core.status_list import SIZE, encode, status_list_claims
from broker.service.admit import BARRED
from broker.service.status_indices import STATUS_COUNTER
from inventory import identities, kills, ledger, meta

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.audit import JsonValue
    from broker.core.caller import Caller
    from broker.core.lease import Lease
    from broker.core.ports import VerificationKey
    from broker.keys.own_tokens import TokenClaims, TokenReader
    from broker.service.context import Context

STATUS_LIST_TTL_SECONDS: Final = 15
"""How long a verifier may keep a status list: the bound on its staleness."""

STATUS_LIST_LIFETIME_SECONDS: Final = 600
"""From when no verifier may use a list any more; its key is published for longer than that."""

STATUS_SKEW_SECONDS: Final = 300
"""How far behind ours a verifier's clock may be: it still accepts what has expired here, so the
bit of an ended token stays set that much longer."""

STATUS_LIST_REBUILD_MS: Final = 1000
"""A list is rebuilt at most once a second, however many ask."""

LISTS_MAX: Final = 1 << 20
INACTIVE: Final[Mapping[str, JsonValue]] = {"active": False}


@dataclass(slots=True)
class _CachedList:
    token: str
    built_ms: int
    keys: tuple[VerificationKey, ...]


class Tokens:
    """Serves `/oauth2/*` and `/statuslists/*`."""

    def __init__(self, ctx: Context, reader: TokenReader, *, issuer: str, algorithm: str) -> None:
        self._ctx = ctx
        self._reader = reader
        self._issuer = issuer
        self._algorithm = algorithm
        self._lists: dict[int, _CachedList] = {}
        self._building: dict[int, asyncio.Future[str]] = {}

    def introspect(self, caller: Caller, token: str) -> Mapping[str, JsonValue]:
        """Say whether a token is active (RFC 7662 §2.2).

        More than ``{"active": false}`` goes only to the token's audience or its holder;
        unknown, foreign, ended and killed tokens all answer alike.
        """
        now_ms = self._ctx.clock.now_ms()
        own = self._reader.read(token, now_ms)
        if own is None:
            return INACTIVE
        lease = ledger.get(self._ctx.store.reader, own.lease_id)
        if lease is None or lease.state is not LeaseState.ACTIVE:
            return INACTIVE
        if caller.spiffe_id not in {own.audience, lease.identity}:
            return INACTIVE
        if lease.expires_ms <= now_ms:
            return INACTIVE
        if self._is_barred(lease):
            return INACTIVE
        return _active(own)

    def _is_barred(self, lease: Lease) -> bool:
        """Whether the holder was suspended or its scope killed: both close first and move leases later."""
        holder = identities.get(self._ctx.store.reader, lease.identity)
        if holder is None or holder.lifecycle in BARRED:
            return True
        kill = kills.find(
            self._ctx.store.reader, identity=lease.identity, owner=holder.owner, resource=lease.resource
        )
        return kill is not None

    @property
    def jwks_cache_seconds(self) -> int:
        """How long verifiers may cache the keys."""
        return self._ctx.keys.jwks_cache_seconds

    def jwks(self) -> dict[str, JsonValue]:
        """Return every public key that may verify a live token (RFC 7517 §5)."""
        return {"keys": [dict(key.jwk) for key in self._ctx.keys.token_keys()]}

    def metadata(self) -> dict[str, JsonValue]:
        """Return what resource servers discover (RFC 8414 §2); no token endpoint exists yet."""
        return {
            "issuer": self._issuer,
            "jwks_uri": f"{self._issuer}/oauth2/jwks",
            "introspection_endpoint": f"{self._issuer}/oauth2/introspect",
            "introspection_endpoint_auth_methods_supported": ["tls_client_auth", "spiffe_jwt"],
            "response_types_supported": [],
            "grant_types_supported": [],
        }

    def status_list_uri(self, number: int) -> str:
        """Return where a status list is served."""
        return f"{self._issuer}/statuslists/{number}"

    async def status_list(self, number: int) -> str:
        """Return a signed Status List Token: a set bit is a token that ended before its expiry.

        Raises:
            UnknownObject: no token was ever given a place in such a list.

        """
        now_ms = self._ctx.clock.now_ms()
        # The key store hands out the same tuple until a key is rotated or thrown out.
        keys = self._ctx.keys.token_keys()
        cached = self._lists.get(number)
        if (
            cached is not None
            and cached.keys is keys
            and 0 <= now_ms - cached.built_ms < STATUS_LIST_REBUILD_MS
        ):
            return cached.token
        reserved = meta.reserved(self._ctx.store.reader, STATUS_COUNTER)
        if not 0 <= number < LISTS_MAX or number * SIZE >= reserved:
            raise UnknownObject
        building = self._building.get(number)
        if building is None:
            building = asyncio.ensure_future(self._rebuild(number, now_ms, keys))
            self._building[number] = building
        # Whoever gives up waiting must not stop it for the others.
        return await asyncio.shield(building)

    async def _rebuild(self, number: int, now_ms: int, keys: tuple[VerificationKey, ...]) -> str:
        """Build a list in a thread: a full one takes a large part of a second."""
        try:
            token = await asyncio.to_thread(self._build, number, now_ms)
        finally:
            del self._building[number]
        self._lists[number] = _CachedList(token, now_ms, keys)
        return token

    def _build(self, number: int, now_ms: int) -> str:
        first = number * SIZE
        expires_after_ms = now_ms - STATUS_SKEW_SECONDS * MS_PER_SECOND
        with closing(self._ctx.store.open_reader()) as reader:
            ended = ledger.revoked_status_indices(reader, first, first + SIZE, expires_after_ms)
        claims = status_list_claims(
            uri=self.status_list_uri(number),
            issued_ms=now_ms,
            ttl_seconds=STATUS_LIST_TTL_SECONDS,
            expires_ms=now_ms + STATUS_LIST_LIFETIME_SECONDS * MS_PER_SECOND,
            lst=encode(index - first for index in ended),
        )
        return self._ctx.keys.sign_token(
            {"typ": "statuslist+jwt"}, orjson.dumps(claims), algorithm=self._algorithm
        )


def _active(own: TokenClaims) -> dict[str, JsonValue]:
    """Return the members of RFC 7662 §2.2 for an active token."""
    return {
        "active": True,
        "token_type": "Bearer",
        "iss": own.issuer,
        "sub": own.subject,
        "client_id": own.subject,
        "aud": own.audience,
        "scope": own.scope,
        "jti": own.lease_id,
        "iat": own.issued_ms // MS_PER_SECOND,
        "exp": own.expires_ms // MS_PER_SECOND,
        "task": own.task_id,
    }
