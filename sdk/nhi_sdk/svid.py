"""Where this workload's SVID comes from, and the authorities it trusts the broker's certificate by.

Three small roles, so that they combine: `SvidSource` gives a JWT-SVID, `TrustSource` gives
X.509 authorities, `CertificateSource` gives an X.509-SVID for mutual TLS.
`WorkloadApiSource` plays all three.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from nhi_sdk.errors import ConfigurationError, MissingExtra, SvidError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

_log = logging.getLogger(__name__)

_COMPACT_JWS: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TOKEN_BYTES_MAX: Final = 65_536
_BUNDLE_BYTES_MAX: Final = 4_194_304
_WORKLOAD_API_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """An X.509-SVID and its key, PEM.

    Attributes:
        renew_at: UNIX seconds from which another should be fetched.

    """

    chain: str
    key: str = field(repr=False)
    renew_at: float


@runtime_checkable
class SvidSource(Protocol):
    """Gives a JWT-SVID. Safe for use from several threads."""

    def token(self, audience: str) -> str:
        """Return a JWT-SVID for `audience`; may block.

        Raises:
            SvidError: there is none to be had.

        """
        ...

    def cached_token(self, audience: str) -> str | None:
        """Return what `token` would without blocking, or None."""
        ...

    def forget(self) -> None:
        """Drop what is cached: the broker refused it."""
        ...

    def close(self) -> None:
        """Release connections. Idempotent."""
        ...


@runtime_checkable
class TrustSource(Protocol):
    """Gives the authorities that the broker's certificate must chain to."""

    def authorities(self) -> str:
        """Return them as PEM; may block.

        Raises:
            SvidError: there are none to be had.

        """
        ...


@runtime_checkable
class CertificateSource(Protocol):
    """Gives an X.509-SVID to authenticate with by mutual TLS."""

    def client_certificate(self) -> ClientCertificate:
        """Return a fresh one; may block.

        Raises:
            SvidError: there is none to be had.

        """
        ...


def unverified_claims(token: str) -> dict[str, Any]:
    """Return the claims of a JWT without checking anything: for expiry times and diagnostics only.

    Raises:
        SvidError: not a JWT. The message does not repeat it.

    """
    if not _COMPACT_JWS.fullmatch(token):
        raise SvidError("the JWT-SVID is not a signed JWT in compact form")
    payload = token.split(".")[1]
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        claims = None
    if not isinstance(claims, dict):
        raise SvidError("the JWT-SVID's claims cannot be read")
    return claims


class StaticSource:
    """One given JWT-SVID, for tests and scripts that bring their own."""

    def __init__(self, token: str) -> None:
        unverified_claims(token)
        self._token = token

    def token(self, audience: str) -> str:  # noqa: ARG002  the port's signature
        """Return the token."""
        return self._token

    def cached_token(self, audience: str) -> str | None:
        """Return the token."""
        return self.token(audience)

    def forget(self) -> None:
        """Do nothing: there is no other token."""

    def close(self) -> None:
        """Do nothing."""


class TokenFileSource:
    """A JWT-SVID that something else keeps fresh in a file; read again when the file changes.

    Args:
        path: a file with one JWT and nothing else.

    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._seen: tuple[tuple[int, int, int], str] | None = None

    def token(self, audience: str) -> str:  # noqa: ARG002  the file's writer chose the audience
        """Return the file's token.

        Raises:
            SvidError: the file cannot be read or holds no JWT.

        """
        with self._lock:
            try:
                status = self._path.stat()
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if self._seen is not None and self._seen[0] == stamp:
                    return self._seen[1]
                text = _read_bounded(self._path, _TOKEN_BYTES_MAX).strip()
            except (OSError, ValueError) as error:
                raise SvidError(f"cannot read the token file {self._path}: {_why(error)}") from None
            unverified_claims(text)
            self._seen = (stamp, text)
            return text

    def cached_token(self, audience: str) -> str | None:
        """Return the file's token; a local stat is no blocking worth the name."""
        return self.token(audience)

    def forget(self) -> None:
        """Read the file again next time."""
        with self._lock:
            self._seen = None

    def close(self) -> None:
        """Do nothing."""


class CaFile:
    """Authorities in a PEM file."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def authorities(self) -> str:
        """Return the file's text.

        Raises:
            SvidError: the file cannot be read.

        """
        try:
            return _read_bounded(self._path, _BUNDLE_BYTES_MAX)
        except (OSError, ValueError) as error:
            raise SvidError(f"cannot read the CA file {self._path}: {_why(error)}") from None


def _read_bounded(path: Path, bytes_max: int) -> str:
    with path.open("rb") as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise ValueError(f"more than {bytes_max} bytes")
    return content.decode("utf-8")


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not text"  # the exception's own text quotes the bytes
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


@dataclass(frozen=True, slots=True)
class _Held:
    token: str = field(repr=False)
    renew_at: float
    expires_at: float


class WorkloadApiSource:
    """SVIDs and bundles from a SPIFFE Workload API socket (extra ``spiffe``).

    A JWT-SVID is kept until half its life is over; if the Workload API is away then, it
    is used to the end, so a restarted agent is survived.

    Args:
        socket: path or ``unix:`` address of the socket.
        spiffe_id: which identity to use where the workload has several; the default one if None.
        wall_clock: UNIX seconds; replaced in tests.

    """

    def __init__(
        self,
        socket: str,
        *,
        spiffe_id: str | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if not socket:
            raise ConfigurationError("the Workload API socket is empty: set SPIFFE_ENDPOINT_SOCKET")
        self._socket = socket if socket.startswith("unix:") else f"unix:{socket}"
        self._spiffe_id = spiffe_id
        self._wall_clock = wall_clock
        self._lock = threading.RLock()
        self._client: Any = None
        self._held: dict[str, _Held] = {}

    def token(self, audience: str) -> str:
        """Return a JWT-SVID for `audience`, fetched unless one is held that is young enough.

        Raises:
            SvidError: the Workload API gives none, and none held is still valid.
            MissingExtra: the extra is not installed.

        """
        with self._lock:
            cached = self.cached_token(audience)
            if cached is not None:
                return cached
            try:
                held = self._fetch_token(audience)
            except SvidError as error:
                old = self._held.get(audience)
                if old is None or old.expires_at <= self._wall_clock():
                    raise
                _log.warning("keeping the JWT-SVID at hand: %s", error)
                return old.token
            self._held[audience] = held
            return held.token

    def cached_token(self, audience: str) -> str | None:
        """Return the held token while it is in the first half of its life."""
        held = self._held.get(audience)
        return held.token if held is not None and self._wall_clock() < held.renew_at else None

    def forget(self) -> None:
        """Fetch again next time."""
        with self._lock:
            self._held.clear()

    def authorities(self) -> str:
        """Return the X.509 authorities of this workload's own trust domain as PEM.

        Raises:
            SvidError: the Workload API gives none.

        """
        svid, bundles = self._x509()
        bundle = bundles.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        found = [] if bundle is None else [_pem(authority) for authority in bundle.x509_authorities]
        if not found:
            raise SvidError(f"the Workload API at {self._socket} gives no X.509 authorities")
        return "".join(sorted(found))

    def client_certificate(self) -> ClientCertificate:
        """Return this workload's X.509-SVID.

        Raises:
            SvidError: the Workload API gives none.

        """
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  comes with the extra

        svid, _ = self._x509()
        key = svid.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        begins = svid.leaf.not_valid_before_utc.timestamp()
        ends = svid.leaf.not_valid_after_utc.timestamp()
        return ClientCertificate(
            chain="".join(_pem(certificate) for certificate in svid.cert_chain),
            key=key.decode(),
            renew_at=begins + (ends - begins) / 2,
        )

    def spiffe_ids(self) -> list[str]:
        """Return every identity the Workload API gives this process.

        Raises:
            SvidError: it gives none.

        """
        with self._asking("its X.509-SVIDs") as client:
            context = client.fetch_x509_context(timeout=_WORKLOAD_API_SECONDS)
        return [str(svid.spiffe_id) for svid in context.x509_svids]

    def close(self) -> None:
        """Close the connection to the socket. Idempotent; the next use opens another."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None:
                client.close()

    def _fetch_token(self, audience: str) -> _Held:
        with self._asking("a JWT-SVID") as client:
            subject = _spiffe().SpiffeId(self._spiffe_id) if self._spiffe_id else None
            svid = client.fetch_jwt_svid({audience}, subject, timeout=_WORKLOAD_API_SECONDS)
        if self._spiffe_id is not None and str(svid.spiffe_id) != self._spiffe_id:
            raise SvidError(f"the Workload API gave {svid.spiffe_id}, not {self._spiffe_id} (NHI_SPIFFE_ID)")
        now = self._wall_clock()
        expires = float(svid.expiry)
        return _Held(svid.token, now + (expires - now) / 2, expires)

    def _x509(self) -> tuple[Any, Any]:
        with self._asking("an X.509-SVID") as client:
            context = client.fetch_x509_context(timeout=_WORKLOAD_API_SECONDS)
        if self._spiffe_id is None:
            return context.default_svid, context.x509_bundle_set
        for svid in context.x509_svids:
            if str(svid.spiffe_id) == self._spiffe_id:
                return svid, context.x509_bundle_set
        known = ", ".join(str(svid.spiffe_id) for svid in context.x509_svids)
        raise SvidError(f"the Workload API has no {self._spiffe_id} (NHI_SPIFFE_ID); it has: {known}")

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """Lend the client; an error of it becomes a `SvidError`, and the next use opens another."""
        spiffe = _spiffe()
        try:
            with self._lock:
                if self._client is None:
                    self._client = spiffe.WorkloadApiClient(self._socket)
                client = self._client
            yield client
        except spiffe.errors.PySpiffeError as error:
            # A failed channel would otherwise hold its reconnect backoff against us.
            self.close()
            message = f"the Workload API at {self._socket} did not give {what}: {error}"
            raise SvidError(message) from None


def _spiffe() -> ModuleType:
    try:
        import spiffe  # noqa: PLC0415  an extra: loaded only when used
        import spiffe.errors  # noqa: PLC0415  same
    except ImportError:
        raise MissingExtra("spiffe", "the Workload API") from None
    return spiffe


def _pem(certificate: Any) -> str:  # noqa: ANN401  cryptography comes with the extra
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415  same

    pem: bytes = certificate.public_bytes(Encoding.PEM)
    return pem.decode()
