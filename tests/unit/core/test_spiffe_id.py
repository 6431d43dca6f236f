from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.core.spiffe_id import SpiffeId, SpiffeIdError

TRUST_DOMAIN_ALPHABET = string.ascii_lowercase + string.digits + "._-"
SEGMENT_ALPHABET = string.ascii_letters + string.digits + "._-"

trust_domains = st.text(TRUST_DOMAIN_ALPHABET, min_size=1, max_size=255)
segments = st.text(SEGMENT_ALPHABET, min_size=1, max_size=40).filter(lambda s: s not in {".", ".."})
paths = st.lists(segments, max_size=8).map(lambda parts: "".join(f"/{part}" for part in parts))


def is_accepted(text: str) -> bool:
    try:
        SpiffeId.parse(text)
    except SpiffeIdError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "trust_domain", "path"),
    [
        ("spiffe://example.org", "example.org", ""),
        ("spiffe://example.org/a", "example.org", "/a"),
        ("spiffe://example.org/a/B/9", "example.org", "/a/B/9"),
        ("spiffe://192.0.2.7/ip", "192.0.2.7", "/ip"),
        ("spiffe://a_b-c.d/x", "a_b-c.d", "/x"),
        ("spiffe://td/...", "td", "/..."),
        ("spiffe://td/.path", "td", "/.path"),
        ("spiffe://td/..path/path..", "td", "/..path/path.."),
    ],
)
def test_a_legal_id_is_taken_as_it_stands(text: str, trust_domain: str, path: str) -> None:
    spiffe_id = SpiffeId.parse(text)
    assert (spiffe_id, spiffe_id.trust_domain, spiffe_id.path) == (text, trust_domain, path)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("ID-1", ""),
        ("ID-1", "s"),
        ("ID-1", "spiffe:/"),
        ("ID-1", "spiffe:/td/a"),
        ("ID-1", "spiffe://"),
        ("ID-1", "spiffe:///"),
        ("ID-1", "spiffe:///path"),
        ("ID-1", "https://td/a"),
        ("ID-1", "Spiffe://td/a"),
        ("ID-1", "SPIFFE://td/a"),
        ("ID-1", " spiffe://td/a"),
        ("ID-1", "\tspiffe://td/a"),
        ("ID-1", "spiffe://td/a?query"),
        ("ID-1", "spiffe://td?query"),
        ("ID-1", "spiffe://td/a#fragment"),
        ("ID-1", "spiffe://td#"),
        ("ID-2", "spiffe://Example.org/a"),
        ("ID-2", "spiffe://user@td/a"),
        ("ID-2", "spiffe://user:pw@td/a"),  # pragma: allowlist secret  a form to refuse, no login
        ("ID-2", "spiffe://td:8443/a"),
        ("ID-2", "spiffe://td:/a"),
        ("ID-2", "spiffe://[::1]/a"),
        ("ID-2", "spiffe://trust$domain/a"),
        ("ID-2", "spiffe://%74d/a"),
        ("ID-2", "spiffe://%F0%9F%A4%AF/a"),
        ("ID-2", "spiffe://td\n/a"),
        ("ID-2", "spiffe://td\n"),
        ("ID-2", "spiffe://\uff54\uff44/a"),
        ("ID-3", "spiffe://td/"),
        ("ID-3", "spiffe://td/a/"),
        ("ID-3", "spiffe://td//a"),
        ("ID-3", "spiffe://td/a//b"),
        ("ID-3", "spiffe://td/."),
        ("ID-3", "spiffe://td/./a"),
        ("ID-3", "spiffe://td/a/./b"),
        ("ID-3", "spiffe://td/a/."),
        ("ID-3", "spiffe://td/.."),
        ("ID-3", "spiffe://td/../a"),
        ("ID-3", "spiffe://td/a/.."),
        ("ID-3", "spiffe://td/pay/../admin"),
        ("ID-3", "spiffe://td/%61"),
        ("ID-3", "spiffe://td/%2e%2e/admin"),
        ("ID-3", "spiffe://td/%F0%9F%A4%AF"),
        ("ID-3", "spiffe://td/path$"),
        ("ID-3", "spiffe://td/a\n"),
        ("ID-3", "spiffe://td/a\x00"),
        ("ID-3", "spiffe://td/\uff41"),
        ("ID-3", "spiffe://td/a\ud800"),
    ],
)
def test_an_illegal_id_names_its_rule(rule: str, text: str) -> None:
    with pytest.raises(SpiffeIdError) as refused:
        SpiffeId.parse(text)
    assert refused.value.rule == rule


def test_id_2_every_code_point_in_a_trust_domain() -> None:
    accepted = {c for c in map(chr, range(256)) if c != "/" and is_accepted(f"spiffe://td{c}")}
    assert accepted == set(TRUST_DOMAIN_ALPHABET)
    assert len(accepted) == 39


def test_id_3_every_code_point_in_a_path() -> None:
    accepted = {c for c in map(chr, range(256)) if c != "/" and is_accepted(f"spiffe://td/path{c}")}
    assert accepted == set(SEGMENT_ALPHABET)
    assert len(accepted) == 65


@pytest.mark.parametrize(("size", "ok"), [(255, True), (256, False)])
def test_id_4_length_of_a_trust_domain(size: int, ok: bool) -> None:  # noqa: FBT001  a table column
    assert is_accepted("spiffe://" + "a" * size + "/p") is ok


@pytest.mark.parametrize(("size", "ok"), [(2048, True), (2049, False)])
def test_id_4_length_of_an_id(size: int, ok: bool) -> None:  # noqa: FBT001  a table column
    text = "spiffe://td/"
    assert is_accepted(text + "a" * (size - len(text))) is ok


def test_id_4_length_counts_bytes_and_comes_first() -> None:
    with pytest.raises(SpiffeIdError) as refused:
        SpiffeId.parse("\u20ac" * 700)
    assert refused.value.rule == "ID-4"


def test_id_5_comparison_is_of_bytes() -> None:
    assert SpiffeId.parse("spiffe://td/Pay") != SpiffeId.parse("spiffe://td/pay")


@given(trust_domains, paths)
def test_whatever_the_grammar_makes_is_accepted_and_comes_apart_again(trust_domain: str, path: str) -> None:
    spiffe_id = SpiffeId.parse(f"spiffe://{trust_domain}{path}")
    assert spiffe_id.trust_domain == trust_domain
    assert spiffe_id.path == path


@given(st.text(max_size=60) | st.text(TRUST_DOMAIN_ALPHABET + "/%:@?#A\n", max_size=60))
@example("td/a/")
@example("td")
@example("td/\n")
def test_whatever_is_accepted_is_of_the_grammar(rest: str) -> None:
    text = f"spiffe://{rest}"
    if not is_accepted(text):
        return
    trust_domain, *parts = rest.split("/")
    assert trust_domain
    assert set(trust_domain) <= set(TRUST_DOMAIN_ALPHABET)
    assert all(part not in {"", ".", ".."} for part in parts)
    assert set("".join(parts)) <= set(SEGMENT_ALPHABET)


@given(trust_domains, paths, st.characters(exclude_characters=SEGMENT_ALPHABET + "/"), st.data())
def test_one_foreign_character_anywhere_refuses(
    trust_domain: str, path: str, foreign: str, data: st.DataObject
) -> None:
    text = f"spiffe://{trust_domain}{path}"
    position = data.draw(st.integers(0, len(text)))
    assert not is_accepted(text[:position] + foreign + text[position:])
