"""An authenticated identity on one request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.spiffe_id import SpiffeId


class AuthMethod(StrEnum):
    """How the identity was proven."""

    X509_SVID = "x509-svid"
    JWT_SVID = "jwt-svid"
    BOTH = "x509-svid+jwt-svid"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking. Only ``broker.authn`` makes one; a test holds it to that.

    Attributes:
        spiffe_id: the proven identity.
        method: how it was proven.
        not_after_ms: when the proof ends; no request is served with it afterwards.
        bundle_generation: the trust-bundle generation that accepted it; another one means check again.
        svid_digest: SHA-256 of the leaf certificate or the token, hex: names the proof in the audit.

    """

    spiffe_id: SpiffeId
    method: AuthMethod
    not_after_ms: int
    bundle_generation: int
    svid_digest: str
