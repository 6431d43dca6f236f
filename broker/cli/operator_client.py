"""The operator commands' way to the broker: HTTP over its Unix socket."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from broker.cli.options import SOCKET_VARIABLE
from broker.cli.sockets import why_unreachable
from nhi_sdk.cli.output import ExitCode, fail
from nhi_sdk.errors import Problem, TransportError, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    import httpx

_CONNECT_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 120.0
"""A kill of a large scope moves its leases page by page before it answers."""

_PAGE: Final = 500
_NOT_A_BROKER: Final = "what answers at {path} is no broker's operator socket of this version"


class OperatorClient:
    """Asks the broker's operator socket; a context manager.

    Every method raises the SDK's errors: `ProblemError` for what the broker refuses,
    `TransportError` where it does not answer.
    """

    def __init__(self, path: Path) -> None:
        import httpx  # noqa: PLC0415  heavy: see the package

        self._path = path
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)),
            base_url="http://localhost",
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=False,
        )

    @classmethod
    def at(cls, path: Path | None) -> Self:
        """Return a client for the socket given, or leave saying how to give one that answers."""
        if path is None:
            fail(
                f"no operator socket: give --socket PATH or set {SOCKET_VARIABLE} (the settings' "
                "operator.socket; nhi dev prints the line to paste)",
                ExitCode.USAGE,
            )
        why = why_unreachable(path)
        if why is not None:
            fail(
                f"the broker's operator socket does not answer: {why} nhi doctor says more",
                ExitCode.TRY_LATER,
            )
        return cls(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, query: Mapping[str, str | int | None] | None = None) -> dict[str, Any]:
        """Return the object at a path."""
        return self._json("GET", path, query=query)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send an object and return the answer."""
        return self._json("POST", path, body=body)

    def items(
        self, path: str, query: Mapping[str, str | int | None] | None = None, *, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return up to `limit` items of a paged list, and whether there are more."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            room = limit - len(found)
            page = self.get(path, {**(query or {}), "cursor": cursor, "limit": min(room, _PAGE)})
            with _understood(self._path):
                found += page["items"]
                cursor = page["next"]
            if cursor is None or len(found) >= limit:
                return found[:limit], cursor is not None

    @contextmanager
    def stream(self, path: str, query: Mapping[str, str | int | None]) -> Iterator[Iterator[bytes]]:
        """Give the chunks of a long answer as they come."""
        import httpx  # noqa: PLC0415  heavy: see the package

        try:
            with self._http.stream("GET", path, params=_present(query)) as answer:
                if answer.is_error:
                    answer.read()
                    self._refuse(answer)
                yield answer.iter_bytes()
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        import httpx  # noqa: PLC0415  heavy: see the package

        try:
            answer = self._http.request(method, path, params=_present(query or {}), json=body)
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if answer.is_error:
            self._refuse(answer)
        with _understood(self._path):
            document = answer.json()
            if not isinstance(document, dict):
                raise TypeError("not an object")
            return document

    def _refuse(self, answer: httpx.Response) -> NoReturn:
        problem = problem_of(answer.status_code, answer.content, answer.headers.get("retry-after"))
        if not problem.code:
            raise TransportError(
                f"{_NOT_A_BROKER.format(path=self._path)}: it answered {answer.status_code}", ambiguous=True
            )
        raise error_of(problem)

    def _lost(self, error: Exception) -> TransportError:
        return TransportError(
            f"the broker at {self._path} did not answer ({type(error).__name__}): it may have acted on the "
            "request all the same; repeating it is harmless",
            ambiguous=True,
        )


def problem_of(status: int, body: bytes, retry_after: str | None) -> Problem:
    """Return what a failed answer says."""
    from nhi_sdk._wire import Answer  # noqa: PLC0415  the SDK reads problems: there is one reader
    from nhi_sdk._wire import problem_of as read  # noqa: PLC0415  same

    headers = {} if retry_after is None else {"retry-after": retry_after}
    return read(Answer(status, headers, body))


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError):
        raise TransportError(_NOT_A_BROKER.format(path=path), ambiguous=True) from None


def _present(query: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in query.items() if value is not None}
