"""SPIFFE ID grammar, rules ID-1 to ID-5, byte for byte.

Nothing is decoded, normalised or lower-cased before it is compared: an ID that needs
that is refused (ID-5 adopts go-spiffe's resolution of the specification's §2.1 and §2.4).
"""

from __future__ import annotations

import re
from typing import Final, Self

SCHEME: Final = "spiffe://"
ID_BYTES_MAX: Final = 2048
TRUST_DOMAIN_BYTES_MAX: Final = 255

_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[a-zA-Z0-9._-]+")


class SpiffeIdError(ValueError):
    """The text breaks a SPIFFE ID rule.

    Attributes:
        rule: the rule id of ``docs/spiffe-rules.md``, for log and audit.

    """

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


def check_trust_domain(name: str) -> None:
    """Raise `SpiffeIdError` unless `name` is a legal trust domain (ID-1, ID-2, ID-4)."""
    if not name:
        raise SpiffeIdError("ID-1", "the trust domain is empty")
    if len(name.encode("utf-8", "surrogatepass")) > TRUST_DOMAIN_BYTES_MAX:
        raise SpiffeIdError("ID-4", "the trust domain is longer than 255 bytes")
    if not _TRUST_DOMAIN.fullmatch(name):
        raise SpiffeIdError("ID-2", "the trust domain holds a character outside [a-z0-9._-]")


def _check_path(path: str) -> None:
    if path.endswith("/"):
        raise SpiffeIdError("ID-3", "the path ends with a slash")
    for segment in path.split("/")[1:]:
        if not segment:
            raise SpiffeIdError("ID-3", "the path has an empty segment")
        if segment in {".", ".."}:
            raise SpiffeIdError("ID-3", "the path has a dot segment")
        if not _SEGMENT.fullmatch(segment):
            raise SpiffeIdError("ID-3", "the path holds a character outside [a-zA-Z0-9._-]")


class SpiffeId(str):
    """A validated SPIFFE ID; equality is equality of bytes."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the ID.

        Raises:
            SpiffeIdError: naming the first rule broken, ID-4 (length) before any other.

        """
        if len(text.encode("utf-8", "surrogatepass")) > ID_BYTES_MAX:
            raise SpiffeIdError("ID-4", "the ID is longer than 2048 bytes")
        if not text.startswith(SCHEME):
            raise SpiffeIdError("ID-1", "the scheme is not spiffe")
        rest = text[len(SCHEME) :]
        for mark in "?#":
            if mark in rest:
                raise SpiffeIdError("ID-1", "query and fragment are forbidden")
        slash = rest.find("/")
        trust_domain = rest if slash < 0 else rest[:slash]
        check_trust_domain(trust_domain)
        if slash >= 0:
            _check_path(rest[slash:])
        return cls(text)

    @property
    def trust_domain(self) -> str:
        """The authority part."""
        return self[len(SCHEME) :].partition("/")[0]

    @property
    def path(self) -> str:
        """The path with its leading slash, or the empty string for a trust domain's own ID."""
        _, slash, path = self[len(SCHEME) :].partition("/")
        return slash + path
