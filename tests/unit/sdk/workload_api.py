"""A real gRPC server that speaks the SPIFFE Workload API, one behaviour per attribute."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc

from tests.unit.sdk.pki import AGENT, jwt_svid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.sdk.pki import Authority


class WorkloadApi(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.identities = [AGENT]
        self.knows_caller = True
        self.honours_hint = True
        self.token_seconds = 300
        self.certificate_seconds = 3600
        self.jwt_requests: list[pb.JWTSVIDRequest] = []
        self.x509_requests = 0

    def FetchJWTSVID(self, request: pb.JWTSVIDRequest, context: grpc.ServicerContext) -> pb.JWTSVIDResponse:  # noqa: N802  gRPC's name
        self.jwt_requests.append(request)
        self._check(context)
        wanted = [one for one in self.identities if not self.honours_hint or request.spiffe_id in {"", one}]
        svids = [
            pb.JWTSVID(
                spiffe_id=one,
                svid=jwt_svid(one, audience=request.audience[0], seconds=self.token_seconds),
            )
            for one in wanted
        ]
        return pb.JWTSVIDResponse(svids=svids)

    def FetchX509SVID(self, _request: Any, context: grpc.ServicerContext) -> Iterator[pb.X509SVIDResponse]:  # noqa: N802  gRPC's name
        self.x509_requests += 1
        self._check(context)
        svids = []
        for one in self.identities:
            leaf = self.authority.issue(one, seconds=self.certificate_seconds)
            svids.append(
                pb.X509SVID(
                    spiffe_id=one,
                    x509_svid=leaf.certificate_der(),
                    x509_svid_key=leaf.key_der(),
                    bundle=self.authority.der(),
                )
            )
        yield pb.X509SVIDResponse(svids=svids)

    def _check(self, context: grpc.ServicerContext) -> None:
        assert ("workload.spiffe.io", "true") in context.invocation_metadata()
        if not self.knows_caller:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


@contextlib.contextmanager
def serving(api: WorkloadApi, socket: Path) -> Iterator[None]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(api, server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()
