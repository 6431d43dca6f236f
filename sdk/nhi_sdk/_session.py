"""What every request needs before it can be sent: a TLS context, and the caller's SVID.

Blocking, and shared by both clients; the asyncio one calls it in a thread when it would block.
"""

from __future__ import annotations

import logging
import os
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nhi_sdk.errors import ConfigurationError, SvidError
from nhi_sdk.svid import SvidSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from nhi_sdk.svid import CertificateSource, ClientCertificate, TrustSource

_log = logging.getLogger(__name__)

_TRUST_SECONDS: Final = 300.0
"""How long fetched authorities are relied on, so that a withdrawn one is not trusted for ever."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Ready to send.

    Attributes:
        generation: rises whenever `context` is another one.
        authorization: the header's value, None where the client certificate alone speaks.

    """

    generation: int
    context: ssl.SSLContext
    authorization: str | None = field(repr=False)


@dataclass(slots=True)
class _Tls:
    generation: int
    context: ssl.SSLContext
    authorities: str
    fetched_at: float
    renew_at: float | None


def checked_url(url: str) -> str:
    """Return the broker's address without a trailing slash.

    Raises:
        ConfigurationError: not an https address of a host. SVIDs never leave in the clear.

    """
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise ConfigurationError("the broker's address must look like https://host:port (NHI_BROKER_URL)")
    if parts.username or parts.query or parts.fragment:
        raise ConfigurationError("the broker's address takes no user, query or fragment (NHI_BROKER_URL)")
    return url.rstrip("/")


class Session:
    """Holds the SVID, the trust and the TLS context of one client.

    Args:
        svid: JWT-SVIDs; None to authenticate by certificate alone.
        audience: the broker's, for the JWT-SVID.
        trust: the authorities of the broker's certificate.
        certificates: X.509-SVIDs for mutual TLS, None for none.

    """

    def __init__(
        self,
        *,
        svid: SvidSource | None,
        audience: str | None,
        trust: TrustSource,
        certificates: CertificateSource | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if svid is None and certificates is None:
            raise ConfigurationError("nothing to authenticate with: give an SVID source, or mutual TLS")
        if svid is not None and not audience:
            raise ConfigurationError("a JWT-SVID needs the broker's audience: set NHI_AUDIENCE")
        self._svid = svid
        self._audience = audience or ""
        self._trust = trust
        self._certificates = certificates
        self._monotonic = monotonic
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._tls: _Tls | None = None

    def ready(self) -> Prepared | None:
        """Return what `prepare` would without blocking, or None."""
        tls = self._tls
        if tls is None or self._stale(tls):
            return None
        if self._svid is None:
            return Prepared(tls.generation, tls.context, None)
        token = self._svid.cached_token(self._audience)
        return None if token is None else Prepared(tls.generation, tls.context, f"Bearer {token}")

    def prepare(self) -> Prepared:
        """Fetch what is missing or old.

        Raises:
            SvidError: no SVID or no authorities.

        """
        with self._lock:
            tls = self._tls
            if tls is None or self._stale(tls):
                tls = self._renewed(tls)
                self._tls = tls
        authorization = None if self._svid is None else f"Bearer {self._svid.token(self._audience)}"
        return Prepared(tls.generation, tls.context, authorization)

    def refused(self) -> None:
        """Forget the SVID: the broker answered 401."""
        if self._svid is not None:
            self._svid.forget()

    def distrusted(self) -> bool:
        """Fetch the authorities again, as the broker's certificate did not verify; say if they changed."""
        with self._lock:
            old = self._tls
            try:
                self._tls = self._renewed(old)
            except SvidError as error:
                _log.warning("cannot refresh the broker's authorities: %s", error)
                return False
            return old is None or self._tls.generation != old.generation

    def close(self) -> None:
        """Release the sources. Idempotent."""
        for source in (self._svid, self._trust, self._certificates):
            if isinstance(source, SvidSource):
                source.close()

    def _stale(self, tls: _Tls) -> bool:
        if self._monotonic() - tls.fetched_at >= _TRUST_SECONDS:
            return True
        return tls.renew_at is not None and self._wall_clock() >= tls.renew_at

    def _renewed(self, old: _Tls | None) -> _Tls:
        now = self._monotonic()
        try:
            authorities = self._trust.authorities()
            # A handshake needs the key, and the key is kept nowhere: fetched each time.
            certificate = None if self._certificates is None else self._certificates.client_certificate()
        except SvidError as error:
            if old is None:
                raise
            _log.warning("keeping the TLS settings at hand: %s", error)
            old.fetched_at = now
            return old
        if old is not None and certificate is None and authorities == old.authorities:
            old.fetched_at = now
            return old
        generation = 1 if old is None else old.generation + 1
        renew_at = None if certificate is None else certificate.renew_at
        return _Tls(generation, _context(authorities, certificate), authorities, now, renew_at)


def _context(authorities: str, certificate: ClientCertificate | None) -> ssl.SSLContext:
    """Return a context that speaks TLS 1.3 and trusts `authorities` alone, host name checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authorities)
    except (ssl.SSLError, ValueError):
        raise SvidError("the broker's authorities are not PEM certificates (NHI_CA_FILE)") from None
    if certificate is not None:
        _load(context, certificate)
    return context


def _load(context: ssl.SSLContext, certificate: ClientCertificate) -> None:
    """Give the context a key; OpenSSL takes it from a path only, so it gets one that is no file on disk."""
    content = (certificate.key + certificate.chain).encode()
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("nhi-svid")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return
    with tempfile.NamedTemporaryFile() as file:  # created 0600, gone when the block ends
        file.write(content)
        file.flush()
        context.load_cert_chain(file.name)
