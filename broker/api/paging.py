"""Pages of lists: a cursor is the key of the last item shown, opaque to whoever sends it back."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import orjson

from broker.api.edge_errors import FieldError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_INTEGER_BEYOND: Final = 2**53
_CURSOR: Final = "The cursor is not one this list gave out; begin without one."


def cursor_of(*key: str | int) -> str:
    """Return the cursor after an item with this key."""
    return base64.urlsafe_b64encode(orjson.dumps(key)).rstrip(b"=").decode("ascii")


def key_of(cursor: str, *kinds: type) -> tuple[Any, ...]:
    """Return the key that `cursor_of` made a cursor of; `kinds` are the types of its parts.

    Raises:
        InvalidInput: it is no such cursor.

    """
    try:
        key = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError):
        _refuse()
    if not isinstance(key, list) or [type(part) for part in key] != list(kinds):
        _refuse()
    if any(isinstance(part, int) and not 0 <= part < _INTEGER_BEYOND for part in key):
        _refuse()
    return tuple(key)


def _refuse() -> NoReturn:
    raise InvalidInput(_CURSOR, [FieldError("cursor", "is not a cursor of this list")])


def page_of(
    found: Sequence[T], limit: int, view: Callable[[T], dict[str, Any]], cursor: Callable[[T], str]
) -> dict[str, Any]:
    """Return a page out of up to `limit` + 1 items; the one too many says that there is another page."""
    shown = found[:limit]
    return {
        "items": [view(item) for item in shown],
        "next": cursor(shown[-1]) if len(found) > limit else None,
    }
