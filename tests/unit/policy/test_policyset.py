"""A set that could mislead does not load, and says everything that is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.policy.engine import PolicyEngine
from broker.policy.errors import PolicyError
from broker.policy.policyset import GUARDS, PolicyFile, PolicySources

if TYPE_CHECKING:
    from pathlib import Path

    from broker.policy.catalog import Catalog


def _load_with(folder: Path, catalog: Catalog, text: str) -> PolicyEngine:
    (folder / "extra.cedar").write_text(text)
    return PolicyEngine.load(folder, catalog)


FORBID = 'forbid (principal, action in Action::"use", resource)'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("permit (principal, action, resource", "extra.cedar: does not parse"),
        ("", "extra.cedar: holds no policy"),
        ("permit (principal, action, resource);", 'a policy has no @id("…")'),
        ('@id("") permit (principal, action, resource);', 'a policy has no @id("…")'),
        ('@id("A B") permit (principal, action, resource);', 'a policy has no @id("…")'),
        (f'@id("x") {FORBID};', 'x: a forbid needs a @reason("…")'),
        (f'@id("x") @reason {FORBID};', 'x: a forbid needs a @reason("…")'),
        (f'@id("x") @reason("No {{secret}}.") {FORBID};', "x: the @reason names {secret}"),
        (f'@id("x") @reason("No {{owner!r}}.") {FORBID};', "x: the @reason names {owner}"),
        (f'@id("x") @reason("No {{owner.__class__}}.") {FORBID};', "x: the @reason names {owner.__class__}"),
        (f'@id("x") @reason("No {{0}}.") {FORBID};', "x: the @reason names {0}"),
        (f'@id("x") @reason("No {{.") {FORBID};', "x: the @reason has an unpaired brace"),
        (f'@id("x") @reason("No\\nway.") {FORBID};', "x: the @reason is not one printable line"),
        (
            '@id("x") @reason("At most {ttl_seconds_max}.") forbid (principal, action, resource);',
            "x: the @reason names {ttl_seconds_max}, which not every question",
        ),
        (f'@id("x") @raeson("No.") @reason("No.") {FORBID};', "x: @raeson is not an annotation we know"),
        (
            '@id("x") @needs_approval("leads") permit (principal, action, resource);',
            "x: @needs_approval belongs on a forbid",
        ),
        (f'@id("x") @reason("No.") @needs_approval("") {FORBID};', "x: @needs_approval names no group"),
        (
            f'@id("x") @reason("No.") @needs_approval("leads") {FORBID};',
            'x: no condition looks for "leads" in context.facts.approvals',
        ),
        (
            '@id("x") permit (principal, action in Action::"use", resource) when { principal.salary > 1 };',
            "extra.cedar: x: for policy",
        ),
        (
            '@id("x") permit (principal, action == Action::"fly", resource);',
            "extra.cedar: x: for policy",
        ),
        (
            '@id("x") permit (principal == ?principal, action, resource);',
            "extra.cedar: templates (?principal, ?resource) are not supported",
        ),
        (
            '@id("environment-wall") permit (principal, action, resource);',
            "the id environment-wall is already used in environments.cedar",
        ),
    ],
)
def test_a_faulty_policy_stops_the_load(folder: Path, catalog: Catalog, text: str, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _load_with(folder, catalog, text)
    assert said in str(caught.value)


def test_everything_wrong_is_told_at_once(folder: Path, catalog: Catalog) -> None:
    (folder / "guards.cedar").unlink()
    (folder / "broken.cedar").write_text("permit (")
    with pytest.raises(PolicyError) as caught:
        _load_with(folder, catalog, f'@id("x") {FORBID} when {{ principal.salary > 1 }};')
    assert len(caught.value.problems) == len(GUARDS) + 3


@pytest.mark.parametrize("guard", sorted(GUARDS))
def test_a_guard_cannot_be_left_out_or_turned_into_a_permit(
    starter: Path, catalog: Catalog, guard: str
) -> None:
    sources = PolicySources.read(starter)
    for replacement in ("other", None):
        files = tuple(
            PolicyFile(file.name, file.text.replace(f'@id("{guard}")', f'@id("{replacement}")'))
            if replacement
            else PolicyFile(file.name, _as_permit(file.text, guard))
            for file in sources.files
        )
        changed = PolicySources(sources.schema, files)
        with pytest.raises(PolicyError, match=f"the guard {guard} is missing"):
            PolicyEngine(lambda changed=changed: changed, catalog)


def _as_permit(text: str, policy: str) -> str:
    before, mark, after = text.partition(f'@id("{policy}")')
    return before + mark + after.replace("forbid", "permit", 1)


def test_a_directory_without_policies_stops_the_start(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(PolicyError) as caught:
        PolicyEngine.load(tmp_path, catalog)
    assert "schema.cedarschema: cannot be read" in str(caught.value)
    assert "holds no *.cedar file" in str(caught.value)


def test_a_set_that_permits_nothing_stops_the_start(starter: Path, catalog: Catalog) -> None:
    sources = PolicySources.read(starter)
    only_guards = tuple(file for file in sources.files if file.name == "guards.cedar")
    with pytest.raises(PolicyError, match="holds no permit"):
        PolicyEngine(lambda: PolicySources(sources.schema, only_guards), catalog)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("entity Identity {", "entity Identity { salary: Long,", "does not fit the entities"),
        ("  external: Bool,", "  external: String,", "does not fit the entities"),
        ("    tool: String,", "    tool: String, colour: String,", "does not fit the context of read"),
        (
            "      deadline_seconds: Long,",
            "      deadline_seconds: Bool,",
            "does not fit the context of open_task",
        ),
        ("entity Identity {", "entity Identity", "schema.cedarschema: "),
    ],
)
def test_a_schema_that_does_not_describe_the_facts_stops_the_start(
    starter: Path, catalog: Catalog, old: str, new: str, said: str
) -> None:
    sources = PolicySources.read(starter)
    assert old in sources.schema
    # Policies that look at what the schema now types otherwise must not hide the schema's own fault.
    permit = PolicyFile("one.cedar", '@id("one") permit (principal, action, resource);')
    changed = PolicySources(sources.schema.replace(old, new, 1), (permit,))
    with pytest.raises(PolicyError) as caught:
        PolicyEngine(lambda: changed, catalog, guards=frozenset())
    assert said in str(caught.value)


def test_a_file_that_is_not_utf_8_or_too_large_is_named(folder: Path, catalog: Catalog) -> None:
    (folder / "bytes.cedar").write_bytes(b"\xff")
    (folder / "large.cedar").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(PolicyError) as caught:
        PolicyEngine.load(folder, catalog)
    assert "bytes.cedar: is not UTF-8" in str(caught.value)
    assert "large.cedar: is larger than" in str(caught.value)


def test_the_policy_hash_names_policies_schema_and_catalog(folder: Path, catalog: Catalog) -> None:
    hashes = {PolicyEngine.load(folder, catalog).policy_hash for _ in range(2)}
    assert len(hashes) == 1
    for name in ("guards.cedar", "schema.cedarschema"):
        with (folder / name).open("a") as file:
            file.write("// a word more\n")
        hashes.add(PolicyEngine.load(folder, catalog).policy_hash)
    path = folder / "catalog.yaml"
    path.write_text(path.read_text().replace("title: Orders database", "title: Orders"))
    hashes.add(PolicyEngine.load(folder, catalog.load(path)).policy_hash)
    assert len(hashes) == 4


def test_the_policy_hash_tells_where_one_file_ends(starter: Path, catalog: Catalog) -> None:
    sources = PolicySources.read(starter)
    first, *rest = sources.files
    moved = (PolicyFile(first.name + "x", first.text), *rest)
    assert PolicySources(sources.schema, moved).sha256("") != sources.sha256("")
