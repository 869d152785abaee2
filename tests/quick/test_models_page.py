"""The page on models shows the matrix's own table, and names every class of which a setting is refused."""

from __future__ import annotations

import re

from tests.matrix.combinations import CASES
from tests.matrix.families import FAMILIES
from tests.matrix.models_page import PAGE, page_with_tables
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import TOKENIZERS
from torchrl_sglang.protocol import model_limits


def test_the_tables_are_those_of_the_matrix() -> None:
    page = PAGE.read_text()
    assert page == page_with_tables(page), "run: python -m tests.matrix.models_page"
    assert all(f"| {name} | `{family.architecture}` |" in page for name, family in FAMILIES.items())


def test_every_class_that_is_refused_is_on_the_page() -> None:
    kinds = [value for name, value in vars(model_limits).items() if name.startswith(("_NO_", "_ONLY_"))]
    assert len(kinds) == 6
    named = {word for kind in kinds for word in re.findall(r"\w+ForCausalLM", repr(kind))}
    page = PAGE.read_text().partition("## What is refused")[2]
    assert {name for name in named if f"`{name}`" not in page} == set()


def test_every_tokenizer_and_template_is_served_by_some_family() -> None:
    served = [case for name, case in CASES.items() if not FAMILIES[name].refused]
    assert {case.tokenizer for case in served} == set(TOKENIZERS)
    assert {case.template for case in served} == set(TEMPLATES)
    assert any(case.extra_rows > 0 for case in served)
    assert any(case.extra_rows < 0 for case in served)
