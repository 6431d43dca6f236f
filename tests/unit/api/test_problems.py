from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import orjson
import pytest

import broker.core
from broker.api import edge_errors, problems, schemas
from broker.core import errors
from broker.core.decision import Basis, Deny
from broker.core.errors import BrokerError
from broker.core.ids import DecisionId, LeaseId, TaskId

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
DOCS = Path(__file__).parents[3] / "docs" / "errors.md"


def every_error() -> list[type[BrokerError]]:
    found: set[type[BrokerError]] = set()
    waiting: list[type[BrokerError]] = [BrokerError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    return sorted(
        (kind for kind in found if kind.__module__.startswith("broker.")), key=lambda kind: kind.__name__
    )


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_its_own_row(kind: type[BrokerError]) -> None:
    assert kind in problems.TABLE


def test_the_table_covers_the_modules_that_define_errors() -> None:
    for module in pkgutil.iter_modules(broker.core.__path__):
        importlib.import_module(f"broker.core.{module.name}")
    defined = {
        member
        for module in (errors, edge_errors)
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, BrokerError)
    }
    assert defined == set(problems.TABLE)


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in problems.TABLE if kind is not edge_errors.EdgeError]
    assert sorted(codes) == sorted(set(codes))


def test_a_problem_names_type_title_status_detail_and_trace_id() -> None:
    rendered = problems.render(errors.TaskClosed("The task has ended."), TRACE_ID)
    assert rendered.status == 409
    assert dict(rendered.headers)[b"content-type"] == b"application/problem+json"
    assert orjson.loads(rendered.body) == {
        "type": "urn:nhi-broker:problem:task-closed",
        "title": "Task has ended",
        "status": 409,
        "detail": "The task has ended.",
        "trace_id": TRACE_ID,
    }


def test_extensions_carry_lease_task_and_decision() -> None:
    lease_id, task_id, decision_id = LeaseId.new(), TaskId.new(), DecisionId.new()
    lost = problems.problem(errors.LeaseLost("Ended.", lease_id=lease_id, task_id=task_id), TRACE_ID)
    assert (lost["lease_id"], lost["task_id"]) == (lease_id, task_id)
    denied = errors.PolicyDenied(Deny(Basis(("team-owns",), "ab" * 32), "Not your team."), decision_id)
    members = orjson.loads(problems.render(denied, TRACE_ID).body)
    assert members["decision"] == {"id": decision_id, "policy_ids": ["team-owns"], "policy_hash": "ab" * 32}
    schemas.Problem.model_validate_json(problems.render(denied, TRACE_ID).body)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.RateLimited("Slow down.", retry_after_seconds=7), b"7"),
        (errors.LedgerUnavailable("Nothing durable."), b"1"),
        (errors.StillMinting("Running.", retry_after_seconds=2), b"2"),
    ],
)
def test_retry_after_is_said_where_a_retry_helps(error: BrokerError, seconds: bytes) -> None:
    assert dict(problems.render(error, TRACE_ID).headers)[b"retry-after"] == seconds


def test_no_retry_after_where_it_cannot_help() -> None:
    assert b"retry-after" not in dict(problems.render(errors.UnknownObject(), TRACE_ID).headers)


def test_a_401_names_its_scheme_and_hides_the_rule() -> None:
    rendered = problems.render(errors.Unauthenticated("J-7", "aud holds two values"), TRACE_ID)
    assert dict(rendered.headers)[b"www-authenticate"].startswith(b"Bearer")
    assert b"J-7" not in rendered.body
    assert b"aud holds" not in rendered.body


@pytest.mark.parametrize(
    "error", [RuntimeError("password=hunter2"), BrokerError("password=hunter2"), KeyError("x")]
)
def test_what_nobody_expected_is_opaque(error: Exception) -> None:
    rendered = problems.render(error, TRACE_ID)
    assert rendered.status == 500
    assert b"hunter2" not in rendered.body
    assert TRACE_ID.encode() in rendered.body


def test_an_error_class_without_a_row_takes_its_parents() -> None:
    class Elsewhere(errors.Overloaded):
        """Stands for an error of a later version."""

    assert problems.row_of(Elsewhere("Full.")).status == 503
    del Elsewhere


def test_the_documentation_carries_the_table() -> None:
    assert problems.markdown_table() in DOCS.read_text(encoding="utf-8")
