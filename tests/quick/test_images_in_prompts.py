"""A conversation with an image is refused by the policy: it would be answered as if the image were not there."""

from __future__ import annotations

from typing import Any

import pytest
from tensordict import TensorDict
from torchrl.data.llm import History

from torchrl_sglang import ConfigError, SGLangWrapper
from torchrl_sglang.testing import EchoPool

TEXT = {"type": "text", "text": "hi"}


def td(*parts: dict[str, str]) -> TensorDict:
    chats = [[{"role": "user", "content": "plain"}], [{"role": "user", "content": list(parts)}]]
    return TensorDict({("history", "prompt"): History.from_chats(chats)}, batch_size=[2])


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio"])
def test_an_image_in_a_history_is_refused_by_its_place(tokenizer: Any, kind: str) -> None:
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 1})
    with pytest.raises(ConfigError, match=rf"batch index 1.*message 0 holds a part of type '{kind}'.*SGLangChat"):
        policy(td({"type": kind, "url": "cat.png"}, TEXT))
    masked = policy.get_new_version(on_error="mask")(td({"type": kind, "url": "cat.png"}, TEXT))
    assert [bool(error) for error in masked["generation"].error] == [False, True]


def test_parts_of_text_are_taken(tokenizer: Any) -> None:
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 1})
    assert len(policy(td(TEXT))["text", "response"]) == 2
