"""Conversations as text, rendered by the chat template of a model's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.message_forms import REFUSALS, as_parts, drops_texts, message_forms
from torchrl_sglang.text_tokens import encode_untemplated, mark_ids

__all__ = ["ChatRenderer", "check_template_kwargs"]

Message = Mapping[str, Any]

_MARK = "7f3b-the-answer"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SET_HERE = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)


def check_template_kwargs(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a chat template, such as ``enable_thinking``, ``tools`` and ``documents``.

    Raises:
        ConfigError: not a mapping, or a name that decides how the template is applied.

    Examples:
        >>> check_template_kwargs({"enable_thinking": False})
        {'enable_thinking': False}
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ConfigError(f"template_kwargs must map names to values, got {variables!r:.100}")
    for name in variables:
        if name in _SET_HERE:
            raise ConfigError(
                f"template_kwargs[{name!r}]: this is set by the caller of the template; template_kwargs are the "
                "template's own variables, such as enable_thinking, tools or documents"
            )
    return dict(variables)


class ChatRenderer:
    """Renders conversations as ``tokenizer.apply_chat_template`` does.

    A template that reads parts of contents alone, and drops texts, gets every text as a part.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: a Jinja template, or the name of one of the tokenizer's; ``None`` is the tokenizer's own.
        variables: variables of the template, e.g. ``{"enable_thinking": False, "tools": [...]}``.

    Raises:
        ConfigError: there is no chat template, or a variable's name is taken.
    """

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._variables = check_template_kwargs(variables)
        self._options = {} if chat_template is None else {"chat_template": chat_template}
        # mistral-common's tokenizers render without a template
        own = getattr(tokenizer, "chat_template", None) if hasattr(tokenizer, "chat_template") else tokenizer
        if (chat_template is None and not own) or not hasattr(tokenizer, "apply_chat_template"):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ConfigError(
                f"the tokenizer {name!r} has no chat template, so it can't turn a conversation into a prompt: pass "
                "chat_template= (a Jinja template), set tokenizer.chat_template, or give text or token ids instead"
            )
        self._drops_texts = (chat_template is not None or own is not tokenizer) and drops_texts(self._apply)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text, with all special tokens in it.

        A template that refuses the messages as they are (ids of tool calls are missing, or a content is ``None``) gets
        them completed.

        Raises:
            ConfigError: the template refuses the conversation.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)[1]

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[list[dict[str, Any]], str]:
        """The messages in the form that the template accepts, and the text."""
        refusal: Exception | None = None
        for form in message_forms(messages):
            try:
                text = self._apply(as_parts(form) if self._drops_texts else form, add_generation_prompt)
            except REFUSALS as error:
                refusal = refusal or error
            else:
                return form, text
        raise ConfigError(f"the chat template refuses the conversation: {refusal}") from refusal

    def _apply(self, form: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        options = {**self._options, **self._variables}
        text = self.tokenizer.apply_chat_template(
            form, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return encode_untemplated(self.tokenizer, text)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Token ids that ``text`` has behind ``before``; a tokenizer may mark the start of a text of its own."""
        if not text:
            return []
        for context in filter(None, (before, "a", "0", ".", "\n")):
            known, joined = self.encode(context), self.encode(context + text)
            if joined[: len(known)] == known:
                return joined[len(known) :]
        return self.encode(text)

    def turn_end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: EOS, and the added token that the template writes right behind an answer."""
        eos_id = self.tokenizer.eos_token_id
        ends = [] if eos_id is None else [eos_id]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            closing = self.render(messages, add_generation_prompt=False).rpartition(_MARK)[2]
        except ConfigError:
            return frozenset(ends)
        ids = self.encode_after(_MARK, closing)[:1]
        known = mark_ids(self.tokenizer)
        return frozenset(map(int, [*ends, *(i for i in ids if i in known)]))

    # ------------------------------------------------------------------ what the assistant wrote

    def assistant_mask(self, messages: Sequence[Message], text: str) -> list[bool] | None:
        """Which tokens of a rendered conversation the assistant wrote.

        These are the tokens between the template's ``generation`` tags. A template without them is rendered again with
        another answer in place of each of the assistant's: what differs is what it wrote, without the tokens with
        which the template begins and ends a message.

        Args:
            messages: the conversation.
            text: :meth:`render` of it, without a generation prompt.

        Returns:
            One entry per token of ``encode(text)``; ``None`` if the answers can't be found in the text.
        """
        spans = self._tagged_spans(messages, text)
        if spans is None:
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            found = [self._answer_span(messages, index, text) for index in answers]
            spans = [span for span in found if span is not None]
            if len(spans) < len(found):
                return None
        return self._tokens_in(text, spans)

    def _tagged_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        try:
            template = self.tokenizer.get_chat_template(
                self._options.get("chat_template"), self._variables.get("tools")
            )
        except (AttributeError, ValueError):
            return None
        if not _GENERATION_TAG.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

        for form in message_forms(messages):
            try:
                rendered, spans = render_jinja_template(
                    conversations=[as_parts(form) if self._drops_texts else form],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=False,
                    **{**self.tokenizer.special_tokens_map, **self._variables},
                )
            except REFUSALS:
                continue
            return list(spans[0]) if rendered[0] == text else None
        return None

    def _answer_span(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int] | None:
        """Where the answer is in the text: what changes when another answer is in its place."""
        message = messages[index]
        plain = {key: value for key, value in message.items() if key in ("role", "name")}
        others: list[Message] = [{**plain, "content": _MARK}]
        if message.get("tool_calls"):  # the template may refuse a tool's result without a call before it
            others.append({**message, "content": _MARK})
        for other in others:
            try:
                marked = self.render([*messages[:index], other, *messages[index + 1 :]], add_generation_prompt=False)
            except ConfigError:
                continue
            before, mark, after = marked.rpartition(_MARK)
            if not mark or not text.endswith(after):
                continue
            starts = [before] if text.startswith(before) else self._prompt_before(messages, index, text)
            for start in starts:
                if len(start) + len(after) <= len(text):
                    return len(start), len(text) - len(after)
        return None

    def _prompt_before(self, messages: Sequence[Message], index: int, text: str) -> list[str]:
        """The prompt that the answer was given to, where the text begins with it."""
        try:
            prompt = self.render(messages[:index], add_generation_prompt=True)
        except ConfigError:
            return []
        return [prompt] if text.startswith(prompt) else []

    def _tokens_in(self, text: str, spans: Sequence[tuple[int, int]]) -> list[bool] | None:
        """Which tokens of the text have a character in one of the spans."""
        spans = [(start, end) for start, end in spans if start < end]
        if getattr(self.tokenizer, "is_fast", False):
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return [any(a < end and max(b, a + 1) > start for start, end in spans) for a, b in offsets]
        ids_T = self.encode(text)
        mask_T = [False] * len(ids_T)
        for start, end in spans:
            head, whole = self.encode(text[:start]), self.encode(text[:end])
            if ids_T[: len(head)] != head or ids_T[: len(whole)] != whole:
                return None  # a token reaches over the edge of the answer, and there are no offsets to see it
            mask_T[len(head) : len(whole)] = [True] * (len(whole) - len(head))
        return mask_T

    # ------------------------------------------------------------------ what is between the answers

    def segments(self, messages: Sequence[Message]) -> list[str] | None:
        """What the template writes before the first answer, after each, and before the next or the generation prompt.

        Each segment is rendered from the conversation as it was when the next answer was generated.

        Returns:
            One text more than there are answers of the assistant; ``None`` if the template hides an answer.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ends = [*answers, len(messages)]
        found = []
        try:
            form, _ = self._render(messages, add_generation_prompt=True)
            found.append(self.render(form[: ends[0]], add_generation_prompt=True))
            for last, end in zip(answers, ends[1:], strict=True):
                segment = self.after_answer(form[:end], last)
                if segment is None:
                    return None
                found.append(segment)
        except ConfigError:
            return None
        return found

    def after_answer(self, until: Sequence[Message], last: int) -> str | None:
        """What the template writes behind an answer, up to the next one's generation prompt.

        Args:
            until: the conversation up to the next answer, in a form that the template takes.
            last: index of the answer.

        Returns:
            The text; ``None`` if the template hides the answer.

        Raises:
            ConfigError: the template refuses the conversation.
        """
        marked = [*until[:last], {"role": "assistant", "content": _MARK}, *until[last + 1 :]]
        try:
            _, mark, after = self.render(marked, add_generation_prompt=True).rpartition(_MARK)
            if mark:
                return after
        except ConfigError:  # some take a tool's result behind a call only
            pass
        prompt = self.render(until[:last], add_generation_prompt=True)
        text = self.render(until, add_generation_prompt=True)
        ends = [self.tokenizer.decode([token]) for token in self.turn_end_ids()]
        starts = [at for end in ends if (at := text.find(end, len(prompt))) >= 0]
        return text[min(starts) :] if starts and text.startswith(prompt) else None
