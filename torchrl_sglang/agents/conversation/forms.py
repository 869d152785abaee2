"""Forms of a conversation for chat templates that refuse, or leave out, some of its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.errors import ConfigError

__all__ = ["Form", "join_contents", "render_form", "with_first_system", "without_system"]

Content = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Messages as a template takes them.

    Attributes:
        messages: the messages.
        places: per message of the conversation, its index in ``messages``.
    """

    messages: list[dict[str, Any]]
    places: list[int]


def render_form(form: Form, renderer: ChatRenderer) -> tuple[Form, str]:
    """The form that the template takes, and its text with a generation prompt.

    The messages as they are, if the template renders them with all system messages. Otherwise the system messages at
    the beginning are one, and later ones are put at the front of the next user's message; then users' messages that
    follow each other are joined; then users and the assistant alternate. A prompt's text before an answer is the same
    in every form of a longer conversation.

    Raises:
        ConfigError: the template refuses the conversation in every form.
    """
    refusal: ConfigError | None = None
    incomplete: tuple[Form, str] | None = None
    for each in _forms(form):
        try:
            text = renderer.render(each.messages, add_generation_prompt=True)
        except ConfigError as error:
            refusal = refusal or error
            continue
        if _has_all(text, form.messages):
            return each, text
        incomplete = incomplete or (each, text)
    if incomplete is None:
        assert refusal is not None
        raise refusal
    return incomplete


def _forms(form: Form) -> Iterator[Form]:
    yield form
    made = [form]
    for each in _other_forms(form):
        if each not in made:
            made.append(each)
            yield each


def _other_forms(form: Form) -> Iterator[Form]:
    changes = (with_first_system, without_system)
    for change in changes:
        changed = change(form)
        yield changed
        yield _with_joined_users(changed)
    for change in changes:
        yield _alternating(change(form))


def _has_all(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text has what the system messages say: some templates leave out those that they don't expect."""
    said = [message["content"].strip() for message in messages if message["role"] == "system"]
    return all(one in text for one in said) or all(_plain(one) in _plain(text) for one in said)


def _plain(text: str) -> str:
    """A text without what templates change of it: white space and capitals."""
    return "".join(text.split()).lower()


def with_first_system(form: Form) -> Form:
    """The system messages at the beginning as one, all later ones put into users' messages."""
    count = 0
    while count < len(form.messages) and form.messages[count]["role"] == "system":
        count += 1
    if not count:
        return without_system(form)
    first = {"role": "system", "content": "\n\n".join(each["content"] for each in form.messages[:count])}
    rest = without_system(
        Form(messages=form.messages[count:], places=[place - count for place in form.places if place >= count])
    )
    heads = [0] * sum(place < count for place in form.places)
    return Form(messages=[first, *rest.messages], places=[*heads, *(place + 1 for place in rest.places)])


def without_system(form: Form) -> Form:
    r"""System messages put at the front of the user's message that follows, or in a user's message of their own.

    Examples:
        >>> talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        >>> without_system(Form(messages=talk, places=[0, 1]))
        Form(messages=[{'role': 'user', 'content': 'Be brief.\n\nHi'}], places=[0, 0])
    """
    messages = form.messages
    made: list[dict[str, Any]] = []
    moved: list[int] = []
    waiting = ""
    for index, message in enumerate(messages):
        moved.append(len(made))
        if message["role"] == "system":
            waiting += f"{message['content']}\n\n"
            if index + 1 < len(messages) and messages[index + 1]["role"] in ("user", "system"):
                continue
            message = {"role": "user", "content": ""}
        if waiting:
            content = join_contents(waiting, message["content"])
            content = content.rstrip("\n") if isinstance(content, str) else content
            message, waiting = {**message, "content": content}, ""
        made.append(message)
    return Form(messages=made, places=[moved[place] for place in form.places])


def _with_joined_users(form: Form) -> Form:
    """Users' messages that follow each other as one, for templates in which roles alternate."""
    made: list[dict[str, Any]] = []
    moved: list[int] = []
    for message in form.messages:
        if made and message["role"] == made[-1]["role"] == "user":
            made[-1] = {**made[-1], "content": join_contents(made[-1]["content"], "\n\n", message["content"])}
        else:
            made.append(message)
        moved.append(len(made) - 1)
    return Form(messages=made, places=[moved[place] for place in form.places])


def _alternating(form: Form) -> Form:
    """Users' messages and answers in turns, for templates that refuse anything else, such as Mistral's and Gemma's.

    Messages of one role that follow each other are joined. An empty message of the user stands before an answer at the
    beginning. An empty answer stands between a tool's result, or calls without results, and a user's message: Mistral's
    models know no other place for it.
    """
    made: list[dict[str, Any]] = []
    moved: list[int] = []
    for message in form.messages:
        role, last = message["role"], made[-1] if made else {"role": "system"}
        plain = not message.get("tool_calls") and not last.get("tool_calls")
        if role == last["role"] and role in ("user", "assistant") and plain:
            made[-1] = {**last, "content": join_contents(last["content"], "\n\n", message["content"])}
        else:
            if role == "assistant" and last["role"] == "system":
                made.append({"role": "user", "content": ""})
            if role == "user" and (last["role"] == "tool" or last.get("tool_calls")):
                made.append({"role": "assistant", "content": ""})
            made.append(message)
        moved.append(len(made) - 1)
    return Form(messages=made, places=[moved[place] for place in form.places])


def join_contents(*contents: Content) -> Content:
    """Contents one behind the other, as text if all are text."""
    if all(isinstance(content, str) for content in contents):
        return "".join(map(str, contents))
    parts: list[dict[str, Any]] = []
    for content in contents:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if parts and part["type"] == parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
    return parts
