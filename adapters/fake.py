"""A backend in memory, with faults on demand: for tests and for learning the port.

`FakeServer` is the backend: it outlives adapters, as a real server outlives brokers, and
several `FakeAdapter` instances may share it. Refused in production by the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from broker.core.clock import SystemClock
from broker.core.ids import backend_name, lease_of_backend_name
from broker.core.ports import (
    Capabilities,
    Check,
    Credential,
    Effect,
    ErrorClass,
    Fence,
    Found,
    Liveness,
    Minted,
    Naming,
    Presence,
    Revocability,
    Verification,
)
from broker.core.secret import Secret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from broker.core.clock import Clock
    from broker.core.ids import InstanceTag
    from broker.core.ports import MintRequest, Target

CALL_SECONDS: Final = 5.0
"""Total deadline of a call, as every adapter has one."""


class FakeRefusedError(Exception):
    """The backend refused; nothing was minted."""


class FakeTroubleError(Exception):
    """The backend failed or its answer was lost: what it did is not known."""


class Operation(StrEnum):
    """What a fault is put on."""

    MINT = "mint"
    REVOKE = "revoke"
    VERIFY = "verify"
    SCAN = "scan"
    PROBE = "probe"


class Fault(StrEnum):
    """What goes wrong, once per `FakeServer.inject`.

    ``fail_before``: an error, and nothing happened.
    ``fail_after``: it happened, the answer was lost.
    ``refuse``: a clear no, and nothing happened.
    ``hang_before``, ``hang_after``: no answer until `FakeServer.release`; before or after the effect.
    ``late``: the call fails, the effect comes with `FakeServer.land`; mint only.
    ``unknown``: verification cannot say.
    """

    FAIL_BEFORE = "fail_before"
    FAIL_AFTER = "fail_after"
    REFUSE = "refuse"
    HANG_BEFORE = "hang_before"
    HANG_AFTER = "hang_after"
    LATE = "late"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class FakeLogin:
    """One live object of the backend."""

    password: str = field(repr=False)
    scope: str
    created_ms: int
    not_after_ms: int


@dataclass(slots=True, eq=False)
class FakeSession:
    """A session opened with a credential; lives until the backend cuts it."""

    login: str
    alive: bool = True


class FakeServer:
    """The backend: logins, sessions, fences, and the faults injected into it.

    Attributes:
        strong_fence: whether a revocation stops mints that land after it.
        down: every call fails with `FakeTroubleError` while it is set.
        calls: what was asked of it, in order, as (operation, name): for assertions.

    """

    def __init__(self, clock: Clock | None = None, *, strong_fence: bool = True) -> None:
        self.clock = clock or SystemClock()
        self.strong_fence = strong_fence
        self.down = False
        self.logins: dict[str, FakeLogin] = {}
        self.sessions: list[FakeSession] = []
        self.tombstones: dict[str, int] = {}
        self.calls: list[tuple[Operation, str]] = []
        self._faults: dict[Operation, deque[Fault]] = defaultdict(deque)
        self._late: list[Callable[[], None]] = []
        self._released = asyncio.Event()
        self._hanging = asyncio.Condition()
        self._hung = 0

    def inject(self, operation: Operation, *faults: Fault) -> None:
        """Queue faults: each is met by one call of `operation`, in order."""
        self._faults[operation].extend(faults)

    def clear(self) -> None:
        """Forget the faults not met yet, come up, and let everything that hangs go on."""
        self._faults.clear()
        self.down = False
        self.release()

    def release(self) -> None:
        """Let every call that hangs now go on."""
        self._released.set()
        self._released = asyncio.Event()

    def land(self) -> None:
        """Let the late mints take effect, as far as the fence lets them."""
        late, self._late = self._late, []
        for effect in late:
            with contextlib.suppress(FakeRefusedError):
                effect()

    async def until_hanging(self, count: int = 1) -> None:
        """Wait until `count` calls hang: the moment a test acts in."""
        async with self._hanging:
            await self._hanging.wait_for(lambda: self._hung >= count)

    def log_in(self, name: str, password: str) -> FakeSession | None:
        """Open a session, or return None where the login is refused."""
        login = self.logins.get(name)
        if login is None or self.clock.now_ms() >= login.not_after_ms:
            return None
        if not hmac.compare_digest(login.password, password):
            return None
        session = FakeSession(login=name)
        self.sessions.append(session)
        return session

    async def run(self, operation: Operation, name: str, effect: Callable[[], None]) -> Fault | None:
        """Do `effect` under the next fault queued for `operation`; returns the fault met.

        Raises:
            FakeRefusedError, FakeTroubleError: as the fault, or `down`, demands.

        """
        self.calls.append((operation, name))
        if self.down:
            raise FakeTroubleError("the backend is down")
        queue = self._faults[operation]
        fault = queue.popleft() if queue else None
        if fault is Fault.REFUSE:
            raise FakeRefusedError("the backend refused")
        if fault is Fault.FAIL_BEFORE:
            raise FakeTroubleError("the backend failed")
        if fault is Fault.LATE:
            self._late.append(effect)
            raise FakeTroubleError("no answer in time")
        if fault is Fault.HANG_BEFORE:
            await self._hang()
        effect()
        if fault is Fault.HANG_AFTER:
            await self._hang()
        if fault is Fault.FAIL_AFTER:
            raise FakeTroubleError("the answer was lost")
        return fault

    async def _hang(self) -> None:
        released = self._released
        async with self._hanging:
            self._hung += 1
            self._hanging.notify_all()
        try:
            await released.wait()
        finally:
            self._hung -= 1

    def create(self, name: str, login: FakeLogin) -> None:
        """Create a login unless the fence or an older one of the same name stands against it."""
        if self.strong_fence and name in self.tombstones:
            raise FakeRefusedError("the lease was revoked")
        if name in self.logins:
            raise FakeTroubleError("the lease was minted before")
        self.logins[name] = login

    def destroy(self, name: str) -> None:
        """Fence, cut, drop."""
        self.tombstones.setdefault(name, self.clock.now_ms())
        self.logins.pop(name, None)
        for session in self.sessions:
            if session.login == name:
                session.alive = False
        self.sessions = [session for session in self.sessions if session.alive]


class FakeAdapter:
    """`broker.core.ports.Adapter` over a `FakeServer`.

    The recipe: ``scope``, a word; it has no meaning.

    Args:
        call_seconds: total deadline of a call; a small one turns a hang into a timeout.
        two_step: whether `prepare` hands out a handle first.

    """

    def __init__(
        self,
        *,
        name: str,
        instance: InstanceTag,
        server: FakeServer | None = None,
        call_seconds: float = CALL_SECONDS,
        two_step: bool = False,
    ) -> None:
        self._name = name
        self._instance = instance
        self._call_seconds = call_seconds
        self._two_step = two_step
        self.server = server or FakeServer()

    @property
    def name(self) -> str:
        """The configured backend's name."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What this adapter declares."""
        return Capabilities(
            external_effect=True,
            naming=Naming.TWO_STEP if self._two_step else Naming.DETERMINISTIC,
            fence=Fence.STRONG if self.server.strong_fence else Fence.NONE,
            revocability=Revocability(Effect.IMMEDIATE),
            cuts_sessions=True,
            listable=True,
            needs_secret_to_revoke=False,
            expiry_ends_sessions=False,
            ttl_seconds_min=1,
            ttl_seconds_max=7 * 24 * 3600,
            t_inflight_seconds=10,
        )

    def validate_recipe(self, recipe: Mapping[str, object]) -> list[str]:
        """Return what is wrong with ``{scope}``."""
        faults = [f"{member}: not a member of this recipe" for member in sorted(recipe.keys() - {"scope"})]
        scope = recipe.get("scope")
        if not isinstance(scope, str) or not scope.isalnum():
            faults.append("scope: give one word of letters and digits")
        return faults

    async def prepare(self, request: MintRequest) -> str | None:
        """Return a handle where the two steps are asked for."""
        return f"handle-{request.lease_id.body}" if self._two_step else None

    async def mint(self, request: MintRequest) -> Minted:
        """Create a login."""
        if self.validate_recipe(request.recipe):
            raise FakeRefusedError("the recipe is not valid")
        login = FakeLogin(
            password=secrets.token_urlsafe(24),
            scope=str(request.recipe["scope"]),
            created_ms=self.server.clock.now_ms(),
            not_after_ms=request.not_after_ms,
        )
        effect = lambda: self.server.create(request.backend_name, login)  # noqa: E731  reads as one word
        await self._run(Operation.MINT, request.backend_name, effect)
        credential = Credential(
            kind="fake_login",
            public={"server": self._name, "username": request.backend_name},
            secret={"password": Secret(login.password)},
        )
        return Minted(credential=credential, handle=request.handle)

    async def revoke(self, target: Target) -> None:
        """Fence, cut, drop."""
        self._own(target)
        await self._run(
            Operation.REVOKE, target.backend_name, lambda: self.server.destroy(target.backend_name)
        )

    async def verify(self, target: Target) -> Verification:
        """Look for login, sessions and tombstone."""
        self._own(target)
        name = target.backend_name
        if await self._run(Operation.VERIFY, name, lambda: None) is Fault.UNKNOWN:
            return Verification(presence=Presence.UNKNOWN, evidence={"reason": "injected"})
        sessions = sum(session.login == name for session in self.server.sessions)
        exists, fenced = name in self.server.logins, name in self.server.tombstones
        evidence: dict[str, str | int | bool] = {
            "name": name,
            "exists": exists,
            "sessions": sessions,
            "fenced": fenced,
        }
        if exists or sessions:
            return Verification(presence=Presence.PRESENT, evidence=evidence)
        return Verification(presence=Presence.ABSENT if fenced else Presence.UNKNOWN, evidence=evidence)

    async def scan(self, recipes: Sequence[Mapping[str, object]]) -> AsyncIterator[Found]:
        """Yield our logins."""
        del recipes
        await self._run(Operation.SCAN, "", lambda: None)
        for name, login in sorted(self.server.logins.items()):
            if lease_of_backend_name(self._instance, name) is not None:
                yield Found(backend_name=name, created_ms=login.created_ms)

    def classify(self, error: Exception) -> ErrorClass:
        """Only a refusal is certain."""
        return ErrorClass.PERMANENT if isinstance(error, FakeRefusedError) else ErrorClass.RETRY

    async def check(self, recipes: Sequence[Mapping[str, object]]) -> list[Check]:
        """Say whether the server is up and the recipes are valid."""
        faults = [fault for recipe in recipes for fault in self.validate_recipe(recipe)]
        return [
            Check(name="recipes are valid", ok=not faults, remedy="; ".join(faults)),
            Check(
                name="the backend answers",
                ok=not self.server.down,
                remedy="start the backend" if self.server.down else "",
            ),
        ]

    async def probe(self, credential: Credential) -> Liveness:
        """Log in and out again."""
        name = str(credential.public["username"])
        try:
            await self._run(Operation.PROBE, name, lambda: None)
        except (FakeTroubleError, FakeRefusedError, TimeoutError):
            return Liveness.UNKNOWN
        session = self.server.log_in(name, credential.secret["password"].reveal())
        if session is None:
            return Liveness.DEAD
        self.server.sessions.remove(session)
        return Liveness.ALIVE

    async def close(self) -> None:
        """Do nothing: the server is not ours to end."""

    async def _run(self, operation: Operation, name: str, effect: Callable[[], None]) -> Fault | None:
        async with asyncio.timeout(self._call_seconds):
            return await self.server.run(operation, name, effect)

    def _own(self, target: Target) -> None:
        if target.backend_name != backend_name(self._instance, target.lease_id):
            raise FakeRefusedError("the name is not of this instance")
