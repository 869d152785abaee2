"""The parts of a chat that need no server: tools, settings, templates and text deltas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.response import Response, ToolCall
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.text_deltas import TextDeltas
from torchrl_sglang.chat.tool_calls import find_tool_calls
from torchrl_sglang.chat.tool_schemas import read_tools
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import read_model_json

ADD = ToolCall(name="add", arguments={"a": 1, "b": 2})
BODY = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
CALLS = {
    "hermes": f"<tool_call>\n{BODY}\n</tool_call>",
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}',
    "bare list": f"[{BODY}]",
    "mistral list": f"[TOOL_CALLS] [{BODY}]",
    "mistral args": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}',
    "mistral args, nested": '[TOOL_CALLS]add{"a": 1, "b": 2}',
    "function": '<function=add>{"a": 1, "b": 2}</function>',
    "qwen coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
}


@pytest.mark.parametrize("way", CALLS)
def test_a_tool_call_is_found_however_it_is_written(way: str) -> None:
    assert find_tool_calls(CALLS[way], ["add"]) == ("", (ADD,))


def test_text_around_calls_stays_and_several_calls_keep_their_order() -> None:
    other = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert find_tool_calls(f"Well. {CALLS['hermes']}{other}", []) == ("Well.", (ADD, ToolCall(name="now")))
    nested = '[TOOL_CALLS]f[ARGS]{"x": {"y": 1}}[TOOL_CALLS]g[ARGS]{}'
    assert find_tool_calls(nested, []) == ("", (ToolCall(name="f", arguments={"x": {"y": 1}}), ToolCall(name="g")))
    for text in ("No call.", "<tool_call>{broken</tool_call>", '{"name": "eve", "arguments": {}}', '{"a": 1}', "5", ""):
        assert find_tool_calls(text, ["add"]) == (text, ())


def test_tools_are_schemas_functions_or_json() -> None:
    def add(a: int) -> int:
        """Adds one.

        Args:
            a: the number.
        """
        return a + 1

    schema = read_tools([add])[0]
    assert schema["function"]["name"] == "add"
    assert read_tools(json.dumps([schema])) == [schema] == read_tools([schema["function"]])
    for bad, words in (("{", "not the JSON"), ([5], "with a 'name'"), ({"name": "x"}, "must be a list")):
        with pytest.raises(ConfigError, match=words):
            read_tools(bad)
    with pytest.raises(ConfigError, match="can't be described"):
        read_tools([lambda a: a])


def test_a_response_is_the_next_message() -> None:
    response = Response(
        text="x", content="x", tool_calls=(ADD,), prompt_length=1, response_length=1, finish_reason="stop"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert response.message == {"role": "assistant", "content": "x", "tool_calls": [call]}
    assert read_conversation([{"role": "user", "content": "?"}, response.message]).messages[1] == response.message


def test_settings_of_a_call_replace_the_chats_and_those_the_checkpoints() -> None:
    defaults = GenerationDefaults(
        given={"max_tokens": 50, "temperature": 0.5, "stop": "a", "min_new_tokens": 10},
        checkpoint={"temperature": 0.9, "top_k": 20, "eos_token_id": 7, "do_sample": True},
        stop_ids=(2,),
    )

    def sampling(**call: object):
        return defaults.sampling(call, prompt_length=10, context_length=100)

    params = sampling()
    assert (params.temperature, params.top_k, params.stop, params.max_new_tokens) == (0.5, 20, ("a",), 50)
    assert params.stop_token_ids == (2,)
    params = sampling(max_new_tokens=12, do_sample=False, stop=["b"], num_return_sequences=3, stop_token_ids=[5, 2])
    assert (params.temperature, params.stop, params.max_new_tokens, params.n) == (0.0, ("b",), 12, 3)
    assert params.stop_token_ids == (2, 5)
    assert sampling(temperature=None).temperature == 0.5
    assert sampling(max_length=30).max_new_tokens == 20
    assert sampling(max_length=30, max_new_tokens=60).max_new_tokens == 60
    assert sampling(ignore_eos=True).stop_token_ids == ()
    with pytest.raises(ConfigError, match="min_new_tokens"):
        sampling(max_new_tokens=5)
    with pytest.raises(ConfigError, match="leaves no room"):
        sampling(max_length=10)
    free = GenerationDefaults(given={}, checkpoint={}, stop_ids=())
    assert free.sampling({}, prompt_length=10, context_length=100).max_new_tokens == 90
    assert free.sampling({}, prompt_length=10, context_length=None).max_new_tokens == 1024


def test_the_tokens_that_end_a_turn_are_read_from_the_template(tiny_llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ChatTemplate(tokenizer).turn_end_ids() == (end,)
    tokenizer.eos_token = "<|endoftext|>"  # as in many real checkpoints, where EOS is not what ends a turn
    assert ChatTemplate(tokenizer).turn_end_ids() == (tokenizer.eos_token_id, end)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate(tokenizer)


def test_media_without_a_placeholder_in_the_template_are_refused(tiny_llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    talk = read_conversation("hi", images=["http://host/a.png"])
    with pytest.raises(ConfigError, match="no place for images"):
        ChatTemplate(tokenizer).encode(talk)  # this one prints the list of parts
    tokenizer.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="no place for images"):
        ChatTemplate(tokenizer).encode(talk)  # and this one leaves it out
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        ChatTemplate(tokenizer).encode(read_conversation("hi"))


def test_template_variables_and_an_open_assistant_message_reach_the_prompt(tiny_llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    template = ChatTemplate(tokenizer)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So"}]
    text = tokenizer.decode(template.encode(read_conversation(talk)))
    assert text.endswith("<|im_start|>assistant\nSo")
    tokenizer.chat_template = "{{ mood }}{{ tools | length if tools else 0 }}"
    ids = template.encode(read_conversation("a"), read_tools([{"name": "f"}]), {"mood": "glad"})
    assert tokenizer.decode(ids) == "glad1"


def test_a_generation_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    assert read_model_json(str(tmp_path), "generation_config.json") == {}
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.8}')
    assert read_model_json(str(tmp_path), "generation_config.json") == {"top_p": 0.8}
    (tmp_path / "generation_config.json").write_text("{")
    assert read_model_json(str(tmp_path), "generation_config.json") == {}
    assert read_model_json("/a/path/on/the/server", "generation_config.json") == {}
    assert read_model_json("nobody/no-such-model", "generation_config.json") == {}


@given(st.text(alphabet="abS ", max_size=30), st.lists(st.text(alphabet="abS", min_size=1, max_size=4), max_size=3))
def test_pieces_joined_are_the_final_text_without_a_stop_string(text: str, stops: list[str]) -> None:
    """The server's side: text grows by a character, ends when a stop string is complete, and is cut before it."""
    deltas, shown = TextDeltas(stops), ""
    for end in range(1, len(text) + 1):
        so_far = text[:end]
        hits = [so_far.index(stop) for stop in stops if stop in so_far]
        if hits:
            text = so_far[: min(hits)]
            break
        shown += deltas.push(so_far)
        assert text.startswith(shown)
    shown += deltas.finish(text)
    assert shown == text


def test_an_unfinished_character_is_held_back() -> None:
    deltas = TextDeltas()
    assert [deltas.push("a\ufffd"), deltas.push("aé"), deltas.finish("aé!\ufffd")] == ["a", "é", "!\ufffd"]
