"""Every way a dead token could still be called active."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from broker.core.clock import MS_PER_SECOND
from broker.core.errors import UnknownObject
from broker.core.facts import Lifecycle
from broker.core.status_list import INVALID, SIZE, VALID, decode, locate, status_of
from broker.keys.token_keys import TokenKeyPolicy
from broker.service.tokens import (
    STATUS_LIST_LIFETIME_SECONDS,
    STATUS_LIST_REBUILD_MS,
    STATUS_LIST_TTL_SECONDS,
    STATUS_SKEW_SECONDS,
)
from inventory import identities, kills, ledger
from inventory.kills import Kill, KillScope
from tests.support.world import CHURN, CHURN_OWNER, REPORTS_API, World, caller

if TYPE_CHECKING:
    from broker.service.issue import Issued
    from inventory.store.writer import Transaction

OPERATOR = "operator:uid=0"


async def a_token(world: World, *, ttl_seconds: int = 300) -> Issued:
    return await world.ask(await world.open_task(), "reports-api", "read", ttl_seconds=ttl_seconds)


def token_of(issued: Issued) -> str:
    assert issued.credential is not None
    return str(issued.credential.reveal()["access_token"])


def is_active(world: World, issued: Issued) -> bool:
    return world.services.tokens.introspect(caller(REPORTS_API), token_of(issued))["active"] is True


def parts_of(jws: str) -> tuple[dict[str, Any], dict[str, Any]]:
    header, payload = (
        orjson.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in jws.split(".")[:2]
    )
    return header, payload


async def status_in_list(world: World, issued: Issued) -> int:
    assert issued.lease.status_index is not None
    number, position = locate(issued.lease.status_index)
    _, payload = parts_of(await world.services.tokens.status_list(number))
    return status_of(decode(payload["status_list"]["lst"]), position)


def number_of(issued: Issued) -> int:
    assert issued.lease.status_index is not None
    return issued.lease.status_index // SIZE


# --- introspection -------------------------------------------------------------------------------


async def test_a_live_token_is_active_until_the_second_it_expires(world: World) -> None:
    issued = await a_token(world, ttl_seconds=60)
    assert is_active(world, issued)
    world.clock.advance(ms=60_000 - 1)
    _, claims = parts_of(token_of(issued))
    assert is_active(world, issued) == (world.clock.now_ms() < claims["exp"] * MS_PER_SECOND)
    world.clock.advance(ms=1)
    assert not is_active(world, issued)


async def test_a_suspension_makes_tokens_inactive_in_its_first_commit(world: World) -> None:
    """Its tasks and leases end only afterwards, in pages; a crash may come in between."""
    issued = await a_token(world)

    def suspend(tx: Transaction) -> None:
        known = identities.get(tx, CHURN)
        assert known is not None
        identities.set_lifecycle(tx, known, Lifecycle.SUSPENDED, at_ms=1, actor=OPERATOR, reason="leak")

    await world.store.writer.run(suspend)
    lease = ledger.get(world.store.reader, issued.lease.id)
    assert lease is not None
    assert lease.state == "active"
    assert not is_active(world, issued)


@pytest.mark.parametrize(
    ("scope", "value"),
    [
        (KillScope.IDENTITY, str(CHURN)),
        (KillScope.OWNER, CHURN_OWNER),
        (KillScope.RESOURCE, "reports-api"),
    ],
)
async def test_a_kill_makes_tokens_inactive_in_its_first_commit(
    world: World, scope: KillScope, value: str
) -> None:
    issued = await a_token(world)
    await world.store.writer.run(lambda tx: kills.mark(tx, Kill(scope, value, "theft", OPERATOR, 1)))
    assert not is_active(world, issued)


async def test_a_token_of_a_key_that_was_thrown_out_is_inactive(world: World) -> None:
    issued = await a_token(world)
    world.keys.revoke_all_token_keys()
    assert not is_active(world, issued)


async def test_a_token_the_ledger_does_not_know_is_inactive(world: World) -> None:
    """After a restore from an older backup the signature is still good."""
    issued = await a_token(world)
    await world.store.writer.run(lambda tx: tx.execute("DELETE FROM leases"))
    assert not is_active(world, issued)


@pytest.mark.parametrize("seconds", [-600, 600])
async def test_a_clock_that_jumps_revives_no_token(world: World, seconds: int) -> None:
    issued = await a_token(world, ttl_seconds=300)
    world.clock.advance(seconds=301)
    await world.drain()
    world.clock.advance(seconds=seconds)
    assert not is_active(world, issued)


async def test_a_superseded_token_is_inactive_once_its_successor_is_out(world: World) -> None:
    task = await world.open_task()
    first = await world.ask(task, "reports-api", "read", key="k")
    second = await world.ask(task, "reports-api", "read", key="k")
    assert not is_active(world, first)
    assert is_active(world, second)


# --- status lists --------------------------------------------------------------------------------


async def test_an_ended_token_is_set_in_its_list_and_a_live_one_is_not(world: World) -> None:
    task = await world.open_task()
    ended = await world.ask(task, "reports-api", "read")
    live = await world.ask(task, "reports-api", "read")
    await world.services.revoke.release(caller(CHURN), ended.lease.id)
    assert await status_in_list(world, ended) == INVALID
    assert await status_in_list(world, live) == VALID


async def test_a_list_says_so_within_its_ttl_and_not_later(world: World) -> None:
    issued = await a_token(world)
    assert await status_in_list(world, issued) == VALID
    await world.services.revoke.release(caller(CHURN), issued.lease.id)
    world.clock.advance(ms=STATUS_LIST_REBUILD_MS)
    assert await status_in_list(world, issued) == INVALID
    assert STATUS_LIST_REBUILD_MS < STATUS_LIST_TTL_SECONDS * MS_PER_SECOND


async def test_a_list_built_before_the_clock_jumped_back_is_not_served(world: World) -> None:
    issued = await a_token(world)
    assert await status_in_list(world, issued) == VALID
    await world.services.revoke.release(caller(CHURN), issued.lease.id)
    world.clock.advance(seconds=-600)
    assert await status_in_list(world, issued) == INVALID


async def test_an_ended_token_stays_set_for_verifiers_whose_clock_is_behind(world: World) -> None:
    issued = await a_token(world, ttl_seconds=60)
    await world.services.revoke.release(caller(CHURN), issued.lease.id)
    world.clock.advance(seconds=60 + STATUS_SKEW_SECONDS - 1)
    assert await status_in_list(world, issued) == INVALID


async def test_a_list_outlives_neither_its_key_nor_the_tokens_it_speaks_of(world: World) -> None:
    issued = await a_token(world)
    _, payload = parts_of(await world.services.tokens.status_list(number_of(issued)))
    policy = TokenKeyPolicy()
    assert payload["exp"] - payload["iat"] == STATUS_LIST_LIFETIME_SECONDS
    assert policy.linger_ms >= STATUS_LIST_LIFETIME_SECONDS * MS_PER_SECOND
    assert payload["ttl"] == STATUS_LIST_TTL_SECONDS


async def test_a_list_is_signed_anew_when_its_key_is_thrown_out(world: World) -> None:
    issued = await a_token(world)
    before, _ = parts_of(await world.services.tokens.status_list(number_of(issued)))
    world.keys.revoke_all_token_keys()
    after, _ = parts_of(await world.services.tokens.status_list(number_of(issued)))
    assert after["kid"] != before["kid"]
    assert after["kid"] in {key.kid for key in world.keys.token_keys()}


async def test_a_list_is_built_once_however_many_ask(world: World) -> None:
    issued = await a_token(world)
    first = await world.services.tokens.status_list(number_of(issued))
    world.clock.advance(ms=STATUS_LIST_REBUILD_MS - 1)
    assert await world.services.tokens.status_list(number_of(issued)) is first


@pytest.mark.parametrize("number", [-1, 7, 1 << 20, 1 << 80])
async def test_a_list_that_holds_no_token_is_unknown(world: World, number: int) -> None:
    await a_token(world)
    with pytest.raises(UnknownObject):
        await world.services.tokens.status_list(number)


async def test_those_who_ask_at_once_wait_for_one_list_and_one_who_leaves_takes_nothing_along(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await a_token(world)
    built: list[int] = []
    build = world.services.tokens._build

    def counted(number: int, now_ms: int) -> str:
        built.append(number)
        return build(number, now_ms)

    monkeypatch.setattr(world.services.tokens, "_build", counted)
    asking = [asyncio.create_task(world.services.tokens.status_list(number_of(issued))) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert len(set(results[1:])) == 1
    assert built == [number_of(issued)]


async def test_a_list_that_could_not_be_built_is_built_when_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await a_token(world)
    with monkeypatch.context() as broken:
        broken.setattr("broker.service.tokens.encode", lambda _indices: object())
        with pytest.raises(TypeError):
            await world.services.tokens.status_list(number_of(issued))
    assert await status_in_list(world, issued) == VALID
