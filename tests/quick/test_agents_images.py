"""Images in agents' conversations: what is sent has a placeholder each, what is recorded is what the server saw."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.agent_kit import ScriptedGenerator, chat, check_parents, run, says, scripted, user
from tests.tokenizers_made import make_tokenizer
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.errors import ConfigError, ContextLengthError, RequestRejectedError

pillow = pytest.importorskip("PIL.Image")

# Writes parts, as templates of vision models do; the second one knows text alone.
SEES = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}\
{%- for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PRINTS = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def picture(color: str) -> str:
    file = io.BytesIO()
    pillow.new("RGB", (4, 4), color).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


RED, BLUE = picture("red"), picture("blue")


def shows(*items: str) -> dict[str, Any]:
    """A user's message: data URLs are images, all else is text."""
    parts = [
        {"type": "image_url", "image_url": {"url": item}}
        if item.startswith(("data:", "http"))
        else {"type": "text", "text": item}
        for item in items
    ]
    return {"role": "user", "content": parts}


def expand(placeholder: int, counts: dict[str, int]) -> Callable[[list[int], PromptImages], list[int]]:
    """As SGLang does: every placeholder becomes as many as its image takes."""

    def expanded(ids: list[int], images: PromptImages) -> list[int]:
        waiting = iter(images.urls)
        return [i for token in ids for i in [token] * (counts[next(waiting)] if token == placeholder else 1)]

    return expanded


@pytest.fixture
def sees() -> Any:
    more = (tokenizers.AddedToken("<image>", special=True),)
    return make_tokenizer("byte-level", chat_template=SEES, more_tokens=more)


@pytest.fixture
def seeing(sees: Any, tmp_path: Path) -> tuple[Sessions, ScriptedGenerator, int]:
    placeholder = sees.convert_tokens_to_ids("<image>")
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": placeholder, "model_type": "any"}))
    sessions, model = scripted(sees, lambda _: says(sees, "A dog.", "<|im_end|>"), model_path=str(tmp_path))
    model.expand = expand(placeholder, {RED: 4, BLUE: 2, "http://host/a.png": 3})
    return sessions, model, placeholder


def sent(model: ScriptedGenerator) -> list[int]:
    return list(model.calls[-1][0])


def test_a_conversation_about_images_is_one_sequence_with_all_their_tokens(seeing: Any) -> None:
    sessions, model, placeholder = seeing
    session: Session = sessions.create()
    talk: list[Any] = [shows("Is it ", RED, " or ", BLUE, "?")]
    turn = chat(session, talk, sampling={"max_new_tokens": 8})
    assert sent(model).count(placeholder) == 2
    first = session.trajectories()[0]
    assert [first.token_ids.count(placeholder), turn.prompt_tokens] == [6, len(sent(model)) + 4]
    assert first.images == (RED, BLUE)
    assert first.messages[0] == talk[0]

    # the server's answer comes back, and another image
    talk += [turn.choices[0].message, shows("And ", "http://host/a.png", "?")]
    turn = chat(session, talk, sampling={"max_new_tokens": 8})
    assert sent(model).count(placeholder) == 3
    talk += [turn.choices[0].message, user("Sure?")]
    chat(session, talk, sampling={"max_new_tokens": 8})
    (leaf,) = session.trajectories()
    assert leaf.images == (RED, BLUE, "http://host/a.png")
    assert leaf.token_ids[: len(first.token_ids)] == first.token_ids
    assert leaf.token_ids.count(placeholder) == 9
    assert sum(leaf.loss_mask) == sum(len(ids) for _, ids in model.calls)
    expanded = model.expand(sent(model), PromptImages(urls=leaf.images))
    assert list(leaf.token_ids[: len(expanded)]) == expanded
    check_parents(session.trajectories(), session.info().sampled_tokens)


def test_another_image_at_the_same_place_is_another_conversation(seeing: Any) -> None:
    sessions, _, _ = seeing
    session = sessions.create()
    answer = chat(session, [shows("What?", RED)], sampling={"max_new_tokens": 8}).choices[0].message
    for image in (BLUE, RED):
        chat(session, [shows("What?", image), answer, user("Sure?")], sampling={"max_new_tokens": 8})
    assert [leaf.images for leaf in session.trajectories()] == [(BLUE,), (RED,)]
    chat(session, [shows(RED, "What?"), answer, user("Sure?")], sampling={"max_new_tokens": 8})  # elsewhere in the text
    assert len(session.trajectories()) == 3


def test_an_answer_without_a_limit_leaves_room_for_the_images(seeing: Any) -> None:
    sessions, model, _ = seeing
    sessions.model.pool.context_length = 200
    model.expand = expand(seeing[2], {RED: 90, BLUE: 190})
    session = sessions.create()
    turn = chat(session, [shows("What?", RED)])
    assert turn.prompt_tokens > 90
    assert len(model.calls) == 2  # the first one asked how many tokens the image takes
    talk = [shows("What?", RED), turn.choices[0].message, user("Sure?")]
    chat(session, talk)
    assert len(model.calls) == 3  # now they are known
    with pytest.raises(ContextLengthError, match="the conversation has 2[0-9][0-9] tokens"):
        chat(session, [shows("What?", BLUE)])
    assert len(session.trajectories()) == 1


def test_a_beginning_that_the_server_tokenized_otherwise_begins_a_trajectory(seeing: Any) -> None:
    sessions, model, _ = seeing
    session = sessions.create()
    talk: list[Any] = [shows("What?", RED)]
    talk += [chat(session, talk, sampling={"max_new_tokens": 8}).choices[0].message, user("Sure?")]
    whole = model.expand

    def drifting(ids: list[int], images: PromptImages) -> list[int]:
        return [5, *whole(ids, images)]

    model.expand = drifting
    chat(session, talk, sampling={"max_new_tokens": 8})
    first, second = session.trajectories()
    assert second.token_ids[0] == 5
    assert first.token_ids == second.token_ids[1 : 1 + len(first.token_ids)]
    assert second.shared_tokens == 0
    assert second.loss_mask.count(1) == len(model.calls[-1][1]), "what was tokenized anew was not sampled"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (shows("What?", "data:image/png;base64,AAAA"), "no image|wrong content"),
        (shows("What?", "data:image/png,raw"), "no data URL with base64"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}, "reads no files"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}, "reads no files"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "an image without a URL"),
        ({**shows(RED), "role": "system"}, "an image in a message of the role 'system'"),
        ({**shows(RED), "role": "assistant"}, "an image in a message of the role 'assistant'"),
        (shows("Is <image> it?", RED), "1 images, but 2 places"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA"}}]}, "text and images"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(seeing: Any, message: Any, error: str) -> None:
    sessions, model, _ = seeing
    session = sessions.create()
    with pytest.raises(ConfigError, match=error):
        chat(session, [message])
    assert not model.calls
    assert not session.trajectories()
    chat(session, [user("dog")])  # the session stays usable


def test_a_model_of_text_alone_refuses_images(seeing: Any) -> None:
    sessions, model, _ = seeing
    model.expand = None
    with pytest.raises(ConfigError, match="takes text alone"):
        chat(sessions.create(), [shows(RED)])


@pytest.mark.parametrize("template", [PRINTS, SEES.replace("<image>", "")])
def test_a_template_without_a_place_for_images_refuses_them(sees: Any, template: str) -> None:
    sessions, model = scripted(sees, lambda _: says(sees, "x", None), chat_template=template)
    model.expand = expand(0, {})
    with pytest.raises(ConfigError, match="no place for images"):
        chat(sessions.create(), [shows("What?", RED)])


def test_what_a_server_says_of_a_bad_image_is_the_clients_error(seeing: Any) -> None:
    sessions, model, _ = seeing

    def refuse(ids: list[int]) -> Any:
        raise RequestRejectedError("400", server="http://host", status=400, detail="cannot fetch http://host/a.png")

    answer, model.answer = model.answer, refuse
    session = sessions.create()
    with pytest.raises(ConfigError, match="refused the prompt with its images: cannot fetch"):
        chat(session, [shows("http://host/a.png")], sampling={"max_new_tokens": 8})
    with pytest.raises(RequestRejectedError):
        chat(session, [user("dog")])
    model.answer = answer
    chat(session, [user("dog")])


def test_a_tools_result_may_be_an_image(seeing: Any) -> None:
    sessions, model, placeholder = seeing
    session = sessions.create()
    calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    talk = [
        user("Look."),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": shows("Seen: ", RED)["content"]},
    ]
    chat(session, talk, sampling={"max_new_tokens": 8})
    assert sent(model).count(placeholder) == 1
    assert session.trajectories()[0].images == (RED,)


# ------------------------------------------------------------------ what servers report

ONE = PromptImages(urls=(RED,), placeholder=9)


def test_a_model_that_puts_images_in_later_is_known_by_the_number_of_tokens() -> None:
    assert ONE.seen_by_server([5, 9, 6], [5, 9, 6], 6, server="s") == [5, 9, 9, 9, 9, 6]
    # an answer that is continued: its tokens follow the prompt
    assert ONE.seen_by_server([5, 9, 6, 7], [5, 9, 6, 7], 7, server="s") == [5, 9, 9, 9, 9, 6, 7]
    later = PromptImages(urls=(RED, BLUE), num_known_sent=4, known_ids=(5, 9, 9, 9, 6, 7), placeholder=9)
    sent_ids = [5, 9, 6, 7, 8, 9]
    assert later.seen_by_server(sent_ids, sent_ids, 9, server="s") == [5, 9, 9, 9, 6, 7, 8, 9, 9]
    text_follows = replace(later, urls=(RED,))
    assert text_follows.seen_by_server([5, 9, 6, 7, 8], [5, 9, 6, 7, 8], 7, server="s") == [5, 9, 9, 9, 6, 7, 8]


@pytest.mark.parametrize(
    ("sent_ids", "reported", "count", "message"),
    [
        ([5, 9, 9], [5, 9, 9], 9, "send one new image per request"),
        ([5, 9], None, 4, "newer SGLang"),
        ([5, 9], [5, "x"], 2, "newer SGLang"),
        ([5, 9], [5, 9, 9], 2, "which tokens it saw is not known"),
        ([5, 9], [4, 9], 5, "which tokens it saw is not known"),
    ],
)
def test_a_prompt_that_can_not_be_known_is_refused(sent_ids: Any, reported: Any, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ONE.seen_by_server(sent_ids, reported, count, server="s")


# As SmolVLM's: it goes through the parts of every content, and a text has none.
PARTS_ALONE = """\
<|im_start|>{% for m in messages %}{{ m.role | capitalize }}\
{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}\
{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def test_a_template_that_reads_parts_alone_gets_texts_as_parts(sees: Any) -> None:
    sessions, model = scripted(sees, lambda _: says(sees, " A dog.", "<|im_end|>"), chat_template=PARTS_ALONE)
    model.expand = expand(sees.convert_tokens_to_ids("<image>"), {RED: 4})
    session = sessions.create()
    talk: list[Any] = [{"role": "system", "content": "Be brief."}, shows(RED, "What is it?")]
    for question in ("Sure?", "Really?"):
        answer = chat(session, talk, sampling={"max_new_tokens": 8}).choices[0].message
        talk += [answer, user(question)]
    chat(session, talk, sampling={"max_new_tokens": 8})
    text = sees.decode(sent(model))
    for said in ("Be brief.", "What is it?", "Sure?", "Really?"):
        assert said in text
    assert text.count("A dog.") == 2
    (leaf,) = session.trajectories()
    assert sum(leaf.loss_mask) == sum(len(ids) for _, ids in model.calls)


def test_requests_with_images_are_told_apart(seeing: Any) -> None:
    sessions, _, _ = seeing
    session = sessions.create()
    ask = ChatRequest(messages=(shows("What?", RED),), sampling={"max_new_tokens": 8})
    first = run(session.chat(ask))
    assert run(session.chat(replace(ask, attempt=1))).id == first.id
    other = replace(ask, messages=(shows("What?", BLUE),), attempt=1)
    assert not run(session.chat(other)).is_repeated
