"""Microseconds of one core per token: sign, mint, read back, pick a status position.

Run it as ``python benchmarks/micro_tokens.py``. It times single calls in a warm process;
inside a loaded server they cost about half as much again.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adapters.jwt_issuer import JwtIssuer
from broker.core.clock import SystemClock
from broker.core.ids import LeaseId, TaskId
from broker.core.ports import MintRequest
from broker.core.spiffe_id import SpiffeId
from broker.core.status_list import SIZE, StatusIndexer, encode
from broker.keys import ALGORITHMS, FileKeyStore, TokenReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.core.ports import Minted

ISSUER: Final = "https://broker.test"
HEADER: Final = {"typ": "at+jwt"}
PAYLOAD: Final = b"x" * 400
ROUNDS: Final = 5
CALLS: Final = 2_000


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Return the fastest round's microseconds per call: what is left when nothing else ran."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter_ns() - start) / calls / 1000)
    return min(rounds)


def mint(issuer: JwtIssuer, request: MintRequest) -> Minted:
    """Run `JwtIssuer.mint` without an event loop, whose cost is not its own."""
    try:
        issuer.mint(request).send(None)
    except StopIteration as done:
        minted: Minted = done.value
        return minted
    raise RuntimeError("mint waited for something")


def main() -> None:
    """Print the table."""
    clock = SystemClock()
    now_ms = clock.now_ms()
    with tempfile.TemporaryDirectory() as folder:
        keys = FileKeyStore(Path(folder) / "keys.json", clock)
        issuer = JwtIssuer(name="tokens", issuer=ISSUER, keys=keys, status_lists=f"{ISSUER}/statuslists")
        reader = TokenReader(keys, ISSUER)
        print(f"{'':8}{'sign':>8}{'mint':>8}{'read':>8}")
        for algorithm in ALGORITHMS:
            request = MintRequest(
                lease_id=LeaseId.new(),
                task_id=TaskId.new(),
                identity=SpiffeId.parse("spiffe://demo.test/agent/report"),
                backend_name="nhi_abcdef_abcdefghijklmnop",
                resource="orders-api",
                action="read",
                recipe={
                    "audience": "spiffe://demo.test/tool",
                    "scope": "orders:read",
                    "algorithm": algorithm,
                },
                now_ms=now_ms,
                expires_ms=now_ms + 300_000,
                not_after_ms=now_ms + 360_000,
                status_index=3 * SIZE + 17,
            )
            token = mint(issuer, request).credential.secret["access_token"].reveal()
            figures = (
                microseconds(lambda a=algorithm: keys.sign_token(HEADER, PAYLOAD, algorithm=a)),
                microseconds(lambda r=request: mint(issuer, r)),
                microseconds(lambda t=token: reader.read(t, now_ms)),
            )
            print(f"{algorithm:8}" + "".join(f"{figure:8.1f}" for figure in figures))
        indexer = StatusIndexer(keys.derive("status list"))
        invalid = [indexer.index_of(counter) for counter in range(SIZE // 1000)]
        print(f"digest {microseconds(lambda: keys.digest(token.encode())):.1f}")
        print(f"status position {microseconds(lambda: indexer.index_of(12_345)):.1f}")
        print(f"status list of {SIZE}, 0.1 % revoked {microseconds(lambda: encode(invalid), 10):.0f}")


if __name__ == "__main__":
    main()
