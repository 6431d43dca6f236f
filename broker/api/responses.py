"""Answers as bytes: written by orjson, with the headers they need and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Mapping

OK: Final = 200
CREATED: Final = 201
ACCEPTED: Final = 202
NOT_READY: Final = 503

_JSON_TYPE: Final = (b"content-type", b"application/json")


class _Bytes(Response):
    """A whole answer whose headers are complete: Starlette would build them anew for each."""

    def __init__(self, body: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = status
        self.background = None
        self.body = body
        self.raw_headers = headers


def json_response(members: Mapping[str, Any], status: int = OK) -> Response:
    """Return a JSON answer. It says nothing of caching, so that the boundary forbids it."""
    body = orjson.dumps(members)
    return _Bytes(body, status, [_JSON_TYPE, (b"content-length", b"%d" % len(body))])


def public_response(body: bytes, media_type: str, *, max_age_seconds: int) -> Response:
    """Return an answer that is the same for everybody and may be cached for a while."""
    return _Bytes(
        body,
        OK,
        [
            (b"content-type", media_type.encode("ascii")),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"public, max-age=%d" % max_age_seconds),
        ],
    )
