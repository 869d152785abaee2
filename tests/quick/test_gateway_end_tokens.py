"""A stop string that is part of the end token's name does not become part of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from torchrl_sglang.agents.conversation.answers import decode_answer
from torchrl_sglang.agents.conversation.progress import ProgressText
from torchrl_sglang.agents.conversation.template import AgentTemplate


@pytest.mark.parametrize("matched", ["i", "im_end", "<|im_end|>", 2, None])
def test_the_end_token_is_no_text_whatever_the_server_says_it_matched(
    tiny_llama: Path, matched: int | str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    template = AgentTemplate(tokenizer)
    ids = [*tokenizer("No.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert decode_answer(ids, finish_reason="stop", matched=matched, template=template).text == "No."


def test_a_special_token_in_the_middle_is_no_text_either(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = [*tokenizer("No.", add_special_tokens=False)["input_ids"], tokenizer.pad_token_id]
    assert decode_answer(ids, finish_reason="stop", matched="f", template=AgentTemplate(tokenizer)).text == "No."


@pytest.mark.parametrize("stop", ["i", "ital", "capital", "a cap"])
def test_a_stream_never_shows_what_a_stop_string_cuts_off(tiny_llama: Path, stop: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("We are a capital team", add_special_tokens=False)["input_ids"]
    template = AgentTemplate(tokenizer)
    end = next(n for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
    whole = decode_answer(ids[:end], finish_reason="stop", matched=stop, template=template).text
    progress, content = ProgressText(template, stops=[stop]), ""
    for count in range(1, end + 1):
        content += progress.push(ids[:count]).content
        assert whole.startswith(content)


def test_a_stop_string_in_the_text_is_cut_off(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("No. END", add_special_tokens=False)["input_ids"]
    written = decode_answer(ids, finish_reason="stop", matched="END", template=AgentTemplate(tokenizer))
    assert (written.text, written.beyond) == ("No. ", "END")
