from __future__ import annotations

import base64
import io
import json
import logging
import secrets
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.api import logs
from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWORD = secrets.token_hex(12)
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg":"ES256"}', b'{"sub":"spiffe://a/b"}', b"signature")
)
SCRAM = "SCRAM-SHA-256$4096:c2FsdHNhbHQ=$c3RvcmVk:c2VydmVy"
KEY = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    .decode()
)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(**fields: Any) -> list[dict[str, Any]]:
    stream = io.StringIO()
    logs.configure_logging(log_format="json", stream=stream)
    structlog.get_logger("test").info("event", **fields)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "db_password",
        "token",
        "access_token",
        "Authorization",
        "cookie",
        "client_secret",
        "dsn",
        "jwt_svid",
    ],
)
def test_a_key_that_smells_of_a_secret_hides_its_value(key: str) -> None:
    assert lines(**{key: "hunter2"})[0][key] == logs.REDACTED
    assert lines(nested={"a": [{key: "hunter2"}]})[0]["nested"]["a"][0][key] == logs.REDACTED


@pytest.mark.parametrize(
    "key", ["svid_digest", "token_type", "credential_kind", "policy_hash", "lease_id", "rule"]
)
def test_what_only_names_a_secret_is_shown(key: str) -> None:
    assert lines(**{key: "value"})[0][key] == "value"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        pytest.param(f"the token {JWT} was refused", "eyJ", id="JWT"),
        pytest.param(f"verifier {SCRAM} exists", "c3RvcmVk", id="SCRAM verifier"),
        pytest.param(f"postgresql://app:{PASSWORD}@db.test:5432/orders is down", PASSWORD, id="URL"),
        pytest.param(f"connect host=db password={PASSWORD} failed", PASSWORD, id="DSN"),
        pytest.param(f"connect password='{PASSWORD} 2' failed", PASSWORD, id="quoted, with a space"),
        pytest.param(f"header was Bearer {PASSWORD}", PASSWORD, id="bearer"),
        pytest.param(f"key {KEY} unreadable", "MIGH", id="private key"),
        pytest.param("x" * 950 + f" {JWT}", "eyJ", id="JWT across the bound"),
        pytest.param("x" * 970 + f" postgresql://app:{PASSWORD}@db", PASSWORD[:7], id="URL across the bound"),
    ],
)
def test_a_secret_inside_a_text_is_cut_out(text: str, secret: str) -> None:
    assert secret not in json.dumps(lines(detail=text))
    assert secret not in json.dumps(lines(detail={"deep": [text]}))


def test_secrets_and_bytes_are_never_shown() -> None:
    event = lines(one=Secret("hunter2"), two=b"hunter2", three=[Secret(b"hunter2")])[0]
    assert (event["one"], event["two"], event["three"]) == (logs.REDACTED, logs.REDACTED, [logs.REDACTED])


def test_fields_are_bounded() -> None:
    event = lines(long="x" * 5000, many=list(range(500)), deep=[[[[[[1]]]]]])[0]
    assert len(event["long"]) == logs.FIELD_CHARACTERS_MAX + 1
    assert len(event["many"]) == logs.ENTRIES_MAX
    assert "1" not in json.dumps(event["deep"])


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_control_characters_never_reach_the_terminal(log_format: logs.LogFormat) -> None:
    stream = io.StringIO()
    logs.configure_logging(log_format=log_format, stream=stream)
    structlog.get_logger("test").info("a\nforged\x1b[2J line", who="x\u202ey\x9b")
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert not set(written) & {"\x1b", "\u202e", "\x9b"}


def test_a_traceback_is_redacted_and_keeps_its_end() -> None:
    stream = io.StringIO()
    logs.configure_logging(log_format="json", stream=stream)
    failure = RuntimeError(f"postgresql://app:{PASSWORD}@db " + "x" * 30_000 + " the end")
    structlog.get_logger("test").error("failed", exc_info=failure)
    event = json.loads(stream.getvalue())
    assert PASSWORD not in event["exception"]
    assert event["exception"].endswith("the end")
    assert len(event["exception"]) <= logs.TRACE_CHARACTERS_MAX


def test_libraries_log_through_the_same_redaction() -> None:
    stream = io.StringIO()
    logs.configure_logging(log_format="json", stream=stream)
    logging.getLogger("some.library").warning("got %s", JWT)
    event = json.loads(stream.getvalue())
    assert event["logger"] == "some.library"
    assert "eyJ" not in event["event"]


def test_levels_are_honoured_and_checked() -> None:
    stream = io.StringIO()
    logs.configure_logging(level="WARNING", log_format="json", stream=stream)
    structlog.get_logger("test").info("quiet")
    logging.getLogger("some.library").info("quiet")
    assert stream.getvalue() == ""
    with pytest.raises(ValueError, match="log level"):
        logs.configure_logging(level="LOUD")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_access_log_writes_one_line_a_request(log_format: logs.LogFormat) -> None:
    stream = io.StringIO()
    access = logs.configure_logging(log_format=log_format, stream=stream)
    access(
        logs.AccessRecord(
            listener="workload",
            method="POST",
            route="/tasks/{task_id}/end",
            status=404,
            seconds=0.0123,
            trace_id="ab" * 16,
            identity="spiffe://example.test/agent",
            problem="not-found",
        )
    )
    written = stream.getvalue()
    assert written.count("\n") == 1
    for part in (
        "/tasks/{task_id}/end",
        "404",
        "12.3",
        "ab" * 16,
        "spiffe://example.test/agent",
        "not-found",
    ):
        assert part in written
