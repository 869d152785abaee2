"""The prompt of a request: the tokens that are kept, and the text that is rendered and tokenized behind them.

The rendered conversation decides. The sampled tokens of an answer are kept if everything that the template writes
before it is what it wrote when the answer was generated, and if it writes the same answer: the same thinking, content
and calls, however they are spelled. From the first answer on that the template writes otherwise, for example without
its thinking, the rendered text is tokenized, as it is for a conversation in which nothing was generated.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchrl_sglang.agents.conversation.forms import Form, render_form
from torchrl_sglang.agents.conversation.messages import Call, split_thinking
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.conversation.tree import Match, Node
from torchrl_sglang.chat.quoted_text import open_thinking
from torchrl_sglang.chat.tool_calls import read_tool_calls
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.errors import ConfigError

__all__ = ["OnRewrite", "Prompt", "build_prompt"]

OnRewrite = Literal["branch", "keep"]
"""What becomes of an answer that the template writes otherwise later on: ``branch`` renders the conversation from there
on, so that prompts are what the template makes of them; ``keep`` continues the sampled tokens."""

_TAIL = 32  # last characters of an answer, which a tokenizer may join with what follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt.

    Attributes:
        base: the answer whose tokens it continues; ``None`` if all of it is rendered.
        ids: tokens behind the base's; an image is one placeholder.
        text: their text, as rendered.
        images: URLs of the images in them.
    """

    base: Node | None
    ids: array[int]
    text: str
    images: tuple[str, ...] = ()

    def token_ids(self) -> array[int]:
        """All tokens of the prompt as they are sent: an image is one placeholder."""
        ids = array("q") if self.base is None else self.base.token_ids_to_send()
        ids.extend(self.ids)
        return ids

    def all_images(self) -> tuple[str, ...]:
        """URLs of all images of the prompt."""
        return (*_images_of(self.base), *self.images)


def build_prompt(
    match: Match,
    template: AgentTemplate,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    on_rewrite: OnRewrite = "branch",
) -> Prompt:
    """The prompt for the next answer of a conversation.

    Args:
        match: the conversation, and what the session knows of it.
        template: the chat template.
        tools: the tools that the model may call.
        variables: variables of the template.
        on_rewrite: what becomes of answers that the template writes otherwise than they were generated.

    Raises:
        ConfigError: the template refuses the conversation.
    """
    renderer = template.renderer(tools, variables or {})
    if match.node is not None or template.tells_time or any(message.calls for message in match.messages):
        return _build(match, template, renderer, tools, on_rewrite)
    # The agents of a group begin with one conversation.
    key = (renderer, match.messages)
    known: Prompt | None = template.prompts.get(key)
    if known is None:
        known = _build(match, template, renderer, tools, on_rewrite)
        template.prompts.put(key, known, size=len(known.text) + sum(map(len, known.images)))
    return known


def _build(
    match: Match,
    template: AgentTemplate,
    renderer: ChatRenderer,
    tools: Sequence[Mapping[str, Any]],
    on_rewrite: OnRewrite,
) -> Prompt:
    form, text = render_form(template.form(match.messages, tools), renderer)
    images = tuple(image.url for message in match.messages for image in message.images)
    if images:
        _require_place(text, form, renderer)
    found: tuple[Node, str] | None = None
    if match.node is not None:
        walk = _Walk(text, form, renderer, template, tools)
        found = walk.last_kept(match.node.chain())
        if on_rewrite == "keep" and (found is None or found[0] is not match.node):
            behind = _after(renderer, form, match.node)
            found = found if behind is None else (match.node, behind)
    if found is None:
        return Prompt(base=None, ids=template.segments.encode(text), text=text, images=images)
    base, behind = found
    before = _images_of(base)
    if images[: len(before)] != before:  # the template hides earlier images
        return Prompt(base=None, ids=template.segments.encode(text), text=text, images=images)
    ids = _encode_behind(base, behind, renderer, template)
    return Prompt(base=base, ids=array("q", ids), text=behind, images=images[len(before) :])


def _images_of(node: Node | None) -> tuple[str, ...]:
    return () if node is None else tuple(url for one in node.chain() for url in one.images)


def _require_place(text: str, form: Form, renderer: ChatRenderer) -> None:
    """Require that the template writes a placeholder for images, neither nothing nor the list of parts.

    Raises:
        ConfigError: it does not.
    """
    listed = [message["content"] for message in form.messages if isinstance(message["content"], list)]
    blind = [
        {**message, "content": "".join(part.get("text", "") for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in form.messages
    ]
    try:
        same = renderer.render(blind, add_generation_prompt=True) == text
    except ConfigError:  # a template that takes lists of parts alone
        same = False
    if same or any(str(content) in text for content in listed):
        raise ConfigError("this model's chat template has no place for images: send text alone")


class _Walk:
    """Follows the rendered conversation from answer to answer."""

    def __init__(
        self,
        text: str,
        form: Form,
        renderer: ChatRenderer,
        template: AgentTemplate,
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self.text, self.form, self.renderer, self.template, self.tools = text, form, renderer, template, tools

    def last_kept(self, chain: Sequence[Node]) -> tuple[Node, str] | None:
        """The last answer whose tokens can be kept, and the text behind it."""
        kept: tuple[Node, int] | None = None
        cursor = 0
        for node, following in zip(chain, [*chain[1:], None], strict=True):
            if not self.text.startswith(node.prompt_text, cursor):
                break
            cursor += len(node.prompt_text)
            end = None if following is None else self._end_before(node, cursor, following.prompt_text)
            if end is None:  # the last one, or the template has written something else behind it
                end = self._end_of_last(node, cursor)
                kept = kept if end is None else (node, end)
                break
            kept, cursor = (node, end), end
        return None if kept is None else (kept[0], self.text[kept[1] :])

    def _end_before(self, node: Node, cursor: int, segment: str) -> int | None:
        """Where the answer ends, behind which a known segment follows."""
        end = self._exact_end(node, cursor)
        if end is not None:
            while not self.text.startswith(segment, end) and self.text[end : end + 1].isspace():
                end += 1
            if self.text.startswith(segment, end):
                return end
        at = self.text.find(segment, cursor) if segment else -1
        while at >= 0:
            if self._is_written(node, self.text[cursor:at]):
                return at
            at = self.text.find(segment, at + 1)
        return None

    def _end_of_last(self, node: Node, cursor: int) -> int | None:
        """Where the answer ends, behind which the text is new."""
        end = self._exact_end(node, cursor)
        if end is not None and self.text[end:].lstrip().startswith(self.template.end_texts):
            return end
        behind = _after(self.renderer, self.form, node)
        if not behind or not self.text.endswith(behind) or len(self.text) - len(behind) < cursor:
            return None
        end = len(self.text) - len(behind)
        return end if self._is_written(node, self.text[cursor:end]) else None

    def _exact_end(self, node: Node, cursor: int) -> int | None:
        """Where the answer ends if the text has it as it was generated, but for white space around it."""
        if self.text.startswith(node.text, cursor):
            return cursor + len(node.text)
        answer = node.text.strip()
        while not self.text.startswith(answer, cursor) and self.text[cursor : cursor + 1].isspace():
            cursor += 1
        return cursor + len(answer) if self.text.startswith(answer, cursor) else None

    def _is_written(self, node: Node, rendered: str) -> bool:
        """Whether a passage of the text is the answer, however it is spelled."""
        if rendered.strip() == node.text.strip() or self._tokens_are_same(node.text, rendered):
            return True
        answer = node.answer
        opened = open_thinking(node.prompt_text)
        thinking, rest, _ = split_thinking(self.template.without_marks(rendered), opened=opened)
        if thinking != (answer.reasoning or "").strip():
            return False
        if not answer.calls:
            return rest.strip() == answer.content.strip()
        found = read_tool_calls(split_thinking(rendered, opened=opened)[1], self.tools)
        if found.calls:
            same_calls = [Call.of(call).key for call in found.calls] == [call.key for call in answer.calls]
            return same_calls and self._said(found.content) == answer.content.strip()
        # a family's own format: the server reads it, and it can't be read here
        at = rest.find(answer.content.strip())
        for call in answer.calls:
            at = rest.find(call.name, at) if at >= 0 else -1
        return at >= 0

    def _said(self, content: str) -> str:
        return self.template.without_marks(content).strip()

    def _tokens_are_same(self, generated: str, rendered: str) -> bool:
        """Whether two texts are the same to a tokenizer that changes text (lower-cases it, for example)."""
        if len(generated.strip()) != len(rendered.strip()):
            return False
        encode, decode = self.renderer.encode, self.template.decode
        return decode(encode(generated.strip())).strip() == decode(encode(rendered.strip())).strip()


def _after(renderer: ChatRenderer, form: Form, node: Node) -> str | None:
    """What the template writes behind an answer; ``None`` if it hides the answer, or has joined the next one to it."""
    place = form.places[node.position]
    if place in form.places[node.position + 1 :]:
        return None
    try:
        return renderer.after_answer(form.messages, place)
    except ConfigError:
        return None


def _encode_behind(base: Node, behind: str, renderer: ChatRenderer, template: AgentTemplate) -> list[int]:
    """Tokens of the text behind an answer; what ended the answer is not written again."""
    last = base.output_ids[-1] if base.output_ids else None
    said = base.text.rstrip()
    if last in template.special and not (said and said.endswith(template.decode([last]).strip() or "\0")):
        ids = renderer.encode_after(base.text.strip()[-_TAIL:], behind)
        end = next((index for index, token in enumerate(ids) if token in template.special), None)
        if end is not None and not template.decode(ids[:end]).strip():
            return ids[end + 1 :]
        return ids
    if base.beyond and behind.startswith(base.beyond):  # a stop string that is also the beginning of what follows
        return renderer.encode_after(base.beyond, behind[len(base.beyond) :])
    return renderer.encode_after(base.text.strip()[-_TAIL:], behind)
