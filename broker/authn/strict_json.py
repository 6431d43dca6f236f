"""JSON as RFC 8259 and J-13 mean it: UTF-8 only, no repeated member, no NaN, one object at the top."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

JsonObject: TypeAlias = "dict[str, object]"

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*")


class StrictJsonError(ValueError):
    """The bytes are not the JSON or base64url we accept; the message does not repeat them."""


def _unique_members(pairs: Sequence[tuple[str, object]]) -> JsonObject:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise StrictJsonError("an object repeats a member name")
    return members


def _no_constant(_name: str) -> NoReturn:
    raise StrictJsonError("NaN and Infinity are not JSON")


def parse_object(data: bytes) -> JsonObject:
    """Return the one JSON object in `data`. The caller has bounded its length.

    Raises:
        StrictJsonError: anything else, a repeated member at any depth included.

    """
    try:
        # Decoded here because json.loads guesses UTF-16 and UTF-32 from bytes.
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_members, parse_constant=_no_constant)
    except StrictJsonError:
        raise
    except UnicodeDecodeError as error:
        raise StrictJsonError("not UTF-8") from error
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise StrictJsonError("not JSON") from error
    if not isinstance(value, dict):
        raise StrictJsonError("not a JSON object")
    return value


def decode_base64url(text: str) -> bytes:
    """Return the bytes of unpadded base64url (RFC 7515 §2): one spelling per value.

    Raises:
        StrictJsonError: padding, whitespace, another alphabet, or bits left over at the end.

    """
    if not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        raise StrictJsonError("not base64url")
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode("ascii"):
        raise StrictJsonError("base64url with bits left over")
    return data
