"""Messages in all usual forms, and messages that are refused."""

from __future__ import annotations

import pytest

from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.errors import ConfigError

A, B, C = "http://host/a.png", "http://host/b.png", "http://host/c.png"


def test_text_stays_text() -> None:
    assert read_conversation("hi").messages == [{"role": "user", "content": "hi"}]
    parts = [{"type": "text", "text": "h"}, "i"]
    talk = read_conversation([{"role": "user", "content": parts}], system="be kind")
    assert talk.messages == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert not talk.media
    assert read_conversation("a <image> tag").messages[0]["content"] == "a <image> tag", "no images: the tag is text"


def test_media_are_found_in_the_order_of_their_mention() -> None:
    talk = read_conversation(
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": A}}, {"type": "text", "text": "1"}],
            },
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "<image>2<video>"},
            {"role": "user", "content": [{"type": "image", "image": C}]},
        ],
        images=[B],
        videos=["http://host/v.mp4"],
    )
    assert talk.media.images == (A, B, C)
    assert talk.media.videos == ("http://host/v.mp4",)
    kinds = [
        m["content"] if isinstance(m["content"], str) else [p["type"] for p in m["content"]] for m in talk.messages
    ]
    assert kinds == [["image", "text"], "ok", ["image", "text", "video"], ["image"]]
    assert all("item" not in part for m in talk.messages if isinstance(m["content"], list) for part in m["content"])
    assert [m["content"] for m in talk.without("image")][-1] == []


def test_unmentioned_media_come_before_the_last_user_message() -> None:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    talk = read_conversation(history, images=[A, B], audios=["http://host/s.wav"])
    assert talk.messages[0]["content"] == "a"
    assert [part["type"] for part in talk.messages[2]["content"]] == ["image", "image", "audio", "text"]
    assert history[2]["content"] == "c", "the caller's messages are left alone"


def test_openai_sounds_and_tool_calls_are_read() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    assert read_conversation([{"role": "user", "content": [sound]}]).media.audios == ("data:audio/wav;base64,AAAA",)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = read_conversation(
        [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    )
    assert talk.messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert talk.messages[0]["content"] == ""


@pytest.mark.parametrize(
    ("messages", "more", "words"),
    [
        ([], {}, "messages is empty"),
        (["hi"], {}, "message 0 must be a mapping"),
        ([{"content": "x"}], {}, "message 0 must be a mapping"),
        ([{"role": "user", "content": 5}], {}, "content of type int"),
        ([{"role": "user", "content": [{"type": "smell"}]}], {}, "known types are"),
        ([{"role": "system", "content": "a"}], {"system": "b"}, "given twice"),
        ("hi", {"images": A}, "must be a list"),
        ("<image><image>", {"images": [A]}, r"mention 2 image\(s\)"),
        ("<image>", {"images": [A, B]}, r"mention 1 image\(s\)"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, r"mention 1 video\(s\)"),
        ([{"role": "assistant", "content": "x"}], {"images": [A]}, "no user message"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], {}, "not JSON"),
    ],
)
def test_invalid_messages_are_refused(messages: object, more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_conversation(messages, **more)
