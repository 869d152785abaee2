"""Whatever an agent does with its conversations, a session records exactly what was sent and sampled."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent_kit import ACTIONS, Agent, Sampled, check_parents, check_recorded, says, scripted
from tests.matrix.combinations import TOOLS
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import CALL, QWEN3
from torchrl_sglang.errors import ConfigError

TEXTS = ["It is 5.", "Hello world!\n\nThe dog. ", " leading", "ünï 🙂", "[1] {2}", "no"]
THOUGHTS = ["<think>\n2 and 3\n</think>\n\nIt is 5.", "<think>Hm</think>Yes", "<think>\nnever ends"]
CALLS = [CALL, f"Let me see.\n{CALL}\n{CALL}", f"<think>\nadd them\n</think>\n\n{CALL}"]


def random_answer(tokenizer: Any, rng: random.Random, *, end: str, tools: bool) -> Sampled:
    kind = rng.random()
    ending = None if rng.random() < 0.15 else end
    if kind < 0.25:  # tokens that no tokenizer would make of their text
        ids = tuple(rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 9)))
        return (
            Sampled(ids, "length")
            if ending is None
            else Sampled((*ids, last_id(tokenizer, end)), matched=last_id(tokenizer, end))
        )
    if kind < 0.3:
        return Sampled((last_id(tokenizer, end),), matched=last_id(tokenizer, end))
    texts = TEXTS if kind < 0.55 else (THOUGHTS if kind < 0.75 or not tools else CALLS)
    return says(tokenizer, rng.choice(texts), ending)


def last_id(tokenizer: Any, end: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(end))


TEMPLATES_HERE = [
    pytest.param("byte-level BPE", QWEN3, "<|im_end|>", True, id="Qwen3"),
    pytest.param("byte-level BPE", TEMPLATES["thinking"].source, "<|im_end|>", True, id="thinking in the content"),
    pytest.param("byte-level BPE that adds BOS", TEMPLATES["headers"].source, "<|eot_id|>", True, id="Llama 3"),
    pytest.param("SentencePiece BPE with prefix space", TEMPLATES["alternating"].source, "</s>", True, id="Mistral"),
    pytest.param("SentencePiece Unigram", TEMPLATES["model role"].source, "<end_of_turn>", True, id="Gemma"),
    pytest.param("byte-level BPE", TEMPLATES["ChatML"].source, "<|im_end|>", True, id="ChatML"),
    pytest.param("WordPiece", TEMPLATES["words"].source, "[SEP]", False, id="words"),
]


@pytest.mark.parametrize(("kind", "template", "end", "tools"), TEMPLATES_HERE)
@pytest.mark.parametrize("on_rewrite", ["branch", "keep"])
@settings(max_examples=15, deadline=None)
@given(actions=ACTIONS, seed=st.integers(0, 2**32))
def test_a_session_records_what_was_sent_and_sampled(
    kind: str, template: str, end: str, tools: bool, on_rewrite: str, actions: list[str], seed: int
) -> None:
    rng = random.Random(seed)
    tokenizer = make_tokenizer(kind, template)
    sessions, model = scripted(
        tokenizer, lambda _: random_answer(tokenizer, rng, end=end, tools=tools), on_rewrite=on_rewrite
    )
    session = sessions.create()
    agent = Agent(session, rng, TOOLS if tools and rng.random() < 0.7 else [])
    for action in actions:
        try:
            agent.act(action)
        except ConfigError:  # some templates refuse some conversations
            break
    trajectories = session.trajectories()
    check_recorded(trajectories, model.calls)
    check_parents(trajectories, session.info().sampled_tokens)
    assert session.info().trajectories == len(trajectories)
