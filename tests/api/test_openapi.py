from __future__ import annotations

from typing import Any

import pytest

from broker.api.openapi import DIRECTORY, REGENERATE, openapi_documents, rendered
from broker.api.problems import TABLE
from tests.support.api import OPERATIONS

DOCUMENTS = openapi_documents()


@pytest.mark.parametrize("listener", OPERATIONS)
def test_the_committed_document_is_the_one_the_code_describes(listener: str) -> None:
    committed = (DIRECTORY / f"{listener}.json").read_text(encoding="utf-8")
    assert committed == rendered(DOCUMENTS[listener]), f"docs/openapi is out of date: run `{REGENERATE}`"


@pytest.mark.parametrize("listener", OPERATIONS)
def test_every_operation_is_described_with_its_body_and_its_answers(listener: str) -> None:
    document = DOCUMENTS[listener]
    for operation in OPERATIONS[listener]:
        described = document["paths"][operation.path][operation.method.lower()]
        statuses = {int(status) for status in described["responses"]}
        assert statuses == set(operation.answers) | {TABLE[kind].status for kind in operation.errors}
        assert ("requestBody" in described) == (operation.body is not None)
        named = {parameter["name"] for parameter in described.get("parameters", ())}
        assert set(operation.parameters) <= named
        assert bool(described["security"]) == (operation.security == "svid")


@pytest.mark.parametrize("listener", OPERATIONS)
def test_every_reference_leads_somewhere(listener: str) -> None:
    document = DOCUMENTS[listener]

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                target: Any = document
                for part in value["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for member in value.values():
                check(member)
        elif isinstance(value, list):
            for member in value:
                check(member)

    check(document)
