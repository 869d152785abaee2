"""A long conversation does not keep other agents waiting while it is tokenized."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.fake_sglang import FakeServer
from torchrl_sglang import AgentGateway

LONG = "word " * 30_000


class Waiting:
    """A tokenizer that takes as long for a long text as the test wants."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if len(text) >= len(LONG) or (isinstance(text, list) and len(text[0]) >= len(LONG)):
            self.has_begun.set()
            assert self.may_end.wait(60)
        return self._tokenizer(text, *args, **kwargs)


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_others_are_answered_while_a_long_text_is_tokenized(fake: FakeServer, tiny_llama: Path, path: str) -> None:
    tokenizer = Waiting(AutoTokenizer.from_pretrained(tiny_llama))
    answers: list[httpx.Response] = []
    with AgentGateway(fake.url, tokenizer=tokenizer) as gateway:
        session = gateway.create_session()
        headers = {"Authorization": f"Bearer {session.api_key}"}

        def ask(text: str) -> httpx.Response:
            asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
            body = {"model": "m", "max_tokens": 4, **asked}
            return httpx.post(f"{session.base_url}{path}", json=body, headers=headers, timeout=30, verify=False)

        long = threading.Thread(target=lambda: answers.append(ask(LONG)))
        long.start()
        try:
            assert tokenizer.has_begun.wait(30)
            assert ask("Hi").status_code == 200
            assert not answers
        finally:
            tokenizer.may_end.set()
            long.join()
    (answer,) = answers
    assert answer.json()["error"]["code"] == "context_length_exceeded"
