from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from adapters.conformance import ExternalAdapterConformance, ExternalHarness, Trouble
from adapters.fake import FakeAdapter, FakeServer, FakeSession, Fault, Operation
from broker.core.ids import InstanceTag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.core.ports import Credential

FAULTS = {
    Trouble.DOWN: Fault.FAIL_BEFORE,
    Trouble.SILENT: Fault.HANG_BEFORE,
    Trouble.ANSWER_LOST: Fault.FAIL_AFTER,
}


class OpenFakeSession:
    def __init__(self, session: FakeSession) -> None:
        self._session = session

    async def is_alive(self) -> bool:
        return self._session.alive


class FakeHarness(ExternalHarness):
    def __init__(self, *, strong_fence: bool, two_step: bool) -> None:
        self.instance = InstanceTag.new()
        self.server = FakeServer(strong_fence=strong_fence)
        self.recipe = {"scope": "read"}
        self.bad_recipes = ({}, {"scope": 7}, {"scope": "two words"}, {**self.recipe, "more": 1})
        self.adapter = FakeAdapter(
            name="fake", instance=self.instance, server=self.server, call_seconds=0.05, two_step=two_step
        )

    def neighbour(self) -> tuple[InstanceTag, FakeAdapter]:
        tag = InstanceTag.new()
        return tag, FakeAdapter(name="fake", instance=tag, server=self.server)

    def powerless(self) -> FakeAdapter:
        server = FakeServer()
        server.down = True
        return FakeAdapter(name="fake", instance=self.instance, server=server)

    @contextlib.asynccontextmanager
    async def trouble(self, kind: Trouble) -> AsyncIterator[None]:
        self.server.down = kind is Trouble.DOWN
        for operation in Operation:
            self.server.inject(operation, FAULTS[kind])
        try:
            yield
        finally:
            self.server.clear()

    async def open_session(self, credential: Credential) -> OpenFakeSession:
        session = self.server.log_in(
            str(credential.public["username"]), credential.secret["password"].reveal()
        )
        assert session is not None
        return OpenFakeSession(session)


class TestFake(ExternalAdapterConformance):
    @pytest.fixture(params=["strong", "unfenced", "two_step"])
    def harness(self, request: pytest.FixtureRequest) -> FakeHarness:
        return FakeHarness(strong_fence=request.param != "unfenced", two_step=request.param == "two_step")
