"""Our own access tokens (RFC 9068): the backend is the broker's own ledger.

Minting signs a few claims and changes nothing outside, so a lease is ACTIVE from its one
durable commit and REVOKED from another. Introspection answers from the ledger and says
inactive from that commit on; the Token Status List follows within its ``ttl``; who checks
the signature alone sees only expiry.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import orjson

from broker.core.ports import (
    Capabilities,
    Check,
    Credential,
    Effect,
    ErrorClass,
    Fence,
    Liveness,
    Minted,
    Naming,
    Presence,
    Revocability,
    Verification,
)
from broker.core.secret import Secret
from broker.core.spiffe_id import SpiffeId, SpiffeIdError
from broker.core.status_list import locate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from broker.core.ports import Found, KeyStore, MintRequest, Target

ALGORITHM_DEFAULT: Final = "ES256"
_ALGORITHMS: Final = ("ES256", "EdDSA", "RS256")
_MEMBERS: Final = frozenset({"audience", "scope", "algorithm"})
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
"""RFC 6749 §3.3: printable tokens without quote and backslash, one space between."""

_HEADER: Final[Mapping[str, object]] = {"typ": "at+jwt"}
_CHECK_HEADER: Final[Mapping[str, object]] = {"typ": "nhi-check+jwt"}


class JwtIssuer:
    """`broker.core.ports.Adapter` that signs access tokens.

    The recipe: ``audience``, the SPIFFE ID of the one resource server that may accept the
    token; ``scope``; and ``algorithm``, ES256 unless said.

    Args:
        name: as the catalog refers to it.
        issuer: the ``iss`` of every token, an https URL (RFC 8414 §2).
        keys: what signs.
        status_lists: URL under which the status lists are served, without the list's number.
        ttl_seconds_max: longest life of a token; keys must be kept for as long after they retire.
        introspect: says of a token whether it is active; without it `probe` knows nothing.

    Raises:
        ValueError: one of the URLs is not an https URL without query and fragment.

    """

    def __init__(
        self,
        *,
        name: str,
        issuer: str,
        keys: KeyStore,
        status_lists: str,
        ttl_seconds_max: int = 3600,
        introspect: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        _check_url("issuer", issuer)
        _check_url("status list", status_lists)
        self._name = name
        self._issuer = issuer
        self._keys = keys
        self._status_lists = status_lists.rstrip("/")
        self._introspect = introspect
        self._capabilities = Capabilities(
            external_effect=False,
            naming=Naming.DETERMINISTIC,
            fence=Fence.STRONG,
            revocability=Revocability(Effect.IMMEDIATE),
            cuts_sessions=False,
            listable=False,
            needs_secret_to_revoke=False,
            expiry_ends_sessions=True,
            ttl_seconds_min=1,
            ttl_seconds_max=ttl_seconds_max,
            t_inflight_seconds=0,
        )

    @property
    def name(self) -> str:
        """The configured name."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What is declared.

        Immediate is meant of introspection. A session that a resource server opened on a
        token is its own: nothing here cuts it, and a server that keeps one past the
        token's ``exp`` breaks RFC 9068 §4.
        """
        return self._capabilities

    def validate_recipe(self, recipe: Mapping[str, object]) -> list[str]:
        """Return what is wrong with a recipe, each a sentence; empty when nothing is."""
        wrong = [f"{member!r} is no member of this recipe." for member in sorted(recipe.keys() - _MEMBERS)]
        audience = recipe.get("audience")
        try:
            if not isinstance(audience, str) or not SpiffeId.parse(audience).path:
                wrong.append("'audience' must be the SPIFFE ID of the resource server, with a path.")
        except SpiffeIdError as error:
            wrong.append(f"'audience' is not a SPIFFE ID ({error}).")
        scope = recipe.get("scope")
        if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
            wrong.append("'scope' must be one or more words with single spaces between (RFC 6749, 3.3).")
        if recipe.get("algorithm", ALGORITHM_DEFAULT) not in _ALGORITHMS:
            wrong.append(f"'algorithm' must be one of {', '.join(_ALGORITHMS)}.")
        return wrong

    async def prepare(self, request: MintRequest) -> str | None:
        """Return None: the token's name is its lease's."""
        del request
        return None

    async def mint(self, request: MintRequest) -> Minted:
        """Sign a token for the lease. It expires when the broker ends the lease, to the second below."""
        recipe = request.recipe
        audience = str(recipe["audience"])
        issued = request.now_ms // 1000
        expires = request.expires_ms // 1000
        claims: dict[str, object] = {
            "iss": self._issuer,
            "sub": request.identity,
            "client_id": request.identity,
            "aud": audience,
            "iat": issued,
            "exp": expires,
            "jti": request.lease_id,
            "task": request.task_id,
            "scope": recipe["scope"],
        }
        if request.status_index is not None:
            number, position = locate(request.status_index)
            uri = f"{self._status_lists}/{number}"
            claims["status"] = {"status_list": {"idx": position, "uri": uri}}
        algorithm = str(recipe.get("algorithm", ALGORITHM_DEFAULT))
        token = self._keys.sign_token(_HEADER, orjson.dumps(claims), algorithm=algorithm)
        public: dict[str, str | int] = {
            "token_type": "Bearer",
            "issuer": self._issuer,
            "audience": audience,
            "expires_in": expires - issued,
        }
        credential = Credential(kind="access_token", public=public, secret={"access_token": Secret(token)})
        return Minted(credential=credential)

    async def revoke(self, target: Target) -> None:
        """Do nothing: the ledger's own commit is the revocation, and the fence."""
        del target

    async def verify(self, target: Target) -> Verification:
        """Say ABSENT: outside the ledger nothing of the lease ever exists.

        It tells nothing about the token. The service moves a lease without external effect
        from ACTIVE to REVOKED by the ledger and has no need to ask.
        """
        del target
        return Verification(
            presence=Presence.ABSENT, evidence={"backend": "ledger", "external_effect": False}
        )

    async def scan(self, recipes: Sequence[Mapping[str, object]]) -> AsyncIterator[Found]:
        """Yield nothing: tokens lie in nobody's list."""
        del recipes
        nothing: tuple[Found, ...] = ()
        for found in nothing:
            yield found

    def classify(self, error: Exception) -> ErrorClass:
        """Say PERMANENT: a token that was not returned was never outside this process."""
        del error
        return ErrorClass.PERMANENT

    async def check(self, recipes: Sequence[Mapping[str, object]]) -> list[Check]:
        """Sign once with every algorithm the recipes name, so that no request makes a slow key."""
        algorithms = {str(recipe.get("algorithm", ALGORITHM_DEFAULT)) for recipe in recipes}
        return [await asyncio.to_thread(self._check_algorithm, algorithm) for algorithm in sorted(algorithms)]

    def _check_algorithm(self, algorithm: str) -> Check:
        name = f"sign tokens with {algorithm}"
        try:
            self._keys.sign_token(_CHECK_HEADER, b"{}", algorithm=algorithm)
        except (RuntimeError, ValueError) as error:
            return Check(name=name, ok=False, remedy=str(error))
        if not any(key.algorithm == algorithm for key in self._keys.token_keys()):
            return Check(name=name, ok=False, remedy="the key store publishes no key that verifies it")
        return Check(name=name, ok=True)

    async def probe(self, credential: Credential) -> Liveness:
        """Ask introspection, as a resource server would; UNKNOWN where there is none to ask."""
        if self._introspect is None:
            return Liveness.UNKNOWN
        try:
            active = await self._introspect(credential.secret["access_token"].reveal())
        except Exception:  # noqa: BLE001  any failure to ask means only that the answer is not known
            return Liveness.UNKNOWN
        return Liveness.ALIVE if active else Liveness.DEAD

    async def close(self) -> None:
        """Do nothing: there are no connections."""


def _check_url(what: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"the {what} URL must be https, without query and fragment")
