from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.audit import AuditKind, AuditRecord
from inventory.audit.canonical import parse_canonical
from inventory.audit.chain import ChainHead, append
from inventory.audit.siem import to_cef, to_ocsf
from tests.support.audit_log import MemoryKeys, record

KEYS = MemoryKeys()
UNESCAPED_EQUALS = re.compile(r"(?<!\\)(?:\\\\)*=")


def body_of(made: AuditRecord) -> dict[str, Any]:
    return parse_canonical(append(ChainHead(2, 6), made, KEYS)[1].body)


@pytest.mark.parametrize(
    ("kind", "class_uid", "type_uid"),
    [
        (AuditKind.AUTHENTICATION_REFUSED, 3002, 300201),
        (AuditKind.DECISION, 3003, 300301),
        (AuditKind.IDENTITY_SEEN, 3004, 300401),
        (AuditKind.IDENTITY_CHANGED, 3004, 300403),
        (AuditKind.LEASE_MOVED, 0, 99),
    ],
)
def test_each_kind_has_its_ocsf_class(kind: AuditKind, class_uid: int, type_uid: int) -> None:
    event = to_ocsf(body_of(replace(record(1), kind=kind)))
    assert (event["class_uid"], event["type_uid"]) == (class_uid, type_uid)
    assert event["category_uid"] == class_uid // 1000
    assert event["metadata"]["uid"] == "2/7"


@pytest.mark.parametrize("kind", AuditKind)
def test_every_kind_can_be_written_in_both(kind: AuditKind) -> None:
    body = body_of(AuditRecord(kind=kind, at_ms=5, actor="broker"))
    assert to_ocsf(body)["time"] == 5
    assert to_cef(body).startswith(f"CEF:0|nhi-broker|nhi-broker|1|{kind}|{kind}|")


HOSTILE = "a|b\\c=d\r\ne cs6=x\x1b[2J\x00\x85\u2028\u2029f"


def test_cef_escapes_what_could_break_out_of_a_value() -> None:
    line = to_cef(body_of(replace(record(1), actor=HOSTILE)))
    assert "suid=a|b\\\\c\\=d\\r\\ne cs6\\=x [2J    f cs1Label=lease_id" in line


def test_cef_escapes_what_could_break_out_of_the_header() -> None:
    body = body_of(record(1))
    body["event"]["kind"] = HOSTILE
    header = to_cef(body).split("rt=")[0]
    assert len(re.findall(r"(?<!\\)\|", header)) == 7


@given(actor=st.text(max_size=40), value=st.text(max_size=40))
def test_no_value_adds_a_line_or_a_pair_to_cef(actor: str, value: str) -> None:
    line = to_cef(body_of(replace(record(1), actor=actor, fields={"value": value})))
    assert len(line.splitlines()) == 1
    labels = re.findall(r"(?<!\\)(?:\\\\)*=", line)
    assert len(labels) == len(
        re.findall(r"(?<!\\)(?:\\\\)*=", to_cef(body_of(replace(record(1), fields={}))))
    )
