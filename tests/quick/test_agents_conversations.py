"""Whatever an agent does with its conversations, a session records exactly what was sent and sampled."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent_kit import Sampled, chat, check_parents, check_recorded, round_trip, run, says, scripted, user
from tests.matrix.combinations import TOOLS, pairs
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.types import TextRequest, Turn
from torchrl_sglang.errors import ConfigError

# Qwen3's manner: thinking is a field of the message, or in the content, and is written after the last question only.
QWEN3 = """\
{%- if tools -%}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' -%}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' -%}
{%- set content = m.content or '' -%}{%- set thinking = m.reasoning_content or '' -%}
{%- if not thinking and '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thinking) -%}<think>
{{ thinking.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}
{%- else -%}{{ content }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if (loop.first and content) or not loop.first -%}{{ '\\n' }}{%- endif -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}<|im_end|>
{% elif m.role == 'tool' -%}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}<think>

</think>

{% endif -%}{%- endif -%}"""

CALL = '<tool_call>\n{"arguments" : {"b":3 , "a": 2.0}, "name": "add"}\n</tool_call>'
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


class Agent:
    """Does at random what agents do: asks, answers calls, edits, branches, samples, retries, forgets."""

    def __init__(self, session: Any, rng: random.Random, tools: list[Any]) -> None:
        self.session, self.rng, self.tools = session, rng, tools
        self.messages: list[dict[str, Any]] = [user("dog")]
        self.kept: list[list[dict[str, Any]]] = []

    def act(self, action: str) -> None:
        rng = self.rng
        if action == "edit" and len(self.messages) > 1:
            at = rng.randrange(len(self.messages))
            self.messages = [*self.messages[:at], {**self.messages[at], "content": f"edited {rng.random()}"}]
            if self.messages[-1]["role"] != "user":
                self.messages.append(user("go on"))
        elif action == "back" and self.kept:
            self.messages = [*rng.choice(self.kept)]
        elif action == "compact":
            self.messages = [user(f"summary of {len(self.messages)} messages")]
        elif action == "sub-agent":
            self.ask([user("a sub-task"), {"role": "assistant", "content": "An example."}, user(f"do {rng.random()}")])
        self.kept.append([*self.messages])
        turn = self.ask(self.messages, retry=action == "retry", n=2 if action == "choices" else 1)
        chosen = dict(rng.choice(turn.choices).message)
        self.messages = [*self.messages, chosen]
        for call in chosen.get("tool_calls") or ():
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": "5"})
        if not chosen.get("tool_calls") or rng.random() < 0.3:
            self.messages.append(user(rng.choice(["and the dog?", "why?", ""])))

    def ask(self, messages: list[dict[str, Any]], *, retry: bool = False, n: int = 1) -> Turn:
        sent = [round_trip(message, self.rng) for message in messages]
        reports: list[Any] = []
        request = {"tools": tuple(self.tools), "sampling": {"n": n}}
        turn = chat(self.session, sent, reports.append if self.rng.random() < 0.5 else None, **request)
        for report in reports:
            choice = turn.choices[report.index]
            assert (choice.message["content"] or "").startswith(report.content)
            assert (choice.message.get("reasoning_content") or "").startswith(report.reasoning_content)
        if retry:
            leaves = len(self.session.trajectories())
            again = chat(self.session, sent, is_retry=True, **request)
            assert again.is_repeated
            assert again.choices == turn.choices
            assert len(self.session.trajectories()) == leaves
        return turn


ACTIONS = st.lists(
    st.sampled_from(["ask", "ask", "ask", "edit", "back", "again", "choices", "retry", "compact", "sub-agent"]),
    min_size=1,
    max_size=6,
)
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
@settings(max_examples=20, deadline=None)
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
        except ConfigError as error:  # some templates refuse some conversations
            assert "refuses" in str(error)
            break
    trajectories = session.trajectories()
    check_recorded(trajectories, model.calls)
    check_parents(trajectories, session.info().sampled_tokens)
    assert session.info().trajectories == len(trajectories)
