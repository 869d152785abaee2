"""A model's chat template: conversations to token ids, and the tokens that end a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from torchrl_sglang.chat.messages import Conversation
from torchrl_sglang.errors import ConfigError

__all__ = ["ChatTemplate"]

_MARK = "7f3b-here-ends-what-was-said"


class ChatTemplate:
    """Renders with the processor's template where there is a processor, else with the tokenizer's.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face processor of a model that sees or hears.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, processor: Any = None) -> None:
        self.tokenizer = tokenizer
        self._renderer = processor if getattr(processor, "chat_template", None) else tokenizer
        if not getattr(self._renderer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template, so it is no chat model: set tokenizer.chat_template, "
                "pass processor=, or generate from plain text with AsyncSGLang.generate"
            )

    def encode(
        self,
        conversation: Conversation,
        tools: Sequence[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant goes on.

        An assistant's message at the end is continued. Media stand as the template's placeholders, one each.

        Args:
            conversation: what was said.
            tools: JSON schemas or Python functions.
            extra: variables of the template, e.g. ``{"enable_thinking": False}``.

        Raises:
            ConfigError: the template refuses the conversation, or knows nothing of its media.
        """
        text = self._render(conversation.messages, tools, extra)
        # A template of a text-only model leaves the parts out, or prints the list itself.
        printed = any(str(m["content"]) in text for m in conversation.messages if isinstance(m["content"], list))
        for kind in ("image", "video", "audio"):
            given = getattr(conversation.media, f"{kind}s")
            if given and (printed or text == self._render(conversation.without(kind), tools, extra)):
                raise ConfigError(
                    f"the chat template has no place for {kind}s: is it the template of a model that takes them? "
                    "(pass processor= if the model's template is in its processor)"
                )
        # The template has put every special token into the text; adding BOS once more would be a different prompt.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(
        self, messages: Sequence[Any], tools: Any, extra: Mapping[str, Any] | None, open_end: bool = True
    ) -> str:
        continues = open_end and messages[-1]["role"] == "assistant"
        try:
            text: str = self._renderer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=open_end and not continues,
                continue_final_message=continues,
                **(extra or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"the chat template refuses the conversation: {error}") from error
        return text

    def turn_end_ids(self) -> tuple[int, ...]:
        """The special token that the template writes after an assistant's words, if it writes one; with EOS."""
        found = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            _, mark, tail = self._render(messages, None, None, open_end=False).partition(_MARK)
        except ConfigError:
            return tuple(found)
        ids = list(self.tokenizer(tail, add_special_tokens=False)["input_ids"]) if mark else []
        if ids and self._is_special(ids[0]) and ids[0] not in found:
            found.append(int(ids[0]))
        return tuple(found)

    def _is_special(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return token in self.tokenizer.all_special_ids or getattr(added, "special", False)
