"""Passages of conversations are encoded once, and the ids are those of the whole text."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers

from tests.agent_kit import user
from tests.matrix.tokenizer_kinds import TOKENIZERS, make_tokenizer
from tests.quick.agent_templates import QWEN3
from torchrl_sglang.agents.conversation import segment_ids
from torchrl_sglang.agents.conversation.continuation import build_prompt
from torchrl_sglang.agents.conversation.kept import Kept
from torchrl_sglang.agents.conversation.messages import read_messages
from torchrl_sglang.agents.conversation.segment_ids import SegmentIds
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.conversation.tree import Tree

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "<think>",
    "</think>",
    "<tool_call>",
    "</s>",
)
PIECES = (
    *(
        "the dog",
        " and the fox",
        "\n",
        "\n\n",
        "  ",
        " ",
        "user\n",
        "é犬👩🏽",
        "<",
        "|im_start|>",
        "<|im_",
        "[/IN",
        "\t",
        "▁",
    ),
    *("2 + 3 = 5. ", '{"a": 1}', "Ünï", "e\u0301", "\u00a0", "<0x41>"),
)


def some_text(rng: random.Random) -> str:
    pieces = [rng.choice(rng.choice([MARKS, PIECES])) for _ in range(rng.randrange(150, 250))]
    return "".join(pieces)


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_ids_of_passages_are_those_of_the_whole_text_for_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = make_tokenizer(kind, QWEN3)
    segments, rng = SegmentIds(tokenizer, most_characters=4000), random.Random(1)
    texts = [some_text(rng) for _ in range(12)]
    for text in [*texts, *rng.sample(texts, 12)]:
        assert list(segments.encode(text)) == whole(tokenizer, text)
        assert sum(map(len, segments._kept._values)) == segments._kept.size <= 4000


def special_with(**how: Any) -> Any:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|greedy|>", special=True, **how)]})
    return tokenizer


@pytest.mark.parametrize("how", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}, {}])
@pytest.mark.parametrize("scheme", ["first", "always", "never", None])
def test_special_tokens_that_take_something_along_change_no_id(how: dict[str, Any], scheme: Any) -> None:
    tokenizer = special_with(**how)
    if scheme is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme=scheme),
                pre_tokenizers.ByteLevel(add_prefix_space=scheme != "never"),
            ]
        )
    segments, rng = SegmentIds(tokenizer), random.Random(2)
    for _ in range(6):
        text = "".join(rng.choice([some_text(rng)[:40], "<|greedy|>", " ", "\n", "a"]) for _ in range(60))
        assert list(segments.encode(text)) == whole(tokenizer, text)


def test_special_tokens_that_count_as_text_for_a_while_are_not_cut_out() -> None:
    tokenizer = special_with()
    segments, text = SegmentIds(tokenizer), some_text(random.Random(3))
    cut_out = segments.encode(text)
    tokenizer.split_special_tokens = True
    assert list(segments.encode(text)) == whole(tokenizer, text)
    tokenizer.split_special_tokens = False
    assert list(segments.encode(text)) == whole(tokenizer, text) == list(cut_out)


def test_agents_with_one_system_message_and_tools_have_it_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = AgentTemplate(make_tokenizer("byte-level BPE", QWEN3))
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": "Runs. " * 40}} for i in range(30)]
    encoded: list[str] = []
    encode = segment_ids.encode_plainly
    monkeypatch.setattr(
        segment_ids, "encode_plainly", lambda tokenizer, text: (encoded.append(text), encode(tokenizer, text))[1]
    )
    for task in range(8):
        renderer = template.renderer([dict(tool) for tool in tools], {})
        messages = [{"role": "user", "content": f"task {task // 2}"}]
        text = renderer.render(messages, add_generation_prompt=True)
        assert renderer.encode(text) == whole(template.tokenizer, text)
    assert len([text for text in encoded if "Runs." in text]) == 1
    assert len([text for text in encoded if "task" in text]) == 4


def test_tools_whose_fields_have_another_order_are_written_in_theirs() -> None:
    template = AgentTemplate(make_tokenizer("byte-level BPE", QWEN3))
    for schema in ({"type": "string", "title": "a"}, {"title": "a", "type": "string"}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        text = template.renderer([tool], {}).render([{"role": "user", "content": "?"}], add_generation_prompt=True)
        assert (text.index('"type": "string"') < text.index('"title"')) == (next(iter(schema)) == "type")


def test_equal_first_prompts_are_made_once_and_others_are_their_own() -> None:
    template = AgentTemplate(make_tokenizer("byte-level BPE", QWEN3))
    talks = [[user("dog")], [{"role": "system", "content": "Be brief."}, user("dog")], [user("dog"), user("cat")]]
    choices = itertools.product(talks, [(), (TOOL,)], [{}, {"enable_thinking": False}, {"enable_thinking": 1}])
    made: dict[str, Any] = {}
    for talk, tools, variables in choices:
        first, again = (
            build_prompt(Tree().match(read_messages(talk)), template, tools=tools, variables=variables)
            for _ in range(2)
        )
        assert first is again
        assert list(first.ids) == whole(template.tokenizer, first.text)
        made[json.dumps([talk, tools, variables])] = first
    assert len(made) == len({id(prompt) for prompt in made.values()}) == 18


def test_a_prompt_that_has_the_date_is_made_anew_each_time() -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + QWEN3
    template = AgentTemplate(make_tokenizer("byte-level BPE", source))
    first, again = (build_prompt(Tree().match(read_messages([user("dog")])), template) for _ in range(2))
    assert first is not again
    assert len(template.prompts) == 0


def test_what_is_kept_of_prompts_is_bounded_and_a_giant_drives_nothing_out() -> None:
    kept: Kept[str, int] = Kept(100)
    for number in range(1000):
        kept.put(f"{number}", number, size=7)
    assert (len(kept), kept.size) == (14, 98)
    kept.put("giant", 0, size=101)
    assert (len(kept), kept.get("giant"), kept.get("999")) == (14, None, 999)
