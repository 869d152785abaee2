"""Which tokenizer and chat template each family is tested with: every family once, each kind several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from tests.matrix.families import FAMILIES
from tests.matrix.templates import TEMPLATES, Template
from tests.matrix.tokenizer_kinds import TOKENIZERS

__all__ = ["CASES", "Case", "conversations", "pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the matrix.

    Attributes:
        family: of :data:`FAMILIES`.
        tokenizer: of :data:`TOKENIZERS`.
        template: of :data:`TEMPLATES`.
        extra_rows: rows of the embedding beyond the tokenizer's ids; negative if the tokenizer has more ids than rows.
        in_make_test: also part of ``make test``, not only of ``make test-full``.
    """

    family: str
    tokenizer: str
    template: str
    extra_rows: int = 0
    in_make_test: bool = False


_ROWS = (
    ("Llama", "byte-level BPE that adds BOS", "headers", 0),
    ("Mistral", "SentencePiece BPE with prefix space", "alternating", 0),
    ("Qwen2", "byte-level BPE", "ChatML", 37),
    ("Qwen3", "byte-level BPE", "thinking", 50),
    ("Qwen3-MoE", "byte-level BPE", "ChatML with generation tags", 0),
    ("Gemma", "SentencePiece Unigram", "model role", 6),
    ("Gemma 2", "SentencePiece BPE with prefix space", "model role", 0),
    ("Gemma 3", "SentencePiece Unigram", "model role", 70),
    ("GPT-2", "byte-level BPE with one special token", "words", 0),
    ("Phi", "byte-level BPE with one special token", "ChatML", 100),
    ("Phi-3", "SentencePiece BPE with prefix space", "headers", -1),
    ("OLMo", "WordPiece", "words", 1),
    ("OLMo 2", "WordPiece", "ChatML with generation tags", 0),
    ("Mixtral", "SentencePiece BPE with prefix space", "thinking", 0),
)
_IN_MAKE_TEST = ("Mistral",)

CASES: dict[str, Case] = {
    family: Case(
        family=family,
        tokenizer=tokenizer,
        template=template,
        extra_rows=extra_rows,
        in_make_test=family in _IN_MAKE_TEST,
    )
    for family, tokenizer, template, extra_rows in _ROWS
}
assert set(CASES) == set(FAMILIES)


def pairs() -> Iterator[tuple[str, str]]:
    """Every tokenizer with every template; these need no server."""
    return product(TOKENIZERS, TEMPLATES)


QUESTION = {"role": "user", "content": "What is 2 + 3?  Answer, please!\nünï 🙂 "}
ANSWER = {"role": "assistant", "content": "It is 5."}
NEXT = {"role": "user", "content": "and the dog?"}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
THOUGHT = {"role": "assistant", "content": "<think>\n2 and 3\n</think>\n\nIt is 5."}
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "call00001"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]


def conversations(template: Template) -> dict[str, list[dict[str, Any]]]:
    """Conversations that the template accepts, each ending with a message that an answer follows."""
    found = {
        "one question": [QUESTION],
        "a second question": [QUESTION, ANSWER, NEXT],
        "a third question after thinking": [QUESTION, THOUGHT, NEXT, ANSWER, QUESTION],
    }
    if template.has_system:
        found["a system message"] = [SYSTEM, QUESTION, ANSWER, NEXT]
    if template.has_tools:
        found["a tool's result"] = [QUESTION, CALLING, RESULT]
    return found
