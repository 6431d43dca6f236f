"""Canonical bytes: one spelling per record, so that a hash over them means something (DESIGN 9).

The subset is ASCII keys, no floats, integers below 2^53, no lone surrogates. Within it
orjson with sorted keys writes what RFC 8785 prescribes: ASCII order is UTF-16 order
(§3.2.3), and integers are the only numbers (§3.2.2.3). The ``rfc8785`` package is the
oracle in the tests. orjson itself refuses surrogates, large integers and keys that are no
strings; what it would let through (floats, dates, UUIDs, deep nesting) is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.audit import JsonValue

BYTES_MAX: Final = 256 * 1024
"""Longest canonical form accepted."""

DEPTH_MAX: Final = 16
"""Deepest nesting accepted; the outermost object is level 1."""

_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER
_SCALARS: Final = frozenset({str, int, bool, type(None)})
_ARRAYS: Final = frozenset({list, tuple})


class NotCanonicalError(ValueError):
    """The value, or the bytes, lie outside the canonical subset. The message repeats no value."""


def canonical_bytes(mapping: Mapping[str, JsonValue], *, level: int = 1, bytes_max: int = BYTES_MAX) -> bytes:
    """Return the canonical form of `mapping`.

    Args:
        mapping: the object to write.
        level: 1 for a whole document; where it will stand when it becomes part of one.
        bytes_max: the longest form accepted.

    Raises:
        NotCanonicalError: a float or another type outside the subset, an integer of 2^53 or
            more, a key that is not ASCII, a lone surrogate, more than `DEPTH_MAX` levels or
            more than `bytes_max` bytes.

    """
    _check_object(mapping, level)
    try:
        encoded = orjson.dumps(mapping, default=_plain, option=_OPTIONS)
    except TypeError as error:  # orjson's one error, subclass of TypeError
        raise NotCanonicalError(f"not in the canonical subset: {error}") from error
    if len(encoded) > bytes_max:
        raise NotCanonicalError(f"longer than {bytes_max} bytes")
    return encoded


def parse_canonical(data: bytes) -> dict[str, Any]:
    """Parse `data`, refusing whatever `canonical_bytes` would have spelled otherwise.

    Raises:
        DuplicateKeyError: a key stands twice in one object.
        NotCanonicalError: any other deviation: not JSON, not an object, spaces, key order,
            escapes, floats, trailing bytes.

    """
    if len(data) > BYTES_MAX:
        raise NotCanonicalError(f"longer than {BYTES_MAX} bytes")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise NotCanonicalError("not JSON") from error
    if type(value) is not dict:
        raise NotCanonicalError("not a JSON object")
    if canonical_bytes(value) != data:
        # Most deviations end here; only then is it worth knowing which one it was.
        _refuse_duplicate_keys(data)
        raise NotCanonicalError("valid JSON, but not in its canonical spelling")
    return value


class DuplicateKeyError(NotCanonicalError):
    """One object holds the same key twice: two readers could see two different records."""


def _check_object(mapping: Mapping[str, Any], depth: int) -> None:
    # Sets and str.join keep the common, flat record inside C: this runs once per audit record.
    if depth > DEPTH_MAX:
        raise NotCanonicalError(f"nested deeper than {DEPTH_MAX} levels")
    try:
        ascii_keys = "".join(mapping).isascii()
    except TypeError as error:
        raise NotCanonicalError("an object key is not a string") from error
    if not ascii_keys:
        raise NotCanonicalError("an object key is not ASCII")
    values = mapping.values()
    if not _SCALARS.issuperset(map(type, values)):
        _check_values(values, depth)


def _check_values(values: Iterable[object], depth: int) -> None:
    for value in values:
        kind = type(value)
        if kind in _SCALARS or issubclass(kind, str):  # ids and StrEnums are written as their text
            continue
        if isinstance(value, list | tuple) and kind in _ARRAYS:  # a named tuple is neither list nor object
            if depth >= DEPTH_MAX:
                raise NotCanonicalError(f"nested deeper than {DEPTH_MAX} levels")
            _check_values(value, depth + 1)
        elif isinstance(value, Mapping):
            _check_object(value, depth + 1)
        else:
            raise NotCanonicalError(f"a {kind.__name__} is not in the canonical subset")


def _plain(value: object) -> object:
    # orjson knows dict only; read-only views and other mappings were checked like dicts.
    if isinstance(value, Mapping):
        return dict(value)
    raise NotCanonicalError(f"a {type(value).__name__} is not in the canonical subset")


def _refuse_duplicate_keys(data: bytes) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise DuplicateKeyError("a key stands twice in one object")
        return result

    try:
        json.loads(data, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotCanonicalError("not JSON") from error
