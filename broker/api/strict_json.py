"""Bodies, forms and queries: read within bounds, parsed strictly, refused without an echo.

JSON is parsed twice on purpose. The standard library's scanner is the judge of form: it
sees each object's pairs, so a repeated key cannot slip through (pydantic keeps the last
one). Then pydantic reads the same bytes in its strict JSON mode. Both together cost
under 10 us for a credential request.
"""

from __future__ import annotations

import asyncio
import json
import re
import urllib.parse
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from broker.api import schemas
from broker.api.edge_errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    FieldError,
    InvalidInput,
    MalformedHttp,
    MalformedJson,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails
    from starlette.requests import Request
    from starlette.types import Receive, Scope

BODY_BYTES_MAX: Final = 65_536
BODY_SECONDS_MAX: Final = 10.0
DEPTH_MAX: Final = 16
INTEGER_DIGITS_MAX: Final = 16
ERRORS_LISTED_MAX: Final = 20
QUERY_BYTES_MAX: Final = 4_096

_JSON_TYPES: Final = frozenset({"application/json", "application/json;charset=utf-8"})
_FORM_TYPES: Final = frozenset(
    {"application/x-www-form-urlencoded", "application/x-www-form-urlencoded;charset=utf-8"}
)

M = TypeVar("M", bound=BaseModel)


# --- reading ------------------------------------------------------------------------------------


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return a header's value, None where it is absent.

    Raises:
        MalformedHttp: it came more than once, so that two readers could take different ones.

    """
    found: bytes | None = None
    for key, value in scope["headers"]:
        if key == name:
            if found is not None:
                raise MalformedHttp("A header that may come once came twice.")
            found = value
    return found


async def read_body(
    scope: Scope,
    receive: Receive,
    *,
    max_bytes: int = BODY_BYTES_MAX,
    seconds: float = BODY_SECONDS_MAX,
) -> bytes:
    """Return the whole body.

    Raises:
        BodyTooLarge: more than `max_bytes`; a declared length is believed before any byte is read.
        BodyTooSlow: not whole after `seconds`.
        ClientGone: the client hung up first.
        MalformedHttp: the Content-Length is repeated.

    """
    declared = header(scope, b"content-length")
    if declared is not None and (not declared.isdigit() or len(declared) > 9 or int(declared) > max_bytes):  # noqa: PLR2004  nine digits
        _too_large(max_bytes)
    try:
        async with asyncio.timeout(seconds):
            return await _collect(receive, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"The request's body did not arrive within {seconds:g} seconds.") from None


async def _collect(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The client hung up before its request was whole.")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join((*chunks, chunk)) if chunks else chunk
        chunks.append(chunk)


def _too_large(max_bytes: int) -> NoReturn:
    raise BodyTooLarge(f"The request's body may have at most {max_bytes} bytes.")


def _check_content_type(scope: Scope, accepted: frozenset[str], name: str) -> None:
    raw = header(scope, b"content-type")
    text = "" if raw is None else raw.decode("latin-1").lower().replace(" ", "").replace('"', "")
    if text not in accepted:
        raise UnsupportedMediaType(f"This route reads {name} in UTF-8: set the Content-Type header to it.")


# --- JSON ---------------------------------------------------------------------------------------


class _RepeatedKeyError(ValueError):
    pass


class _NumberError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _RepeatedKeyError
    return members


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS_MAX:
        raise _NumberError
    return int(digits)


def _constant(_name: str) -> NoReturn:
    raise _NumberError


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant, strict=True
)

# The closing quote is optional and the loop gives nothing back: an unterminated string is
# one match, not a quadratic search for its end.
_TOKEN: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def _too_deep(text: str) -> bool:
    if text.count("{") + text.count("[") <= DEPTH_MAX:
        return False
    depth = 0
    for mark in _TOKEN.findall(text):
        if mark in "[{":
            depth += 1
            if depth > DEPTH_MAX:
                return True
        elif mark in "]}":
            depth -= 1
    return False


def _holds_nul(value: Any) -> bool:  # noqa: ANN401  any JSON value
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in key or _holds_nul(member) for key, member in value.items())
    return isinstance(value, list) and any(_holds_nul(member) for member in value)


def parse_json(body: bytes) -> Any:  # noqa: ANN401  any JSON value
    """Return the JSON value of `body`.

    Raises:
        MalformedJson: not UTF-8, not JSON, a repeated key, NaN or infinity, an integer of more
            than 16 digits, a NUL character, or nesting deeper than 16.

    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedJson("The body is not valid UTF-8.") from None
    if _too_deep(text):
        raise MalformedJson(f"The body nests deeper than {DEPTH_MAX} levels.")
    try:
        value = _DECODER.decode(text)
    except _RepeatedKeyError:
        raise MalformedJson("The body repeats a key within one object.") from None
    except _NumberError:
        raise MalformedJson("The body holds a number that is too long or not finite.") from None
    except ValueError:
        raise MalformedJson("The body is not well-formed JSON.") from None
    if "\\u0000" in text and _holds_nul(value):
        raise MalformedJson("The body holds a NUL character.")
    return value


def parse_model(model: type[M], body: bytes) -> M:
    """Return the validated model.

    Raises:
        MalformedJson: see `parse_json`; lone surrogates too.
        InvalidInput: well-formed, but not what the schema asks for.

    """
    parse_json(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(model, error) from None


async def read_model(request: Request, model: type[M]) -> tuple[M, bytes]:
    """Return the body as `model`, and the body itself (its digest goes with an Idempotency-Key).

    Raises:
        UnsupportedMediaType, BodyTooLarge, BodyTooSlow, MalformedJson, InvalidInput: as named.

    """
    scope = request.scope
    _check_content_type(scope, _JSON_TYPES, "application/json")
    body = await read_body(scope, request.receive)
    return parse_model(model, body), body


async def read_optional_model(request: Request, model: type[M]) -> tuple[M, bytes]:
    """Return the body as `model`; an empty body stands for the empty object, whatever its type."""
    body = await read_body(request.scope, request.receive)
    if not body:
        return parse_model(model, b"{}"), b""
    _check_content_type(request.scope, _JSON_TYPES, "application/json")
    return parse_model(model, body), body


# --- forms and queries --------------------------------------------------------------------------


def _pairs(raw: bytes, what: str) -> dict[str, str]:
    try:
        pairs = urllib.parse.parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(raw),
            errors="strict",
            max_num_fields=32,
        )
    except ValueError:  # not ASCII, not UTF-8 behind the escapes, no `=`, or too many fields
        raise InvalidInput(
            f"The {what} is not well-formed.", [FieldError("", "is not well-formed")]
        ) from None
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidInput(f"The {what} repeats a parameter.", [FieldError("", "repeats a parameter")])
    return members


def parse_query(scope: Scope, model: type[M]) -> M:
    """Return the query string as `model`; whole numbers and booleans are read from their plain form.

    Raises:
        InvalidInput: malformed, repeated, unknown or wrong parameters.

    """
    raw: bytes = scope["query_string"]
    if len(raw) > QUERY_BYTES_MAX:
        raise InvalidInput("The query is too long.", [FieldError("", "is too long")])
    return _validate_texts(model, _pairs(raw, "query"))


_PLAIN_INTEGER: Final = re.compile(r"(?:0|[1-9][0-9]{0,15})")


def _plain_value(text: str) -> str | int | bool:
    if text in {"true", "false"}:
        return text == "true"
    return int(text) if _PLAIN_INTEGER.fullmatch(text) else text


def _validate_texts(model: type[M], texts: Mapping[str, str]) -> M:
    typed = {name: _plain_value(text) if _takes_scalar(model, name) else text for name, text in texts.items()}
    try:
        return model.model_validate(typed)
    except ValidationError as error:
        raise _refusal(model, error) from None


def _takes_scalar(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return int in kinds or bool in kinds


async def read_form(request: Request, model: type[M]) -> M:
    """Return a form body as `model`; unknown parameters are ignored, as RFC 6749 section 3.2 asks.

    Raises:
        UnsupportedMediaType, BodyTooLarge, BodyTooSlow, InvalidInput: as named.

    """
    _check_content_type(request.scope, _FORM_TYPES, "application/x-www-form-urlencoded")
    members = _pairs(await read_body(request.scope, request.receive), "form")
    return _validate_texts(
        model, {name: text for name, text in members.items() if name in model.model_fields}
    )


# --- refusals -----------------------------------------------------------------------------------

_OBJECT: Final = "must be an object"
_WHOLE: Final = "must be a whole number"
_TEXT: Final = "must be a string"
_LIST: Final = "must be a list"
_MESSAGES: Final[Mapping[str, str]] = {
    "missing": "is required",
    "string_type": _TEXT,
    "string_unicode": _TEXT,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "bool_type": "must be true or false",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
}
_TEMPLATES: Final[Mapping[str, str]] = {
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_long": "must hold at most {max_length} entries",
    "literal_error": "must be {expected}",
}


def _refusal(model: type[BaseModel], error: ValidationError) -> MalformedJson | InvalidInput:
    details = error.errors(include_url=False, include_input=False)
    if any(detail["type"] == "json_invalid" for detail in details):
        return MalformedJson("The body is not well-formed JSON.")
    errors = [_field_error(model, detail) for detail in details[:ERRORS_LISTED_MAX]]
    return InvalidInput("The input does not fit the schema; see errors.", list(dict.fromkeys(errors)))


def _field_error(model: type[BaseModel], detail: ErrorDetails) -> FieldError:
    """Translate pydantic's error: names out of our schema and sentences of ours, nothing else."""
    path, owner = _known_path(model, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        message = f"has a field this server does not know; it knows {', '.join(owner.model_fields)}"
    elif kind == "string_pattern_mismatch":
        message = schemas.FORM_MESSAGES.get(context["pattern"], "has a form that is not accepted")
    elif kind == "value_error":
        message = str(context["error"])  # raised by our own validators, whose texts are fixed
    elif kind in _TEMPLATES:
        message = _TEMPLATES[kind].format(**context)
    else:
        message = _MESSAGES.get(kind, "is not accepted")
    return FieldError(path, message)


def _known_path(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, type[BaseModel]]:
    """Return the dotted path as far as our schema knows it, and the model it ends in.

    The last part of an unknown field's location is the caller's own text: it is dropped.
    """
    path, owner = "", model
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in owner.model_fields:
            path += f".{part}" if path else part
            owner = _nested(owner).get(part, owner)
    return path, owner


@cache
def _nested(model: type[BaseModel]) -> Mapping[str, type[BaseModel]]:
    """Return the models that fields of `model` hold, by field name."""

    def found(annotation: object) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((inner for each in get_args(annotation) if (inner := found(each))), None)

    members = {name: found(field.annotation) for name, field in model.model_fields.items()}
    return {name: inner for name, inner in members.items() if inner is not None}
