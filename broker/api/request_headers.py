"""Headers that routes act on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from broker.api.edge_errors import FieldError, InvalidInput
from broker.api.strict_json import header

if TYPE_CHECKING:
    from starlette.types import Scope

WAIT_SECONDS_MAX: Final = 30

_KEY: Final = re.compile(rb"[A-Za-z0-9._:~+/=-]{1,128}")
_WAIT: Final = re.compile(rb"\s*wait\s*=\s*\"?([0-9]{1,9})\"?\s*", re.IGNORECASE)


def idempotency_key(scope: Scope) -> str | None:
    """Return the Idempotency-Key, None where there is none.

    Raises:
        InvalidInput: it is longer than 128 characters or holds others than letters, digits
            and ``. _ : ~ + / = -``.
        MalformedHttp: it came twice.

    """
    raw = header(scope, b"idempotency-key")
    if raw is None:
        return None
    if not _KEY.fullmatch(raw):
        message = "must have 1 to 128 characters out of letters, digits and . _ : ~ + / = -"
        raise InvalidInput("The Idempotency-Key is not accepted.", [FieldError("Idempotency-Key", message)])
    return raw.decode("ascii")


def prefer_wait_seconds(scope: Scope) -> int:
    """Return the seconds of ``Prefer: wait=N``, at most 30; 0 where there is no such preference.

    A preference that cannot be read is ignored (RFC 7240 section 2).
    """
    for name, value in scope["headers"]:
        if name == b"prefer":
            for preference in value.split(b","):
                match = _WAIT.fullmatch(preference.partition(b";")[0])
                if match:
                    return min(int(match[1]), WAIT_SECONDS_MAX)
    return 0


def authorization(scope: Scope) -> str | None:
    """Return the Authorization header as sent, None where there is none.

    Raises:
        MalformedHttp: it came twice.

    """
    raw = header(scope, b"authorization")
    return None if raw is None else raw.decode("latin-1")
