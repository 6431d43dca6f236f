"""The synchronous client."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import httpx

from nhi_sdk import _calls, _http
from nhi_sdk._exchange import Failure, Pause, RetryPolicy, exchange
from nhi_sdk._report import left_by, report
from nhi_sdk._session import Session, checked_url
from nhi_sdk._tool import Reason, ToolSpec
from nhi_sdk._version import USER_AGENT
from nhi_sdk._wire import Answer
from nhi_sdk.environment import Environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from nhi_sdk._session import Prepared
    from nhi_sdk.models import CatalogItem, Credential, Lease, Task, TaskEnd
    from nhi_sdk.svid import CertificateSource, SvidSource, TrustSource

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

CLEANUP_SECONDS_DEFAULT: Final = 10.0


class OpenTask:
    """A task that is under way.

    Attributes:
        view: the task as the broker last described it.
        end_result: what its end answered, None before that.

    """

    def __init__(self, broker: Broker, view: Task) -> None:
        self._broker = broker
        self.view = view
        self.end_result: TaskEnd | None = None

    def __repr__(self) -> str:
        return f"OpenTask({self.task_id!r}, purpose={self.view.purpose!r})"

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.view.task_id

    @contextlib.contextmanager
    def credential(
        self,
        resource: str,
        action: str,
        *,
        tool: str,
        reason: str,
        ttl_seconds: int | None = None,
    ) -> Iterator[Credential]:
        """Get a credential under this task; it is revoked when the block is left, however that happens.

        Args:
            resource: what is asked for, as the catalog names it.
            action: what is to be done with it, as the catalog names it.
            tool: which tool will use it; part of the intent.
            reason: why; part of the intent.
            ttl_seconds: a shorter life than the catalog's default.

        Raises:
            Denied: policy says no; the reason is the error's text.
            TaskClosed: the task has ended.
            NhiError: anything else of `nhi_sdk.errors`.

        """
        issued = self.request(resource, action, tool=tool, reason=reason, ttl_seconds=ttl_seconds)
        with self._broker.revoking(issued):
            yield issued

    def request(
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
        return self._broker.request(
            resource,
            action,
            task=self.task_id,
            tool=tool,
            reason=reason,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )

    def refresh(self) -> Task:
        """Read the task again."""
        self.view = self._broker.read_task(self.task_id)
        return self.view

    def end(self, *, reason: str | None = None, wait: int | None = None) -> TaskEnd:
        """End the task and with it all its credentials. Ending it again is harmless.

        Args:
            reason: kept with the audit record.
            wait: seconds to wait for proof that each credential is dead, at most 30.

        """
        self.end_result = self._broker.end_task(self.task_id, reason=reason, wait=wait)
        self.view = self.end_result.task
        return self.end_result


class Broker:
    """A synchronous client of one broker. Safe for use from several threads.

    Args:
        url: the broker's workload listener, ``https://host:port``.
        svid: where the JWT-SVID comes from; None to speak by client certificate alone.
        audience: the broker's audience for JWT-SVIDs.
        trust: the authorities of the broker's certificate.
        certificates: X.509-SVIDs for mutual TLS.
        retry: bounds on the SDK's own retries.
        cleanup_seconds: how long the end of a block may try to revoke.

    Raises:
        ConfigurationError: these do not add up.

    """

    def __init__(
        self,
        url: str,
        *,
        svid: SvidSource | None,
        audience: str | None,
        trust: TrustSource,
        certificates: CertificateSource | None = None,
        retry: RetryPolicy | None = None,
        cleanup_seconds: float = CLEANUP_SECONDS_DEFAULT,
    ) -> None:
        self._url = checked_url(url)
        self._session = Session(svid=svid, audience=audience, trust=trust, certificates=certificates)
        self._retry = retry or RetryPolicy()
        self._cleanup = replace(
            self._retry, deadline_seconds=min(cleanup_seconds, self._retry.deadline_seconds)
        )
        self._sleep: Callable[[float], None] = time.sleep
        self._lock = threading.Lock()
        self._client: tuple[int, httpx.Client] | None = None
        self._retired: httpx.Client | None = None
        self._managed: dict[str, OpenTask] = {}
        self._current: ContextVar[OpenTask | None] = ContextVar("nhi_task", default=None)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, retry: RetryPolicy | None = None) -> Self:
        """Construct from ``NHI_BROKER_URL``, ``NHI_AUDIENCE``, ``SPIFFE_ENDPOINT_SOCKET`` and their like.

        Raises:
            ConfigurationError: naming the variable that is missing and how to set it.

        """
        environment = Environment.read(environ)
        return cls(environment.broker_url, **environment.sources(), retry=retry)

    def __repr__(self) -> str:
        return f"Broker({self._url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what blocks left open, and close connections. Idempotent."""
        for task in tuple(self._managed.values()):
            # An interrupt struck while the block's own end was on its way.
            self._end_quietly(task, None)
        with self._lock:
            clients = [self._retired, None if self._client is None else self._client[1]]
            self._client = self._retired = None
        for client in clients:
            if client is not None:
                client.close()
        self._session.close()

    # --- tasks ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def task(
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
    ) -> Iterator[OpenTask]:
        """Open a task that ends when the block is left: normally, by an exception or by an interrupt.

        Args:
            purpose: a word the broker's catalog registers.
            description: free text for those who read the audit.
            resources: the only ones to be asked for under it; no bound beyond policy if None.
            actions: likewise.
            classification_max: ceiling on what may be asked for.
            budget_leases: how many credentials may be issued at most.
            deadline_seconds: when the broker ends the task by itself.
            wait: seconds to wait at the end for proof; the answer is in `OpenTask.end_result`.

        Raises:
            Denied: policy says no.
            NhiError: anything else of `nhi_sdk.errors`.

        """
        task = self.open_task(
            purpose,
            description=description,
            resources=resources,
            actions=actions,
            classification_max=classification_max,
            budget_leases=budget_leases,
            deadline_seconds=deadline_seconds,
        )
        self._managed[task.task_id] = task
        outer = self._current.set(task)
        try:
            yield task
        except BaseException as error:
            self._end_quietly(task, error)
            raise
        finally:
            with contextlib.suppress(ValueError):  # left in another context than it was entered in
                self._current.reset(outer)
        if task.end_result is None:
            self._finish(task, wait)
        self._managed.pop(task.task_id, None)

    def open_task(
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
    ) -> OpenTask:
        """Open a task that stays open until `OpenTask.end` or its deadline; arguments as of `task`."""
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
        return OpenTask(self, self._run(call))

    def read_task(self, task_id: str) -> Task:
        """Read a task."""
        return self._run(_calls.read_task(task_id))

    def end_task(self, task_id: str, *, reason: str | None = None, wait: int | None = None) -> TaskEnd:
        """End a task by its id; see `OpenTask.end`."""
        ended = self._run(_calls.end_task(task_id, reason=reason, wait=wait))
        self._managed.pop(task_id, None)
        return ended

    def _finish(self, task: OpenTask, wait: int | None) -> None:
        try:
            task.end(wait=wait)
        except Exception:
            raise
        except BaseException as error:
            self._end_quietly(task, error)
            raise

    def _end_quietly(self, task: OpenTask, error: BaseException | None) -> None:
        """End a task on the way out of `error`, which must not be masked by a failure to do so."""
        try:
            if task.end_result is None:
                call = _calls.end_task(task.task_id, reason=left_by(error))
                task.end_result = self._run(call, self._cleanup)
        except Exception as failure:  # noqa: BLE001  whatever it is, the first error is the one to report
            report(f"task {task.task_id} could not be ended, its deadline will do it", failure, error)
        finally:
            self._managed.pop(task.task_id, None)

    # --- credentials ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def credential(
        self,
        resource: str,
        action: str,
        *,
        purpose: str,
        tool: str,
        reason: str,
        ttl_seconds: int | None = None,
    ) -> Iterator[Credential]:
        """Get one credential under a task of its own; both end when the block is left."""
        issued = self.request(
            resource, action, purpose=purpose, tool=tool, reason=reason, ttl_seconds=ttl_seconds
        )
        with self.revoking(issued):
            yield issued

    def request(
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
        """Get a credential that lives until `revoke`, its TTL or its task's end.

        Args:
            resource: what is asked for, as the catalog names it.
            action: what is to be done with it, as the catalog names it.
            tool: which tool will use it; part of the intent.
            reason: why; part of the intent.
            task: a task's id; give this or `purpose`.
            purpose: of a task opened for this credential alone.
            ttl_seconds: a shorter life than the catalog's default.
            idempotency_key: one's own, to repeat a request over processes.

        Raises:
            TypeError: both or neither of `task` and `purpose`.
            Denied: policy says no.
            NhiError: anything else of `nhi_sdk.errors`.

        """
        call = _calls.request_credential(
            resource,
            action,
            task=_calls.task_or_inline(task, purpose),
            tool=tool,
            reason=reason,
            ttl_seconds=ttl_seconds,
            idempotency_key=idempotency_key,
        )
        return self._run(call)

    def read_lease(self, lease_id: str) -> Lease:
        """Read the record of one credential."""
        return self._run(_calls.read_lease(lease_id))

    def revoke(self, lease_id: str, *, reason: str | None = None, wait: int | None = None) -> Lease:
        """Revoke one credential. Doing it again is harmless.

        Args:
            lease_id: its lease.
            reason: kept with the audit record.
            wait: seconds to wait for proof, at most 30.

        """
        return self._run(_calls.revoke_lease(lease_id, reason=reason, wait=wait))

    @contextlib.contextmanager
    def revoking(self, issued: Credential) -> Iterator[Credential]:
        """Revoke a credential when the block is left, and close the connections it opened."""
        try:
            yield issued
        except BaseException as error:
            self._revoke_quietly(issued, error)
            raise
        try:
            issued.close()
        finally:
            self._run(_calls.revoke_lease(issued.lease_id))

    def _revoke_quietly(self, issued: Credential, error: BaseException) -> None:
        try:
            try:
                issued.close()
            finally:
                self._run(_calls.revoke_lease(issued.lease_id, reason=left_by(error)), self._cleanup)
        except Exception as failure:  # noqa: BLE001  whatever it is, the first error is the one to report
            report(f"{issued.lease_id} could not be revoked, its task's end will do it", failure, error)

    def catalog(self) -> tuple[CatalogItem, ...]:
        """Return what this caller may ask for."""
        items: list[CatalogItem] = []
        cursor: str | None = None
        for _ in range(_calls.CATALOG_PAGES_MAX):
            page = self._run(_calls.catalog(cursor))
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
        """Decorate a tool function: each call gets a credential, revoked when it returns or raises.

        Inside a ``with broker.task(...)`` block the credential is issued under that task,
        elsewhere under one of its own with `purpose`.

        Args:
            name: the tool's name, as the intent states it.
            resource: what each call needs.
            action: what each call does with it.
            purpose: of the task a call gets where none is under way.
            reason: the intent's reason, or a function of the call's arguments that returns it.
            ttl_seconds: a shorter life than the catalog's default.
            inject: the parameter that receives the `Credential`; callers do not see it.

        Raises:
            TypeError: the function is a coroutine function, or has no such parameter.

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
            if inspect.iscoroutinefunction(function):
                raise TypeError("a coroutine function needs AsyncBroker.tool")
            signature = spec.visible_signature(function)

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  the function's own types
                with self._for_tool(spec, spec.reason_for(args, kwargs)) as issued:
                    return function(*args, **{**kwargs, inject: issued})

            call.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature
            return call  # type: ignore[return-value]  # same callable type by intent

        return decorate

    def _for_tool(self, spec: ToolSpec, reason: str) -> contextlib.AbstractContextManager[Credential]:
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

    def _run(self, call: _calls.Call[T], policy: RetryPolicy | None = None) -> T:
        steps = exchange(call, policy or self._retry, time.monotonic)
        outcome: Answer | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, Pause):
                self._sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(call, step.timeout_seconds)

    def _send(self, call: _calls.Call[Any], timeout_seconds: float) -> Answer | Failure:
        prepared = self._session.prepare()
        client = self._client_for(prepared)
        until = time.monotonic() + timeout_seconds
        try:
            with client.stream(
                call.method,
                self._url + call.path,
                content=call.content(),
                headers=_http.headers_of(call, prepared, USER_AGENT),
                timeout=_http.timeout_of(timeout_seconds),
            ) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _http.ANSWER_BYTES_MAX:
                        return _http.too_large()
                    if time.monotonic() > until:
                        return _http.failure_of(httpx.ReadTimeout("too slow"), self._url)
        except httpx.HTTPError as error:
            renewed = _http.certificate_error(error) is not None and self._session.distrusted()
            return _http.failure_of(error, self._url, trust_renewed=renewed)
        if response.status_code == _calls.STATUS_UNAUTHENTICATED:
            self._session.refused()
        return Answer(response.status_code, dict(response.headers), bytes(body))

    def _client_for(self, prepared: Prepared) -> httpx.Client:
        """Return a client on the current TLS context; one older is kept for requests under way."""
        with self._lock:
            if self._client is None or self._client[0] != prepared.generation:
                if self._retired is not None:
                    self._retired.close()
                self._retired = None if self._client is None else self._client[1]
                fresh = httpx.Client(verify=prepared.context, trust_env=False, limits=_http.LIMITS)
                self._client = (prepared.generation, fresh)
            return self._client[1]
