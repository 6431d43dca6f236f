"""Identifiers as types: parsed once at the edge, never a bare ``str`` inside.

An id is a name, never a capability (DESIGN 6): every route checks the caller
against the object that the id names.
"""

from __future__ import annotations

import base64
import itertools
import re
import secrets
import string
import time
from typing import ClassVar, Final, Self

_SECONDS_BITS: Final = 34
_COUNT_BITS: Final = 46
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
# Together 80 bits: 16 base32 characters, short enough for a PostgreSQL role name.
_BODY: Final = re.compile(r"[a-z2-7]{16}")
_INSTANCE: Final = re.compile(r"[a-z2-7]{6}")


_count = itertools.count(secrets.randbits(_COUNT_BITS))


# RFC 4648 §6 in lower case, two characters for ten bits at a time.
_ALPHABET: Final = string.ascii_lowercase + "234567"
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
_SHIFTS: Final = range(_SECONDS_BITS + _COUNT_BITS - 10, -1, -10)


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode("ascii").rstrip("=").lower()


class MalformedIdError(ValueError):
    """The text is not an id of this kind; the message does not repeat it."""


class _PrefixedId(str):
    """``<prefix><16 base32 characters>``, compared byte for byte."""

    __slots__ = ()
    prefix: ClassVar[str]

    @classmethod
    def new(cls) -> Self:
        """Draw a fresh id: the second it was drawn in, then a count that begins at random.

        Ids that begin with the time are neighbours in the ledger's indices: a group of inserts
        touches a few pages instead of as many as it has rows. The count keeps the ids of one
        process apart whatever their rate, its random beginning those of two.
        """
        drawn = int(time.time()) << _COUNT_BITS | next(_count) & _COUNT_MASK
        return cls(cls.prefix + "".join([_PAIRS[drawn >> shift & 1023] for shift in _SHIFTS]))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the id, or raise `MalformedIdError`."""
        if not text.startswith(cls.prefix) or not _BODY.fullmatch(text, len(cls.prefix)):
            msg = f"not a {cls.__name__}"
            raise MalformedIdError(msg)
        return cls(text)

    @property
    def body(self) -> str:
        """The 16 base32 characters, for names in backends that allow no prefix."""
        return self[len(self.prefix) :]


class LeaseId(_PrefixedId):
    """Names one lease, ``lse_…``; the backend's object is named after its body."""

    __slots__ = ()
    prefix = "lse_"


class TaskId(_PrefixedId):
    """Names one task, ``tsk_…``."""

    __slots__ = ()
    prefix = "tsk_"


class DecisionId(_PrefixedId):
    """Names one recorded decision, ``dec_…``."""

    __slots__ = ()
    prefix = "dec_"


class IdentityId(_PrefixedId):
    """Names one inventory record, ``idn_…``."""

    __slots__ = ()
    prefix = "idn_"


class InstanceTag(str):
    """Six base32 characters that mark backend objects as this deployment's.

    Drawn once when the ledger is created. A scan touches only names that carry it,
    so two brokers may share one backend.
    """

    __slots__ = ()

    @classmethod
    def new(cls) -> Self:
        """Draw a fresh tag (30 bits)."""
        return cls(_base32(secrets.token_bytes(4))[:6])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the tag, or raise `MalformedIdError`."""
        if not _INSTANCE.fullmatch(text):
            msg = "not an InstanceTag"
            raise MalformedIdError(msg)
        return cls(text)


def backend_name(instance: InstanceTag, lease_id: LeaseId) -> str:
    """Name a lease's object in a backend: ``nhi_<instance>_<lease body>`` (DESIGN 4, rule 1).

    27 characters of ``[a-z0-9_]``: legal as a PostgreSQL role, an STS session name and
    most things between, so revoke works from the lease id alone.
    """
    return f"nhi_{instance}_{lease_id.body}"


def lease_of_backend_name(instance: InstanceTag, name: str) -> LeaseId | None:
    """Return the lease that a backend object belongs to, or None where it is not ours."""
    prefix = f"nhi_{instance}_"
    if not name.startswith(prefix):
        return None
    try:
        return LeaseId.parse(LeaseId.prefix + name[len(prefix) :])
    except MalformedIdError:
        return None
