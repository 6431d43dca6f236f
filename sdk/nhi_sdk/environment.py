"""Settings from environment variables, with errors that say which one and how to set it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypedDict

from nhi_sdk.errors import ConfigurationError
from nhi_sdk.svid import (
    CaFile,
    CertificateSource,
    SvidSource,
    TokenFileSource,
    TrustSource,
    WorkloadApiSource,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

BROKER_URL: Final = "NHI_BROKER_URL"
AUDIENCE: Final = "NHI_AUDIENCE"
SOCKET: Final = "SPIFFE_ENDPOINT_SOCKET"
TOKEN_FILE: Final = "NHI_TOKEN_FILE"  # noqa: S105  a variable's name
CA_FILE: Final = "NHI_CA_FILE"
SPIFFE_ID: Final = "NHI_SPIFFE_ID"
MTLS: Final = "NHI_MTLS"

_HOW: Final = {
    BROKER_URL: "the broker's workload listener, e.g. https://localhost:8443",
    AUDIENCE: "the audience the broker expects in a JWT-SVID, e.g. spiffe://example.org/nhi-broker",
    SOCKET: "the SPIFFE Workload API socket, e.g. unix:///run/spire/agent.sock",
}
_YES: Final = frozenset({"1", "true", "yes"})
_NO: Final = frozenset({"", "0", "false", "no"})


class Sources(TypedDict):
    """What the clients are constructed with."""

    svid: SvidSource | None
    audience: str | None
    trust: TrustSource
    certificates: CertificateSource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The variables this package reads, as they are set. None of them holds a secret."""

    broker_url: str
    audience: str | None
    socket: str | None
    token_file: str | None
    ca_file: str | None
    spiffe_id: str | None
    mtls: bool

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Read the variables.

        Raises:
            ConfigurationError: one is missing or wrong.

        """
        values = os.environ if environ is None else environ
        mtls = values.get(MTLS, "").strip().lower()
        if mtls not in _YES | _NO:
            raise ConfigurationError(f"{MTLS} must be 1 or 0")
        found = cls(
            broker_url=_required(values, BROKER_URL),
            audience=values.get(AUDIENCE) or None,
            socket=values.get(SOCKET) or None,
            token_file=values.get(TOKEN_FILE) or None,
            ca_file=values.get(CA_FILE) or None,
            spiffe_id=values.get(SPIFFE_ID) or None,
            mtls=mtls in _YES,
        )
        found.check(values)
        return found

    def check(self, values: Mapping[str, str]) -> None:
        """Raise `ConfigurationError` where the variables do not add up to a way in."""
        if self.socket is None and self.token_file is None:
            raise ConfigurationError(
                f"no SVID: set {SOCKET} to {_HOW[SOCKET]}, or {TOKEN_FILE} to a file with a JWT-SVID"
            )
        if self.socket is None and self.ca_file is None:
            raise ConfigurationError(
                f"nothing to trust the broker's certificate by: set {CA_FILE} to a PEM file with its "
                f"authorities, or {SOCKET} to {_HOW[SOCKET]}"
            )
        if self.mtls and self.socket is None:
            raise ConfigurationError(f"{MTLS} needs an X.509-SVID: set {SOCKET} to {_HOW[SOCKET]}")
        if not self.mtls or self.token_file is not None:
            _required(values, AUDIENCE)

    def sources(self) -> Sources:
        """Return what the clients are constructed with.

        A token file goes before the Workload API as the JWT-SVID's source, a CA file as
        the trust's. With mutual TLS and no token file, the certificate alone speaks.
        """
        api = None if self.socket is None else WorkloadApiSource(self.socket, spiffe_id=self.spiffe_id)
        trust: TrustSource | None = api if self.ca_file is None else CaFile(self.ca_file)
        svid: SvidSource | None = api
        if self.token_file is not None:
            svid = TokenFileSource(self.token_file)
        elif self.mtls:
            svid = None
        if trust is None:
            raise ConfigurationError(f"set {CA_FILE} or {SOCKET}")
        return Sources(
            svid=svid, audience=self.audience, trust=trust, certificates=api if self.mtls else None
        )


def _required(values: Mapping[str, str], name: str) -> str:
    value = values.get(name, "").strip()
    if not value:
        raise ConfigurationError(f"{name} is not set: set it to {_HOW[name]}")
    return value
