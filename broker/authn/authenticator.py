"""From what a request carries to its `Caller`: the only place that makes one.

Two rules of ours beside the specifications': A-1, a request carries at least one SVID;
A-2, two SVIDs on one request name the same SPIFFE ID.

What was verified is remembered, because an agent sends one token many times (J-11) and
one connection many requests; what can change is looked at on every request all the
same: the end of validity, and the generation of the trust bundles.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from broker.authn.jwt_svid import TOKEN_BYTES_MAX, validate_jwt_svid
from broker.authn.x509_svid import validate_x509_svid
from broker.core.caller import AuthMethod, Caller
from broker.core.clock import MS_PER_SECOND
from broker.core.errors import Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.authn.bundles import BundleStore, TrustBundles
    from broker.core.clock import Clock

LIFETIME_SECONDS_MAX_DEFAULT: Final = 3600
LEEWAY_SECONDS_DEFAULT: Final = 5
REMEMBERED_SECONDS_MAX: Final = 60
REMEMBERED_TOKENS_MAX: Final = 10_000

_SCHEME: Final = "bearer"


def bearer_token(authorization: str | None) -> str | None:
    """Return the token of an ``Authorization`` header, None where there is no header (J-10).

    Raises:
        Unauthenticated: the header is of another scheme, or holds no token.

    """
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    token = token.strip(" ")
    if scheme.lower() != _SCHEME or not token:
        raise Unauthenticated("J-10", "the Authorization header is not a bearer token")
    return token


@dataclass(frozen=True, slots=True)
class _Proven:
    """A verified SVID, and while it may be taken as such without verifying again."""

    caller: Caller
    verified_ms: int
    fresh_until_ms: int

    def holds(self, now_ms: int, generation: int) -> bool:
        # A clock that was set back makes us verify again, so that a not-before counts too.
        return (
            self.verified_ms <= now_ms <= self.fresh_until_ms and self.caller.bundle_generation == generation
        )


class PeerCertificates:
    """The chain one TLS connection presented, and what came of it. One object per connection."""

    __slots__ = ("_proven", "chain_der")

    def __init__(self, chain_der: Sequence[bytes]) -> None:
        self.chain_der: Final = tuple(chain_der)
        self._proven: _Proven | None = None

    def recall(self, now_ms: int, generation: int) -> Caller | None:
        """Return the caller this chain proved, where that still holds."""
        proven = self._proven
        return proven.caller if proven is not None and proven.holds(now_ms, generation) else None

    def remember(self, caller: Caller, now_ms: int) -> None:
        """Keep a caller until its proof ends."""
        self._proven = _Proven(caller, now_ms, caller.not_after_ms)


class Authenticator:
    """Makes a `Caller` out of a bearer token, a client certificate, or both.

    Belongs to one event loop; `authenticate` does no I/O and does not wait.
    """

    def __init__(
        self,
        bundles: BundleStore,
        clock: Clock,
        audience: str,
        *,
        lifetime_seconds_max: int = LIFETIME_SECONDS_MAX_DEFAULT,
        leeway_seconds: int = LEEWAY_SECONDS_DEFAULT,
        remembered_tokens_max: int = REMEMBERED_TOKENS_MAX,
    ) -> None:
        """Keep the parts.

        Args:
            bundles: holds the trust bundles in force.
            clock: where "now" comes from.
            audience: what a JWT-SVID for this broker names as its only ``aud``.
            lifetime_seconds_max: ceiling on a JWT-SVID's ``exp - iat`` (J-11).
            leeway_seconds: clock difference tolerated in JWT-SVIDs.
            remembered_tokens_max: bound on verified tokens kept, each at most 60 s.

        Raises:
            ValueError: `audience` is empty.

        """
        if not audience:
            raise ValueError("the audience is empty: J-7 makes it part of every validation")
        self._bundles = bundles
        self._clock = clock
        self._audience = audience
        self._lifetime_seconds_max = lifetime_seconds_max
        self._leeway_seconds = leeway_seconds
        self._remembered_tokens_max = remembered_tokens_max
        self._tokens: dict[bytes, _Proven] = {}
        self._tokens_generation = bundles.current.generation

    def authenticate(self, *, bearer: str | None, peer: PeerCertificates | None) -> Caller:
        """Return who is asking.

        Args:
            bearer: the token alone, as `bearer_token` returns it.
            peer: what the connection presented; an empty chain is no proof and no error.

        Raises:
            Unauthenticated: no proof, or one that our rules refuse: both must hold where both are sent.

        """
        now_ms = self._clock.now_ms()
        bundles = self._bundles.current
        by_certificate = (
            self._from_certificates(peer, bundles, now_ms) if peer is not None and peer.chain_der else None
        )
        by_token = self._from_token(bearer, bundles, now_ms) if bearer is not None else None
        if by_token is None:
            if by_certificate is None:
                raise Unauthenticated("A-1", "neither a bearer token nor a client certificate")
            return by_certificate
        if by_certificate is None:
            return by_token
        return _both(by_token, by_certificate)

    def _from_certificates(self, peer: PeerCertificates, bundles: TrustBundles, now_ms: int) -> Caller:
        known = peer.recall(now_ms, bundles.generation)
        if known is not None:
            return known
        svid = validate_x509_svid(peer.chain_der, bundles, now_ms)
        caller = Caller(
            spiffe_id=svid.spiffe_id,
            method=AuthMethod.X509_SVID,
            not_after_ms=svid.not_after_ms,
            bundle_generation=bundles.generation,
            svid_digest=svid.leaf_sha256,
        )
        peer.remember(caller, now_ms)
        return caller

    def _from_token(self, token: str, bundles: TrustBundles, now_ms: int) -> Caller:
        if self._tokens_generation != bundles.generation:
            self._tokens.clear()
            self._tokens_generation = bundles.generation
        if len(token) > TOKEN_BYTES_MAX:  # before anything is computed over it
            raise Unauthenticated("J-13", f"the token is longer than {TOKEN_BYTES_MAX} bytes")
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._tokens.get(digest)
        if known is not None and known.holds(now_ms, bundles.generation):
            return known.caller
        svid = validate_jwt_svid(
            token,
            self._audience,
            bundles,
            now_ms,
            lifetime_seconds_max=self._lifetime_seconds_max,
            leeway_seconds=self._leeway_seconds,
        )
        caller = Caller(
            spiffe_id=svid.spiffe_id,
            method=AuthMethod.JWT_SVID,
            # The last millisecond at which J-8, leeway included, still accepts the token.
            not_after_ms=svid.expires_ms + self._leeway_seconds * MS_PER_SECOND - 1,
            bundle_generation=bundles.generation,
            svid_digest=svid.token_sha256,
        )
        self._remember(digest, caller, now_ms)
        return caller

    def _remember(self, digest: bytes, caller: Caller, now_ms: int) -> None:
        self._tokens.pop(digest, None)
        if len(self._tokens) >= self._remembered_tokens_max:
            del self._tokens[next(iter(self._tokens))]  # the one verified longest ago
        fresh_until_ms = min(now_ms + REMEMBERED_SECONDS_MAX * MS_PER_SECOND, caller.not_after_ms)
        self._tokens[digest] = _Proven(caller, now_ms, fresh_until_ms)


def _both(by_token: Caller, by_certificate: Caller) -> Caller:
    """Join two proofs of one identity (A-2); it ends when the first of them does."""
    if by_token.spiffe_id != by_certificate.spiffe_id:
        raise Unauthenticated(
            "A-2", f"the token is of {by_token.spiffe_id}, the certificate of {by_certificate.spiffe_id}"
        )
    return Caller(
        spiffe_id=by_token.spiffe_id,
        method=AuthMethod.BOTH,
        not_after_ms=min(by_token.not_after_ms, by_certificate.not_after_ms),
        bundle_generation=by_token.bundle_generation,
        svid_digest=by_token.svid_digest,
    )
