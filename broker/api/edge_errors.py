"""What the edge itself refuses, before any service is asked.

They join the vocabulary of `broker.core.errors` so that one table renders both. Their
`detail` is fixed text of ours: nothing the client sent is ever part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.core.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class FieldError:
    """One wrong field.

    Attributes:
        field: dotted name out of our own schema, or the empty string for the whole input.
        message: a sentence out of our own vocabulary; never the value.

    """

    field: str
    message: str


class EdgeError(BrokerError):
    """Root of what the HTTP edge refuses."""


class MalformedHttp(EdgeError):
    """The bytes are not a request this server reads."""

    code = "malformed-request"


class HeadTooLarge(EdgeError):
    """Request line and headers exceed their bound."""

    code = "head-too-large"


class WrongHost(EdgeError):
    """The Host header names something that is not this broker."""

    code = "wrong-host"


class NoSuchPath(EdgeError):
    """No route of this listener has that path."""

    code = "no-such-path"


class MethodNotAllowed(EdgeError):
    """The path exists, with other methods; `allow` is the Allow header's value."""

    code = "method-not-allowed"

    def __init__(self, allow: str) -> None:
        super().__init__("This path does not answer that method; the Allow header lists those it does.")
        self.allow = allow


class UnsupportedMediaType(EdgeError):
    """The body's Content-Type is not the one this route reads."""

    code = "unsupported-media-type"


class BodyTooLarge(EdgeError):
    """The body exceeds its bound."""

    code = "body-too-large"


class BodyTooSlow(EdgeError):
    """The request did not arrive whole in time."""

    code = "request-timeout"


class ClientGone(EdgeError):
    """The client hung up before its request was whole; nobody reads the answer."""

    code = "client-gone"


class MalformedJson(EdgeError):
    """The body is not JSON as this server accepts it."""

    code = "malformed-json"


class InvalidInput(EdgeError):
    """The input is well-formed but breaks the schema; `errors` says where."""

    code = "invalid-input"

    def __init__(self, detail: str, errors: Sequence[FieldError]) -> None:
        super().__init__(detail)
        self.errors = tuple(errors)
