"""Templates that read the parts of a content alone, as SmolVLM's: no text is lost, whoever renders."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import chat, says, scripted
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat_templates import ChatRenderer

PARTS = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + ':' }}
{%- for part in m.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- elif part.type == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant:' }}{%- endif -%}"""
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A dog"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "And a fox"}]},
]
WRITTEN = (
    "<|im_start|>system:Be brief.<|im_end|><|im_start|>user:A dog<|im_end|><|im_start|>assistant:A cat.<|im_end|>"
    "<|im_start|>user:And a fox<|im_end|><|im_start|>assistant:"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("byte-level BPE", PARTS)


def test_what_is_rendered_is_the_same_for_rollouts_chats_and_agents(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    assert renderer.render(TALK, add_generation_prompt=True) == WRITTEN
    ids = ChatTemplate(tokenizer).encode(read_conversation(TALK))
    assert ids == renderer.encode(WRITTEN)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "ok", "<|im_end|>"))
    chat(sessions.create(), TALK)
    assert list(model.calls[0][0]) == ids


def test_the_ends_of_turns_and_the_answers_are_found(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    renderer = ChatRenderer(tokenizer)
    assert end in renderer.turn_end_ids()
    assert end in ChatTemplate(tokenizer).turn_end_ids()
    text = renderer.render(TALK, add_generation_prompt=False)
    mask = renderer.assistant_mask(TALK, text)
    assert mask is not None
    written = [token for token, is_answer in zip(renderer.encode(text), mask, strict=True) if is_answer]
    assert tokenizer.decode(written) == "A cat."


def test_an_answer_that_a_user_continues_is_continued(tokenizer: Any) -> None:
    talk = [*TALK, {"role": "assistant", "content": "The fox"}]
    ids = ChatTemplate(tokenizer).encode(read_conversation(talk))
    assert tokenizer.decode(ids) == WRITTEN + "The fox"


def test_other_templates_get_texts_as_they_are() -> None:
    texts = "{%- for m in messages -%}{{ m.role + ':' + m.content + ';' }}{%- endfor -%}"
    assert ChatRenderer(make_tokenizer("byte-level BPE", texts)).render(TALK[:2], add_generation_prompt=True) == (
        "system:Be brief.;user:A dog;"
    )
