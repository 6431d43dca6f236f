"""What both httpx transports have in common."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx

from nhi_sdk._exchange import Failure
from nhi_sdk.errors import TransportError

if TYPE_CHECKING:
    from nhi_sdk._calls import Call
    from nhi_sdk._session import Prepared

ANSWER_BYTES_MAX: Final = 16_777_216
"""More than the views of a task's thousand leases."""

CONNECT_SECONDS_MAX: Final = 5.0
_CHAIN_MAX: Final = 10

LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=30.0)


def timeout_of(seconds: float) -> httpx.Timeout:
    """Return httpx's timeouts for one attempt."""
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS_MAX))


def headers_of(call: Call[object], prepared: Prepared, user_agent: str) -> dict[str, str]:
    """Return the headers of one attempt."""
    headers = {**call.headers, "User-Agent": user_agent}
    if prepared.authorization is not None:
        headers["Authorization"] = prepared.authorization
    return headers


def too_large() -> Failure:
    """Return what an answer beyond the bound comes to."""
    return Failure(TransportError("the broker's answer is too large", ambiguous=True), passing=False)


def certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Return the certificate failure behind an httpx error, if that is what it was."""
    found = _cause(error, ssl.SSLCertVerificationError)
    return found if isinstance(found, ssl.SSLCertVerificationError) else None


def failure_of(error: httpx.HTTPError, url: str, *, trust_renewed: bool = False) -> Failure:
    """Say what an httpx error means.

    Args:
        error: what httpx raised.
        url: the broker's address, for the message.
        trust_renewed: whether other authorities were fetched since, so that a certificate may now verify.

    """
    where = urlsplit(url).netloc
    certificate = certificate_error(error)
    if certificate is not None:
        message = (
            f"the certificate of the broker at {where} is not trusted: {certificate.verify_message}. "
            "Check the host name in NHI_BROKER_URL and the authorities (NHI_CA_FILE, or the Workload API's)"
        )
        return Failure(TransportError(message), passing=trust_renewed)
    tls = _cause(error, ssl.SSLError)
    if isinstance(tls, ssl.SSLError) and not isinstance(tls, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        message = f"TLS with the broker at {where} failed: {tls.reason or 'unknown reason'}"
        return Failure(TransportError(message), passing=False)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        message = f"cannot connect to the broker at {where}: is it running, and NHI_BROKER_URL right?"
        return Failure(TransportError(message), passing=True)
    if isinstance(error, httpx.TimeoutException):
        message = f"the broker at {where} did not answer in time"
        return Failure(TransportError(message, ambiguous=True), passing=True)
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        message = f"the connection to the broker at {where} was lost before its answer"
        return Failure(TransportError(message, ambiguous=True), passing=True)
    message = f"the request to the broker at {where} failed: {type(error).__name__}"
    return Failure(TransportError(message, ambiguous=True), passing=False)


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    current: BaseException | None = error
    for _ in range(_CHAIN_MAX):
        if current is None or isinstance(current, kind):
            return current
        current = current.__cause__ or current.__context__
    return None
