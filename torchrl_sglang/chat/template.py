"""``ChatTemplate``: a model's chat template, which turns conversations into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.chat.messages import Conversation
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.message_forms import REFUSALS, as_parts, drops_texts, message_forms
from torchrl_sglang.text_tokens import encode_untemplated, mark_ids

__all__ = ["ChatTemplate"]

_MARK = "7f3b-end-of-content"


class ChatTemplate:
    """The processor's chat template if it has one, else the tokenizer's.

    A template that reads parts of contents alone, and drops texts, gets every text as a part.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face processor of a multimodal model.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, processor: Any = None) -> None:
        self.tokenizer = tokenizer
        self._renderer = processor if getattr(processor, "chat_template", None) else tokenizer
        if not getattr(self._renderer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template: set tokenizer.chat_template, "
                "pass processor=, or generate from plain text with AsyncSGLang.generate"
            )
        self._drops_texts = drops_texts(
            lambda messages: self._renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def encode(
        self,
        conversation: Conversation,
        tools: Sequence[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's answer.

        If the last message is the assistant's, the ids end with it, so that the model continues it. Each medium is one
        placeholder of the template.

        Args:
            conversation: the messages.
            tools: JSON schemas or Python functions.
            extra: variables of the template, e.g. ``{"enable_thinking": False}``.

        Raises:
            ConfigError: the template refuses the conversation, or has no placeholder for its media.
        """
        text = self._render(conversation.messages, tools, extra)
        # The template of a text-only model drops the parts, or prints the list of parts.
        printed = any(str(m["content"]) in text for m in conversation.messages if isinstance(m["content"], list))
        for kind in ("image", "video", "audio"):
            given = getattr(conversation.media, f"{kind}s")
            if given and (printed or text == self._render(conversation.without(kind), tools, extra)):
                raise ConfigError(
                    f"the chat template has no place for {kind}s: is it the template of a model that takes them? "
                    "(pass processor= if the model's template is in its processor)"
                )
        # The rendered text has all special tokens; a second BOS would make a different prompt.
        return encode_untemplated(self.tokenizer, text)

    def _render(
        self, messages: Sequence[Any], tools: Any, extra: Mapping[str, Any] | None, continue_chat: bool = True
    ) -> str:
        continues = continue_chat and messages[-1]["role"] == "assistant"
        refusal: Exception | None = None
        for form in message_forms(messages):
            try:
                text: str = self._renderer.apply_chat_template(
                    as_parts(form) if self._drops_texts else form,
                    tools=tools or None,
                    tokenize=False,
                    add_generation_prompt=continue_chat and not continues,
                    continue_final_message=continues,
                    **(extra or {}),
                )
            except REFUSALS as error:
                refusal = refusal or error
            else:
                return text
        raise ConfigError(f"the chat template refuses the conversation: {refusal}") from refusal

    def turn_end_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn: EOS, and the added token after an assistant's message in the template."""
        found = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            _, mark, tail = self._render(messages, None, None, continue_chat=False).partition(_MARK)
        except ConfigError:
            return tuple(found)
        ids = list(self.tokenizer(tail, add_special_tokens=False)["input_ids"]) if mark else []
        if ids and ids[0] in mark_ids(self.tokenizer) and ids[0] not in found:
            found.append(int(ids[0]))
        return tuple(found)
