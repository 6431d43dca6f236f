"""What resource servers use: keys, introspection, status lists, and where to find them.

Keys, lists and metadata are public: a verifier needs no SVID to check a token.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import orjson

from broker.api import schemas
from broker.api.operations import Answer, Operation
from broker.api.responses import json_response, public_response
from broker.api.strict_json import read_form
from broker.core.errors import UnknownObject
from broker.service.tokens import STATUS_LIST_TTL_SECONDS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from broker.api.authenticate import Admitted, Gate
    from broker.api.operations import Endpoint
    from broker.service.services import Services

STATUS_LIST_TYPE: Final = "application/statuslist+jwt"
_JSON: Final = "application/json"
_METADATA_SECONDS: Final = 300
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,6}", re.ASCII)

READ_JWKS: Final = Operation(
    method="GET",
    path="/oauth2/jwks",
    id="readJwks",
    summary="Public keys that may verify a live token (RFC 7517)",
    answers={200: Answer("The key set.", schemas.Jwks, max_age_seconds=_METADATA_SECONDS)},
)
INTROSPECT: Final = Operation(
    method="POST",
    path="/oauth2/introspect",
    id="introspectToken",
    summary="Whether a token is active (RFC 7662); more than that only to its audience or holder",
    security="svid",
    body=schemas.IntrospectionForm,
    form=True,
    answers={200: Answer("What this caller may know of the token.", schemas.Introspection)},
)
READ_STATUS_LIST: Final = Operation(
    method="GET",
    path="/statuslists/{number}",
    id="readStatusList",
    summary="A signed Token Status List: a set bit is a token that ended before its expiry",
    path_patterns={"number": f"^(?:{_NUMBER.pattern})$"},
    answers={
        200: Answer(
            "A Status List Token.", media_type=STATUS_LIST_TYPE, max_age_seconds=STATUS_LIST_TTL_SECONDS
        )
    },
    refusals=(UnknownObject,),
)
READ_METADATA: Final = Operation(
    method="GET",
    path="/.well-known/oauth-authorization-server",
    id="readServerMetadata",
    summary="Where the above are found (RFC 8414)",
    answers={200: Answer("The metadata.", schemas.ServerMetadata, max_age_seconds=_METADATA_SECONDS)},
)

OPERATIONS: Final = (READ_JWKS, INTROSPECT, READ_STATUS_LIST, READ_METADATA)


def bound(services: Services, gate: Gate) -> list[tuple[Operation, Endpoint]]:
    """Return the operations with what serves them."""
    routes = TokenRoutes(services)
    return [
        (INTROSPECT, gate.guard(routes.introspect)),
        (READ_JWKS, routes.jwks),
        (READ_STATUS_LIST, routes.status_list),
        (READ_METADATA, routes.metadata),
    ]


class TokenRoutes:
    """Tokens that others can check."""

    def __init__(self, services: Services) -> None:
        self._tokens = services.tokens

    async def introspect(self, request: Request, who: Admitted) -> Response:
        """Serve `INTROSPECT`."""
        form = await read_form(request, schemas.IntrospectionForm)
        return json_response(self._tokens.introspect(who.caller, form.token))

    async def jwks(self, _request: Request) -> Response:
        """Serve `READ_JWKS`; the rotation of keys counts on nobody caching it for longer."""
        return public_response(
            orjson.dumps(self._tokens.jwks()), _JSON, max_age_seconds=self._tokens.jwks_cache_seconds
        )

    async def status_list(self, request: Request) -> Response:
        """Serve `READ_STATUS_LIST`."""
        number: str = request.path_params["number"]
        if not _NUMBER.fullmatch(number):
            raise UnknownObject
        token = await self._tokens.status_list(int(number))
        return public_response(
            token.encode("ascii"), STATUS_LIST_TYPE, max_age_seconds=STATUS_LIST_TTL_SECONDS
        )

    async def metadata(self, _request: Request) -> Response:
        """Serve `READ_METADATA`."""
        return public_response(
            orjson.dumps(self._tokens.metadata()), _JSON, max_age_seconds=_METADATA_SECONDS
        )
