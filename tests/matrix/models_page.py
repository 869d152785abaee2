"""The tables of ``docs/models.md``, made from the matrix.

To write them again: ``python -m tests.matrix.models_page``.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.matrix.combinations import CASES, Case
from tests.matrix.families import FAMILIES
from tests.matrix.templates import TEMPLATES

__all__ = ["PAGE", "page_with_tables", "tables", "versions"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
_PINS = ("torchrl_sglang/server/cpu_requirements.txt", "requirements.txt")
_COLUMNS = (
    *("Family", "Class", "Tokens and log-probs", "Scoring", "Conversations", "Sync", "LoRA adapter"),
    *("Tokenizer; template", "Settings covered"),
)
_START, _END = "<!-- {}: made by tests/matrix/models_page.py -->\n", "<!-- end of {} -->"


def versions() -> str:
    """The versions that the tests run with, from the pins."""
    pins = "\n".join((ROOT / name).read_text() for name in _PINS)
    found = {}
    for package in ("sglang", "transformers", "torch", "peft", "tokenizers"):
        match = re.search(rf"^{package}==(\S+)", pins, re.MULTILINE)
        assert match is not None, f"{package} has no pin"
        found[package] = match[1]
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _row(case: Case) -> str:
    family, template = FAMILIES[case.family], TEMPLATES[case.template]
    if family.refused:
        results = [f"refused: {family.refused}", *["-"] * 5]
    else:
        agree = "yes" if family.atol <= 1e-4 else f"within {family.atol:g}"
        results = [
            agree,
            agree,
            "chat and tools" if template.has_tools else "chat",
            "broadcast, disk",
            "yes" if family.lora_targets else "not run",
            f"{case.tokenizer}; {case.template}",
        ]
    return " | ".join(["", case.family, f"`{family.architecture}`", *results, family.about, ""]).strip()


def tables() -> dict[str, str]:
    """Name of each table to its lines."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS), *map(_row, CASES.values())]
    return {"versions": f"Versions: {versions()}.", "families": "\n".join(lines)}


def page_with_tables(page: str) -> str:
    """The page with its tables replaced by the current ones."""
    for name, content in tables().items():
        before, start, rest = page.partition(_START.format(name))
        _, end, after = rest.partition(_END.format(name))
        assert end, f"the page needs a place for {name}"
        page = f"{before}{start}{content}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
