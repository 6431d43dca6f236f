"""A Workload API server over a real socket, that says whatever a test wants it to say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from spiffe._proto import workload_pb2, workload_pb2_grpc

from tests.support.pki import der, key_der

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from tests.support.pki import Authority, Leaf


def x509_answer(
    *svids: workload_pb2.X509SVID, federated: Mapping[str, bytes] | None = None
) -> workload_pb2.X509SVIDResponse:
    return workload_pb2.X509SVIDResponse(svids=svids, federated_bundles=dict(federated or {}))


def x509_svid(
    leaf: Leaf, spiffe_id: str, bundle: Sequence[Authority], **changes: Any
) -> workload_pb2.X509SVID:
    fields: dict[str, Any] = {
        "spiffe_id": spiffe_id,
        "x509_svid": b"".join(leaf.chain),
        "x509_svid_key": key_der(leaf.key),
        "bundle": joined(*bundle),
    }
    return workload_pb2.X509SVID(**(fields | changes))


def joined(*authorities: Authority) -> bytes:
    return b"".join(der(authority.certificate) for authority in authorities)


class FakeAgent(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Streams the answers it was last given; an answer that is a status code refuses the call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.x509: workload_pb2.X509SVIDResponse | grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED
        self.jwt: Mapping[str, bytes] | grpc.StatusCode = {}
        self.calls = 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0)
            self._server = None

    async def say(
        self,
        *,
        x509: workload_pb2.X509SVIDResponse | grpc.StatusCode | None = None,
        jwt: Mapping[str, bytes] | grpc.StatusCode | None = None,
    ) -> None:
        async with self._changed:
            self.x509 = self.x509 if x509 is None else x509
            self.jwt = self.jwt if jwt is None else jwt
            self._changed.notify_all()

    async def FetchX509SVID(  # noqa: N802  the protocol's name
        self, _request: object, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workload_pb2.X509SVIDResponse]:
        async for answer in self._answers("x509", context):
            yield answer

    async def FetchJWTBundles(  # noqa: N802  the protocol's name
        self, _request: object, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workload_pb2.JWTBundlesResponse]:
        async for answer in self._answers("jwt", context):
            yield workload_pb2.JWTBundlesResponse(bundles=dict(answer))

    async def _answers(self, part: str, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        self.calls += 1
        if ("workload.spiffe.io", "true") not in tuple(context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        said = None
        while True:
            async with self._changed:
                while getattr(self, part) is said:
                    await self._changed.wait()
                said = getattr(self, part)
            if isinstance(said, grpc.StatusCode):
                await context.abort(said, "refused by the test")
            yield said
