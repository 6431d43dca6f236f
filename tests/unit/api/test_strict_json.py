from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from broker.api import edge_errors as edge
from broker.api import problems, schemas, strict_json
from broker.api.request_headers import authorization, idempotency_key, prefer_wait_seconds

VALID: dict[str, Any] = {
    "task": "tsk_abcdefghijklmnop",
    "resource": "orders-db",
    "action": "read",
    "intent": {"tool": "sql.query", "reason": "churn by plan, weekly report"},
    "ttl_seconds": 300,
}
JSON = [(b"content-type", b"application/json")]


def request(
    *chunks: bytes, headers: list[tuple[bytes, bytes]] | None = None, query: bytes = b"", hang: bool = False
) -> Request:
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if messages and not hang:
        messages[-1]["more_body"] = False
    waiting = iter(messages)

    async def receive() -> Any:
        message = next(waiting, None)
        if message is None:
            if hang:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}
        return message

    scope = {"type": "http", "headers": JSON if headers is None else headers, "query_string": query}
    return Request(scope, receive)


def parse(body: bytes) -> schemas.CredentialRequest:
    return strict_json.parse_model(schemas.CredentialRequest, body)


def refused(body: bytes) -> edge.InvalidInput:
    with pytest.raises(edge.InvalidInput) as caught:
        parse(body)
    return caught.value


def test_the_example_of_the_contract_is_read() -> None:
    assert parse(orjson.dumps(VALID)).intent.tool == "sql.query"
    inline = parse(orjson.dumps({**VALID, "task": {"purpose": "churn-report"}}))
    assert isinstance(inline.task, schemas.InlineTaskIn)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        pytest.param(b'{"a":1,"a":2}', "repeats", id="repeated key"),
        pytest.param(b'{"a":1,"\\u0061":2}', "repeats", id="repeated key behind an escape"),
        pytest.param(b'{"b":{"a":1,"a":1}}', "repeats", id="repeated key further in"),
        pytest.param(b'{"a":"\\u0000"}', "NUL", id="escaped NUL"),
        pytest.param(b'{"\\u0000":1}', "NUL", id="NUL in a key"),
        pytest.param(b'{"a":["x",{"b":"\\u0000"}]}', "NUL", id="NUL further in"),
        pytest.param(b'{"a":"\0"}', "well-formed", id="raw NUL"),
        pytest.param(b'{"a":"\xff"}', "UTF-8", id="not UTF-8"),
        pytest.param(b'{"a":"\xed\xa0\x80"}', "UTF-8", id="encoded surrogate"),
        pytest.param(b'\xef\xbb\xbf{"a":1}', "well-formed", id="byte order mark"),
        pytest.param(b'{"a":NaN}', "number", id="NaN"),
        pytest.param(b'{"a":-Infinity}', "number", id="infinity"),
        pytest.param(b'{"a":' + b"9" * 17 + b"}", "number", id="17 digits"),
        pytest.param(b'{"a":' + b"9" * 60_000 + b"}", "number", id="60,000 digits"),
        pytest.param(b"[" * 17 + b"]" * 17, "deeper", id="17 levels"),
        pytest.param(b"[" * 60_000, "deeper", id="60,000 levels"),
        pytest.param(b'{"a":' * 17 + b"1" + b"}" * 17, "deeper", id="17 objects"),
        pytest.param(b"", "well-formed", id="nothing"),
        pytest.param(b"{} {}", "well-formed", id="two values"),
        pytest.param(b"{'a':1}", "well-formed", id="single quotes"),
        pytest.param(b'{"a":1,}', "well-formed", id="trailing comma"),
    ],
)
def test_malformed_json_is_refused(body: bytes, word: str) -> None:
    with pytest.raises(edge.MalformedJson) as caught:
        strict_json.parse_json(body)
    assert word in caught.value.detail


def test_brackets_inside_strings_are_not_depth() -> None:
    assert strict_json.parse_json(orjson.dumps({"a": "[" * 40, "b": '"\\[{' * 20})) is not None
    assert strict_json.parse_json(b"[" * 16 + b"]" * 16) is not None


def test_an_escaped_backslash_before_u0000_is_no_nul() -> None:
    assert strict_json.parse_json(b'{"a":"\\\\u0000"}') == {"a": "\\u0000"}


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(edge.MalformedJson):
        parse(orjson.dumps(VALID).replace(b"churn", b"\\ud800"))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"ttl_seconds": True}, "ttl_seconds", "must be a whole number"),
        ({"ttl_seconds": "300"}, "ttl_seconds", "must be a whole number"),
        ({"ttl_seconds": 300.0}, "ttl_seconds", "must be a whole number"),
        ({"ttl_seconds": 0}, "ttl_seconds", "must be at least 1"),
        ({"task": 7}, "task", "must be a string"),
        ({"task": "tsk_short"}, "task", "must be a task id: tsk_ and 16 characters"),
        ({"task": {"purpose": ""}}, "task.purpose", "must have at least 1 characters"),
        ({"intent": []}, "intent", "must be an object"),
        ({"resource": "a\nb"}, "resource", schemas.FORM_MESSAGES[schemas.WORD]),
        ({"resource": "orders-db\n"}, "resource", schemas.FORM_MESSAGES[schemas.WORD]),
        (
            {"intent": {"tool": "t", "reason": "a\x1b[2Jb"}},
            "intent.reason",
            schemas.FORM_MESSAGES[schemas.PLAIN_TEXT],
        ),
        (
            {"intent": {"tool": "t", "reason": "a\u202eb"}},
            "intent.reason",
            schemas.FORM_MESSAGES[schemas.PLAIN_TEXT],
        ),
        ({"intent": {"tool": "t", "reason": "x" * 501}}, "intent.reason", "must have at most 500 characters"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(
    change: dict[str, Any], field: str, message: str
) -> None:
    assert edge.FieldError(field, message) in refused(orjson.dumps({**VALID, **change})).errors


def test_an_unknown_field_is_refused_without_repeating_its_name() -> None:
    error = refused(orjson.dumps({**VALID, "evil<script>": 1, "intent": {**VALID["intent"], "zzz": 1}}))
    assert {each.field for each in error.errors} == {"", "intent"}
    body = problems.render(error, "0" * 32).body
    assert b"evil" not in body
    assert b"zzz" not in body
    assert b"it knows tool, reason" in body


def test_the_list_of_errors_is_bounded() -> None:
    body = orjson.dumps({"purpose": "p", "resources": ["\n"] * 64})
    with pytest.raises(edge.InvalidInput) as caught:
        strict_json.parse_model(schemas.TaskRequest, body)
    assert len(caught.value.errors) == strict_json.ERRORS_LISTED_MAX


@pytest.mark.parametrize("scopes", [{}, {"task": "tsk_abcdefghijklmnop", "owner": "anna"}])
def test_a_kill_names_exactly_one_scope(scopes: dict[str, str]) -> None:
    with pytest.raises(edge.InvalidInput) as caught:
        strict_json.parse_model(schemas.KillRequest, orjson.dumps({"reason": "leak", **scopes}))
    assert caught.value.errors == (edge.FieldError("", schemas.ONE_SCOPE),)


# --- fuzzing --------------------------------------------------------------------------------------

MARKER = "zQ9xMARKERx9Qz"
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(MARKER)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just(MARKER), inner, max_size=4)
    ),
)
MODELS = [
    schemas.CredentialRequest,
    schemas.TaskRequest,
    schemas.KillRequest,
    schemas.ReasonIn,
    schemas.OwnerRequest,
]


def check_refusal(model: type[schemas.Strict], body: bytes) -> None:
    try:
        strict_json.parse_model(model, body)
    except (edge.MalformedJson, edge.InvalidInput) as error:
        rendered = problems.render(error, "0" * 32)
        assert rendered.status in {400, 422}
        assert MARKER.encode() not in rendered.body
        schemas.Problem.model_validate_json(rendered.body)


@settings(deadline=None)
@given(model=st.sampled_from(MODELS), body=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_never_a_failure(model: type[schemas.Strict], body: bytes) -> None:
    check_refusal(model, body)


@settings(deadline=None)
@given(model=st.sampled_from(MODELS), value=values)
@example(model=schemas.CredentialRequest, value={MARKER: 1, "task": {MARKER: MARKER}, "intent": MARKER})
def test_any_json_is_read_or_refused_and_never_reflected(model: type[schemas.Strict], value: Any) -> None:
    check_refusal(model, json.dumps(value).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(field=st.sampled_from(["task", "resource", "action", "intent", "ttl_seconds"]), value=values)
def test_any_value_in_a_known_field_is_read_or_refused(field: str, value: Any) -> None:
    check_refusal(
        schemas.CredentialRequest, json.dumps({**VALID, field: value}).encode("utf-8", "surrogatepass")
    )


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_query_is_read_or_refused(query: bytes) -> None:
    for model in (schemas.LeasesQuery, schemas.IdentitiesQuery, schemas.AuditQuery):
        with contextlib.suppress(edge.InvalidInput):
            strict_json.parse_query({"query_string": query}, model)


# --- reading --------------------------------------------------------------------------------------


async def test_a_body_in_pieces_is_read() -> None:
    body = orjson.dumps(VALID)
    model, raw = await strict_json.read_model(request(body[:40], body[40:], b""), schemas.CredentialRequest)
    assert (model.resource, raw) == ("orders-db", body)


@pytest.mark.parametrize(
    "value", [b"application/json", b"Application/JSON; charset=UTF-8", b'application/json;charset="utf-8"']
)
async def test_json_content_types_are_accepted(value: bytes) -> None:
    headers = [(b"content-type", value)]
    await strict_json.read_model(request(orjson.dumps(VALID), headers=headers), schemas.CredentialRequest)


@pytest.mark.parametrize(
    "value", [None, b"text/plain", b"application/json; charset=latin-1", b"application/jsonx"]
)
async def test_other_content_types_are_refused(value: bytes | None) -> None:
    headers = [] if value is None else [(b"content-type", value)]
    with pytest.raises(edge.UnsupportedMediaType):
        await strict_json.read_model(request(orjson.dumps(VALID), headers=headers), schemas.CredentialRequest)


async def test_two_content_types_are_refused() -> None:
    with pytest.raises(edge.MalformedHttp):
        await strict_json.read_model(request(b"{}", headers=JSON * 2), schemas.ReasonIn)


@pytest.mark.parametrize("length", [b"65537", b"99999999999999999999", b"-1", b"1e3"])
async def test_a_declared_length_above_the_bound_is_refused_unread(length: bytes) -> None:
    headers = [*JSON, (b"content-length", length)]
    with pytest.raises(edge.BodyTooLarge):
        await strict_json.read_model(request(headers=headers, hang=True), schemas.ReasonIn)


async def test_an_undeclared_body_above_the_bound_is_refused() -> None:
    with pytest.raises(edge.BodyTooLarge):
        await strict_json.read_model(request(*[b" " * 1024] * 65, hang=True), schemas.ReasonIn)


async def test_a_slow_body_is_given_up() -> None:
    slow = request(b"{", hang=True)
    with pytest.raises(edge.BodyTooSlow):
        await strict_json.read_body(slow.scope, slow.receive, seconds=0.01)


async def test_a_client_that_hangs_up_is_noticed() -> None:
    gone = request()
    with pytest.raises(edge.ClientGone):
        await strict_json.read_body(gone.scope, gone.receive)


async def test_an_absent_optional_body_is_the_empty_object() -> None:
    model, raw = await strict_json.read_optional_model(request(b"", headers=[]), schemas.ReasonIn)
    assert (model.reason, raw) == (None, b"")
    with pytest.raises(edge.UnsupportedMediaType):
        await strict_json.read_optional_model(request(b"{}", headers=[]), schemas.ReasonIn)


# --- queries, forms, headers ----------------------------------------------------------------------


def test_a_query_is_typed() -> None:
    query = strict_json.parse_query({"query_string": b"stuck=true&limit=7"}, schemas.LeasesQuery)
    assert (query.stuck, query.limit, query.state) == (True, 7, None)
    assert strict_json.parse_query({"query_string": b""}, schemas.LeasesQuery).limit == 100
    assert strict_json.parse_query({"query_string": b"q=007"}, schemas.IdentitiesQuery).q == "007"


@pytest.mark.parametrize(
    "query",
    [
        b"limit=1&limit=2",
        b"limit=+7",
        b"limit=7.0",
        b"limit=0",
        b"stuck=yes",
        b"evil=1",
        b"q",
        b"limit=%ff",
        b"&",
    ],
)
def test_a_wrong_query_is_refused(query: bytes) -> None:
    with pytest.raises(edge.InvalidInput):
        strict_json.parse_query({"query_string": query}, schemas.LeasesQuery)


FORM = [(b"content-type", b"application/x-www-form-urlencoded")]


async def test_a_form_ignores_unknown_parameters_and_refuses_repeated_ones() -> None:
    form = await strict_json.read_form(request(b"token=abc&extra=1", headers=FORM), schemas.IntrospectionForm)
    assert form.token == "abc"
    for body in (b"token=a&token=b", b"", b"token=", b"token=a%00", b"%ff"):
        with pytest.raises(edge.InvalidInput):
            await strict_json.read_form(request(body, headers=FORM), schemas.IntrospectionForm)


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"headers": list(headers)}


def test_an_idempotency_key_is_bounded() -> None:
    assert idempotency_key(scope_of()) is None
    assert idempotency_key(scope_of((b"idempotency-key", b"a-1"))) == "a-1"
    for bad in (b"", b"a" * 129, b"a b", b"\xff"):
        with pytest.raises(edge.InvalidInput):
            idempotency_key(scope_of((b"idempotency-key", bad)))
    with pytest.raises(edge.MalformedHttp):
        idempotency_key(scope_of((b"idempotency-key", b"a"), (b"idempotency-key", b"b")))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"wait=5", 5),
        (b"respond-async, wait=5", 5),
        (b"Wait = 7", 7),
        (b"wait=999", 30),
        (b"wait=x", 0),
        (b"", 0),
    ],
)
def test_prefer_wait_is_bounded_and_forgiving(value: bytes, seconds: int) -> None:
    assert prefer_wait_seconds(scope_of((b"prefer", value))) == seconds


def test_an_authorization_header_comes_once() -> None:
    assert authorization(scope_of()) is None
    assert authorization(scope_of((b"authorization", b"Bearer a.b.\xff"))) == "Bearer a.b.\xff"
    with pytest.raises(edge.MalformedHttp):
        authorization(scope_of((b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")))
