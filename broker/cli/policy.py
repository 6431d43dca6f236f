"""``nhi policy``: check a policy set, and run its cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from broker.cli import tables
from broker.cli.options import Json  # noqa: TC001  Typer reads annotations at run time
from nhi_sdk.cli.output import ExitCode, print_fields, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.policy.cases import CaseResult
    from broker.policy.catalog import Catalog
    from broker.policy.engine import PolicyEngine

DIRECTORY_DEFAULT: Final = Path("policies")

Directory = Annotated[
    Path, typer.Option("--directory", "-d", help="Policies, schema, catalog, identities and cases.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Check policies and run their cases.")
    group.command("check")(check)
    group.command("test")(run)
    app.add_typer(group, name="policy")


def check(*, directory: Directory = DIRECTORY_DEFAULT, as_json: Json = False) -> None:
    """Check that policies, catalog and identities load. Exits 1 with a line for each thing that is wrong."""
    engine, catalog, identities = _load(directory, as_json=as_json)
    fields = {
        "policies": len(engine.policies),
        "policy hash": engine.policy_hash,
        "things to ask for": len(catalog),
        "identities": identities,
    }
    if as_json:
        print_json(
            {"ok": True, "problems": [], **{name.replace(" ", "_"): one for name, one in fields.items()}}
        )
    else:
        print_fields(fields)


def run(*, directory: Directory = DIRECTORY_DEFAULT, as_json: Json = False) -> None:
    """Run the cases in DIRECTORY/cases.

    Exits 1 when a case fails, or when a policy lacks a case in which it decides or one in which it lets go.
    """
    from broker.policy.cases import run_cases, uncovered  # noqa: PLC0415  heavy: see the package
    from broker.policy.errors import PolicyError  # noqa: PLC0415  same

    engine, _, _ = _load(directory, as_json=as_json)
    try:
        results = run_cases(engine, directory / "cases")
    except PolicyError as error:
        _refuse(error.problems, as_json=as_json)
    missing = uncovered(engine, results)
    failed = [one for one in results if not one.passed]
    if as_json:
        _print_json(results, missing)
    else:
        _show(results, failed, missing)
    if failed or missing:
        raise typer.Exit(ExitCode.FAILED)


def _load(directory: Path, *, as_json: bool) -> tuple[PolicyEngine, Catalog, int]:
    from broker.policy.catalog import Catalog  # noqa: PLC0415  heavy: see the package
    from broker.policy.engine import PolicyEngine  # noqa: PLC0415  same
    from broker.policy.errors import PolicyError  # noqa: PLC0415  same
    from broker.policy.registrations import Registrations  # noqa: PLC0415  same

    problems: list[str] = []
    try:
        catalog = Catalog.load(directory / "catalog.yaml")
    except PolicyError as error:
        _refuse(error.problems, as_json=as_json)  # everything else is read against the catalog
    registrations, engine = Registrations({}), None
    try:
        registrations = Registrations.load(directory / "identities.yaml", catalog=catalog)
    except PolicyError as error:
        problems += error.problems
    try:
        engine = PolicyEngine.load(directory, catalog)
    except PolicyError as error:
        problems += error.problems
    if engine is None or problems:
        _refuse(problems, as_json=as_json)
    return engine, catalog, len(registrations)


def _refuse(problems: Sequence[str], *, as_json: bool) -> NoReturn:
    if as_json:
        print_json({"ok": False, "problems": list(problems)})
    for problem in problems:
        say(problem)
    raise typer.Exit(ExitCode.FAILED)


def _print_json(results: Sequence[CaseResult], missing: Sequence[str]) -> None:
    cases: list[dict[str, Any]] = [
        {
            "file": one.file,
            "name": one.name,
            "policy": one.policy,
            "expected": one.expected,
            "got": one.got,
            "determining": list(one.determining),
            "passed": one.passed,
            "problems": list(one.problems),
        }
        for one in results
    ]
    passed = all(one.passed for one in results) and not missing
    print_json({"ok": passed, "cases": cases, "uncovered": list(missing)})


def _show(results: Sequence[CaseResult], failed: Sequence[CaseResult], missing: Sequence[str]) -> None:
    if failed:
        rows = [(one.file, one.name, one.policy, "; ".join(one.problems)) for one in failed]
        tables.show(("FILE", "CASE", "POLICY", "WHAT DIFFERED"), rows)
    for one in missing:
        say(one)
    print_fields({"cases": len(results), "failed": len(failed), "policies not covered": len(missing)})
