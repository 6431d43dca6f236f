"""The embedded trust domain: what `nhi dev` has instead of SPIRE (DESIGN 6).

A small certificate authority and, for each registered identity, a real SPIFFE Workload API
on a Unix socket of its own. **The path is the attestation**: nothing looks at who connects.
Whoever can open an identity's socket *is* that identity; the sockets lie in one directory,
mode 0700, so that is every process of the same user (and root). That is enough to develop
against and nothing more: production takes its SVIDs from SPIRE.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from broker.authn import strict_json
from broker.authn.bundles import TrustBundles
from broker.authn.jwt_svid import validate_jwt_svid
from broker.authn.trust_bundle import parse_spiffe_bundle
from broker.core.clock import MS_PER_SECOND, Clock, SystemClock
from broker.core.spiffe_id import SCHEME, SpiffeId, check_trust_domain
from broker.dev.authority import (
    SVID_TTL_SECONDS_MAX,
    Authority,
    IssuedX509Svid,
    jwt_bundle,
    spiffe_bundle,
    x509_bundle,
)
from broker.dev.authority_file import Authorities, load_authorities, save_authorities
from broker.dev.workload_api import WorkloadApiServers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

TRUST_DOMAIN_DEFAULT: Final = "dev.nhi.internal"
SOCKET_PATH_BYTES_MAX: Final = 107
"""What ``sockaddr_un`` holds, without its closing zero."""

_JWT_TTL_SECONDS: Final = 300
_FORGET_MARGIN_SECONDS: Final = 60
_LEEWAY_SECONDS: Final = 5
_TICK_SECONDS_MAX: Final = 5.0
_TICKS_PER_TTL: Final = 20
_SLUG_CHARACTERS: Final = 24
_DIGEST_CHARACTERS: Final = 8
# gRPC and SPIFFE_ENDPOINT_SOCKET both read the path as part of a URI.
_URI_SAFE: Final = re.compile(r"[A-Za-z0-9/._~+@,=-]+")


class TrustDomainError(RuntimeError):
    """The trust domain cannot be served as asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class _Registration:
    socket: Path
    dns_names: tuple[str, ...]
    ip_addresses: tuple[str, ...]
    svid: IssuedX509Svid | None = None


class EmbeddedTrustDomain:
    """One trust domain, its authority and its Workload API sockets.

    Methods without ``async`` may be called from any thread.

    Args:
        state_dir: private (0700) directory for the authority's keys and the sockets; keep its path short.
        trust_domain: the trust domain's name.
        clock: decides what is valid and what is due; by default the host's.
        x509_ttl_seconds, jwt_ttl_seconds: lifetime of SVIDs, at most an hour.

    Raises:
        SpiffeIdError: `trust_domain` is not a legal name.
        ValueError: a lifetime is out of range.

    """

    def __init__(
        self,
        state_dir: Path,
        trust_domain: str = TRUST_DOMAIN_DEFAULT,
        clock: Clock | None = None,
        *,
        x509_ttl_seconds: int = SVID_TTL_SECONDS_MAX,
        jwt_ttl_seconds: int = _JWT_TTL_SECONDS,
    ) -> None:
        check_trust_domain(trust_domain)
        self._trust_domain = trust_domain
        self._clock = clock or SystemClock()
        self._x509_ttl_seconds = _checked_ttl(x509_ttl_seconds)
        self._jwt_ttl_seconds = _checked_ttl(jwt_ttl_seconds)
        self._state_dir = state_dir.absolute()
        self._lock = threading.RLock()
        self._registered: dict[SpiffeId, _Registration] = {}
        self._authorities: Authorities | None = None
        self._servers: WorkloadApiServers | None = None
        self._claim: int | None = None

    def __repr__(self) -> str:
        return f"EmbeddedTrustDomain({self._trust_domain!r}, {len(self._registered)} identities)"

    @property
    def trust_domain(self) -> str:
        """The trust domain's name."""
        return self._trust_domain

    @property
    def trust_domain_id(self) -> str:
        """The trust domain's own SPIFFE ID."""
        return SCHEME + self._trust_domain

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Load or draw the keys and serve every registered identity. Idempotent.

        Raises:
            TrustDomainError: the directory is served by another process, or is not usable.
            AuthorityFileError: the file with the keys is damaged, readable by others, or another domain's.

        """
        work = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread cannot be interrupted: let it finish, then undo, so that no socket stays.
            await asyncio.wait({work})
            if work.exception() is None:
                await self.close()
            raise
        return self

    async def close(self) -> None:
        """End every stream, remove the sockets, give the directory back. Idempotent."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self) -> None:
        with self._lock:
            if self._servers is not None:
                return
            _make_private(self._state_dir)
            _make_private(self._socket_dir)
            self._claim = _claim(self._state_dir)
            try:
                self._load()
                servers = WorkloadApiServers(self, tick_seconds=self._tick_seconds())
            except BaseException:
                self._release()
                raise
            self._servers = servers
        # Not under the lock: the serving thread takes it too.
        for spiffe_id, registration in list(self._registered.items()):
            self._open(servers, spiffe_id, registration)

    def _close(self) -> None:
        with self._lock:
            servers, self._servers = self._servers, None
        if servers is None:
            return
        try:
            servers.close()
        finally:
            with self._lock:
                for registration in self._registered.values():
                    registration.socket.unlink(missing_ok=True)
                self._release()

    def _release(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _load(self) -> None:
        found = load_authorities(self._authority_file, self._trust_domain)
        if found is None:
            now_ms = self._clock.now_ms()
            found = Authorities(self._trust_domain, 1, (Authority.generate(self._trust_domain, now_ms),))
            save_authorities(self._authority_file, found)
        self._authorities = found

    def _tick_seconds(self) -> float:
        return min(_TICK_SECONDS_MAX, self._x509_ttl_seconds / _TICKS_PER_TTL)

    @property
    def _authority_file(self) -> Path:
        return self._state_dir / "authority.json"

    @property
    def _socket_dir(self) -> Path:
        return self._state_dir / "workload"

    # --- identities ------------------------------------------------------------------------------

    def register(
        self, spiffe_id: str, dns_names: Sequence[str] = (), ip_addresses: Sequence[str] = ()
    ) -> Path:
        """Give an identity a socket, before or after the start; again with other names re-issues its SVID.

        Args:
            spiffe_id: in this trust domain, with a path.
            dns_names: further names in its X.509-SVID, for a server such as the broker.
            ip_addresses: the same, as addresses.

        Returns:
            The socket's path; ``SPIFFE_ENDPOINT_SOCKET`` is ``unix://`` and this path.

        Raises:
            SpiffeIdError: not a SPIFFE ID.
            TrustDomainError: of another trust domain, without a path, or its socket's path is too long.

        """
        identity = self._own_id(spiffe_id)
        registration = _Registration(self._socket_path(identity), tuple(dns_names), tuple(ip_addresses))
        with self._lock:
            known = self._registered.get(identity)
            if known is not None and replace(known, svid=None) == registration:
                return known.socket
            self._registered[identity] = registration
            servers = self._servers
        if servers is not None:
            if known is None:
                self._open(servers, identity, registration)
            servers.announce()
        return registration.socket

    def socket_for(self, spiffe_id: str) -> Path:
        """Return a registered identity's socket.

        Raises:
            TrustDomainError: it is not registered.

        """
        with self._lock:
            return self._registration(self._own_id(spiffe_id)).socket

    def _open(self, servers: WorkloadApiServers, spiffe_id: SpiffeId, registration: _Registration) -> None:
        registration.socket.unlink(missing_ok=True)  # left by a process that was killed: we hold the claim
        servers.open(spiffe_id, registration.socket)

    def _own_id(self, text: str) -> SpiffeId:
        spiffe_id = SpiffeId.parse(text)
        if spiffe_id.trust_domain != self._trust_domain or not spiffe_id.path:
            msg = f"{spiffe_id} is no workload's ID here: begin it with {self.trust_domain_id}/"
            raise TrustDomainError(msg)
        return spiffe_id

    def _registration(self, spiffe_id: SpiffeId) -> _Registration:
        try:
            return self._registered[spiffe_id]
        except KeyError:
            msg = f"{spiffe_id} is not registered: register it first"
            raise TrustDomainError(msg) from None

    def _socket_path(self, spiffe_id: SpiffeId) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", spiffe_id.path.lower()).strip("-")[-_SLUG_CHARACTERS:].lstrip("-")
        digest = hashlib.sha256(spiffe_id.encode("ascii")).hexdigest()[:_DIGEST_CHARACTERS]
        path = self._socket_dir / f"{slug}-{digest}.sock"
        length = len(os.fsencode(path))
        if length > SOCKET_PATH_BYTES_MAX:
            msg = (
                f"the socket path {path} has {length} bytes and Unix sockets allow {SOCKET_PATH_BYTES_MAX}: "
                "choose a shorter state directory"
            )
            raise TrustDomainError(msg)
        if not _URI_SAFE.fullmatch(str(path)):
            msg = (
                f"the socket path {path} holds a character that means something in a URI: choose a state "
                "directory of letters, digits and ./_-~+@,="
            )
            raise TrustDomainError(msg)
        return path

    # --- issuing ---------------------------------------------------------------------------------

    def issue_x509_svid(
        self,
        spiffe_id: str,
        *,
        ttl_seconds: int | None = None,
        dns_names: Sequence[str] = (),
        ip_addresses: Sequence[str] = (),
    ) -> IssuedX509Svid:
        """Issue an X.509-SVID directly; the identity needs no registration.

        Raises:
            SpiffeIdError, TrustDomainError: not a workload of this trust domain, or not started.
            ValueError: the lifetime is out of range.

        """
        identity = self._own_id(spiffe_id)
        ttl_seconds = self._x509_ttl_seconds if ttl_seconds is None else _checked_ttl(ttl_seconds)
        with self._lock:
            return self._held().current.issue_x509_svid(
                identity,
                now_ms=self._clock.now_ms(),
                ttl_seconds=ttl_seconds,
                dns_names=dns_names,
                ip_addresses=ip_addresses,
            )

    def issue_jwt_svid(self, spiffe_id: str, audience: str, ttl_seconds: int | None = None) -> str:
        """Issue a JWT-SVID directly, for one audience; the identity needs no registration.

        Raises:
            SpiffeIdError, TrustDomainError: not a workload of this trust domain, or not started.
            ValueError: the audience is empty, or the lifetime is out of range.

        """
        if not audience:
            raise ValueError("a JWT-SVID needs an audience")
        identity = self._own_id(spiffe_id)
        ttl_seconds = self._jwt_ttl_seconds if ttl_seconds is None else _checked_ttl(ttl_seconds)
        with self._lock:
            now_ms = self._clock.now_ms()
            return self._held().current.issue_jwt_svid(
                identity, audience, now_ms=now_ms, ttl_seconds=ttl_seconds
            )

    def current_x509_svid(self, spiffe_id: str) -> IssuedX509Svid:
        """Return what a registered identity's socket serves now.

        Raises:
            TrustDomainError: it is not registered.

        """
        identity = self._own_id(spiffe_id)
        with self._lock:
            registration = self._registration(identity)
            svid = registration.svid
            if svid is None or self._past_half_life(svid):
                svid = self.issue_x509_svid(
                    identity, dns_names=registration.dns_names, ip_addresses=registration.ip_addresses
                )
                self._registered[identity] = replace(registration, svid=svid)
            return svid

    def validate_jwt_svid(self, token: str, audience: str) -> tuple[SpiffeId, Mapping[str, object]]:
        """Check a token of this trust domain by the broker's own rules.

        Raises:
            Unauthenticated: with the id of the first rule broken.

        """
        bundle = parse_spiffe_bundle(self._trust_domain, self.bundle_json())
        found = validate_jwt_svid(
            token,
            audience,
            TrustBundles({self._trust_domain: bundle}),
            self._clock.now_ms(),
            lifetime_seconds_max=SVID_TTL_SECONDS_MAX,
            leeway_seconds=_LEEWAY_SECONDS,
        )
        claims = strict_json.parse_object(strict_json.decode_base64url(token.split(".")[1]))
        return found.spiffe_id, claims

    # --- bundles and rotation --------------------------------------------------------------------

    def x509_bundle(self) -> bytes:
        """Return the X.509 authorities, DER, one after another."""
        with self._lock:
            return x509_bundle(self._held().generations)

    def jwt_bundle(self) -> bytes:
        """Return the JWT authorities as a JWK Set."""
        with self._lock:
            return jwt_bundle(self._held().generations)

    def bundle_json(self) -> bytes:
        """Return the SPIFFE bundle document, with sequence and refresh hint."""
        with self._lock:
            held = self._held()
            return spiffe_bundle(held.generations, held.sequence)

    def rotate_ca(self) -> None:
        """Draw new keys, sign with them from now on, and push new SVIDs and bundles.

        The old keys stay in the bundle until the last SVID they may have signed has ended.
        Verifiers on a socket learn of the new keys at once; one that polls `bundle_json` may
        be behind by the refresh hint.
        """
        with self._lock:
            held = self._held()
            now_ms = self._clock.now_ms()
            forget_ms = now_ms + (SVID_TTL_SECONDS_MAX + _FORGET_MARGIN_SECONDS) * MS_PER_SECOND
            retired = replace(held.current, forget_ms=forget_ms)
            fresh = Authority.generate(self._trust_domain, now_ms)
            self._replace((fresh, retired, *held.generations[1:]))
            for identity, registration in self._registered.items():
                self._registered[identity] = replace(registration, svid=None)
        self._announce()

    def rotate_due(self) -> bool:
        """Do what the clock asks for, and push it; say whether anything was due.

        Called every few seconds: SVIDs at half their life, the authority at half of its own,
        retired authorities once nothing they signed is valid.
        """
        with self._lock:
            held = self._held()
            now_ms = self._clock.now_ms()
            kept = tuple(a for a in held.generations if a.forget_ms is None or a.forget_ms > now_ms)
            forgotten = kept != held.generations
            if forgotten:
                self._replace(kept)
            if now_ms >= held.current.half_life_ms:
                self.rotate_ca()
                return True
            due = any(r.svid and self._past_half_life(r.svid) for r in self._registered.values())
        if due or forgotten:
            self._announce()
        return due or forgotten

    def _past_half_life(self, svid: IssuedX509Svid) -> bool:
        return self._clock.now_ms() >= svid.half_life_ms

    def _replace(self, generations: tuple[Authority, ...]) -> None:
        changed = Authorities(self._trust_domain, self._held().sequence + 1, generations)
        save_authorities(self._authority_file, changed)
        self._authorities = changed

    def _held(self) -> Authorities:
        if self._authorities is None:
            raise TrustDomainError("the trust domain is not started: await start() first")
        return self._authorities

    def _announce(self) -> None:
        with self._lock:
            servers = self._servers
        if servers is not None:
            servers.announce()


def _checked_ttl(seconds: int) -> int:
    if not 0 < seconds <= SVID_TTL_SECONDS_MAX:
        msg = f"an SVID lives 1 to {SVID_TTL_SECONDS_MAX} seconds, not {seconds}"
        raise ValueError(msg)
    return seconds


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.geteuid():
        msg = f"{directory} belongs to another user: choose a directory of your own"
        raise TrustDomainError(msg)
    directory.chmod(0o700)


def _claim(state_dir: Path) -> int:
    """Take the directory for this process; the kernel gives it back when the process ends."""
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        msg = f"another process serves the trust domain in {state_dir}: stop it, or use another directory"
        raise TrustDomainError(msg) from None
    return descriptor
