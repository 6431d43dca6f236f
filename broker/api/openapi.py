"""The OpenAPI documents, one per listener, generated from the same operations that the routers serve.

``make openapi`` writes them to ``docs/openapi/``; a test compares what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic.json_schema import models_json_schema

from broker.api import operator, ops, schemas, workload
from broker.api.operations import FORM, JSON
from broker.api.problems import CONTENT_TYPE, TABLE, TYPE_PREFIX
from broker.core.errors import StillMinting, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic import BaseModel

    from broker.api.operations import Answer, Operation
    from broker.core.errors import BrokerError

DIRECTORY: Final = Path(__file__).parents[2] / "docs" / "openapi"
REGENERATE: Final = "make openapi"
API_VERSION: Final = "0.1"

_REF: Final = "#/components/schemas/{model}"
_PROBLEM_TYPE: Final = CONTENT_TYPE.decode("ascii")
_RETRY_STATUSES: Final = frozenset({429, 503})

_LISTENERS: Final[Mapping[str, tuple[str, str, tuple[Operation, ...]]]] = {
    "workload": (
        "nhi-broker: workload listener",
        (
            "For workloads and agents, over TLS 1.3. A caller proves who it is with a JWT-SVID as bearer "
            "token, an X.509-SVID as client certificate, or both of one SPIFFE ID. An id in a path is "
            "never a capability: what belongs to another caller answers exactly as what does not exist."
        ),
        workload.OPERATIONS,
    ),
    "operator": (
        "nhi-broker: operator listener",
        (
            "For operators, over a Unix socket on the broker's host. The kernel says who is at the other "
            "end: root and the broker's own user may operate it, everybody else is answered 403. Each "
            "change is audited with the operator's user id."
        ),
        operator.OPERATIONS,
    ),
    "ops": (
        "nhi-broker: ops listener",
        "For probes and metrics, on loopback. Nothing here needs authentication, and nothing here is secret.",
        ops.OPERATIONS,
    ),
}

_SECURITY_SCHEMES: Final = {
    "jwtSvid": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT-SVID",
        "description": "A JWT-SVID whose only audience is this broker.",
    },
    "x509Svid": {"type": "mutualTLS", "description": "An X.509-SVID as client certificate."},
}
_HEADERS: Final = {
    "TraceId": {
        "description": "Names the request in the broker's log and audit.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    },
    "RetryAfter": {
        "description": "In how many seconds a retry may help.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Authenticate": {"description": "How to prove oneself.", "schema": {"type": "string"}},
}


def openapi_documents() -> dict[str, dict[str, Any]]:
    """Return the documents by listener: ``workload``, ``operator``, ``ops``."""
    return {
        name: _document(title, description, operations)
        for name, (title, description, operations) in _LISTENERS.items()
    }


def rendered(document: Mapping[str, Any]) -> str:
    """Return a document as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write(directory: Path = DIRECTORY) -> list[Path]:
    """Write the documents and return where."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, document in openapi_documents().items():
        path = directory / f"{name}.json"
        path.write_text(rendered(document), encoding="utf-8")
        written.append(path)
    return written


def _document(title: str, description: str, operations: tuple[Operation, ...]) -> dict[str, Any]:
    parts = _Components(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, parts)
    components: dict[str, Any] = {
        "schemas": parts.schemas,
        "responses": dict(sorted(parts.responses.items())),
        "headers": _HEADERS,
    }
    if any(operation.security == "svid" for operation in operations):
        components["securitySchemes"] = _SECURITY_SCHEMES
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": description, "version": API_VERSION},
        "paths": paths,
        "components": components,
    }


# --- schemas --------------------------------------------------------------------------------------


def _models(operations: Iterable[Operation]) -> Iterator[type[BaseModel]]:
    yield schemas.Problem
    for operation in operations:
        if operation.body is not None:
            yield operation.body
        for answer in operation.answers.values():
            if answer.model is not None:
                yield answer.model


class _Components:
    """What the operations of one document share: schemas, and the problems most of them may answer."""

    def __init__(self, operations: tuple[Operation, ...]) -> None:
        models = list(dict.fromkeys(_models(operations)))
        references, definitions = models_json_schema(
            [(model, "validation") for model in models], ref_template=_REF
        )
        self._references = {model: dict(references[model, "validation"]) for model in models}
        self.schemas: dict[str, Any] = dict(sorted(definitions["$defs"].items()))
        self.responses: dict[str, Any] = {}

    def schema(self, model: type[BaseModel]) -> dict[str, Any]:
        """Return a reference to a model's schema."""
        return self._references[model]

    def problem(self, status: int, kinds: list[type[BrokerError]]) -> dict[str, Any]:
        """Return a reference to the response that these errors are."""
        name = f"{status}-{'-'.join(sorted(kind.code for kind in kinds))}"
        self.responses[name] = _problem(status, kinds, self.schema(schemas.Problem))
        return {"$ref": f"#/components/responses/{name}"}


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter: what may be absent there is never null."""
    plain = {name: value for name, value in schema.items() if name not in {"title", "anyOf"}}
    if plain.get("default", ...) is None:
        del plain["default"]
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    return {**plain, **kinds[0]} if kinds else plain


# --- operations -----------------------------------------------------------------------------------


def _operation(operation: Operation, parts: _Components) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "security": [{"jwtSvid": []}, {"x509Svid": []}] if operation.security == "svid" else [],
    }
    parameters = list(_parameters(operation))
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": not operation.body_optional,
            "content": {FORM if operation.form else JSON: {"schema": parts.schema(operation.body)}},
        }
    described["responses"] = dict(sorted(_responses(operation, parts).items()))
    return described


def _responses(operation: Operation, parts: _Components) -> dict[str, dict[str, Any]]:
    responses = {str(status): _answer(answer, parts) for status, answer in operation.answers.items()}
    for status, kinds in _by_status(operation.errors).items():
        own = responses.get(str(status))
        if own is None:
            responses[str(status)] = parts.problem(status, kinds)
        else:  # a probe's own 503 beside the broker's
            problem = _problem(status, kinds, parts.schema(schemas.Problem))
            own["description"] += " " + problem["description"]
            own["content"].update(problem["content"])
    return responses


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name in operation.parameters:
        schema = {"type": "string", "pattern": operation.path_patterns[name]}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    if operation.query is not None:
        whole = operation.query.model_json_schema(by_alias=True)
        for name, schema in whole["properties"].items():
            yield {
                "name": name,
                "in": "query",
                "required": name in whole.get("required", ()),
                "schema": _without_null(schema),
            }
    for header in operation.headers:
        yield {
            "name": header.name,
            "in": "header",
            "required": False,
            "description": header.description,
            "schema": {"type": "string", "pattern": header.pattern},
        }


def _answer(answer: Answer, parts: _Components) -> dict[str, Any]:
    caching = "no-store" if answer.max_age_seconds is None else f"public, max-age={answer.max_age_seconds}"
    schema = {"type": "string"} if answer.model is None else parts.schema(answer.model)
    return {
        "description": answer.description,
        "headers": {
            "trace-id": _header("TraceId"),
            "Cache-Control": {"required": True, "schema": {"type": "string", "const": caching}},
        },
        "content": {answer.media_type: {"schema": schema}},
    }


def _header(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}


def _by_status(errors: Iterable[type[BrokerError]]) -> dict[int, list[type[BrokerError]]]:
    found: dict[int, list[type[BrokerError]]] = {}
    for kind in errors:
        found.setdefault(TABLE[kind].status, []).append(kind)
    return found


def _problem(status: int, kinds: list[type[BrokerError]], schema: Mapping[str, Any]) -> dict[str, Any]:
    headers: dict[str, Any] = {"trace-id": _header("TraceId")}
    if status in _RETRY_STATUSES or StillMinting in kinds:
        headers["Retry-After"] = _header("RetryAfter")
    if Unauthenticated in kinds:
        headers["WWW-Authenticate"] = _header("Authenticate")
    meanings = [f"`{TYPE_PREFIX}{kind.code}`: {TABLE[kind].title}." for kind in kinds]
    return {
        "description": " ".join(meanings),
        "headers": headers,
        "content": {_PROBLEM_TYPE: {"schema": schema}},
    }


if __name__ == "__main__":
    for _path in write():
        print(_path.relative_to(DIRECTORY.parents[1]))  # noqa: T201  what `make openapi` shows
