"""Package, documentation and tests use the field's terms; none of the project's earlier private words remains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("torchrl_sglang", "tests", "docs", "examples", "tutorials", "benchmarks")
SUFFIXES = (".py", ".md", ".rst", ".yaml")

# The standard term -> words that earlier versions used for it.
INSTEAD_OF = {
    "transport": ("road", "roads"),
    "rendezvous": ("meeting", "knock", "knocks", "knocking"),
    "liveness check": ("roll call", "RollCall"),
    "dispatch, retry, balance": ("run_round", "RoundResult", "LoadBook"),
    "server state, quarantine, restore": ("DeathBook", "death book", "note_death"),
    "offloaded": ("lent", "refuse_while_lent"),
    "verify": ("proof", "prove", "proves", "proved", "proven"),
    "kill, reap, crash report": ("make_way", "bury", "obituary"),
    "generation paused": ("standstill", "standstill_s"),
    "router client": ("RouterFront",),
    "resolve_adapter": ("speaking",),
    "lazy tensor": ("LiveTensor", "LiveSource"),
    "HTTP front end, info endpoints, life cycle": ("rim", "Mortal"),
    "text columns": ("_spoken",),
    "another process": ("bystander", "bystanders"),
}
WORDS = re.compile(
    rf"(?<![A-Za-z])({'|'.join(word for words in INSTEAD_OF.values() for word in words)})(?![A-Za-z])", re.IGNORECASE
)


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [path for path in [*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md"] if path != Path(__file__)]


def test_no_private_word_remains() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files()}
    assert len(texts) > 200, "the check looks in the wrong place"
    found = [
        f"{path}:{number}: {match.group()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for match in WORDS.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["over this road", "the servers' Proof", "pool.note_death(url, error)"])
def test_a_private_word_is_found(line: str) -> None:
    assert WORDS.search(line)
