"""Schemathesis over the OpenAPI documents: no 5xx, and no answer that the document does not describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from broker.api.openapi import openapi_documents
from tests.support.served_api import ServedApi

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTS = openapi_documents()
WORKLOAD, OPERATOR, OPS = (
    schemathesis.openapi.from_dict(DOCUMENTS[name]) for name in ("workload", "operator", "ops")
)
NOT_FOR_US = [
    positive_data_acceptance,  # well-formed requests are refused for good reason: policy, unknown objects
]
TRIED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApi]:
    with ServedApi().running() as api:
        yield api


@WORKLOAD.parametrize()
@TRIED
def test_the_workload_listener_as_a_caller(case: schemathesis.Case, served: ServedApi) -> None:
    case.call_and_validate(
        base_url=served.urls["workload"],
        headers={"Authorization": f"Bearer {served.token}"},
        excluded_checks=NOT_FOR_US,
    )


@WORKLOAD.parametrize()
@TRIED
def test_the_workload_listener_as_nobody(case: schemathesis.Case, served: ServedApi) -> None:
    case.call_and_validate(base_url=served.urls["workload"], excluded_checks=NOT_FOR_US)


@OPERATOR.parametrize()
@TRIED
def test_the_operator_listener_as_an_operator(case: schemathesis.Case, served: ServedApi) -> None:
    case.call_and_validate(base_url=served.urls["operator"], excluded_checks=NOT_FOR_US)


@OPERATOR.parametrize()
@TRIED
def test_the_operator_listener_as_nobody(case: schemathesis.Case, served: ServedApi) -> None:
    case.call_and_validate(base_url=served.urls["operator-nobody"], excluded_checks=NOT_FOR_US)


@OPS.parametrize()
@TRIED
def test_the_ops_listener(case: schemathesis.Case, served: ServedApi) -> None:
    case.call_and_validate(base_url=served.urls["ops"], excluded_checks=NOT_FOR_US)
