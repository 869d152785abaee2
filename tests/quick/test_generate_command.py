"""``torchrl-sglang generate``: several responses to a prompt can be told apart."""

from __future__ import annotations

import json

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang.cli import main


def generate(capsys: pytest.CaptureFixture[str], fake: FakeServer, *words: str) -> list[str]:
    assert main(["generate", *words, "--url", fake.url, "--max-new-tokens", "2", "--temperature", "0"]) == 0
    return capsys.readouterr().out.splitlines()


def test_several_responses_have_a_heading_each(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    lines = generate(capsys, fake, "Hello", "-n", "2")
    assert [line for line in lines if line.startswith("---")] == [
        "--- response 1 of 2 ---",
        "--- response 2 of 2 ---",
    ]
    lines = generate(capsys, fake, "Hello", "World", "-n", "2")
    assert [line for line in lines if line.startswith("---")] == [
        f"--- prompt {prompt} of 2, response {response} of 2 ---" for prompt in (1, 2) for response in (1, 2)
    ]


def test_one_response_and_json_have_none(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(line.startswith("---") for line in generate(capsys, fake, "Hello", "World"))
    lines = generate(capsys, fake, "Hello", "-n", "2", "--json")
    assert [json.loads(line)["prompt"] for line in lines] == ["Hello", "Hello"]
