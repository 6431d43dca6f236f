"""Structured logs: one JSON object a line, or ``key=value`` on a terminal.

Redaction is the last line of defence, not the first (`broker.core.secret.Secret` is):
whatever reaches a log, also through a library or a traceback, passes `redact`, which
drops what smells of a secret, bounds each field and escapes what moves a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO, TypeAlias

import orjson
import structlog

from broker.core.clock import MS_PER_SECOND
from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat: TypeAlias = Literal["json", "text", "auto"]

FIELD_CHARACTERS_MAX: Final = 1_000
TRACE_CHARACTERS_MAX: Final = 8_000
DEPTH_MAX: Final = 4
ENTRIES_MAX: Final = 50
REDACTED: Final = "<redacted>"

_SECRET_KEY: Final = re.compile(
    r"passw|pwd|secret|token|authorization|cookie|credential|private|api_?key|verifier|dsn|jwt$|svid$|seal",
    re.IGNORECASE,
)
_SAFE_KEY: Final = re.compile(
    r"_(?:digest|hash|id|kind|type|name|count|seconds|ms|kid|path|url)s?$|^token_type$"
)

_SECRET_VALUES: Final = re.compile(
    r"""
      eyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)*                       # JWT, JWE
    | SCRAM-SHA-\d+\$[^\s"']+                                  # SCRAM verifier
    | \bmd5[0-9a-f]{32}\b                                      # PostgreSQL md5 verifier
    | (?<=://)[^\s/:@"']{0,200}:[^\s@"']{0,400}(?=@)                  # user:password of a connection string
    | (?<=\bpassword=)(?:'[^']*'|"[^"]*"|[^\s&'";]+)           # libpq keywords, query strings
    | (?<=\bbearer\ )[^\s"']+                                  # a header that was quoted
    | (?<=\bbasic\ )[A-Za-z0-9+/=]{8,}
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----.*?(?:-----END[ A-Z]*PRIVATE\ KEY-----|\Z)
    | \b(?:hv|s|b)[sbr]?\.[A-Za-z0-9_-]{24,}                   # Vault, OpenBao
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                            # AWS access key ids
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)

# C0 and C1 controls, line and paragraph separators, marks that reorder text, lone surrogates.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] == "\n":
        return "\\n"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"  # noqa: PLR2004  one byte or two


def clean_text(text: str, characters_max: int = FIELD_CHARACTERS_MAX) -> str:
    """Return `text` without what looks like a secret, escaped and no longer than the bound."""
    # Redacted before it is cut: half a password would not look like one.
    cleaned = _UNSAFE.sub(_escape, _SECRET_VALUES.sub(REDACTED, text[: 2 * characters_max]))
    return cleaned if len(cleaned) <= characters_max else cleaned[:characters_max] + "…"


def clean_value(value: object, depth: int = 0) -> Any:  # noqa: ANN401  any JSON value
    """Return `value` as JSON types: cleaned, bounded in size and depth."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Secret | bytes | bytearray | memoryview):
        return REDACTED
    if depth >= DEPTH_MAX:
        return "…"
    return _clean_nested(value, depth)


def _clean_nested(value: object, depth: int) -> Any:  # noqa: ANN401  any JSON value
    if isinstance(value, dict):
        return {
            clean_text(str(key), 100): _clean_member(str(key), member, depth)
            for key, member in list(value.items())[:ENTRIES_MAX]
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [clean_value(each, depth + 1) for each in list(value)[:ENTRIES_MAX]]
    return clean_text(str(value))


def _clean_member(key: str, value: object, depth: int) -> Any:  # noqa: ANN401  any JSON value
    return REDACTED if _names_a_secret(key) else clean_value(value, depth + 1)


@lru_cache(maxsize=1024)
def _names_a_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None and _SAFE_KEY.search(key) is None


def _clean_tail(text: str) -> str:
    cleaned = clean_text(text[-2 * TRACE_CHARACTERS_MAX :], 2 * TRACE_CHARACTERS_MAX)
    return cleaned[-TRACE_CHARACTERS_MAX:]


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Clean every field of a log event (a structlog processor)."""
    for key, value in event.items():
        if key.startswith("_"):
            continue  # structlog's own bookkeeping, removed before rendering
        if key == "exception" and isinstance(value, str):
            # The end of a traceback names the error: keep that rather than the beginning.
            event[key] = _clean_tail(value)
        else:
            event[key] = _clean_member(key, value, -1)
    return event


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode("utf-8")


def _as_text(_logger: WrappedLogger, _method: str, event: MutableMapping[str, Any]) -> str:
    head = (event.pop("timestamp", ""), f"{event.pop('level', ''):<8}", event.pop("event", ""))
    rest = (f"{key}={_text_value(value)}" for key, value in event.items())
    return " ".join((*map(str, head), *rest))


def _text_value(value: object) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode("utf-8")
    return f'"{text}"' if " " in text and isinstance(value, str) else text


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]


class _RedactingHandler(logging.StreamHandler[TextIO]):
    """Where a broken log record would print its arguments to stderr, this prints that it was lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        name = clean_text(record.name)
        sys.stderr.write(f"a log record of {name} could not be written\n")


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """One answered request, in words of our own only: no path as sent, no query, header or body.

    Attributes:
        route: the route's template, ``-`` where none matched.
        identity: the caller's SPIFFE ID or the operator, None before authentication.
        problem: the problem's code, None for a success.

    """

    listener: str
    method: str
    route: str
    status: int
    seconds: float
    trace_id: str
    identity: str | None
    problem: str | None


class AccessLog:
    """Writes one line per request.

    Bypasses the processors above: each field of an `AccessRecord` comes from a closed set or
    a strict grammar, so there is nothing to redact, and this costs a tenth.
    """

    def __init__(self, stream: TextIO, *, as_text: bool) -> None:
        self._stream = stream
        self._as_text = as_text

    def __call__(self, record: AccessRecord) -> None:
        """Write the line."""
        event: dict[str, Any] = {
            "timestamp": datetime.now(UTC).isoformat()[:26] + "Z",
            "level": "info",
            "event": "request",
            "listener": record.listener,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "milliseconds": round(record.seconds * MS_PER_SECOND, 2),
            "trace_id": record.trace_id,
        }
        if record.identity is not None:
            event["identity"] = record.identity
        if record.problem is not None:
            event["problem"] = record.problem
        line = _as_text(None, "", event) if self._as_text else orjson.dumps(event).decode("ascii")
        self._stream.write(line + "\n")
        self._stream.flush()


def configure_logging(
    *, level: str = "INFO", log_format: LogFormat = "auto", stream: TextIO | None = None
) -> AccessLog:
    """Send structlog and the standard library's loggers through the same redaction, to one stream.

    Args:
        level: the lowest level written: DEBUG, INFO, WARNING, ERROR.
        log_format: ``json``, ``text``, or ``auto``: text where `stream` is a terminal.
        stream: standard error unless said otherwise.

    Returns:
        The access log of the same stream and format.

    Raises:
        ValueError: `level` is not one of the names.

    """
    target = sys.stderr if stream is None else stream
    numeric = logging.getLevelNamesMapping().get(level.upper())
    if numeric is None:
        raise ValueError("the log level must be DEBUG, INFO, WARNING or ERROR")
    as_text = log_format == "text" or (log_format == "auto" and target.isatty())
    renderer: Processor = _as_text if as_text else _as_json
    structlog.configure(
        processors=[*_shared_processors(), redact, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        cache_logger_on_first_use=True,
    )
    handler = _RedactingHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *_shared_processors()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(numeric)
    for name, floor in _QUIET.items():
        logging.getLogger(name).setLevel(max(numeric, floor))
    return AccessLog(target, as_text=as_text)


_QUIET: Final[Mapping[str, int]] = {
    "uvicorn.error": logging.ERROR,  # a stranger's malformed request is counted, not logged
    "uvicorn.access": logging.CRITICAL,
    "asyncio": logging.WARNING,
    "apscheduler": logging.WARNING,
}
