"""Audit records as other tools read them: OCSF 1.8.0 events and CEF lines.

Both are for searching and alerting. Neither can be verified: what proves a record is its
canonical body, which only the JSON-lines export carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from broker.core.audit import AuditKind

if TYPE_CHECKING:
    from collections.abc import Mapping

_OCSF_VERSION: Final = "1.8.0"
_PRODUCT: Final = "nhi-broker"
_OTHER: Final = 99
_BASE_EVENT, _AUTHENTICATION, _AUTHORIZE_SESSION, _ENTITY_MANAGEMENT = 0, 3002, 3003, 3004
_IDS: Final = ("lease_id", "task_id", "decision_id", "identity")

# Class and activity of each kind; everything else is a base event with activity "Other".
_OCSF_CLASSES: Final[Mapping[str, tuple[int, int]]] = {
    AuditKind.AUTHENTICATION_REFUSED: (_AUTHENTICATION, 1),  # Logon
    AuditKind.DECISION: (_AUTHORIZE_SESSION, 1),  # Assign Privileges
    AuditKind.IDENTITY_SEEN: (_ENTITY_MANAGEMENT, 1),  # Create
    AuditKind.IDENTITY_CHANGED: (_ENTITY_MANAGEMENT, 3),  # Update
}
_ALERTING: Final = frozenset({AuditKind.AUTHENTICATION_REFUSED, AuditKind.KILL, AuditKind.FINDING_OPENED})
_OCSF_INFORMATIONAL, _OCSF_MEDIUM = 1, 3
_CEF_LOW, _CEF_HIGH = 3, 7

# CEF knows no escape for these, and a raw one could end the line or drive a terminal.
_CONTROLS: Final = dict.fromkeys((*range(32), *range(127, 160), 8232, 8233), " ")
_CEF_HEADER: Final = str.maketrans({**_CONTROLS, ord("\\"): "\\\\", ord("|"): "\\|"})
_CEF_VALUE: Final = str.maketrans(
    {**_CONTROLS, ord("\\"): "\\\\", ord("="): "\\=", ord("\r"): "\\r", ord("\n"): "\\n"}
)


def to_ocsf(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the OCSF event of a parsed record body.

    Args:
        body: what `parse_canonical` returned for a body that verification accepted.

    """
    event = body["event"]
    kind = event["kind"]
    class_uid, activity_id = _OCSF_CLASSES.get(kind, (_BASE_EVENT, _OTHER))
    result: dict[str, Any] = {
        "activity_id": activity_id,
        "actor": {"user": {"uid": event["actor"]}},
        "category_uid": class_uid // 1000,
        "class_uid": class_uid,
        "message": kind,
        "metadata": {
            "log_name": "audit",
            "product": {"name": _PRODUCT, "vendor_name": _PRODUCT},
            "sequence": body["seq"],
            "uid": f"{body['slot']}/{body['seq']}",
            "version": _OCSF_VERSION,
        },
        "severity_id": _OCSF_MEDIUM if kind in _ALERTING else _OCSF_INFORMATIONAL,
        "time": event["at_ms"],
        "type_uid": class_uid * 100 + activity_id,
        "unmapped": {
            "fields": event["fields"],
            "prev": body["prev"],
            **{name: event[name] for name in _IDS if name in event},
        },
    }
    if activity_id == _OTHER:
        result["activity_name"] = kind
    subject = {"uid": event.get("identity", event["actor"])}
    if class_uid in {_AUTHENTICATION, _AUTHORIZE_SESSION}:
        result["user"] = subject
    elif class_uid == _ENTITY_MANAGEMENT:
        result["entity"] = {**subject, "type": "non-human identity"}
    if kind == AuditKind.AUTHENTICATION_REFUSED:
        result["status_id"] = 2  # Failure
    return result


def to_cef(body: Mapping[str, Any]) -> str:
    """Return the CEF line of a parsed record body, without a line end; every value is escaped.

    Args:
        body: what `parse_canonical` returned for a body that verification accepted.

    """
    event = body["event"]
    severity = _CEF_HIGH if event["kind"] in _ALERTING else _CEF_LOW
    header = ["CEF:0", _PRODUCT, _PRODUCT, str(body["v"]), event["kind"], event["kind"], str(severity)]
    pairs = {
        "rt": str(event["at_ms"]),
        "externalId": f"{body['slot']}/{body['seq']}",
        "suid": event["actor"],
    }
    for number, name in enumerate(_IDS, 1):
        if name in event:
            pairs[f"cs{number}Label"] = name
            pairs[f"cs{number}"] = event[name]
    pairs["cs5Label"] = "fields"
    pairs["cs5"] = orjson.dumps(event["fields"], option=orjson.OPT_SORT_KEYS).decode("utf-8")
    extension = " ".join(f"{name}={value.translate(_CEF_VALUE)}" for name, value in pairs.items())
    return "|".join([*(part.translate(_CEF_HEADER) for part in header), extension])
