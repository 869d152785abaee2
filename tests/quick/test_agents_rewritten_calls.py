"""A call that a client sends back with its defaults filled in is the same call; with other arguments it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent_kit import chat, check_recorded, says, scripted, user
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.scripted_gateway import calls

EDIT = {
    "type": "function",
    "function": {
        "name": "Edit",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "replace_all": {"type": "boolean", "default": False},
                "limit": {"type": "integer"},
                "edits": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"count": {"type": "number", "default": 1}}},
                },
            },
        },
    },
}
SAMPLED = {"path": "a.py", "edits": [{"old": "x"}]}
CASES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    (SAMPLED, {**SAMPLED, "replace_all": False}, 1),  # what Claude Code does
    (SAMPLED, {**SAMPLED, "limit": None}, 1),
    (SAMPLED, {**SAMPLED, "edits": [{"old": "x", "count": 1.0}]}, 1),
    ({**SAMPLED, "replace_all": False}, SAMPLED, 1),  # defaults left out
    (SAMPLED, {**SAMPLED, "replace_all": True}, 2),
    (SAMPLED, {**SAMPLED, "replace_all": 0}, 2),
    (SAMPLED, {**SAMPLED, "limit": 5}, 2),
    (SAMPLED, {**SAMPLED, "other": False}, 2),
    (SAMPLED, {**SAMPLED, "edits": [{"old": "x"}, {"old": "y"}]}, 2),
    (SAMPLED, {**SAMPLED, "path": "b.py", "replace_all": False}, 2),
    ({**SAMPLED, "replace_all": True}, SAMPLED, 2),
]


@pytest.mark.parametrize(("sampled", "sent_back", "sequences"), CASES)
def test_a_call_with_its_defaults_is_the_call_that_was_sampled(
    sampled: dict[str, Any], sent_back: dict[str, Any], sequences: int
) -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["thinking"].source)
    answers = [says(tokenizer, text, "<|im_end|>") for text in (calls("Edit", **sampled), "Done.")]
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    message = json.loads(json.dumps(chat(session, [user("q")], tools=(EDIT,)).choices[0].message))
    message["tool_calls"][0]["function"]["arguments"] = json.dumps(sent_back)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "ok"}
    chat(session, [user("q"), message, result], tools=(EDIT,))
    recorded = session.trajectories()
    check_recorded(recorded, model.calls)
    assert len(recorded) == sequences


@pytest.mark.parametrize(
    ("on_rewrite", "keeps_id", "sequences"), [("keep", True, 1), ("keep", False, 2), ("branch", True, 2)]
)
def test_a_call_that_the_agent_has_rewritten_keeps_its_tokens_where_that_is_asked_for(
    on_rewrite: str, keeps_id: bool, sequences: int
) -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["thinking"].source)
    answers = [says(tokenizer, text, "<|im_end|>") for text in (calls("Edit", path=" a.py "), "Done.")]
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0), on_rewrite=on_rewrite)
    session = sessions.create()
    message = json.loads(json.dumps(chat(session, [user("q")], tools=(EDIT,)).choices[0].message))
    message["tool_calls"][0]["function"]["arguments"] = json.dumps({"path": "a.py"})  # as Claude Code trims them
    if not keeps_id:
        message["tool_calls"][0]["id"] = "other"
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "ok"}
    chat(session, [user("q"), message, result], tools=(EDIT,))
    recorded = session.trajectories()
    check_recorded(recorded, model.calls)
    assert len(recorded) == sequences
