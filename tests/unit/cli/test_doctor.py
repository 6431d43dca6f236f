"""Parts of the diagnosis that a healthy broker never shows."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from broker.cli import diagnosis_agent
from broker.cli.diagnosis import Diagnosis


@pytest.mark.parametrize(("apart", "which"), [(600, "behind"), (-600, "ahead of")])
def test_clocks_that_are_far_apart_are_named(apart: int, which: str) -> None:
    found = Diagnosis()
    assert diagnosis_agent._clock(found, formatdate(time.time() + apart, usegmt=True)) is True
    (finding,) = found.findings
    assert finding.verdict == "wrong"
    assert which in finding.seen


def test_clocks_that_agree_are_right_and_a_missing_date_is_unknown() -> None:
    found = Diagnosis()
    assert diagnosis_agent._clock(found, formatdate(usegmt=True)) is False
    assert diagnosis_agent._clock(found, None) is False
    assert [one.verdict for one in found.findings] == ["right", "unknown"]
    assert not found.to_mend


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"aud": ["spiffe://b/broker", "other"], "exp": 2**40}, "for spiffe://b/broker, other"),
        ({"aud": "other", "exp": 2**40}, "for other"),
        ({"exp": 2**40}, "for nobody"),
        ({"aud": "spiffe://b/broker", "exp": 1}, "has expired"),
        ({"aud": "spiffe://b/broker"}, "has expired"),
    ],
)
def test_an_svid_for_others_or_of_yesterday_is_named(claims: dict[str, object], expected: str) -> None:
    found = Diagnosis()
    diagnosis_agent._look_at_claims(found, claims, "spiffe://b/broker", "the token file")
    (finding,) = found.findings
    assert finding.verdict == "wrong"
    assert expected in finding.seen
    assert finding.mend


def test_several_identities_are_named_with_the_variable_that_chooses() -> None:
    found = Diagnosis()
    environment = diagnosis_agent.Environment.read(
        {
            "NHI_BROKER_URL": "https://localhost:1",
            "NHI_AUDIENCE": "spiffe://b/broker",
            "SPIFFE_ENDPOINT_SOCKET": "unix:///s",
        }
    )
    assert diagnosis_agent._chosen(found, environment, ["spiffe://b/one", "spiffe://b/two"])
    (finding,) = found.findings
    assert finding.verdict == "wrong"
    assert "spiffe://b/one, spiffe://b/two" in finding.seen
    assert "NHI_SPIFFE_ID" in finding.mend


@pytest.mark.parametrize("text", ["unix:///run/a.sock", "unix:/run/a.sock", "/run/a.sock"])
def test_every_spelling_of_a_socket_is_one_path(text: str) -> None:
    assert str(diagnosis_agent.socket_path(text)) == "/run/a.sock"
