"""The SDK's own types and requests against the server's schemas: neither side may drift."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from broker.api import request_headers, schemas
from broker.core.lease import TERMINAL
from broker.core.lease import LeaseState as BrokerLeaseState
from nhi_sdk import (
    AccessToken,
    Broker,
    CatalogItem,
    Credential,
    Lease,
    LeaseState,
    PostgresLogin,
    Task,
    TaskEnd,
)
from nhi_sdk._calls import WAIT_SECONDS_MAX

if TYPE_CHECKING:
    from pydantic import BaseModel

    from tests.unit.sdk.contract_server import ContractServer

INTENT = {"tool": "sql.query", "reason": "churn by plan"}


@pytest.mark.parametrize(
    ("ours", "theirs", "elsewhere"),
    [
        (Credential, schemas.CredentialAnswer, {"resource", "action"}),
        (Lease, schemas.LeaseView, set()),
        (Task, schemas.TaskView, set()),
        (CatalogItem, schemas.CatalogItem, set()),
        (TaskEnd, schemas.TaskEnded, {"settled"}),
        (PostgresLogin, schemas.PostgresqlLogin, set()),
        (AccessToken, schemas.AccessToken, set()),
    ],
)
def test_each_type_has_the_fields_of_the_answer_it_stands_for(
    ours: type[Any], theirs: type[BaseModel], elsewhere: set[str]
) -> None:
    fields = {one.name for one in dataclasses.fields(ours) if not one.name.startswith("_")}
    fields = {"credential" if one == "secret" else one for one in fields}
    discriminator = {"kind"} if theirs in {schemas.PostgresqlLogin, schemas.AccessToken} else set()
    assert fields - elsewhere == set(theirs.model_fields) - discriminator


def test_the_states_of_a_lease_are_the_brokers() -> None:
    assert {one.value for one in LeaseState} == {one.value for one in BrokerLeaseState}


@pytest.mark.parametrize("state", [one.value for one in BrokerLeaseState])
def test_a_lease_counts_as_ended_where_the_broker_says_so(
    broker: Broker, server: ContractServer, state: str
) -> None:
    cred = broker.request("orders-db", "read", purpose="p", **INTENT)
    server.leases[cred.lease_id]["state"] = state
    assert broker.read_lease(cred.lease_id).ended == (state in TERMINAL)


def test_the_longest_wait_is_the_brokers() -> None:
    assert request_headers.WAIT_SECONDS_MAX == WAIT_SECONDS_MAX


def test_every_request_passes_the_brokers_schemas(broker: Broker, server: ContractServer) -> None:
    with broker.task(
        "churn-report",
        description="weekly",
        resources=["orders-db"],
        actions=["read"],
        classification_max="confidential",
        budget_leases=3,
        deadline_seconds=60,
    ) as task:
        task.request("orders-db", "read", ttl_seconds=60, **INTENT)
    with pytest.raises(ZeroDivisionError), broker.credential("orders-db", "read", purpose="p", **INTENT):
        raise ZeroDivisionError
    models = {"/tasks": schemas.TaskRequest, "/credentials/request": schemas.CredentialRequest}
    for seen in server.seen:
        model = models.get(seen.path, schemas.ReasonIn)
        model.model_validate_json(json.dumps(seen.body))
    assert len(server.seen) == 5


def test_the_contract_server_answers_what_the_brokers_schemas_describe(
    broker: Broker, server: ContractServer
) -> None:
    task = broker.open_task("t")
    cred = task.request("orders-db", "read", **INTENT)
    ended = task.end()
    schemas.TaskView.model_validate_json(json.dumps(server.tasks[task.task_id]))
    schemas.LeaseView.model_validate_json(json.dumps(server.leases[cred.lease_id]))
    schemas.CatalogItem.model_validate_json(json.dumps(server.catalog[0]))
    assert ended.proven
