"""The agent's way to the broker, step by step: variables, SVID, TLS, clock, audience, policy."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from broker.cli.operator_client import problem_of
from broker.cli.sockets import why_unreachable
from nhi_sdk.environment import (
    AUDIENCE,
    BROKER_URL,
    CA_FILE,
    SOCKET,
    SPIFFE_ID,
    TOKEN_FILE,
    Environment,
)
from nhi_sdk.errors import ConfigurationError, NhiError
from nhi_sdk.svid import CaFile, TokenFileSource, WorkloadApiSource, unverified_claims

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from broker.cli.diagnosis import Diagnosis

_SECONDS: Final = 5.0
SKEW_SECONDS_MAX: Final = 30
"""Below what an SVID's validity forgives everywhere; above it, 401s begin that nobody understands."""

_PRINTED_BY_DEV: Final = "nhi dev prints the lines to paste."


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Svid:
    """What the agent would present; `claims` are unverified and shown only."""

    token: str
    claims: Mapping[str, Any]


def examine(found: Diagnosis, environ: Mapping[str, str]) -> None:
    """Look at one thing after the other; what depends on something wrong is left unknown."""
    environment = _variables(found, environ)
    if environment is None:
        found.unknown("SVID and broker", "mend the variables first")
        return
    reachable = _workload_api(found, environment)
    svid = _svid(found, environment) if reachable or environment.token_file else None
    authorities = _authorities(found, environment) if reachable or environment.ca_file else None
    address = _address(found, environment.broker_url)
    connection = None if address is None else _connect(found, address)
    if connection is None or address is None:
        return
    with connection:
        if authorities is None:
            found.unknown("broker's certificate", "there are no authorities to trust it by: mend that first")
            return
        broker_id = _handshake(found, connection, address, authorities)
    if broker_id is not None:
        _ask(found, environment, svid, authorities, broker_id)


# --- variables -----------------------------------------------------------------------------------


def _variables(found: Diagnosis, environ: Mapping[str, str]) -> Environment | None:
    missing = [name for name in (BROKER_URL, AUDIENCE) if not environ.get(name, "").strip()]
    if not environ.get(SOCKET) and not environ.get(TOKEN_FILE):
        missing.append(f"{SOCKET} (or {TOKEN_FILE} and {CA_FILE})")
    for name in missing:
        found.wrong("variables", f"{name} is not set", f"Set it. {_PRINTED_BY_DEV}")
    if missing:
        return None
    try:
        environment = Environment.read(environ)
    except ConfigurationError as error:
        found.wrong("variables", str(error), f"Set them together. {_PRINTED_BY_DEV}")
        return None
    found.right("variables", f"broker {environment.broker_url}, audience {environment.audience or 'none'}")
    return environment


# --- who we are ----------------------------------------------------------------------------------


def _workload_api(found: Diagnosis, environment: Environment) -> bool:
    """Look at the Workload API's socket and the identities it offers; say whether it can be used."""
    if environment.socket is None:
        return False
    why = why_unreachable(socket_path(environment.socket))
    if why is not None:
        mend = f"Is SPIRE's agent (or nhi dev) running, and {SOCKET} its socket? {_PRINTED_BY_DEV}"
        found.wrong("Workload API", why, mend)
        return False
    source = WorkloadApiSource(environment.socket)
    try:
        identities = source.spiffe_ids()
    except NhiError as error:
        mend = "The agent has no entry for this process: register the workload, by its user or container."
        found.wrong("Workload API", str(error), mend)
        return False
    finally:
        source.close()
    return _chosen(found, environment, identities)


def _chosen(found: Diagnosis, environment: Environment, identities: list[str]) -> bool:
    wanted, names = environment.spiffe_id, ", ".join(identities)
    if wanted is not None and wanted not in identities:
        mend = f"Set {SPIFFE_ID} to one of those, or register this workload for {wanted}."
        found.wrong("Workload API", f"it offers {names}, not {wanted} ({SPIFFE_ID})", mend)
        return False
    if wanted is None and len(identities) > 1:
        mend = f"Which one is used is up to the agent. Set {SPIFFE_ID} to the one you mean."
        found.wrong("Workload API", f"it offers several identities: {names}", mend)
        return True
    found.right("Workload API", f"offers {names}")
    return True


def socket_path(text: str) -> Path:
    """Return the path in ``unix:///path``, ``unix:/path`` or ``/path``."""
    from pathlib import Path  # noqa: PLC0415  the annotation alone needs no import

    bare = text.removeprefix("unix:")
    return Path("/" + bare.lstrip("/") if bare.startswith("/") else bare)


def _svid(found: Diagnosis, environment: Environment) -> _Svid | None:
    audience = environment.audience or ""
    source: TokenFileSource | WorkloadApiSource
    if environment.token_file is not None:
        source, origin = TokenFileSource(environment.token_file), environment.token_file
    else:
        assert environment.socket is not None  # noqa: S101  one of both is set
        source = WorkloadApiSource(environment.socket, spiffe_id=environment.spiffe_id)
        origin = "the Workload API"
    try:
        token = source.token(audience)
        claims = unverified_claims(token)
    except NhiError as error:
        found.wrong("JWT-SVID", str(error), f"Check {TOKEN_FILE}, or {SOCKET} and {SPIFFE_ID}.")
        return None
    finally:
        source.close()
    _look_at_claims(found, claims, audience, origin)
    return _Svid(token, claims)


def _look_at_claims(found: Diagnosis, claims: Mapping[str, Any], audience: str, origin: str) -> None:
    named = claims.get("aud")
    audiences = [named] if isinstance(named, str) else list(named or [])
    expires = claims.get("exp")
    if audiences != [audience]:
        shown = ", ".join(str(one) for one in audiences) or "nobody"
        mend = f"The broker takes one for itself alone: get one for {audience} only, or set {AUDIENCE} right."
        found.wrong("JWT-SVID", f"the one from {origin} is for {shown}, not for {audience} alone", mend)
    elif not isinstance(expires, int | float) or expires <= time.time():
        mend = "Whatever writes it has stopped, or this host's clock is ahead."
        found.wrong("JWT-SVID", f"the one from {origin} has expired", mend)
    else:
        left = int(expires - time.time())
        found.right("JWT-SVID", f"from {origin}: {claims.get('sub')}, valid for {left} s")


def _authorities(found: Diagnosis, environment: Environment) -> str | None:
    source: CaFile | WorkloadApiSource
    if environment.ca_file is not None:
        source = CaFile(environment.ca_file)
    else:
        assert environment.socket is not None  # noqa: S101  one of both is set
        source = WorkloadApiSource(environment.socket, spiffe_id=environment.spiffe_id)
    try:
        authorities = source.authorities()
        ssl.create_default_context(cadata=authorities)
    except NhiError as error:
        found.wrong("authorities", str(error), f"Check {CA_FILE} or {SOCKET}.")
        return None
    except ssl.SSLError:
        mend = f"Set {CA_FILE} to a PEM file with the authorities of the broker's trust domain."
        found.wrong("authorities", f"{environment.ca_file} holds no PEM certificate", mend)
        return None
    finally:
        if isinstance(source, WorkloadApiSource):
            source.close()
    return authorities


# --- the broker ----------------------------------------------------------------------------------


def _address(found: Diagnosis, url: str) -> _Address | None:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        mend = f"Set {BROKER_URL} to https://host:port of the workload listener."
        found.wrong("broker", f"{url} is not an https address", mend)
        return None
    return _Address(parts.hostname, parts.port or 443)


def _connect(found: Diagnosis, address: _Address) -> socket.socket | None:
    try:
        return socket.create_connection((address.host, address.port), _SECONDS)
    except OSError as error:
        mend = f"Is the broker running, {BROKER_URL} right, and no firewall between?"
        found.wrong("broker", f"nobody answers at {address} ({error.strerror or type(error).__name__})", mend)
        return None


def _handshake(
    found: Diagnosis, connection: socket.socket, address: _Address, authorities: str
) -> str | None:
    """Check the certificate; return the broker's SPIFFE ID, empty where it has none."""
    context = ssl.create_default_context(cadata=authorities)
    try:
        with context.wrap_socket(connection, server_hostname=address.host) as secured:
            certificate = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        mend = (
            "The host name must be one of the certificate's, and the authorities those of the broker's trust "
            f"domain ({CA_FILE}, or the Workload API's); a wrong clock looks like this, too."
        )
        found.wrong("broker's certificate", f"not trusted: {error.verify_message}", mend)
        return None
    except (ssl.SSLError, OSError) as error:
        mend = f"Is {address} a broker's workload listener? It speaks TLS 1.3 only."
        found.wrong("broker", f"no TLS with {address}: {getattr(error, 'reason', None) or error}", mend)
        return None
    broker_id = _spiffe_id_of(certificate)
    found.right("broker's certificate", f"trusted, of {broker_id or 'no SPIFFE ID'}")
    return broker_id


def _spiffe_id_of(certificate: bytes | None) -> str:
    if certificate is None:
        return ""
    try:
        names = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (ValueError, x509.ExtensionNotFound):
        return ""
    return next(iter(names.value.get_values_for_type(x509.UniformResourceIdentifier)), "")


def _ask(
    found: Diagnosis, environment: Environment, svid: _Svid | None, authorities: str, broker_id: str
) -> None:
    """Ask for the catalog: shows the broker's clock, whether it knows us, and what we may have."""
    headers = {} if svid is None else {"Authorization": f"Bearer {svid.token}"}
    context = ssl.create_default_context(cadata=authorities)
    try:
        with httpx.Client(verify=context, timeout=_SECONDS, trust_env=False) as client:
            answer = client.get(f"{environment.broker_url.rstrip('/')}/catalog", headers=headers)
    except httpx.HTTPError as error:
        found.wrong("broker", f"the request failed ({type(error).__name__})", "See the broker's log.")
        return
    skewed = _clock(found, answer.headers.get("date"))
    if svid is None:
        found.unknown("identity", "there is no JWT-SVID to present")
    elif answer.status_code == httpx.codes.OK:
        _offers(found, answer)
    else:
        _refused(found, environment, answer, svid, broker_id, skewed=skewed)


def _clock(found: Diagnosis, date: str | None) -> bool:
    """Hold our clock against the broker's Date header; say whether they are too far apart."""
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        found.unknown("clock", "the answer carries no date")
        return False
    skew = round(time.time() - theirs)
    if abs(skew) <= SKEW_SECONDS_MAX:
        found.right("clock", f"{abs(skew)} s apart from the broker's")
        return False
    which = "ahead of" if skew > 0 else "behind"
    mend = "Synchronise both hosts (chrony, systemd-timesyncd): an SVID's times are checked to the second."
    found.wrong("clock", f"this host is {abs(skew)} s {which} the broker", mend)
    return True


def _offers(found: Diagnosis, answer: httpx.Response) -> None:
    try:
        count = len(answer.json()["items"])
    except (ValueError, KeyError, TypeError):
        mend = f"Is {BROKER_URL} a broker's workload listener?"
        found.wrong("broker", "its answer is not a catalog", mend)
        return
    found.right("identity", "the broker accepts it")
    if count:
        found.right("policy", f"{count} things to ask for: nhi catalog lists them")
    else:
        mend = "Register the identity with an owner and team (identities.yaml or nhi inventory set-owner)."
        found.wrong("policy", "nothing in the catalog is for this identity", mend)


def _refused(
    found: Diagnosis,
    environment: Environment,
    answer: httpx.Response,
    svid: _Svid,
    broker_id: str,
    *,
    skewed: bool,
) -> None:
    problem = problem_of(answer.status_code, answer.content, None)
    seen = problem.detail or problem.title
    if answer.status_code != httpx.codes.UNAUTHORIZED:
        found.wrong(
            "identity", seen, "Ask whoever operates the broker: nhi inventory show says how it stands."
        )
        return
    found.wrong("identity", seen, _likely_cause(environment, svid, broker_id, skewed=skewed))


def _likely_cause(environment: Environment, svid: _Svid, broker_id: str, *, skewed: bool) -> str:
    """Say what most likely made the broker refuse: it tells callers no more than that, on purpose."""
    if skewed:
        return "The clocks are too far apart: mend that first."
    if broker_id and environment.audience != broker_id:
        return (
            f"The broker is {broker_id}; unless its settings' identity.audience says otherwise, {AUDIENCE} "
            f"should be that and not {environment.audience}."
        )
    ours, theirs = _trust_domain(str(svid.claims.get("sub"))), _trust_domain(broker_id)
    if theirs and ours != theirs:
        return (
            f"The SVID is of trust domain {ours}, the broker of {theirs}: it must be given {ours}'s bundle."
        )
    return "The broker's log names the rule (authentication refused, rule=J-...)."


def _trust_domain(spiffe_id: str) -> str:
    return urlsplit(spiffe_id).netloc
