"""The asyncio client: the same calls, rules and errors as `nhi_sdk.broker`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from nhi_sdk import _calls, _http
from nhi_sdk._cleanup import acquired, shielded
from nhi_sdk._exchange import Failure, Pause, RetryPolicy, exchange
from nhi_sdk._report import left_by, report
from nhi_sdk._session import Session, checked_url
from nhi_sdk._tool import Reason, ToolSpec
from nhi_sdk._version import USER_AGENT
from nhi_sdk._wire import Answer
from nhi_sdk.environment import Environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from nhi_sdk._session import Prepared
    from nhi_sdk.models import CatalogItem, Credential, Lease, Task, TaskEnd
    from nhi_sdk.svid import CertificateSource, SvidSource, TrustSource

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")


class AsyncOpenTask:
    """A task that is under way.

    Attributes:
        view: the task as the broker last described it.
        end_result: what its end answered, None before that.

    """

    def __init__(self, broker: AsyncBroker, view: Task) -> None:
        self._broker = broker
        self.view = view
        self.end_result: TaskEnd | None = None

    def __repr__(self) -> str:
        return f"AsyncOpenTask({self.task_id!r}, purpose={self.view.purpose!r})"

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.view.task_id

    @contextlib.asynccontextmanager
    async def credential(
        self,
        resource: str,
        action: str,
        *,
        tool: str,
        reason: str,
        ttl_seconds: int | None = None,
    ) -> AsyncIterator[Credential]:
        """Get a credential under this task; it is revoked when the block is left or cancelled.

        Arguments and errors as of `OpenTask.credential`.
        """
        asking = self.request(resource, action, tool=tool, reason=reason, ttl_seconds=ttl_seconds)
        async with self._broker.acquiring(asking) as issued:
            yield issued

    async def request(
        self,
        resource: str,
        action: str,
        *,
        tool: str,
        reason: str,
        ttl_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> Credential:
        """Get a credential that lives until it is revoked, its TTL is over or the task ends."""
        return await self._broker.request(
            resource,
            action,
            task=self.task_id,
            tool=tool,
            reason=reason,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )

    async def refresh(self) -> Task:
        """Read the task again."""
        self.view = await self._broker.read_task(self.task_id)
        return self.view

    async def end(self, *, reason: str | None = None, wait: int | None = None) -> TaskEnd:
        """End the task and all its credentials; arguments as of `OpenTask.end`."""
        self.end_result = await self._broker.end_task(self.task_id, reason=reason, wait=wait)
        self.view = self.end_result.task
        return self.end_result


class AsyncBroker:
    """An asyncio client of one broker, for one event loop. Arguments as of `Broker`."""

    def __init__(
        self,
        url: str,
        *,
        svid: SvidSource | None,
        audience: str | None,
        trust: TrustSource,
        certificates: CertificateSource | None = None,
        retry: RetryPolicy | None = None,
        cleanup_seconds: float = 10.0,
    ) -> None:
        self._url = checked_url(url)
        self._session = Session(svid=svid, audience=audience, trust=trust, certificates=certificates)
        self._retry = retry or RetryPolicy()
        self._cleanup_seconds = min(cleanup_seconds, self._retry.deadline_seconds)
        self._cleanup = replace(self._retry, deadline_seconds=self._cleanup_seconds)
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._client: tuple[int, httpx.AsyncClient] | None = None
        self._retired: httpx.AsyncClient | None = None
        self._managed: dict[str, AsyncOpenTask] = {}
        self._current: ContextVar[AsyncOpenTask | None] = ContextVar("nhi_async_task", default=None)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, retry: RetryPolicy | None = None) -> Self:
        """Construct from environment variables, as `Broker.from_env` does.

        Raises:
            ConfigurationError: naming the variable that is missing and how to set it.

        """
        environment = Environment.read(environ)
        return cls(environment.broker_url, **environment.sources(), retry=retry)

    def __repr__(self) -> str:
        return f"AsyncBroker({self._url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what blocks left open, and close connections. Idempotent."""
        for task in tuple(self._managed.values()):
            await self._end_quietly(task, None)
        clients = [self._retired, None if self._client is None else self._client[1]]
        self._client = self._retired = None
        for client in clients:
            if client is not None:
                await client.aclose()
        self._session.close()

    # --- tasks ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def task(
        self,
        purpose: str,
        *,
        description: str | None = None,
        resources: Sequence[str] | None = None,
        actions: Sequence[str] | None = None,
        classification_max: str | None = None,
        budget_leases: int | None = None,
        deadline_seconds: int | None = None,
        wait: int | None = None,
    ) -> AsyncIterator[AsyncOpenTask]:
        """Open a task that ends when the block is left: normally, by an exception or by cancellation.

        Arguments and errors as of `Broker.task`.
        """
        opening = self.open_task(
            purpose,
            description=description,
            resources=resources,
            actions=actions,
            classification_max=classification_max,
            budget_leases=budget_leases,
            deadline_seconds=deadline_seconds,
        )
        task = await acquired(opening, lambda late: self._end(late, None), self._cleanup_seconds)
        self._managed[task.task_id] = task
        outer = self._current.set(task)
        try:
            yield task
        except BaseException as error:
            await self._end_quietly(task, error)
            raise
        finally:
            with contextlib.suppress(ValueError):  # left in another context than it was entered in
                self._current.reset(outer)
        if task.end_result is None:
            await shielded(task.end(wait=wait), self._retry.deadline_seconds + (wait or 0))
        self._managed.pop(task.task_id, None)

    async def open_task(
        self,
        purpose: str,
        *,
        description: str | None = None,
        resources: Sequence[str] | None = None,
        actions: Sequence[str] | None = None,
        classification_max: str | None = None,
        budget_leases: int | None = None,
        deadline_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncOpenTask:
        """Open a task that stays open until `AsyncOpenTask.end` or its deadline."""
        call = _calls.open_task(
            purpose,
            description=description,
            resources=resources,
            actions=actions,
            classification_max=classification_max,
            budget_leases=budget_leases,
            deadline_seconds=deadline_seconds,
            idempotency_key=idempotency_key,
        )
        return AsyncOpenTask(self, await self._run(call))

    async def read_task(self, task_id: str) -> Task:
        """Read a task."""
        return await self._run(_calls.read_task(task_id))

    async def end_task(self, task_id: str, *, reason: str | None = None, wait: int | None = None) -> TaskEnd:
        """End a task by its id; see `OpenTask.end`."""
        ended = await self._run(_calls.end_task(task_id, reason=reason, wait=wait))
        self._managed.pop(task_id, None)
        return ended

    async def _end_quietly(self, task: AsyncOpenTask, error: BaseException | None) -> None:
        try:
            what = f"task {task.task_id} could not be ended, its deadline will do it"
            await self._quietly(self._end(task, error), what, error)
        finally:
            self._managed.pop(task.task_id, None)

    async def _end(self, task: AsyncOpenTask, error: BaseException | None) -> None:
        if task.end_result is None:
            call = _calls.end_task(task.task_id, reason=left_by(error))
            task.end_result = await self._run(call, self._cleanup)

    # --- credentials ---------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def credential(
        self,
        resource: str,
        action: str,
        *,
        purpose: str,
        tool: str,
        reason: str,
        ttl_seconds: int | None = None,
    ) -> AsyncIterator[Credential]:
        """Get one credential under a task of its own; both end when the block is left or cancelled."""
        asking = self.request(
            resource, action, purpose=purpose, tool=tool, reason=reason, ttl_seconds=ttl_seconds
        )
        async with self.acquiring(asking) as issued:
            yield issued

    async def request(
        self,
        resource: str,
        action: str,
        *,
        tool: str,
        reason: str,
        task: str | None = None,
        purpose: str | None = None,
        ttl_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> Credential:
        """Get a credential that lives until `revoke`, its TTL or its task's end; as `Broker.request`."""
        call = _calls.request_credential(
            resource,
            action,
            task=_calls.task_or_inline(task, purpose),
            tool=tool,
            reason=reason,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )
        return await self._run(call)

    async def read_lease(self, lease_id: str) -> Lease:
        """Read the record of one credential."""
        return await self._run(_calls.read_lease(lease_id))

    async def revoke(self, lease_id: str, *, reason: str | None = None, wait: int | None = None) -> Lease:
        """Revoke one credential; as `Broker.revoke`."""
        return await self._run(_calls.revoke_lease(lease_id, reason=reason, wait=wait))

    @contextlib.asynccontextmanager
    async def acquiring(self, asking: Awaitable[Credential]) -> AsyncIterator[Credential]:
        """Await a credential, and revoke it when the block is left, cancelled while asking included."""
        issued = await acquired(asking, lambda late: self._release(late, None), self._cleanup_seconds)
        try:
            yield issued
        except BaseException as error:
            await self._quietly(
                self._release(issued, error),
                f"{issued.lease_id} could not be revoked, its task's end will do it",
                error,
            )
            raise
        await shielded(self._release(issued, None, self._retry), self._retry.deadline_seconds)

    async def _release(
        self, issued: Credential, error: BaseException | None, policy: RetryPolicy | None = None
    ) -> None:
        try:
            await issued.aclose()
        finally:
            reason = None if error is None else left_by(error)
            await self._run(_calls.revoke_lease(issued.lease_id, reason=reason), policy or self._cleanup)

    async def _quietly(self, work: Awaitable[None], what: str, error: BaseException | None) -> None:
        """Clean up on the way out of `error`, which must not be masked by a failure to do so."""
        try:
            await shielded(work, self._cleanup_seconds)
        except asyncio.CancelledError:
            if not isinstance(error, asyncio.CancelledError):
                raise
        except Exception as failure:  # noqa: BLE001  whatever it is, the first error is the one to report
            report(what, failure, error)

    async def catalog(self) -> tuple[CatalogItem, ...]:
        """Return what this caller may ask for."""
        items: list[CatalogItem] = []
        cursor: str | None = None
        for _ in range(_calls.CATALOG_PAGES_MAX):
            page = await self._run(_calls.catalog(cursor))
            items.extend(page.items)
            cursor = page.next
            if cursor is None:
                break
        return tuple(items)

    def tool(
        self,
        name: str,
        *,
        resource: str,
        action: str,
        purpose: str,
        reason: Reason = None,
        ttl_seconds: int | None = None,
        inject: str = "credential",
    ) -> Callable[[F], F]:
        """Decorate an async tool function; arguments as of `Broker.tool`.

        Raises:
            TypeError: the function is no coroutine function, or has no parameter to inject into.

        """
        spec = ToolSpec(
            name=name,
            resource=resource,
            action=action,
            purpose=purpose,
            reason=reason,
            ttl_seconds=ttl_seconds,
            inject=inject,
        )

        def decorate(function: F) -> F:
            if not inspect.iscoroutinefunction(function):
                raise TypeError("a function that is no coroutine function needs Broker.tool")
            signature = spec.visible_signature(function)

            @functools.wraps(function)
            async def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  the function's own types
                async with self._for_tool(spec, spec.reason_for(args, kwargs)) as issued:
                    return await function(*args, **{**kwargs, inject: issued})

            call.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature
            return call  # type: ignore[return-value]  # same callable type by intent

        return decorate

    def _for_tool(self, spec: ToolSpec, reason: str) -> contextlib.AbstractAsyncContextManager[Credential]:
        task = self._current.get()
        if task is not None:
            return task.credential(
                spec.resource, spec.action, tool=spec.name, reason=reason, ttl_seconds=spec.ttl_seconds
            )
        return self.credential(
            spec.resource,
            spec.action,
            purpose=spec.purpose,
            tool=spec.name,
            reason=reason,
            ttl_seconds=spec.ttl_seconds,
        )

    # --- transport -----------------------------------------------------------------------------

    async def _run(self, call: _calls.Call[T], policy: RetryPolicy | None = None) -> T:
        steps = exchange(call, policy or self._retry, time.monotonic)
        outcome: Answer | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Pause):
                await self._sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._send(call, step.timeout_seconds)

    async def _send(self, call: _calls.Call[Any], timeout_seconds: float) -> Answer | Failure:
        prepared = self._session.ready()
        if prepared is None:
            prepared = await asyncio.to_thread(self._session.prepare)
        client = await self._client_for(prepared)
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                client.stream(
                    call.method,
                    self._url + call.path,
                    content=call.content(),
                    headers=_http.headers_of(call, prepared, USER_AGENT),
                    timeout=_http.timeout_of(timeout_seconds),
                ) as response,
            ):
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _http.ANSWER_BYTES_MAX:
                        return _http.too_large()
        except TimeoutError:
            return _http.failure_of(httpx.ReadTimeout("too slow"), self._url)
        except httpx.HTTPError as error:
            distrusted = _http.certificate_error(error) is not None
            renewed = distrusted and await asyncio.to_thread(self._session.distrusted)
            return _http.failure_of(error, self._url, trust_renewed=renewed)
        if response.status_code == _calls.STATUS_UNAUTHENTICATED:
            self._session.refused()
        return Answer(response.status_code, dict(response.headers), bytes(body))

    async def _client_for(self, prepared: Prepared) -> httpx.AsyncClient:
        """Return a client on the current TLS context; one older is kept for requests under way."""
        if self._client is not None and self._client[0] == prepared.generation:
            return self._client[1]
        oldest, self._retired = self._retired, None if self._client is None else self._client[1]
        fresh = httpx.AsyncClient(verify=prepared.context, trust_env=False, limits=_http.LIMITS)
        self._client = (prepared.generation, fresh)
        if oldest is not None:
            await oldest.aclose()
        return fresh
