"""Weight versions as strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang.protocol.version import FOREIGN, WeightVersion, version_number

VERSIONS = st.builds(
    WeightVersion,
    number=st.integers(0, 10**12),
    owner=st.none() | st.from_regex(r"[0-9a-zA-Z_.-]+", fullmatch=True),
    dirty=st.booleans(),
)


@given(VERSIONS)
def test_parsing_the_string_of_a_version_returns_the_version(version: WeightVersion):
    assert WeightVersion.parse(str(version)) == version


@given(st.text())
def test_any_text_can_be_parsed_and_the_number_is_one_in_the_text(text: str):
    number = WeightVersion.parse(text).number
    assert number in (FOREIGN, 0) or str(number) in text


@pytest.mark.parametrize(
    ("text", "number", "owner", "dirty"),
    [
        ("default", 0, None, False),
        ("0", 0, None, False),
        ("12", 12, None, False),
        ("12@a1b2", 12, "a1b2", False),
        ("dirty-13", 13, None, True),
        ("dirty-13@a1b2", 13, "a1b2", True),
    ],
)
def test_the_forms_of_this_package(text: str, number: int, owner: str | None, dirty: bool):
    assert WeightVersion.parse(text) == WeightVersion(number=number, owner=owner, dirty=dirty)


@pytest.mark.parametrize(
    "text", ["", "step-12", "12 ", " 12", "-1", "1.5", "12@", "12@a b", "v12", "DEFAULT", "12\n", "١٢", "9" * 5000]
)
def test_a_string_in_another_form_is_foreign_and_not_dirty(text: str):
    assert WeightVersion.parse(text) == WeightVersion(number=FOREIGN)
    assert version_number(text) == FOREIGN


@pytest.mark.parametrize("text", ["dirty-", "dirty-x", "dirty-13 "])
def test_the_dirty_mark_counts_even_when_the_rest_is_invalid(text: str):
    assert WeightVersion.parse(text).dirty


def test_the_foreign_number_is_below_every_counter():
    assert FOREIGN < version_number("default") == 0 < version_number("1@a")
